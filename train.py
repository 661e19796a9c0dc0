"""Train a SoFlow model, or continue training it: the same command does both.

    python train.py --config configs/digits.yaml
    torchrun --nproc-per-node=8 train.py --config configs/imagenet.yaml
    python train.py --config configs/digits.yaml --set total_steps=500 --set working_dir=runs/short
    python train.py --config configs/imagenet.yaml --dry-run --time

Everything goes into the config's working_dir: config.yaml, log.txt, ckpts/, evals/, figs/.
"""

from soflow.command import is_first_process, run_command  # isort: skip - first: it attends to the start

import argparse
import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from drawing import draw_batch
from learner import METRICS, build_learner, gap_fraction_at, learning_rate_at
from models import Batch, build_model
from rehearsal import MadeUpData, rehearse, within_memory
from run import Run, due_results, save_and_stop
from soflow.background import background
from soflow.batches import BatchPlan, build_loader
from soflow.budget import describe_model, describe_needs
from soflow.checkpoint import find_checkpoints, newest_checkpoint, read_checkpoint
from soflow.config import (
    FIELDS,
    Config,
    add_options,
    as_yaml,
    config_from_dict,
    due_steps,
    is_due,
    load_config,
    parse_options,
    refuse_another_experiment,
    save_config,
    suggest,
)
from soflow.data import (
    SKIPPED_FILE,
    SOURCES,
    RawBatch,
    TrainingData,
    build_data,
    compare_data,
    count_classes,
)
from soflow.distributed import Processes, processes, world_size_asked_for
from soflow.files import UserError, atomic_write, delete_superseded, hold_lock, make_folder
from soflow.logbook import Interval, Logbook, device_name, duration, peak_memory_gb
from soflow.published import save_published_config
from soflow.sampling import find_decoder
from soflow.signals import Asked, listening


def train(run: Run) -> None:
    """Train from where the state is to the last step, making every result that is due."""
    config, state = run.config, run.state
    for make, path in due_results(run):
        # A run stopped between a checkpoint and the eval of the same step still gets its eval.
        if not run.processes.agree(path.exists()):
            make(run, path)
    if state.finished_steps >= config.total_steps:
        return
    parts = build_loader(
        run.data,
        config,
        run.plan,
        run.processes.rank,
        state.finished_steps,
        pin_memory=run.processes.device.type == "cuda",
    )
    interval = Interval()
    run.logbook.start_bar(state.finished_steps, config.total_steps, "step")
    while state.finished_steps < config.total_steps:
        run.jobs.check()
        interval.add(run.learner.step(draw_batches(run, parts)))
        run.logbook.advance()
        asked = run.asked()
        is_logging = is_due(state.finished_steps, config.logging_steps)
        results = due_results(run, asked)
        if is_logging or results:
            run.learner.refuse_non_finite()
        if is_logging:
            log_metrics(run, interval)
        for make, path in results:
            make(run, path)
        if asked is Asked.STOP:
            save_and_stop(run)
    run.logbook.close_bar()


def draw_batches(run: Run, parts: Iterator[RawBatch]) -> Iterator[Batch]:
    """This process's parts of the next global batch, one by one."""
    step, device = run.state.finished_steps, run.processes.device
    for part in run.plan.parts_of(run.processes.rank):
        yield draw_batch(run.config, run.plan, run.data, next(parts), step, part, device)


def log_metrics(run: Run, interval: Interval) -> None:
    """One line with the means since the last, and what the schedules gave the step just done."""
    means, seconds, steps = interval.close(run.processes)
    config, finished = run.config, run.state.finished_steps
    total, last = config.total_steps, finished - 1
    metrics = ", ".join(f"{name}: {mean:.4f}" for name, mean in zip(METRICS, means, strict=True))
    run.logbook.line(
        f"Step: {finished}/{total} ({100 * finished / total:.1f}%), {metrics}, "
        f"Gap_Fraction: {gap_fraction_at(config, last):.4g}, "
        f"Learning_Rate: {learning_rate_at(config, last):.4g}, "
        f"Memory: {peak_memory_gb(run.processes.device):.2f} GB, Seconds: {seconds:.1f}, "
        f"Images/s: {steps * config.batch_size / seconds:.1f}, "
        f"ETA: {duration(seconds / steps * (total - finished))}"
    )


# Setting up


def build_run(config: Config, own: Processes, check_data: bool = False) -> Run:
    """A fresh run, its data and model checked; nothing is read of its folder, nothing written."""
    plan = plan_batch(config, own.world_size)
    if makes_pixels(config):
        find_decoder(config)
    return assemble_run(config, own, plan, build_data(config, own, check_data))


def assemble_run(config: Config, own: Processes, plan: BatchPlan, data: TrainingData) -> Run:
    """A fresh run on these data."""
    learner, notes = build_learner(config, own, plan, data.spec.channels, data.spec.num_classes)
    logbook = Logbook(Path(config.working_dir) / "log.txt", own.is_main)
    return Run(config, own, data, learner, logbook, [*data.notes, *notes])


@contextlib.contextmanager
def claimed_folder(run: Run) -> Iterator[None]:
    """A block in which the working_dir is there and nobody else's.

    UserError where another run is using it; the lock ends with the process that holds it. What is
    written beside training is written when the block ends.
    """
    with contextlib.ExitStack() as stack:
        if run.processes.is_main:
            folder = make_folder(run.folder)
            refusal = f"{folder}: another run is using this working_dir"
            stack.enter_context(hold_lock(folder / ".lock", refusal))
        run.jobs = stack.enter_context(background())
        yield


