"""What a run writes: log lines, checkpoints, sample grids, samples to score."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from torch import Tensor

from sampler import SampleRequest, decoder_record, decoding, sample_pixels, write_samples
from support.data.grids import labels_by_row, save_grid
from support.data.images import ImageBatch
from support.runs.averages import PowerFunction
from support.runs.logbook import duration, peak_memory_gb, write_record
from support.runs.metrics import Interval
from support.system.digests import weights_digest
from support.system.files import Stopped, UserError
from support.system.randomness import GivenLabels, PerImageStream
from support.system.signals import Signalled
from training.held_out import measure
from training.run import Run
from training.scoring import log_line

LONG_SECONDS = 10  # a first step longer than this is logged


def log_first_step(run: Run, seconds: float) -> None:
    """Log the duration of the first step if it compiled the network or took long."""
    is_compiled = run.learner.state.model.execution.fixed_shapes
    if is_compiled or seconds > LONG_SECONDS:
        compiling = ", compiling included" if is_compiled else ""
        run.logbook.line(f"first step: {seconds:.3g} s{compiling}")


def log_metrics(run: Run) -> None:
    """Log the means since the last line, and the schedules' values for the step just done."""
    config, state = run.config, run.learner.state
    means, seconds, steps = state.interval.close(run.processes)
    state.interval = Interval()
    finished, total = state.finished_steps, config.total_steps
    numbers = {
        "epoch": finished / run.order.steps_per_epoch,
        "images": finished * config.batch_size,
        **means,
        "Gap_Fraction": config.gap_fraction_at(finished - 1),
        "Learning_Rate": config.learning_rate_at(finished - 1),
        "Memory_GB": peak_memory_gb(run.processes.device),
        "Seconds": seconds,
        "Images_Per_Second": steps * config.batch_size / seconds,
    }
    run.metrics.add(finished, numbers)
    metrics = ", ".join(f"{name}: {mean:.4f}" for name, mean in means.items())
    run.logbook.line(
        f"Step: {finished}/{total} ({100 * finished / total:.1f}%), {metrics}, "
        f"Gap_Fraction: {numbers['Gap_Fraction']:.4g}, "
        f"Learning_Rate: {numbers['Learning_Rate']:.4g}, "
        f"Memory: {numbers['Memory_GB']:.2f} GB, Seconds: {seconds:.1f}, "
        f"Images/s: {numbers['Images_Per_Second']:.1f}, "
        f"ETA: {duration(seconds / steps * (total - finished))}"
    )


def log_held_out(run: Run) -> None:
    """Log the held-out loss of the weights and of their EMA."""
    state = run.learner.state
    models = {"weights": state.model, "average": state.ema_model}
    errors = {name: measure(model, run.held_out, run.processes) for name, model in models.items()}
    run.metrics.add_held_out(state.finished_steps, errors)


def make_result(run: Run, path: Path) -> None:
    """Write the result that belongs at `path`: its folder says which kind."""
    make = {
        "ckpts": make_checkpoint,
        "averages": make_snapshot,
        "figs": make_demo,
        "evals": make_eval,
    }
    make[path.parent.name](run, path)


def make_checkpoint(run: Run, path: Path) -> None:
    """Start to write the training state, in the background."""
    run.listener.saved()
    learner = run.learner
    run.results.save(
        "ckpts",
        {
            **learner.state.state_dict(run.order.steps_per_epoch),
            **record_of_run(run),
            "parts": learner.plan.record(),
            "interval": learner.state.interval.state_dict(run.processes),
        },
    )


def make_snapshot(run: Run, path: Path) -> None:
    """Start to write the power-function averages, for posthoc_ema.py."""
    config, state = run.config, run.learner.state
    names = [PowerFunction(std).name for std in config.ema_power]
    run.results.save(
        "averages",
        {
            "averages": {name: state.averages[name].state_dict() for name in names},
            **record_of_run(run),
        },
    )


