"""Train a SoFlow model, or continue training it: the same command does both.

    python train.py --config configs/digits.yaml
    torchrun --nproc-per-node=8 train.py --config configs/imagenet.yaml
    python train.py --config configs/digits.yaml --set total_steps=500 --set working_dir=runs/short
    python train.py --config configs/imagenet.yaml --dry-run

Everything goes into the config's working_dir: config.yaml, log.txt, ckpts/, evals/, figs/.
"""

from support.system.command import run_command  # isort: skip - first: it attends to the start

import argparse
import itertools
import os
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from config import (
    FIELDS,
    Config,
    add_options,
    config_from_dict,
    load_config,
    parse_options,
    refuse_another_experiment,
    refuse_start,
    save_config,
)
from models import Batch, Method, build_model
from passes import set_options
from sampler import find_decoder
from support.data.batches import BatchPlan, build_loader
from support.data.datasets import MadeUpData, RawBatch, TrainingData, build_data, compare_data
from support.runs.averages import Average, Exponential
from support.runs.budget import count_parameters
from support.runs.checkpoint import TrainState, find_checkpoints
from support.runs.guard import NonFiniteGuard, NonFiniteStep
from support.runs.logbook import Logbook, device_name, duration, peak_memory_gb
from support.runs.metrics import Interval, Metrics
from support.runs.optimizers import build_optimizer
from support.runs.rehearsal import time_steps, within_memory
from support.runs.results import Results, is_due
from support.runs.resume import resume
from support.system.signals import Listener, Signalled, listening
from support.runs.starting import start_from
from support.runs.trackers import check_installed
from support.system.files import UserError
from support.system.processes import Processes, connected, exchanging_gradients
from support.system.randomness import derive_seed
from support.system.settings import suggest
from training import doctor, preview
from training.draws import draw_batch
from training.held_out import FrozenBatch, draw_held_out, measure
from training.outputs import make_result, save_and_stop

LONG_SECONDS = 10  # for a first step, beyond which a user wonders


def train(run: "Run") -> None:
    """Train from where the state is to the last step, making every result that is due."""
    config, state, learner = run.config, run.learner.state, run.learner
    for path in run.results.due(state.finished_steps):
        # A run stopped between a checkpoint and the eval of the same step still gets its eval.
        if not run.processes.broadcast_object(path.exists()):
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
    bar = tqdm(
        total=config.total_steps,
        initial=state.finished_steps,
        unit="step",
        dynamic_ncols=True,
        disable=None if run.processes.is_main else True,  # None: shown on a terminal alone
    )
    first, started = state.finished_steps + 1, time.monotonic()
    state.interval.start_clock()
    while state.finished_steps < config.total_steps:
        run.results.jobs.check()
        state.interval.add(learner.step(draw_batches(run, loader)))
        bar.update()
        is_last = state.finished_steps == config.total_steps
        signalled = run.listener.signalled(run.processes, may_be_late=not is_last)
        is_stopping = signalled is Signalled.STOP
        is_logging = is_due(state.finished_steps, config.logging_steps)
        due = run.results.due(state.finished_steps, signalled is Signalled.SAVE, is_stopping)
        is_first = state.finished_steps == first
        if is_logging or due or is_first:
            learner.guard.refuse()
        if is_first:
            log_first_step(run, time.monotonic() - started)
        if is_logging:
            log_metrics(run)
        # By the config: a process may have none of the images, and has to take part all the same.
        if config.held_out and is_due(state.finished_steps, config.held_out_steps):
            log_held_out(run)
        for path in due:
            make_result(run, path)
        if is_stopping:
            save_and_stop(run)
    bar.close()


def log_first_step(run: "Run", seconds: float) -> None:
    """A line on a first step that somebody may have waited for."""
    is_compiled = run.learner.state.model.execution.fixed_shapes
    if is_compiled or seconds > LONG_SECONDS:
        compiling = ", compiling included" if is_compiled else ""
        run.logbook.line(f"first step: {seconds:.3g} s{compiling}")


