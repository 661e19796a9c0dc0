"""Train a SoFlow model, or continue training it: the same command does both.

    python train.py --config configs/digits.yaml
    torchrun --nproc-per-node=8 train.py --config configs/imagenet.yaml
    python train.py --config configs/digits.yaml --set total_steps=500 --set working_dir=runs/short
    python train.py --config configs/imagenet.yaml --dry-run

Everything goes into the config's working_dir: config.yaml, log.txt, ckpts/, evals/, figs/.
"""

import soflow  # noqa: F401  # isort: skip - before torch: tells its threads how to wait

import argparse
import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from drawing import draw_batch
from models import Batch, Objective, SoFlow, build_model
from soflow.batches import BatchPlan, DataOrder, build_loader
from soflow.checkpoint import (
    TrainState,
    checkpoint_path,
    newest_checkpoint,
    read_checkpoint,
    save_checkpoint,
)
from soflow.config import (
    FIELDS,
    Config,
    config_from_dict,
    load_config,
    refuse_another_experiment,
    save_config,
    suggest,
)
from soflow.data import SOURCES, RawBatch, TrainingData, build_data, count_classes
from soflow.distributed import Processes, processes
from soflow.ema import is_ema_step, update_ema
from soflow.files import UserError, make_folder, run_command
from soflow.logbook import (
    Interval,
    Logbook,
    device_name,
    duration,
    peak_memory_gb,
    weights_digest,
    write_record,
)
from soflow.randomness import (
    GivenLabels,
    PerImageStream,
    derive_seed,
)
from soflow.sampling import (
    Sampled,
    SampleRequest,
    decoder_record,
    decoding,
    find_decoder,
    labels_by_row,
    sample_pixels,
    save_grid,
    write_samples,
)
from soflow.vae import PIXELS_PER_LATENT

METRICS = ("Vel_MSE", "Vel_Weight", "Con_MSE", "Con_Weight", "Grad_Norm")


@dataclass
class Run:
    """One run in one process: what is asked for, what it works on, and where it stands."""

    config: Config
    processes: Processes
    data: TrainingData
    plan: BatchPlan
    state: TrainState
    parallel_model: nn.Module  # state.model, reducing gradients where there are several processes
    logbook: Logbook

    @property
    def folder(self) -> Path:
        """The run's working_dir."""
        return Path(self.config.working_dir)


def train(run: Run) -> None:
    """Train from where the state is to the last step, making every result that is due."""
    config, state = run.config, run.state
    parts = build_loader(
        run.data,
        config,
        run.plan,
        run.processes.rank,
        state.finished_steps,
        pin_memory=run.processes.device.type == "cuda",
    )
    interval = Interval()
    make_results(run, only_missing=True)
    run.logbook.start_bar(state.finished_steps, config.total_steps, "step")
    while state.finished_steps < config.total_steps:
        interval.add(training_step(run, parts))
        run.logbook.advance()
        if is_due(state.finished_steps, config.logging_steps):
            log_metrics(run, interval)
        make_results(run, only_missing=False)
    run.logbook.close_bar()


def training_step(run: Run, parts: Iterator[RawBatch]) -> Tensor:
    """One optimizer step on the next global batch; returns this process's share of METRICS."""
    config, state = run.config, run.state
    metrics = accumulate_gradients(run, draw_batches(run, parts))
    state.optimizer.step()
    state.optimizer.zero_grad()
    state.finished_steps += 1
    if is_ema_step(state.finished_steps, config.ema_every_steps):
        update_ema(state.ema_model, state.model, config.ema_decay_rate, config.ema_every_steps)
    return metrics


def draw_batches(run: Run, parts: Iterator[RawBatch]) -> Iterator[Batch]:
    """This process's parts of the next global batch, one by one."""
    step, device = run.state.finished_steps, run.processes.device
    for part in run.plan.parts_of(run.processes.rank):
        yield draw_batch(run.config, run.plan, run.data, next(parts), step, part, device)


