"""Train a SoFlow model, or continue training it: the same command does both.

    python train.py --config configs/digits.yaml
    torchrun --nproc-per-node=8 train.py --config configs/imagenet.yaml
    python train.py --config configs/digits.yaml --set total_steps=500 --set working_dir=runs/short
    python train.py --config configs/imagenet.yaml --dry-run

Everything goes into the config's working_dir: config.yaml, log.txt, ckpts/, evals/, figs/.
"""

from support.system.command import is_first_process, run_command  # isort: skip - first: it attends to the start

import argparse
import contextlib
import dataclasses
import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from backbone import Backbone
from config import (
    FIELDS,
    Config,
    add_options,
    as_yaml,
    config_from_dict,
    load_config,
    parse_options,
    refuse_another_experiment,
    save_config,
)
from draws import draw_batch
from models import Batch, Method, build_model
from passes import Execution
from published import save_published_config
from sampling import (
    SampleRequest,
    decoder_record,
    decoding,
    find_decoder,
    sample_pixels,
    write_samples,
)
from support.data.batches import BatchPlan, DataOrder, build_loader
from support.data.datasets import (
    DATASETS,
    MadeUpData,
    RawBatch,
    TrainingData,
    build_data,
    count_classes,
)
from support.data.grids import labels_by_row, save_grid
from support.data.images import ImageBatch
from support.data.vae import PIXELS_PER_LATENT
from support.runs.averages import is_ema_step, update_ema
from support.runs.budget import count_parameters, describe_needs, state_bytes
from support.runs.checkpoint import TrainState, find_checkpoints
from support.runs.guard import NonFiniteGuard
from support.runs.logbook import (
    Interval,
    Logbook,
    device_name,
    duration,
    peak_memory_gb,
    weights_digest,
    write_record,
)
from support.runs.optimizers import build_optimizer
from support.runs.rehearsal import Rehearsal, within_memory
from support.runs.results import Results, ResultSchedule, is_due
from support.runs.resume import RunIdentity, resume
from support.runs.signals import Listener, Signalled, listening
from support.system.files import Stopped, UserError
from support.system.hardware import allow_tf32, obstacle_to_bf16, obstacle_to_compiling
from support.system.processes import (
    Processes,
    exchanging_gradients,
    processes,
    world_size_asked_for,
)
from support.system.randomness import GivenLabels, PerImageStream, derive_seed
from support.system.settings import suggest

FORWARDS = 4.4  # of a sample that a step takes, about


def train(run: "Run") -> None:
    """Train from where the state is to the last step, making every result that is due."""
    config, state, learner = run.config, run.learner.state, run.learner
    for path in run.results.due(state.finished_steps):
        # A run stopped between a checkpoint and the eval of the same step still gets its eval.
        if not run.processes.agree(path.exists()):
            make_result(run, path)
    if state.finished_steps >= config.total_steps:
        return
    loader = build_loader(
        run.data,
        learner.plan,
        run.processes.rank,
        range(state.finished_steps, config.total_steps),
        config.seed,
        config.num_workers,
        config.prefetch_factor,
        pin_memory=run.processes.device.type == "cuda",
    )
    interval = Interval()
    run.logbook.start_bar(state.finished_steps, config.total_steps, "step")
    while state.finished_steps < config.total_steps:
        run.results.jobs.check()
        interval.add(learner.step(draw_batches(run, loader)))
        run.logbook.advance()
        signalled = run.listener.signalled(run.processes)
        is_stopping = signalled is Signalled.STOP
        is_logging = is_due(state.finished_steps, config.logging_steps)
        due = run.results.due(state.finished_steps, signalled is Signalled.SAVE, is_stopping)
        if is_logging or due:
            learner.guard.refuse()
        if is_logging:
            log_metrics(run, interval)
        for path in due:
            make_result(run, path)
        if is_stopping:
            save_and_stop(run)
    run.logbook.close_bar()


def draw_batches(run: "Run", loader: Iterator[RawBatch]) -> Iterator[Batch]:
    """This process's parts of the next global batch, one by one, with noise, times and masks."""
    plan, step = run.learner.plan, run.learner.state.finished_steps
    for part in plan.parts_of(run.processes.rank):
        stored = next(loader)
        yield draw_batch(run.config, plan, run.data, stored, step, part, run.processes.device)