def draw_batches(run: "Run", loader: Iterator[RawBatch]) -> Iterator[Batch]:
    """This process's microbatches of the next global batch, with noise, times and masks."""
    plan, step = run.learner.plan, run.learner.state.finished_steps
    for microbatch in plan.microbatches_of(run.processes.rank):
        stored = next(loader)
        yield draw_batch(run.config, plan, run.data, stored, step, microbatch, run.processes.device)


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
        rules = {rule.name: rule for rule in config.further_averages()}
        self.state = TrainState.fresh(model, optimizer, rules)
        every = config.ema_every_steps or 1
        self.averages = [
            Average(self.state.ema_model, model, Exponential(config.ema_decay_rate), every),
            *(Average(self.state.averages[name], model, rules[name], every) for name in rules),
        ]
        self.guard = NonFiniteGuard(processes)
        self._trained = [p for p in model.parameters() if p.requires_grad]

    def step(self, batches: Iterator[Batch]) -> dict[str, Tensor]:
        """One optimizer step on this process's microbatches of a global batch.

        Returns this process's share of each metric, on the device. A step whose gradient is not
        finite is not applied: `guard` tells of it, on the CPU at once.
        """
        config, state = self.config, self.state
        metrics = self.accumulate_gradients(batches)
        norm = metrics["Grad_Norm"]
        self.guard.hold_back(state.finished_steps + 1, norm, metrics, state.optimizer)
        for group in state.optimizer.param_groups:
            group["lr"] = config.learning_rate_at(state.finished_steps)
        state.optimizer.step()
        state.optimizer.zero_grad()
        state.finished_steps += 1
        for average in self.averages:
            average.follow(state.finished_steps)
        return metrics

    def accumulate_gradients(self, batches: Iterator[Batch]) -> dict[str, Tensor]:
        """Leave the whole batch's gradient, clipped, in the model; returns the share of metrics.

        The gradients of this process's microbatches add up, and are exchanged once, with the last.
        """
        plan = self.plan
        metrics: dict[str, Tensor] = {}
        for index, batch in enumerate(batches, start=1):
            if isinstance(self.parallel_model, DistributedDataParallel):
                self.parallel_model.require_backward_grad_sync = index == plan.accumulation_steps
            terms = self.parallel_model(batch)
            # DistributedDataParallel averages over the processes; the objective is a sum. What is
            # not finite in one process is to be seen by all, in the gradient.
            scale = plan.world_size * (1 + 0 * sum(terms.metrics.values()))
            (terms.loss * scale).backward()
            for name, value in terms.metrics.items():
                metrics[name] = metrics[name] + value if name in metrics else value
        norm = nn.utils.get_total_norm([p.grad for p in self._trained if p.grad is not None])
        if self.config.gradient_clip is not None:
            nn.utils.clip_grads_with_norm_(self._trained, self.config.gradient_clip, norm)
        # The same on every process, and to be summed over them.
        metrics["Grad_Norm"] = norm / plan.world_size
        return metrics