def accumulate_gradients(run: Run, batches: Iterator[Batch]) -> Tensor:
    """Leave the whole batch's gradient in the model; returns this process's share of METRICS.

    They stay on the device. The gradients of this process's parts add up, and are exchanged once,
    with the last.
    """
    config, plan = run.config, run.plan
    objective = Objective(
        config.cfg_scale, config.mix_ratio, config.cfg_decay_time, config.p, config.eps
    )
    metrics = torch.zeros(len(METRICS), device=run.processes.device)
    for index, batch in enumerate(batches, start=1):
        with exchange_gradients(run.parallel_model, index == plan.accumulation_steps):
            terms = run.parallel_model(batch, objective)
            # DistributedDataParallel averages over the processes; the objective is a sum.
            (terms.loss * plan.world_size).backward()
        metrics[:4] += torch.stack([*terms.flow_matching[1:], *terms.consistency[1:]])
    gradients = [p.grad for p in run.state.model.parameters() if p.grad is not None]
    # The same on every process, and to be summed over them.
    metrics[4] = nn.utils.get_total_norm(gradients) / plan.world_size
    return metrics


def exchange_gradients(model: nn.Module, exchange: bool) -> contextlib.AbstractContextManager:
    """A block whose backward pass exchanges gradients between processes, or keeps them back."""
    if isinstance(model, DistributedDataParallel) and not exchange:
        return model.no_sync()
    return contextlib.nullcontext()


def is_due(finished_steps: int, every: int | None) -> bool:
    """Whether something that happens every so many steps happens now; 0 and None are never."""
    return bool(every) and finished_steps > 0 and finished_steps % every == 0


def log_metrics(run: Run, interval: Interval) -> None:
    """One line with the means since the last; the only place that waits for the device."""
    means, seconds, steps = interval.close(run.processes)
    finished, total = run.state.finished_steps, run.config.total_steps
    metrics = ", ".join(f"{name}: {mean:.4f}" for name, mean in zip(METRICS, means, strict=True))
    run.logbook.line(
        f"Step: {finished}/{total} ({100 * finished / total:.1f}%), {metrics}, "
        f"Memory: {peak_memory_gb(run.processes.device):.2f} GB, Seconds: {seconds:.1f}, "
        f"ETA: {duration(seconds / steps * (total - finished))}"
    )


# Results


def make_results(run: Run, only_missing: bool) -> None:
    """Write the checkpoint, demo and eval that are due at this step.

    With `only_missing`, for the start of a run, those that are there already stay as they are: a
    run stopped between a checkpoint and the eval of the same step still gets its eval.
    """
    config, step = run.config, run.state.finished_steps
    is_last = step == config.total_steps
    is_saving = step == 0 or is_last or is_due(step, config.ckpt_saving_steps)
    for path, due, make in (
        (checkpoint_path(run.folder / "ckpts", step), is_saving, make_checkpoint),
        (run.folder / "figs" / f"{step}.png", is_due(step, config.eval_demo_steps), make_demo),
        (run.folder / "evals" / f"{step}.npz", is_due(step, config.eval_steps), make_eval),
    ):
        if due and not (only_missing and run.processes.agree(path.exists())):
            make(run, path)


def make_checkpoint(run: Run, path: Path) -> None:
    """Save the training state, and its record beside it."""
    if run.processes.is_main:
        order = DataOrder(len(run.data), run.config.batch_size, run.config.seed)
        state = run.state.state_dict(order.steps_per_epoch)
        extra = {
            "data": run.data.spec.to_dict(),
            "config": run.config.to_dict(),
            "parts": dataclasses.asdict(run.plan),
        }
        save_checkpoint(path, {**state, **extra})
        write_record(
            path, run.config, run.processes, run.config.seed, finished_steps=state["finished_steps"]
        )


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
    """Write eval_num_samples images made by the averaged model, and their record."""
    config = run.config
    request = sample_request(run, config.eval_num_samples)
    run.logbook.line(f"sampling {request.num_images} images to {path}")
    write_samples(path, sampled(run, request), request.num_images, run.processes.is_main)
    if run.processes.is_main:
        write_record(
            path,
            config,
            run.processes,
            config.seed,
            num_images=request.num_images,
            NFE=request.num_jumps,
            noise_stream="image",
            finished_steps=run.state.finished_steps,
            weights_sha256=weights_digest(run.state.ema_model.state_dict()),
            **decoder_record(config),
        )