class Learner:
    """The training state of a run in one process, and the step that moves it."""

    def __init__(self, config: Config, processes: Processes, plan: BatchPlan, model: Method):
        """`model` is on the processes' device, with its options set; its weights are made equal."""
        self.config, self.processes, self.plan = config, processes, plan
        model.configure(config.to_dict())
        self.parallel_model: nn.Module = model
        if processes.world_size > 1:
            self.parallel_model = exchanging_gradients(model, gradient_as_bucket_view=True)
        optimizer = build_optimizer(
            config.optimizer or "AdamW",
            model,
            config.learning_rate,
            config.betas,
            config.weight_decay,
        )
        # After DistributedDataParallel has made the weights equal, so that the average is of them.
        self.state = TrainState.fresh(model, optimizer)
        self.guard = NonFiniteGuard(processes)

    def step(self, batches: Iterator[Batch]) -> dict[str, Tensor]:
        """One optimizer step on this process's parts of a global batch.

        Returns this process's share of each metric, on the device. A step whose gradient is not
        finite is not applied: `guard` tells of it, on the CPU at once.
        """
        config, state = self.config, self.state
        metrics = self.accumulate_gradients(batches)
        self.guard.hold_back(
            state.finished_steps + 1, metrics["Grad_Norm"], metrics, self._gradients()
        )
        for group in state.optimizer.param_groups:
            group["lr"] = config.learning_rate_at(state.finished_steps)
        state.optimizer.step()
        state.optimizer.zero_grad()
        state.finished_steps += 1
        every = config.ema_every_steps or 1
        if is_ema_step(state.finished_steps, every):
            update_ema(state.ema_model, state.model, config.ema_decay_rate, every)
        return metrics

    def accumulate_gradients(self, batches: Iterator[Batch]) -> dict[str, Tensor]:
        """Leave the whole batch's gradient, clipped, in the model; returns the share of metrics.

        The gradients of this process's parts add up, and are exchanged once, with the last.
        """
        plan = self.plan
        metrics: dict[str, Tensor] = {}
        for index, batch in enumerate(batches, start=1):
            with self._exchanging_gradients(index == plan.accumulation_steps):
                terms = self.parallel_model(batch)
                # DistributedDataParallel averages over the processes; the objective is a sum. What
                # is not finite in one process's part is to be seen by all, in the gradient.
                scale = plan.world_size * (1 + 0 * sum(terms.metrics.values()))
                (terms.loss * scale).backward()
            for name, value in terms.metrics.items():
                metrics[name] = metrics[name] + value if name in metrics else value
        norm = nn.utils.get_total_norm(self._gradients())
        if self.config.gradient_clip is not None:
            parameters = [p for p in self.state.model.parameters() if p.grad is not None]
            nn.utils.clip_grads_with_norm_(parameters, self.config.gradient_clip, norm)
        # The same on every process, and to be summed over them.
        metrics["Grad_Norm"] = norm / plan.world_size
        return metrics

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self.state.model.parameters() if p.grad is not None]

    def _exchanging_gradients(self, exchange: bool) -> contextlib.AbstractContextManager:
        """A block whose backward pass exchanges gradients between processes, or keeps them back."""
        if isinstance(self.parallel_model, DistributedDataParallel) and not exchange:
            return self.parallel_model.no_sync()
        return contextlib.nullcontext()


def log_metrics(run: "Run", interval: Interval) -> None:
    """One line with the means since the last, and what the schedules gave the step just done."""
    means, seconds, steps = interval.close(run.processes)
    config, finished = run.config, run.learner.state.finished_steps
    total, last = config.total_steps, finished - 1
    metrics = ", ".join(f"{name}: {mean:.4f}" for name, mean in means.items())
    run.logbook.line(
        f"Step: {finished}/{total} ({100 * finished / total:.1f}%), {metrics}, "
        f"Gap_Fraction: {config.gap_fraction_at(last):.4g}, "
        f"Learning_Rate: {config.learning_rate_at(last):.4g}, "
        f"Memory: {peak_memory_gb(run.processes.device):.2f} GB, Seconds: {seconds:.1f}, "
        f"Images/s: {steps * config.batch_size / seconds:.1f}, "
        f"ETA: {duration(seconds / steps * (total - finished))}"
    )


# Results