def record_of_run(run: Run) -> dict[str, Any]:
    """What checkpoints and snapshots record about their run."""
    state = run.learner.state
    return {
        "finished_steps": state.finished_steps,
        "data": run.data.record(),
        "config": run.config.to_dict(),
        **({"started_from": state.started_from} if state.started_from else {}),
    }


def make_demo(run: Run, path: Path) -> None:
    """Write a grid of samples of the EMA model, one class per row."""
    shape = run.config.eval_demo_shape
    request = sample_request(run, shape[0] * shape[1])
    if run.config.is_conditional:
        labels = labels_by_row(run.data.spec.num_classes, shape)
        request = request._replace(stream=GivenLabels(request.stream, labels))
    batches = list(make_images(run, request))
    if run.processes.is_main:
        save_grid(path, np.concatenate([batch.pixels for batch in batches]), shape[1])


def make_eval(run: Run, path: Path) -> None:
    """Write eval_num_samples images of the EMA model, with their labels and record."""
    config, state = run.config, run.learner.state
    request = sample_request(run, config.eval_num_samples)
    run.logbook.line(f"sampling {request.num_images} images to {path}")

    def save_record() -> None:
        record = run.results.record(
            path,
            num_images=request.num_images,
            NFE=request.num_steps,
            labels="uniform" if config.is_conditional else None,
            noise_stream="image",
            finished_steps=state.finished_steps,
            weights_sha256=weights_digest(state.ema_model.state_dict()),
            **decoder_record(config, run.data.record()),
        )
        write_record(path, record)

    batches = make_images(run, request)
    write_samples(path, batches, request.num_images, run.processes.is_main, save_record)
    if run.scorer:
        score_eval(run, path)
    if run.processes.is_main:
        run.results.delete_superseded("evals", state.finished_steps)


def score_eval(run: Run, path: Path) -> None:
    """Score an eval, for the log, metrics.jsonl and the records that report.py reads.

    A score that fails is only logged: evaluator.py can make it later, and training is worth more.
    """
    scorer, device = run.scorer, run.processes.device
    assert scorer is not None
    try:
        record = run.processes.on_rank0(lambda: scorer.score(path, device))
    except UserError as error:
        run.logbook.line(f"warning: {path} is not scored: {error}")
        return
    run.logbook.line(log_line(record))
    run.metrics.add(run.learner.state.finished_steps, record["scores"])


def make_images(run: Run, request: SampleRequest) -> Iterator[ImageBatch]:
    """Images of the EMA model, on rank 0; all processes must iterate."""
    model = run.learner.state.ema_model
    with decoding(run.config, run.data.record(), run.processes.device) as decode:

        def decode_unless_stopped(x_0: Tensor) -> Tensor:
            if run.listener.signalled(run.processes) is Signalled.STOP:
                save_and_stop(run)
            return decode(x_0)

        yield from sample_pixels(model, request, run.processes, decode_unless_stopped)


def sample_request(run: Run, num_images: int) -> SampleRequest:
    """How evals and demos are sampled."""
    config, spec = run.config, run.data.spec
    num_classes = spec.num_classes if config.is_conditional else None
    stream = PerImageStream(config.seed, num_classes, spec.shape)
    size, steps, method = config.eval_batch_size, config.eval_NFE, run.learner.state.model
    return SampleRequest(num_images, size, steps, stream, sampler=method.sampler)


def save_and_stop(run: Run) -> NoReturn:
    """End the run after a signal, with the step just finished on disk."""
    steps, jobs = run.learner.state.finished_steps, run.results.jobs
    path = run.results.path("ckpts", steps)
    jobs.wait()
    if not run.processes.broadcast_object(path.exists()):
        make_checkpoint(run, path)
        jobs.wait()
    run.logbook.line(
        f"stopped by a signal after step {steps}, saved in {path}; the same command continues"
    )
    raise Stopped