def sampled(run: Run, request: SampleRequest) -> Iterator[Sampled]:
    """The averaged model's images, on the main process; all processes have to iterate."""
    with decoding(run.config, run.processes.device) as decode:
        yield from sample_pixels(run.state.ema_model, request, run.processes, decode)


def sample_request(run: Run, num_images: int) -> SampleRequest:
    """The config's way of sampling while training."""
    config, spec = run.config, run.data.spec
    num_classes = spec.num_classes if config.is_conditional else None
    stream = PerImageStream(config.seed, num_classes, spec.shape)
    return SampleRequest(num_images, config.eval_batch_size, config.eval_NFE, stream)


# Setting up


def start_run(config: Config, own: Processes, allowed: Sequence[str]) -> Run:
    """Check all that can be checked, then build the run, fresh or from its newest checkpoint."""
    if makes_pixels(config):
        find_decoder(config)
    data = build_data(config)
    plan = BatchPlan(
        config.batch_size, config.flow_matching_count, own.world_size, config.accumulation_steps
    )
    folder = Path(config.working_dir)
    logbook = Logbook(folder / "log.txt", own.is_main)
    notes: list[str] = []
    checkpoint = find_checkpoint(folder, own, notes.append)
    notes += compare_with_record(config, data, folder, checkpoint, allowed)
    if own.is_main:
        for name in ("ckpts", "evals", "figs"):
            make_folder(folder / name)
        if not (folder / "config.yaml").exists():
            save_config(config, folder / "config.yaml")

    torch.manual_seed(derive_seed(config.seed, "initial weights"))
    model = build_model(**config.model_arguments(data.spec.channels, data.spec.num_classes))
    model.to(own.device)
    parallel_model: nn.Module = model
    if own.world_size > 1:
        parallel_model = DistributedDataParallel(
            model, forward_sync_buffers=False, gradient_as_bucket_view=True
        )
    # After DistributedDataParallel has made the weights equal, so that the average is of them.
    state = TrainState.fresh(model, build_optimizer(config, model))
    started = f"fresh run in {folder}"
    if checkpoint:
        path, content = checkpoint
        notes += [*state.load_state_dict(content, str(path)), *compare_parts(plan, content)]
        started = f"resumed at step {state.finished_steps} from {path}"
    for note in (started, *notes):
        logbook.line(note)
    logbook.line(f"{describe_model(config, model)} on {device_name(own.device)}; batch {plan}")
    return Run(config, own, data, plan, state, parallel_model, logbook)


def makes_pixels(config: Config) -> bool:
    """Whether a run makes any demo or eval."""
    everies = (config.eval_demo_steps, config.eval_steps)
    return any(due_steps(config.total_steps, every) for every in everies)


def find_checkpoint(
    folder: Path, own: Processes, report: Callable[[str], None]
) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint to continue from; the main process chooses it for all."""
    found = newest_checkpoint(folder / "ckpts", report) if own.is_main else None
    path = own.agree(found[0] if found else None)
    if path is None or found:
        return found
    return path, read_checkpoint(path)


def compare_with_record(
    config: Config,
    data: TrainingData,
    folder: Path,
    checkpoint: tuple[Path, dict[str, Any]] | None,
    allowed: Sequence[str],
) -> list[str]:
    """A line for each change since the run was last started; UserError for another experiment."""
    record = folder / "config.yaml"
    source = record
    recorded = None
    if checkpoint and "config" in checkpoint[1]:
        source = checkpoint[0]
        recorded = config_from_dict(checkpoint[1]["config"], str(source))
    elif record.exists():
        recorded = load_config(record)
    if checkpoint and checkpoint[1].get("data", data.spec.to_dict()) != data.spec.to_dict():
        raise UserError(
            f"{checkpoint[0]}: trained on other data: {checkpoint[1]['data']} then, "
            f"{data.spec.to_dict()} now"
        )
    if recorded is None:
        return []
    return refuse_another_experiment(recorded, config, allowed, str(source))


def compare_parts(plan: BatchPlan, content: Mapping[str, Any]) -> list[str]:
    """A line where the batch was cut otherwise before: noise is drawn by part."""
    before = content.get("parts", dataclasses.asdict(plan))
    if before == dataclasses.asdict(plan):
        return []
    return [
        f"batch cut as {plan} now; it was {BatchPlan(**before)}: "
        "the order of the data goes on, the noise is another"
    ]


def build_optimizer(config: Config, model: SoFlow) -> torch.optim.Optimizer:
    """The config's optimizer: one group of all parameters, in the state dict's order."""
    kind = {"AdamW": torch.optim.AdamW, "RAdam": torch.optim.RAdam}[config.optimizer]
    return kind(
        model.parameters(),
        lr=config.learning_rate,
        betas=config.betas,
        weight_decay=config.weight_decay,
    )


def describe_model(config: Config, model: nn.Module) -> str:
    """The model's type and size in words."""
    count = sum(parameter.numel() for parameter in model.parameters())
    return f"{config.model_type}, {count:,} parameters"