def make_result(run: "Run", path: Path) -> None:
    """Write what belongs at `path`: a checkpoint, a picture of samples, or samples to score."""
    make = {"ckpts": make_checkpoint, "figs": make_demo, "evals": make_eval}
    make[path.parent.name](run, path)


def make_checkpoint(run: "Run", path: Path) -> None:
    """Have the training state written, beside the training that goes on."""
    run.listener.saved()
    config, learner = run.config, run.learner
    order = DataOrder(len(run.data), config.batch_size, config.seed)
    run.results.save(
        {
            **learner.state.state_dict(order.steps_per_epoch),
            "data": run.data.record(),
            "config": config.to_dict(),
            "parts": dataclasses.asdict(learner.plan),
        }
    )


def make_demo(run: "Run", path: Path) -> None:
    """Write a picture of one-class rows made by the averaged model."""
    shape = run.config.eval_demo_shape
    request = sample_request(run, shape[0] * shape[1])
    if run.config.is_conditional:
        labels = labels_by_row(run.data.spec.num_classes, shape)
        request = request._replace(stream=GivenLabels(request.stream, labels))
    batches = list(make_images(run, request))
    if run.processes.is_main:
        save_grid(path, np.concatenate([batch.pixels for batch in batches]), shape[1])


def make_eval(run: "Run", path: Path) -> None:
    """Write eval_num_samples images made by the averaged model, their labels and record."""
    config, state = run.config, run.learner.state
    request = sample_request(run, config.eval_num_samples)
    run.logbook.line(f"sampling {request.num_images} images to {path}")

    def write_its_record() -> None:
        record = run.results.record(
            path,
            num_images=request.num_images,
            NFE=request.num_jumps,
            labels="uniform" if config.is_conditional else None,
            noise_stream="image",
            finished_steps=state.finished_steps,
            weights_sha256=weights_digest(state.ema_model.state_dict()),
            **decoder_record(config),
        )
        write_record(path, record)

    batches = make_images(run, request)
    write_samples(path, batches, request.num_images, run.processes.is_main, write_its_record)
    if run.processes.is_main:
        run.results.delete_superseded("evals", state.finished_steps)


def make_images(run: "Run", request: SampleRequest) -> Iterator[ImageBatch]:
    """The averaged model's images, on the main process; all processes have to iterate."""
    model = run.learner.state.ema_model
    with decoding(run.config, run.processes.device) as decode:

        def decode_unless_stopped(x_0: Tensor) -> Tensor:
            if run.listener.signalled(run.processes) is Signalled.STOP:
                save_and_stop(run)
            return decode(x_0)

        yield from sample_pixels(model, request, run.processes, decode_unless_stopped)


def sample_request(run: "Run", num_images: int) -> SampleRequest:
    """The config's way of sampling while training."""
    config, spec = run.config, run.data.spec
    num_classes = spec.num_classes if config.is_conditional else None
    stream = PerImageStream(config.seed, num_classes, spec.shape)
    return SampleRequest(num_images, config.eval_batch_size, config.eval_NFE, stream)


def save_and_stop(run: "Run") -> NoReturn:
    """End the run as it was told to, with the step just finished on disk."""
    steps, jobs = run.learner.state.finished_steps, run.results.jobs
    path = run.results.path("ckpts", steps)
    jobs.wait()
    if not run.processes.agree(path.exists()):
        make_checkpoint(run, path)
        jobs.wait()
    # Nobody leaves before all is saved: launchers end the others when the first has left.
    run.processes.agree(None)
    run.logbook.line(
        f"stopped by a signal after step {steps}, saved in {path}; the same command goes on"
    )
    raise Stopped


# Setting up


@dataclass
class Run:
    """One run in one process: what is asked for, what it works on, and where it stands."""

    config: Config
    processes: Processes
    data: TrainingData
    learner: Learner
    results: Results
    logbook: Logbook
    notes: list[str]  # what is to be said at the start
    listener: Listener = field(default_factory=Listener)


def build_run(config: Config, own: Processes, check_data: bool = False) -> Run:
    """A fresh run, its data and model checked; nothing is read of its folder, nothing written."""
    plan = plan_batch(config, own.world_size)
    if result_schedule(config).has_images:
        find_decoder(config)
    return assemble_run(config, own, plan, build_data(config.data_request(), own, check_data))