def look_beside(config_path: str, run: Run) -> list[str]:
    """A line where a fresh run starts although the config lies beside a run's checkpoints."""
    folder = Path(config_path).resolve().parent
    there = find_checkpoints(folder / "ckpts")
    if not there or find_checkpoints(run.folder / "ckpts"):
        return []
    return [
        f"{config_path} lies beside a run of {max(there)} steps, which this is not; to continue "
        f"that one, say --set working_dir={folder}"
    ]


def resume(run: Run, allowed: Sequence[str]) -> None:
    """Bring the run to where its folder's newest checkpoint is; all is checked, nothing written."""
    config, folder, learner = run.config, run.folder, run.learner

    def compare(checkpoint: tuple[Path, dict[str, Any]] | None) -> list[str]:
        return compare_with_record(config, run.data, folder, checkpoint, allowed)

    def refuse(path: Path, content: dict[str, Any]) -> None:
        try:
            learner.state.check(content, str(path))
        except UserError:
            compare((path, content))  # says more, where it is another experiment
            raise

    notes = run.notes
    checkpoint = find_checkpoint(folder, run.processes, refuse, notes.append)
    notes += compare(checkpoint)
    started = f"fresh run in {folder}"
    if checkpoint:
        path, content = checkpoint
        settings = learner.state.load_state_dict(content, str(path))
        # Where the file has its config, the comparison with that has said it.
        notes += compare_parts(run.plan, content, path)
        notes += settings if "config" not in content else []
        started = f"resumed at step {learner.state.finished_steps} from {path}"
    model = describe_model(config, learner.state.model)
    works_on = f"{model} on {device_name(run.processes.device)}; batch {run.plan}"
    run.notes = [started, *notes, works_on]


def open_folder(run: Run) -> None:
    """Make the places of results, record the config, and say in the log what starts here."""
    if not run.processes.is_main:
        return
    for name in ("ckpts", "evals", "figs"):
        make_folder(run.folder / name)
    if not (run.folder / "config.yaml").exists():
        save_config(run.config, run.folder / "config.yaml")
    if run.config.skip_bad:
        with atomic_write(run.folder / SKIPPED_FILE) as file:
            file.write("".join(f"{path}\n" for path in run.data.skipped).encode(errors="replace"))
    for note in run.notes:
        run.logbook.line(note)
    # What a run killed between a save and the deletions after it has left.
    for kind, suffix in (("ckpts", ".pt"), ("evals", ".npz")):
        keep = (run.config.keep_last, run.config.keep_every_steps)
        delete_superseded(run.folder / kind, suffix, run.state.finished_steps, *keep)


def plan_batch(config: Config, world_size: int) -> BatchPlan:
    """How the config's batch is cut over so many processes."""
    return BatchPlan(
        config.batch_size, config.flow_matching_count, world_size, config.accumulation_steps
    )


def makes_pixels(config: Config) -> bool:
    """Whether a run makes any demo or eval."""
    everies = (config.eval_demo_steps, config.eval_steps)
    return any(due_steps(config.total_steps, every) for every in everies)


def find_checkpoint(
    folder: Path,
    own: Processes,
    refuse: Callable[[Path, dict[str, Any]], None],
    report: Callable[[str], None],
) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint to continue from; the main process chooses and verifies it for all."""
    found = newest_checkpoint(folder / "ckpts", refuse, report) if own.is_main else None
    path = own.agree(found[0] if found else None)
    if path is None or found:
        return found
    return path, read_checkpoint(path, is_verified=True)


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
    notes = []
    if checkpoint and "data" in checkpoint[1]:
        before, is_allowed = checkpoint[1]["data"], "data" in allowed
        notes = compare_data(before, data.record(), str(checkpoint[0]), is_allowed)
    if recorded is not None:
        notes += refuse_another_experiment(recorded, config, allowed, str(source))
    return notes


def compare_parts(plan: BatchPlan, content: Mapping[str, Any], path: Path) -> list[str]:
    """A line where the batch was cut otherwise before: noise is drawn by part."""
    before = content.get("parts", dataclasses.asdict(plan))
    if before == dataclasses.asdict(plan):
        return []
    try:
        was = BatchPlan(**before)
    except (TypeError, ZeroDivisionError, UserError):
        raise UserError(f"{path}: its entry `parts` is damaged") from None
    order = "goes on" if was.batch_size == plan.batch_size else "is another"
    noise = "goes on" if was.num_parts == plan.num_parts else "is another"
    return [f"batch {plan} now, {was} before: the order of the data {order}, the noise {noise}"]


def dry_run(config: Config) -> None:
    """Print what a run would be and need, without device or files."""
    source = SOURCES[config.dataset_type]
    with torch.device("meta"):
        model = build_model(**config.model_arguments(source.channels, count_classes(config)))
    plan = plan_batch(config, world_size_asked_for())
    say(as_yaml(config).rstrip())
    for line in describe_needs(config, model, plan, source.channels):
        say(f"# {line}")


def time_steps(config: Config) -> None:
    """Print what a few steps take here, on made-up data; nothing is written."""
    with processes(config.device, config.timeout_minutes) as own, within_memory(own.device):
        plan = plan_batch(config, own.world_size)
        data = MadeUpData(config, plan.batch_size // plan.num_parts)
        run = assemble_run(config, own, plan, data)
        parts = itertools.repeat(data.whole())
        timed = rehearse(run.learner, data, lambda: draw_batches(run, parts))
        for line in itertools.chain(run.notes, timed):
            say(f"# {line}")


def say(text: str) -> None:
    """Print, once for all processes, before what follows takes its time."""
    if is_first_process():
        print(text, flush=True)


# The command


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
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
        with claimed_folder(run), listening() as run.listener:
            resume(run, arguments.allow_changed)
            open_folder(run)
            train(run)
            run.jobs.wait()
            run.logbook.line(f"finished: all {config.total_steps} steps are done")


if __name__ == "__main__":
    run_command(main)
