"""Runs of train.py on generated pictures: what a save costs, a stop, a resume, a broken step."""

import contextlib
import functools
import io
import itertools
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from measuring import ROOT, wait_for_device

# isort: split
import torch

from config import Config, load_config
from gpu_sections.bench import Bench, Task, Value
from gpu_sections.images import write_pictures
from models import Batch
from support.system.command import STOPPED_STATUS
from support.system.files import UserError
from support.system.signals import listening
from train import train
from training.run import Run, build_run, continue_run, open_folder

CONFIG = ROOT / "configs" / "small_folder.yaml"
LONGEST_WAIT_SECONDS = 120

Step = Callable[[Iterator[Batch]], dict[str, torch.Tensor]]


def tasks(bench: Bench) -> list[Task]:
    """The runs, the shortest first."""
    return [
        Task("broken step", functools.partial(broken_step, bench)),
        Task("save", functools.partial(save, bench)),
        Task("stop and resume", functools.partial(stop_and_resume, bench)),
    ]


def settings(bench: Bench, name: str, **values: object) -> list[str]:
    """Settings of a run in a folder of that name, whose model is small unless they say."""
    pictures = bench.folder / "training pictures"
    if not pictures.exists():
        write_pictures(pictures, 64, (40, 48))
    given = {
        "dataset_path": pictures,
        "working_dir": bench.folder / name,
        "device": bench.device.type,
        "batch_size": 4 if bench.is_tiny else 32,
        "num_workers": 0,
        "eval_demo_steps": 0,
        "ckpt_saving_steps": 0,
        "logging_steps": 1,
        **values,
    }
    return [f"{key}={value}" for key, value in given.items()]


def trained(bench: Bench, config: Config, changed: Callable[[Step], Step]) -> Run:
    """A run that has done all its steps, as train.py does them, through a changed step."""
    run = build_run(config, bench.processes)
    silence = contextlib.redirect_stdout(io.StringIO())  # what a log says is no row
    with silence, run.results.claimed(), listening() as run.listener:
        continue_run(run, ())
        open_folder(run)
        run.learner.step = changed(run.learner.step)  # type: ignore[method-assign]
        train(run)
        run.results.jobs.wait()
    return run


def save(bench: Bench) -> Iterator[Value]:
    """How much longer a step is when a checkpoint is due: the disk is written meanwhile."""
    model_type, total = ("DiT-Nano-4", 6) if bench.is_tiny else ("DiT-B-4", 60)
    values = {"total_steps": total, "ckpt_saving_steps": total // 2, "model_type": model_type}
    values["logging_steps"] = 0
    config = load_config(CONFIG, settings(bench, "saving", **values))
    started = []

    def timed(step: Step) -> Step:
        def work(batches: Iterator[Batch]) -> dict[str, torch.Tensor]:
            wait_for_device()
            started.append(time.perf_counter())
            return step(batches)

        return work

    trained(bench, config, timed)
    taken = [after - before for before, after in itertools.pairwise(started)]
    saving = taken.pop(total // 2 - 1)
    usual = statistics.median(taken)
    yield Value(f"{model_type} step", usual, "s")
    yield Value(f"{model_type} save stall", saving - usual, "s")
    checkpoint = bench.folder / "saving" / "ckpts" / f"{total}.pt"
    yield Value(f"{model_type} checkpoint", checkpoint.stat().st_size, "bytes")


def broken_step(bench: Bench) -> Iterator[Value]:
    """A step that is not finite ends the run and does not reach the weights."""
    config = load_config(CONFIG, settings(bench, "broken", total_steps=3))
    weights: list[torch.nn.Parameter] = []

    def poisoned(step: Step) -> Step:
        weights.extend(step.__self__.state.model.parameters())  # type: ignore[attr-defined]
        return lambda batches: step(map(without_numbers, batches))

    try:
        trained(bench, config, poisoned)
    except UserError as refusal:
        if not all(parameter.isfinite().all() for parameter in weights):
            raise RuntimeError("NaN has reached the weights") from refusal
        yield Value("broken step", f"refused, weights kept: {refusal}"[:80])
        return
    raise RuntimeError("a run whose data are NaN has not ended by itself")


def without_numbers(batch: Batch) -> Batch:
    """The batch with data that are not numbers."""
    return replace(batch, x_0=batch.x_0 * float("nan"))


def stop_and_resume(bench: Bench) -> Iterator[Value]:
    """SIGTERM's exit status, and where and how soon the same command goes on."""
    options = [f"--set={one}" for one in settings(bench, "stopped", total_steps=100_000)]
    log = bench.folder / "stopped" / "log.txt"
    with training(options) as process:
        wait_for_line(log, "Step: ", process)
        status = terminated(process)
    if status != STOPPED_STATUS:
        raise RuntimeError(f"exit status {status} after SIGTERM, not {STOPPED_STATUS}")
    yield Value("SIGTERM", status, "exit status")
    told, started = len(log.read_text()), time.monotonic()
    with training(options) as process:
        resumed = wait_for_line(log, "resumed at step ", process, told)
        wait_for_line(log, "Step: ", process, told)
        seconds = time.monotonic() - started
        terminated(process)
    yield Value("resume", resumed.partition(" from ")[0])
    yield Value("resume: until its first step is logged", seconds, "s")


@contextlib.contextmanager
def training(options: list[str]) -> Iterator[subprocess.Popen]:
    """A train.py that runs for the length of the block at most."""
    command = [sys.executable, str(ROOT / "train.py"), "--config", str(CONFIG), *options]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def terminated(process: subprocess.Popen) -> int:
    """The exit status after SIGTERM."""
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=LONGEST_WAIT_SECONDS)
    return process.returncode


def wait_for_line(log: Path, text: str, process: subprocess.Popen, start: int = 0) -> str:
    """From `text` to the end of its line, once the log has it beyond `start`."""
    deadline = time.monotonic() + LONGEST_WAIT_SECONDS
    while time.monotonic() < deadline:
        written = log.read_text()[start:] if log.exists() else ""
        place = written.find(text)
        if place >= 0 and "\n" in written[place:]:
            return written[place:].splitlines()[0]
        if process.poll() is not None:
            said = process.communicate()[1].decode(errors="replace")
            raise RuntimeError(f"train.py has ended: {said[-300:]}")
        time.sleep(0.05)
    raise TimeoutError(f"no line with {text!r} in {log} within {LONGEST_WAIT_SECONDS} s")