def dry_run(config: Config) -> None:
    """Print what a run would be and need, without device or files; of data, only class names."""
    source = SOURCES[config.dataset_type]
    with torch.device("meta"):
        model = build_model(**config.model_arguments(source.channels, count_classes(config)))
    plan = BatchPlan(
        config.batch_size,
        config.flow_matching_count,
        int(os.environ.get("WORLD_SIZE", 1)),
        config.accumulation_steps,
    )
    weights = sum(tensor.nbytes for tensor in model.state_dict().values())
    moments = 2 * sum(p.nbytes for p in model.parameters() if p.requires_grad)
    steps = config.total_steps
    saves = {0, steps, *due_steps(steps, config.ckpt_saving_steps)}
    eval_bytes = config.eval_num_samples * pixel_bytes(config, source.channels)
    evals = due_steps(steps, config.eval_steps)
    print(yaml.safe_dump(config.to_dict(), sort_keys=False, default_flow_style=None), end="")
    print(f"# model: {describe_model(config, model)}")
    print(f"# batch: {plan}")
    print(
        f"# memory: weights {size(weights)}, their average {size(weights)}, optimizer state "
        f"{size(moments)}, gradients {size(moments / 2)}; activations come on top"
    )
    print(
        f"# disk: {len(saves)} checkpoints of {size(2 * weights + moments)}, "
        f"{len(evals)} evals of {size(eval_bytes)}, "
        f"together {size(len(saves) * (2 * weights + moments) + len(evals) * eval_bytes)}"
    )


def due_steps(total_steps: int, every: int | None) -> range:
    """The steps of a run after which something is due."""
    return range(every, total_steps + 1, every) if every else range(0)


def pixel_bytes(config: Config, data_channels: int) -> int:
    """Bytes of one sampled image."""
    if config.is_latent:
        return 3 * (PIXELS_PER_LATENT * config.data_size) ** 2
    return data_channels * config.data_size**2


def size(num_bytes: float) -> str:
    """A number of bytes for people, in decimal units."""
    for unit in ("B", "kB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.4g} GB"


# The command


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML config of the run")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="replace a value of the config (repeatable)",
    )
    parser.add_argument(
        "--allow-changed",
        action="append",
        default=[],
        metavar="KEY",
        help="continue although this key, which makes it another experiment, changed (repeatable)",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the resolved config and what the run takes, then end",
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    arguments = parse_arguments(argv)
    config = load_config(arguments.config, arguments.set)
    for key in arguments.allow_changed:
        if key not in FIELDS:
            raise UserError(f"--allow-changed {key}: unknown key{suggest(key, FIELDS)}")
    if arguments.dry_run:
        dry_run(config)
        return
    with processes(config.device, config.timeout_minutes) as own:
        run = start_run(config, own, arguments.allow_changed)
        if run.state.finished_steps >= config.total_steps:
            run.logbook.line(f"finished: all {config.total_steps} steps are done")
        train(run)


if __name__ == "__main__":
    run_command(main)
