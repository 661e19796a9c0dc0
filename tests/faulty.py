"""Run train.py with a fault at a chosen moment. torchrun runs this file, or it is imported.

    python tests/faulty.py '["step", "", 3, "SIGKILL", 1]' {options of train.py}

This file patches the faults in, so that training needs no hooks for them.
"""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import sampler
import train
from support.data import datasets as data
from support.runs import guard, results
from support.system import files, locks
from support.system.command import run_command
from support.system.files import UserError
from training import learner

BALLAST = "ballast"
GONE = ".gone"
AS_ON_A_GPU = "FAULTY_AS_ON_A_GPU"  # environment variable: no step checks its result at once


class Moment(NamedTuple):
    """The `count`th time that an event happens, to the file `name` where it is about a file.

    open, write, fsync and replace happen while the temporary file is open, named right after that.
    unlink comes before a file is deleted, line in the middle of a line of the log, lock before
    .lock is opened, step before a training step, sample before images are made. clean and save are
    calls that fail.
    """

    event: str
    name: str
    count: int


class Fault(NamedTuple):
    """What happens to the process `rank`, and when. The action is a signal or a method of Watch."""

    moment: Moment
    action: str
    rank: int = 0


class Watch:
    """Counts the events of this process, and acts at the fault's moment."""

    def __init__(self, fault: Fault | None, folder: Path):
        self.fault, self.folder = fault, folder
        self.counts: Counter[tuple[str, str]] = Counter()

    def is_now(self, event: str, name: str = "") -> bool:
        """Count the event once more. Returns whether this is the fault's moment."""
        self.counts[event, name] += 1
        now = Moment(event, name, self.counts[event, name])
        return self.fault is not None and now == self.fault.moment

    def act(self) -> None:
        action = self.fault.action
        if action.startswith("SIG"):
            os.kill(os.getpid(), getattr(signal, action))
        elif action.startswith("group SIG"):
            os.killpg(os.getpgrp(), getattr(signal, action.removeprefix("group ")))
        else:
            getattr(self, action)()

    def fill(self) -> None:
        """Fill the disk."""
        with open(self.folder / BALLAST, "wb", buffering=0) as file:
            for size in (1 << 20, 1 << 12):
                try:
                    while file.write(bytes(size)) == size:
                        pass
                except OSError:
                    pass

    def freeze(self) -> None:
        """Make the folder read-only."""
        subprocess.run(["mount", "--bind", self.folder, self.folder], check=True)
        # This fails while the other thread has a file of the folder open.
        remount = ["mount", "-o", "remount,bind,ro", self.folder]
        while subprocess.run(remount, capture_output=True).returncode:
            time.sleep(0.01)

    def vanish(self) -> None:
        """Move the folder away."""
        self.folder.rename(self.folder.with_name(self.folder.name + GONE))

    def destroy(self) -> None:
        """Delete the folder."""
        while self.folder.exists():  # the other thread may still create files in it
            shutil.rmtree(self.folder, ignore_errors=True)

    def before(self, event: str, name: str = "") -> None:
        if self.is_now(event, name):
            self.act()


def final_name(path: str | os.PathLike) -> str | None:
    """The final name of a temporary file; None for any other file."""
    name = os.path.basename(path)
    return name[1:-4] if name.startswith(".") and name.endswith(".tmp") else None


def watch_files(watch: Watch) -> None:
    """Patch the functions through which support.system.files changes the disk."""
    real_fsync, real_replace, real_unlink = os.fsync, os.replace, os.unlink

    def half(write, data, event: str, name: str):
        if not watch.is_now(event, name):
            return write(data)
        view = memoryview(data).cast("B")
        written = write(view[: len(view) // 2])
        watch.act()
        return written + write(view[len(view) // 2 :])

    class Written(io.BufferedRandom):
        def write(self, data):
            return half(self._write_through, data, "write", self.final)

        def _write_through(self, data):
            written = super().write(data)
            self.flush()
            return written

    class Line(io.FileIO):
        def write(self, data):
            return half(super().write, data, "line", os.path.basename(self.name))

    def fdopen(descriptor, *arguments, **options):
        name = final_name(os.readlink(f"/proc/self/fd/{descriptor}"))
        if name is None:
            return open(descriptor, *arguments, **options)
        file = Written(io.FileIO(descriptor, "r+b"))
        file.final = name
        watch.before("open", name)
        return file

    def fsync(descriptor):
        if name := final_name(os.readlink(f"/proc/self/fd/{descriptor}")):
            watch.before("fsync", name)
        return real_fsync(descriptor)

    def replace(source, target):
        watch.before("replace", os.path.basename(target))
        real_replace(source, target)
        watch.before("named", os.path.basename(target))

    def unlink(path, *arguments, **options):
        watch.before("unlink", os.path.basename(path))
        return real_unlink(path, *arguments, **options)

    def opened(path, *arguments, **options):
        if os.path.basename(path) == ".lock":
            watch.before("lock", ".lock")
        if options.get("buffering") == 0:
            return Line(path, "a+b")
        return open(path, *arguments, **options)

    os.fdopen, os.fsync, os.replace, os.unlink = fdopen, fsync, replace, unlink
    files.open = locks.open = opened


def watch_training(watch: Watch) -> None:
    """Patch the steps, the samples, the data and the saving of a run."""
    real_step, real_sample = learner.Learner.step, sampler.sample
    real_init = guard.NonFiniteGuard.__init__
    real_clean, real_save = data.PixelData.clean, results.save_checkpoint

    def init(self, *arguments):
        real_init(self, *arguments)
        self.refuses_at_once = not os.environ.get(AS_ON_A_GPU)

    def step(self, batches):
        watch.before("step")
        return real_step(self, batches)

    def sample(*arguments):
        watch.before("sample")
        return real_sample(*arguments)

    def clean(self, stored, source):
        images = real_clean(self, stored, source)
        return torch.full_like(images, torch.nan) if watch.is_now("clean") else images

    def save(path, content):
        if watch.is_now("save", path.name):
            raise UserError(f"{path}: the disk is on fire")
        real_save(path, content)

    guard.NonFiniteGuard.__init__ = init
    learner.Learner.step, sampler.sample = step, sample
    data.PixelData.clean, results.save_checkpoint = clean, save


def folder_of(options: list[str]) -> Path:
    """The working_dir in the command's options."""
    start = "--set=working_dir="
    return [Path(option.removeprefix(start)) for option in options if option.startswith(start)][-1]


def work(options: list[str], fault: Fault | None, notes: Path | None = None) -> None:
    """Run train.py's command with the fault, and write the counts of its events to `notes`."""
    is_ours = fault is not None and fault.rank == int(os.environ.get("RANK", "0"))
    watch = Watch(fault if is_ours else None, folder_of(options))
    watch_files(watch)
    watch_training(watch)
    try:
        train.main(options)
    finally:
        if notes is not None:
            notes.write_text(json.dumps([[*key, count] for key, count in watch.counts.items()]))


if __name__ == "__main__":
    event, name, count, action, rank = json.loads(sys.argv[1])
    is_first = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    fault = Fault(Moment(event, name, count), action, rank) if is_first else None
    run_command(lambda: work(sys.argv[2:], fault))