def assemble_run(config: Config, own: Processes, plan: BatchPlan, data: TrainingData) -> Run:
    """A fresh run on these data."""
    folder = Path(config.working_dir)
    learner, notes = build_learner(config, own, plan, data.spec.channels, data.spec.num_classes)
    results = Results(
        folder,
        own,
        result_schedule(config),
        config.to_dict(),
        config.seed,
        config.keep_last,
        config.keep_every_steps,
    )
    logbook = Logbook(folder / "log.txt", own.is_main)
    return Run(config, own, data, learner, results, logbook, [*data.notes, *notes])


def build_learner(
    config: Config, own: Processes, plan: BatchPlan, data_channels: int, num_classes: int
) -> tuple[Learner, list[str]]:
    """A fresh learner, and a line for each option that goes on without what it asks for."""
    torch.manual_seed(derive_seed(config.seed, "initial weights"))
    model = build_model(**config.model_arguments(data_channels, num_classes))
    model.to(own.device)
    notes = set_options(model, config, own.device)
    return Learner(config, own, plan, model), notes


def set_options(model: Method, config: Config, device: torch.device) -> list[str]:
    """Let the model's passes run as the config asks; a line where the device cannot."""
    notes = []
    allow_tf32(device, config.precision != "fp32")
    coarse_dtype = None
    if config.precision == "bf16":
        if obstacle := obstacle_to_bf16(device):
            notes.append(f"precision: goes on without bf16 ({obstacle})")
        else:
            coarse_dtype = torch.bfloat16
    is_compiled = False
    if config.compile:
        if obstacle := obstacle_to_compiling(device):
            notes.append(f"compile: goes on without ({obstacle})")
        else:
            is_compiled = True
            # In place: the names in files stay what they are. One shape each, known beforehand.
            model.network.compile(dynamic=False)
            if config.cfg_scale > 1:
                notes.append("compile: guidance takes the whole batch, dropped labels too")
    model.execution = Execution(coarse_dtype, fixed_shapes=is_compiled)
    if isinstance(model.network, Backbone):
        model.network.activation_checkpointing = config.activation_checkpointing
    if config.channels_last:
        model.to(memory_format=torch.channels_last)
    return notes


def plan_batch(config: Config, world_size: int) -> BatchPlan:
    """How the config's batch is cut over so many processes."""
    return BatchPlan(
        config.batch_size, config.flow_matching_count, world_size, config.accumulation_steps
    )


def result_schedule(config: Config) -> ResultSchedule:
    """When the config's results are due."""
    return ResultSchedule(
        config.total_steps, config.ckpt_saving_steps, config.eval_demo_steps, config.eval_steps
    )


def continue_run(run: Run, allowed: Sequence[str]) -> None:
    """Bring the run to where its folder's newest checkpoint is; nothing is written."""
    folder, learner = run.results.folder, run.learner

    def compare(recorded: Mapping[str, Any] | None, source: Path) -> list[str]:
        if recorded is not None:
            before = config_from_dict(recorded, str(source))
        elif (source := folder / "config.yaml").exists():
            before = load_config(source)
        else:
            return []
        return refuse_another_experiment(before, run.config, allowed, str(source))

    identity = RunIdentity(compare, run.data.record(), learner.plan, allowed)
    path, notes = resume(folder, learner.state, run.processes, identity)
    started = f"fresh run in {folder}"
    if path:
        started = f"resumed at step {learner.state.finished_steps} from {path}"
    size = f"{run.config.model_type}, {count_parameters(learner.state.model)}"
    works_on = f"{size} on {device_name(run.processes.device)}; batch {learner.plan}"
    run.notes = [started, *run.notes, *notes, works_on]


def open_folder(run: Run) -> None:
    """Make the places of results, record the config, and say in the log what starts here."""
    if not run.processes.is_main:
        return
    results = run.results
    results.open(run.data.skipped if run.config.skip_bad else None)
    if not (results.folder / "config.yaml").exists():
        save_config(run.config, results.folder / "config.yaml")
    for note in run.notes:
        run.logbook.line(note)
    # What a run killed between a save and the deletions after it has left.
    for kind in ("ckpts", "evals"):
        results.delete_superseded(kind, run.learner.state.finished_steps)


