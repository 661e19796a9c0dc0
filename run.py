"""A run in one process, and the results that it writes: checkpoints, demos, evals."""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import numpy as np
from torch import Tensor

from config import Config, is_due
from learner import Learner
from sampling import (
    Sampled,
    SampleRequest,
    decoder_record,
    decoding,
    labels_by_row,
    sample_pixels,
    save_grid,
    write_samples,
)
from support.data.batches import BatchPlan, DataOrder
from support.data.datasets import TrainingData
from support.runs.background import Background
from support.runs.checkpoint import (
    TrainState,
    checkpoint_path,
    host_copy,
    refuse_non_finite,
    save_checkpoint,
)
from support.runs.logbook import Logbook, record_of, weights_digest, write_record
from support.runs.signals import Asked, Listener
from support.system.files import Stopped, delete_superseded
from support.system.processes import Processes
from support.system.randomness import GivenLabels, PerImageStream


@dataclass
class Run:
    """One run in one process: what is asked for, what it works on, and where it stands."""

    config: Config
    processes: Processes
    data: TrainingData
    learner: Learner
    logbook: Logbook
    notes: list[str]  # what is to be said at the start
    jobs: Background | None = None  # what is written beside training, while the folder is claimed
    listener: Listener = field(default_factory=Listener)

    @property
    def state(self) -> TrainState:
        """What the run has learned."""
        return self.learner.state

    @property
    def plan(self) -> BatchPlan:
        """How the run's batch is cut."""
        return self.learner.plan

    @property
    def folder(self) -> Path:
        """The run's working_dir."""
        return Path(self.config.working_dir)

    def asked(self) -> Asked:
        """What signals ask of the run; all processes have to call this."""
        return self.listener.asked(self.processes)


def due_results(
    run: Run, asked: Asked = Asked.NOTHING
) -> list[tuple[Callable[[Run, Path], None], Path]]:
    """What is to be written after the step just finished, the checkpoint first, and where.

    A run that is asked to stop writes the checkpoint alone; what else is due it makes when it goes
    on.
    """
    config, step = run.config, run.state.finished_steps
    saves = step in (0, config.total_steps) or is_due(step, config.ckpt_saving_steps)
    draws = is_due(step, config.eval_demo_steps) and asked is not Asked.STOP
    samples = is_due(step, config.eval_steps) and asked is not Asked.STOP
    results = (
        (make_checkpoint, checkpoint_path(run.folder / "ckpts", step), saves or asked),
        (make_demo, run.folder / "figs" / f"{step}.png", draws),
        (make_eval, run.folder / "evals" / f"{step}.npz", samples),
    )
    return [(make, path) for make, path, due in results if due]


def make_checkpoint(run: Run, path: Path) -> None:
    """Have the training state and its record written, beside the training that goes on."""
    run.jobs.wait()  # for the last one: two would take the memory of two
    run.listener.saved()
    if not run.processes.is_main:
        return
    config, steps = run.config, run.state.finished_steps
    order = DataOrder(len(run.data), config.batch_size, config.seed)
    content = host_copy(
        {
            **run.state.state_dict(order.steps_per_epoch),
            "data": run.data.record(),
            "config": config.to_dict(),
            "parts": dataclasses.asdict(run.plan),
        }
    )
    record = record_of(path, config, run.processes, config.seed, finished_steps=steps)

    def write() -> None:
        refuse_non_finite(content)
        write_record(path, record)  # first, so that a kill leaves no checkpoint without one
        save_checkpoint(path, content)
        delete_superseded(path.parent, ".pt", steps, config.keep_last, config.keep_every_steps)

    run.jobs.start(write)


def save_and_stop(run: Run) -> NoReturn:
    """End the run as it was asked to, with the step just finished on disk."""
    path = checkpoint_path(run.folder / "ckpts", run.state.finished_steps)
    run.jobs.wait()
    if not run.processes.agree(path.exists()):
        make_checkpoint(run, path)
        run.jobs.wait()
    # Nobody leaves before all is saved: launchers end the others when the first has left.
    run.processes.agree(None)
    run.logbook.line(
        f"stopped by a signal after step {run.state.finished_steps}, saved in {path}; the same "
        f"command goes on"
    )
    raise Stopped


def make_demo(run: Run, path: Path) -> None:
    """Write a picture of one-class rows made by the averaged model."""
    shape = run.config.eval_demo_shape
    request = sample_request(run, shape[0] * shape[1])
    if run.config.is_conditional:
        labels = labels_by_row(run.data.spec.num_classes, shape)
        request = request._replace(stream=GivenLabels(request.stream, labels))
    batches = list(sampled(run, request))
    if run.processes.is_main:
        save_grid(path, np.concatenate([batch.pixels for batch in batches]), shape[1])


def make_eval(run: Run, path: Path) -> None:
    """Write eval_num_samples images made by the averaged model, their labels and record."""
    config = run.config
    request = sample_request(run, config.eval_num_samples)
    run.logbook.line(f"sampling {request.num_images} images to {path}")

    def write_own_record() -> None:
        record = record_of(
            path,
            config,
            run.processes,
            config.seed,
            num_images=request.num_images,
            NFE=request.num_jumps,
            labels="uniform" if config.is_conditional else None,
            noise_stream="image",
            finished_steps=run.state.finished_steps,
            weights_sha256=weights_digest(run.state.ema_model.state_dict()),
            **decoder_record(config),
        )
        write_record(path, record)

    batches = sampled(run, request)
    write_samples(path, batches, request.num_images, run.processes.is_main, write_own_record)
    if not run.processes.is_main:
        return
    steps = run.state.finished_steps
    delete_superseded(path.parent, ".npz", steps, config.keep_last, config.keep_every_steps)


def sampled(run: Run, request: SampleRequest) -> Iterator[Sampled]:
    """The averaged model's images, on the main process; all processes have to iterate."""
    with decoding(run.config, run.processes.device) as decode:

        def decode_unless_stopped(x_0: Tensor) -> Tensor:
            if run.asked() is Asked.STOP:
                save_and_stop(run)
            return decode(x_0)

        yield from sample_pixels(run.state.ema_model, request, run.processes, decode_unless_stopped)


def sample_request(run: Run, num_images: int) -> SampleRequest:
    """The config's way of sampling while training."""
    config, spec = run.config, run.data.spec
    num_classes = spec.num_classes if config.is_conditional else None
    stream = PerImageStream(config.seed, num_classes, spec.shape)
    return SampleRequest(num_images, config.eval_batch_size, config.eval_NFE, stream)