def log_metrics(run: "Run") -> None:
    """The means since the last line, and what the schedules gave the step just done."""
    config, state = run.config, run.learner.state
    means, seconds, steps = state.interval.close(run.processes)
    state.interval = Interval()
    finished, total = state.finished_steps, config.total_steps
    numbers = {
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


def log_held_out(run: "Run") -> None:
    """The held-out loss of the weights and of their average."""
    state = run.learner.state
    models = {"weights": state.model, "average": state.ema_model}
    errors = {name: measure(model, run.held_out, run.processes) for name, model in models.items()}
    run.metrics.add_held_out(state.finished_steps, errors)


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
    metrics: Metrics
    held_out: list[FrozenBatch]
    notes: list[str]  # what is to be said at the start
    listener: Listener = field(default_factory=Listener)


def build_run(config: Config, processes: Processes, check_data: bool = False) -> Run:
    """A fresh run, its data and model checked; nothing is read of its folder, nothing written."""
    refuse_start(config)
    plan = config.batch_plan(processes.world_size)
    if config.result_schedule().has_images:
        find_decoder(config)
    check_installed(config.log_to)
    return assemble_run(
        config, processes, plan, build_data(config.data_request(), processes, check_data)
    )


def assemble_run(config: Config, processes: Processes, plan: BatchPlan, data: TrainingData) -> Run:
    """A fresh run on these data."""
    folder = Path(config.working_dir)
    learner, notes = build_learner(
        config, processes, plan, data.spec.channels, data.spec.num_classes
    )
    results = Results(
        folder,
        processes,
        config.result_schedule(),
        config.to_dict(),
        config.seed,
        config.keep_last,
        config.keep_every_steps,
    )
    logbook = Logbook(folder / "log.txt", processes.is_main)
    images_per_epoch = len(data) // config.batch_size * config.batch_size
    metrics = Metrics(folder, config.batch_size, images_per_epoch, processes.is_main, logbook.line)
    held_out = draw_held_out(config, data.held_out, processes) if data.held_out else []
    notes = [*data.notes, *notes]
    return Run(config, processes, data, learner, results, logbook, metrics, held_out, notes)


def build_learner(
    config: Config, processes: Processes, plan: BatchPlan, data_channels: int, num_classes: int
) -> tuple[Learner, list[str]]:
    """A fresh learner, and a line for each option that goes on without what it asks for."""
    torch.manual_seed(derive_seed(config.seed, "initial weights"))
    model = build_model(**config.model_arguments(data_channels, num_classes))
    model.to(processes.device)
    options = (config.precision, config.compile, config.activation_checkpointing)
    model.execution, notes = set_options(model.network, processes.device, *options)
    if model.execution.fixed_shapes and config.cfg_scale > 1:
        notes.append("compile: guidance takes the whole batch, dropped labels too")
    if config.channels_last:
        model.to(memory_format=torch.channels_last)
    return Learner(config, processes, plan, model), notes


def continue_run(run: Run, allowed: Sequence[str]) -> None:
    """Bring the run to where its folder's newest checkpoint is; nothing is written."""
    folder, learner = run.results.folder, run.learner

    def compare(content: Mapping[str, Any], source: Path) -> list[str]:
        notes = []
        if "data" in content:
            is_allowed = "data" in allowed
            notes = compare_data(content["data"], run.data.record(), str(source), is_allowed)
        if "config" in content:
            before = config_from_dict(content["config"], str(source))
        elif (source := folder / "config.yaml").exists():
            before = load_config(source)
        else:
            return notes
        return notes + refuse_another_experiment(before, run.config, allowed, str(source))

    path, notes = resume(folder, learner.state, run.processes, learner.plan, compare)
    started = f"fresh run in {folder}"
    if path is None and run.config.init_from:
        notes += start_from_another(run)
    if path:
        started = f"resumed at step {learner.state.finished_steps} from {path}"
    size = f"{run.config.model_type}, {count_parameters(learner.state.model)}"
    works_on = f"{size} on {device_name(run.processes.device)}; batch {learner.plan}"
    run.notes = [started, *run.notes, *notes, works_on]


def start_from_another(run: Run) -> list[str]:
    """Take the weights that `init_from` names, as far as they fit; gives lines that say it."""
    source, state = run.config.init_from, run.learner.state
    assert source is not None
    network = state.model.network
    names, null_label = run.data.spec.class_names, state.model.null_label
    label_table = getattr(network, "label_table", "")
    record, notes = run.processes.on_rank0(
        lambda: start_from(source, network, label_table, null_label, names)
    )
    run.processes.broadcast_(state.model.state_dict().values())
    state.restart_averages()
    state.started_from = record
    return notes


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
    run.metrics.open(run.config.log_to, run.config.to_dict(), run.learner.state.finished_steps)
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
        f"that one, say --set working_dir={shlex.quote(str(folder))}"
    ]


def rehearse(config: Config) -> None:
    """Time a few steps of the config here, on made-up data; nothing is written."""
    with (
        connected(config.device, config.timeout_minutes) as processes,
        within_memory(processes.device),
    ):
        plan = config.batch_plan(processes.world_size)
        data = MadeUpData(config.data_request(), plan.batch_size // plan.num_microbatches)
        run = assemble_run(config, processes, plan, data)
        loader = itertools.repeat(data.whole())

        def step() -> None:
            run.learner.step(draw_batches(run, loader))

        lines = time_steps(step, processes.device, config.total_steps, config.batch_size)
        for line in itertools.chain(run.notes, lines):
            preview.say(f"# {line}")
        run.learner.guard.refuse()


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
        "--replay",
        metavar="FILE",
        help="make a step again that was not finite, of broken_step_K.json, and print its numbers",
    )
    return parse_options(parser, argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    arguments = parse_arguments(argv)
    if arguments.time and not arguments.dry_run:
        raise UserError("--time: goes with --dry-run, and times a few steps before a run")
    if arguments.dry_run and arguments.check_data:
        raise UserError("--check-data: goes without --dry-run, which opens no picture")
    config = load_config(arguments.config, arguments.set)
    for key in arguments.allow_changed:
        if key not in (*FIELDS, "data"):
            raise UserError(f"--allow-changed {key}: unknown key{suggest(key, (*FIELDS, 'data'))}")
    if arguments.dry_run:
        preview.describe(config)
        if arguments.time:
            rehearse(config)
        return
    with connected(config.device, config.timeout_minutes) as processes:
        run = build_run(config, processes, arguments.check_data)
        if arguments.replay:
            doctor.replay(run, Path(os.path.expanduser(arguments.replay)))
            return
        run.notes += look_beside(arguments.config, run)
        with run.results.claimed(), listening() as run.listener:
            continue_run(run, arguments.allow_changed)
            open_folder(run)
            try:
                with run.metrics.closing():
                    train(run)
            except NonFiniteStep as error:
                raise doctor.explain(run, error) from None
            run.results.jobs.wait()
            run.logbook.line(f"finished: all {run.learner.state.finished_steps} steps are done")


if __name__ == "__main__":
    run_command(main)