def look_beside(config_path: str, run: Run) -> list[str]:
    """A line where a fresh run starts although the config lies beside a run's checkpoints."""
    folder = Path(config_path).resolve().parent
    there = find_checkpoints(folder / "ckpts")
    if not there or find_checkpoints(run.results.folder / "ckpts"):
        return []
    return [
        f"{config_path} lies beside a run of {max(there)} steps, which this is not; to continue "
        f"that one, say --set working_dir={folder}"
    ]


# Before a run


def dry_run(config: Config) -> None:
    """Print what a run would be and need, without device or files."""
    dataset = DATASETS[config.dataset_type]
    num_classes = count_classes(config.data_request())
    with torch.device("meta"):
        model = build_model(**config.model_arguments(dataset.channels, num_classes))
    pixels = dataset.channels * config.data_size**2
    if dataset.is_latent:
        pixels = 3 * (PIXELS_PER_LATENT * config.data_size) ** 2
    say(as_yaml(config).rstrip())
    say(f"# model: {config.model_type}, {count_parameters(model)}")
    plan = plan_batch(config, world_size_asked_for())
    schedule = result_schedule(config)
    for line in describe_needs(model, plan, schedule, config.eval_num_samples * pixels):
        say(f"# {line}")


def time_steps(config: Config) -> None:
    """Print what a few steps take here, on made-up data; nothing is written."""
    with processes(config.device, config.timeout_minutes) as own, within_memory(own.device):
        plan = plan_batch(config, own.world_size)
        data = MadeUpData(config.data_request(), plan.batch_size // plan.num_parts)
        run = assemble_run(config, own, plan, data)
        learner, loader = run.learner, itertools.repeat(data.whole())

        def step() -> None:
            learner.step(draw_batches(run, loader))

        rehearsal = Rehearsal(
            step,
            lambda: seconds_of_a_forward(run),
            FORWARDS * len(data) * plan.accumulation_steps,
            own.device,
            config.total_steps,
            config.batch_size,
            state_bytes(learner.state.model),
        )
        for line in itertools.chain(run.notes, rehearsal.run()):
            say(f"# {line}")
        learner.guard.refuse()


@torch.inference_mode()
def seconds_of_a_forward(run: Run) -> float:
    """What one sample takes through the network, on the CPU."""
    x, t = torch.zeros(1, *run.data.spec.shape), torch.ones(1)
    labels = run.data.labels[:1] if run.config.is_conditional else None
    started = time.monotonic()
    run.learner.state.ema_model.jump(x, t, 0 * t, labels)
    return time.monotonic() - started


def say(text: str) -> None:
    """Print, once for all processes, before what follows takes its time."""
    if is_first_process():
        print(text, flush=True)


# The command


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="docs/config.md explains every key of a config.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_options(parser)
    parser.add_argument(
        "--allow-changed",
        action="append",
        default=[],
        metavar="KEY",
        help="continue although this key, which makes it another experiment, changed, or the "
        "pictures did: `data` (repeatable)",
    )
    parser.add_argument(
        "--check-data",
        action="store_true",
        help="decode every picture before the first step, and name those that cannot be read",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the resolved config and what the run takes, then end",
    )
    parser.add_argument(
        "--time",
        action="store_true",
        help="with --dry-run: time a few steps here, on made-up data",
    )
    parser.add_argument(
        "--save-published-config",
        metavar="FILE",
        help="write the config with the keys that the published code knows alone, then end",
    )
    return parse_options(parser, argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    arguments = parse_arguments(argv)
    if arguments.time and not arguments.dry_run:
        raise UserError("--time: goes with --dry-run, and times a few steps before a run")
    config = load_config(arguments.config, arguments.set)
    for key in arguments.allow_changed:
        if key not in (*FIELDS, "data"):
            raise UserError(f"--allow-changed {key}: unknown key{suggest(key, (*FIELDS, 'data'))}")
    if arguments.save_published_config:
        print(*save_published_config(config, Path(arguments.save_published_config)), sep="\n")
        return
    if arguments.dry_run:
        dry_run(config)
        if arguments.time:
            time_steps(config)
        return
    with processes(config.device, config.timeout_minutes) as own:
        run = build_run(config, own, arguments.check_data)
        run.notes += look_beside(arguments.config, run)
        with run.results.claimed(), listening() as run.listener:
            continue_run(run, arguments.allow_changed)
            open_folder(run)
            train(run)
            run.results.jobs.wait()
            run.logbook.line(f"finished: all {config.total_steps} steps are done")


if __name__ == "__main__":
    run_command(main)
