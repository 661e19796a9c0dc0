"""Train a SoFlow model, or continue training it: the same command does both.

    python train.py --config configs/digits.yaml
    torchrun --nproc-per-node=8 train.py --config configs/imagenet.yaml
    python train.py --config configs/digits.yaml --set total_steps=500 --set working_dir=runs/short
    python train.py --config configs/imagenet.yaml --dry-run

Everything goes into the config's working_dir: config.yaml, log.txt, ckpts/, evals/, figs/.
"""

from support.system.command import command_parser, run_command  # isort: skip - must be first

import argparse
import contextlib
import os
import time
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from config import FIELDS, add_options, load_config, parse_options
from support.runs.guard import NonFiniteStep
from support.runs.results import is_due
from support.system.files import UserError
from support.system.processes import connected
from support.system.settings import suggest
from support.system.signals import Signalled, listening
from training import doctor, preview
from training.outputs import log_first_step, log_held_out, log_metrics, make_result, save_and_stop
from training.run import Run, build_run, continue_run, draw_batches, open_folder, open_loader


def train(run: Run) -> None:
    """Train up to the last step, and write every result that is due."""
    config, state, learner = run.config, run.learner.state, run.learner
    for path in run.results.due(state.finished_steps):
        # The run may have ended between a checkpoint and the eval of the same step.
        if not run.processes.broadcast_object(path.exists()):
            make_result(run, path)
    if state.finished_steps >= config.total_steps:
        return
    loader = open_loader(run)
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
        # Ask the config: a process without held-out images must take part too.
        if config.held_out and is_due(state.finished_steps, config.held_out_steps):
            log_held_out(run)
        for path in due:
            make_result(run, path)
        if is_stopping:
            save_and_stop(run)
    bar.close()


# The command


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line's options."""
    parser = command_parser(__doc__)
    parser.epilog = "docs/config.md explains every key of a config."
    add_options(parser)
    add = parser.add_argument
    allow_help = """continue although this key changed, or the pictures did (`data`), which makes it
        another experiment (repeatable)"""
    add("--allow-changed", action="append", default=[], metavar="KEY", help=allow_help)
    check_help = "decode every picture before the first step, and name those that cannot be read"
    add("--check-data", action="store_true", help=check_help)
    dry_help = "print the resolved config and what the run needs, then exit"
    add("--dry-run", action="store_true", help=dry_help)
    time_help = "with --dry-run: time a few steps on this machine, on made-up data"
    add("--time", action="store_true", help=time_help)
    replay_help = "compute the non-finite step of broken_step_K.json again and print its norms"
    add("--replay", metavar="FILE", help=replay_help)
    return parse_options(parser, argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    arguments = parse_arguments(argv)
    if arguments.time and not arguments.dry_run:
        raise UserError("--time: needs --dry-run")
    if arguments.dry_run and arguments.check_data:
        raise UserError("--check-data: excludes --dry-run, which opens no picture")
    config = load_config(arguments.config, arguments.set)
    for key in arguments.allow_changed:
        if key not in (*FIELDS, "data"):
            raise UserError(f"--allow-changed {key}: unknown key{suggest(key, (*FIELDS, 'data'))}")
    if arguments.dry_run:
        preview.describe(config)
        if arguments.time:
            preview.rehearse(config)
        return
    with connected(config.device, config.timeout_minutes) as processes:
        run = build_run(config, processes, arguments.check_data)
        if arguments.replay:
            doctor.replay(run, Path(os.path.expanduser(arguments.replay)))
            return
        with run.results.claimed(), listening() as run.listener:
            continue_run(run, arguments.allow_changed)
            open_folder(run)
            try:
                with contextlib.closing(run.metrics):
                    train(run)
            except NonFiniteStep as error:
                raise doctor.explain(run, error) from None
            run.results.jobs.wait()
            run.logbook.line(f"finished: all {run.learner.state.finished_steps} steps are done")


if __name__ == "__main__":
    run_command(main)
