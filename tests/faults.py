"""Fault injection: runs on digits that are killed, stopped, out of disk space or damaged.

    python tests/faults.py                    every fault with all its cases; prints a table
    python tests/faults.py --quick kills      only these faults, as the tests run them

A run survives a fault if all the files it leaves are whole, the user gets one line, and the same
command then ends like a run without the fault. The table counts all other runs as lost.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import multiprocessing
import multiprocessing.forkserver
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from checkpoints import assert_equal, numbers_of
from commands import ROOT, digits_settings, run
from faulty import AS_ON_A_GPU, BALLAST, GONE, Fault, Moment, Watch, work
from PIL import Image
from tqdm import tqdm

from config import load_config
from support.runs.checkpoint import find_checkpoints, read_checkpoint, save_checkpoint
from support.scores.npz import read_archive
from support.system.command import STOPPED_STATUS, run_command
from support.system.processes import Processes
from training.run import build_run, continue_run

TESTS = ROOT / "tests"
INSIDE = "FAULTS_INSIDE"  # environment variable: this process has its own namespace
LIMIT_SECONDS = 60  # for a process to end by itself
STEPS = 6
SETTINGS = {
    "model_type": "DiT-Nano-4", "total_steps": STEPS, "logging_steps": 1, "ckpt_saving_steps": 2,
    "eval_demo_steps": 3, "eval_steps": 3, "eval_batch_size": 4,
}  # fmt: skip
ALONE = Processes(0, 0, 1, torch.device("cpu"))


@dataclass
class Tally:
    """How many runs survived one fault."""

    fault: str
    tries: int = 0
    failures: list[str] = field(default_factory=list)
    skipped: str = ""  # why this machine cannot inject the fault

    @contextlib.contextmanager
    def attempt(self, what: object) -> Iterator[None]:
        """Count one try; it is lost if the block raises."""
        self.tries += 1
        try:
            yield
        except Exception as error:
            self.failures.append(f"{what}: {type(error).__name__}: {error}")
            for process in multiprocessing.active_children():
                process.kill()
                process.join()

    @property
    def lost(self) -> int:
        return len(self.failures)

    def row(self) -> str:
        counts = (self.tries, self.tries - self.lost, self.lost)
        return f"{self.fault:<34}" + (
            f"skipped: {self.skipped}" if self.skipped else "".join(f"{n:>10}" for n in counts)
        )


def check(holds: object, otherwise: object) -> None:
    """Raise AssertionError with this message unless it holds, with or without pytest."""
    if not holds:
        raise AssertionError(str(otherwise))


# Runs


def options_of(folder: Path, **values: object) -> list[str]:
    return digits_settings(folder, **{**SETTINGS, **values})


@functools.cache
def forks() -> multiprocessing.context.ForkServerContext:
    """A server that has imported torch, without using it, and forks itself for each process."""
    context = multiprocessing.get_context("forkserver")
    # Processes would import the late ones themselves, which takes most of their time.
    late = ["sklearn.datasets", "torch._dynamo", *(["pytest"] if "pytest" in sys.modules else [])]
    context.set_forkserver_preload(["faulty", *late])
    before = dict(os.environ)
    os.environ.update(OMP_NUM_THREADS="1", PYTHONPATH=f"{TESTS}{os.pathsep}{ROOT}")
    multiprocessing.forkserver.ensure_running()
    os.environ.clear()
    os.environ.update(before)
    return context


def _child(options: list[str], fault: Fault | None, output: Path, world: dict[str, str]) -> None:
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{output}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.environ.update(world)
    os.setpgid(0, 0)
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # as in a process of its own
    tqdm.set_lock(threading.RLock())  # a lock shared by processes would stay locked after a kill
    run_command(functools.partial(work, options, fault, Path(f"{output}.json")))


class Process:
    """One process of a run. Its output goes to files beside the run's folder."""

    def __init__(self, options, output: Path, fault: Fault | None = None, world=None):
        self.output = output
        self._process = forks().Process(target=_child, args=(options, fault, output, world or {}))
        self._process.start()
        self.pid = self._process.pid

    def end(self) -> int:
        """Wait at most LIMIT_SECONDS. Returns the exit status, negative for a signal."""
        self._process.join(LIMIT_SECONDS)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
            raise AssertionError(f"still running after {LIMIT_SECONDS} s: {self.out()}")
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()
        self._process.join()

    def out(self) -> str:
        return Path(f"{self.output}.out").read_text()

    def err(self) -> str:
        return Path(f"{self.output}.err").read_text()


def events_in(output: Path) -> list[Moment]:
    """The events of a process, each with how often it happened."""
    return [Moment(*event) for event in json.loads(Path(f"{output}.json").read_text())]


def start(folder: Path, fault: Fault | None = None, **values: object) -> Process:
    """Start a run of one process."""
    return Process(options_of(folder, **values), folder.with_suffix(".rank0"), fault)


def start_two(folder: Path, fault: Fault | None = None, **values: object) -> list[Process]:
    """Start a run of two processes. torchrun would end one with the other, so it is not used."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    return [
        Process(
            options_of(folder, **values),
            folder.with_suffix(f".rank{rank}"),
            fault,
            {**world, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]


def finish(processes: list[Process], saying: str = f"finished: all {STEPS} steps") -> None:
    """Wait for a run, which must finish."""
    for process in processes:
        status = process.end()
        check(status == 0, f"exit status {status}: {process.out()}{process.err()}")
    check(saying in processes[0].out(), processes[0].out())


def refused(process: Process, *words: str) -> None:
    """Wait for a process, which must fail with one line on stderr that has these words."""
    status, said = process.end(), process.err()
    lines = [line for line in said.splitlines() if not line.startswith("[W")]
    check(status == 1, f"exit status {status}: {said}")
    check(len(lines) == 1 and lines[0].startswith("error"), said)
    for word in words:
        check(word in lines[0], f"{word!r} is not in {lines[0]!r}")


def listed(run: Process | list[Process]) -> list[Process]:
    return run if isinstance(run, list) else [run]


def whole(folder: Path, begin: Callable = start, **values: object) -> Path:
    """The folder of an unbroken run to compare with."""
    if not folder.exists():
        finish(listed(begin(folder, **values)))
    return folder


# What a run must leave


def contents(folder: Path) -> dict[str, object]:
    """The content of every finished file in the folder; raises if one cannot be read."""
    return {
        str(path.relative_to(folder)): _read(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith((".", "broken_step_", BALLAST))
    }


def _read(path: Path) -> object:
    match path.suffix:
        case ".pt":
            return {k: v for k, v in read_checkpoint(path).items() if k != "config"}
        case ".png":
            with Image.open(path) as picture:
                return picture.tobytes()
        case ".npz":
            with read_archive(path) as archive:
                return b"".join(batch.tobytes() for batch in archive.batches(100))
        case ".json":
            record = json.loads(path.read_text())
            told = ("file", "finished_steps", "num_images", "weights_sha256", "processes")
            return {key: record[key] for key in told if key in record}
        case ".yaml":
            return {
                key: value
                for key, value in load_config(path).to_dict().items()
                if key not in ("working_dir", "num_workers", "timeout_minutes")
            }
        case ".txt":
            return logged(path.read_text())
        case ".jsonl":
            return numbers_of(path.parent) if path.read_bytes().endswith(b"\n") else None
    raise AssertionError(f"{path}: an unknown kind of file")


LINE = re.compile(
    r"\S+ \S+ Step: (\d+)/\d+ \([\d.]+%\), (.*), Memory: [\d.]+ GB, Seconds: [\d.]+, "
    r"Images/s: \S+, ETA: \S+"
)
START = re.compile(r"\S+ \S+ (?:resumed at step (\d+) from|fresh run in) .*")


def logged(log: str) -> dict[int, str]:
    """Step -> metrics. A start supersedes what was logged for later steps."""
    steps: dict[int, str] = {}
    for line in log.splitlines():
        if started := START.fullmatch(line):
            steps = {k: said for k, said in steps.items() if k <= int(started[1] or 0)}
        elif step := LINE.fullmatch(line):
            check(int(step[1]) not in steps, f"step {step[1]} is counted twice")
            steps[int(step[1])] = step[2]
    return steps


def ends_as(folder: Path, unbroken: Path, surplus: int | None = None) -> None:
    """Check that both runs left the same; the first may have a surplus checkpoint."""
    found, expected = contents(folder), contents(unbroken)
    for suffix in ("pt", "json"):
        if f"ckpts/{surplus}.{suffix}" not in expected:
            found.pop(f"ckpts/{surplus}.{suffix}", None)
    check(found.keys() == expected.keys(), f"files {sorted(found.keys() ^ expected.keys())}")
    differing = [name for name in found if not is_same(found[name], expected[name])]
    check(not differing, f"differ from the unbroken run: {differing}")
    check(not list(folder.rglob(".*.tmp")), "temporary files are left")


def is_same(one: object, other: object) -> bool:
    """Bitwise equality, also inside containers."""
    try:
        assert_equal(one, other)
    except AssertionError:
        return False
    return True


def steps_saved(folder: Path) -> list[int]:
    return list(find_checkpoints(folder / "ckpts"))


# The faults

FAULTS: dict[str, Callable[[bool, Path], Tally]] = {}  # by name; called with is_quick and a folder


def each_of(
    title: str, cases: Sequence[Any], quick: int, begin: Callable = start, on_own_disk: bool = False
) -> Callable[[Callable[[Path, Any, Path], None]], Callable]:
    """Register a fault and its cases; --quick tries only the first `quick` of them.

    Each try gets its own folder, a case, and the folder of an unbroken run. With `on_own_disk` the
    fault has its own mount namespace, so it may mount anything.
    """

    def register_attempt(attempt: Callable[[Path, Any, Path], None]) -> Callable:
        def tries(is_quick: bool, folder: Path) -> Tally:
            tally, name = Tally(title), attempt.__name__
            if on_own_disk and INSIDE not in os.environ:
                return in_namespace(tally, name, is_quick, folder)
            unbroken = whole(folder / "whole", begin)
            for number, case in enumerate(cases[: quick if is_quick else None]):
                with tally.attempt(case):
                    attempt(folder / str(number), case, unbroken)
            return tally

        FAULTS[attempt.__name__] = tries
        return attempt

    return register_attempt


def in_namespace(tally: Tally, name: str, is_quick: bool, folder: Path) -> Tally:
    """The tally of a fault that is tried by a process with its own mount namespace."""
    if sys.platform != "linux":
        return dataclasses.replace(tally, skipped="needs Linux's namespaces")
    if subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "x", "/mnt"]).returncode:
        return dataclasses.replace(tally, skipped="namespaces are denied")
    return told_by("faults.py", name, str(folder), *["--quick"] * is_quick, is_inside=True)


def told_by(script: str, *arguments: str, is_inside: bool = False) -> Tally:
    """The tally that another script prints as JSON; with `is_inside`, in its own namespace."""
    command = ["unshare", "-rm"] * is_inside + [sys.executable, str(TESTS / script), "--json"]
    ended = subprocess.run(
        [*command, *arguments],
        stdout=subprocess.PIPE,
        text=True,
        timeout=20 * LIMIT_SECONDS,
        env={**os.environ, **({INSIDE: "yes"} if is_inside else {})},
    )
    return Tally(**json.loads(ended.stdout.splitlines()[-1])[0])


def goes_on(place: Path, unbroken: Path, begin: Callable = start, **values: object) -> None:
    """Check that the files left are whole and that the same command ends like the unbroken run."""
    contents(place)
    finish(listed(begin(place, **values)))
    ends_as(place, unbroken)


# Kills

# The events to hit; --quick takes the first eight.
TARGETS = (
    ("write", ".pt"), ("write", ".npz"), ("named", ".pt"), ("write", ".json"),
    ("line", ".txt"), ("replace", ".png"), ("named", ".npz"), ("step", ""),
    ("fsync", ".pt"), ("sample", ""), ("replace", ".json"), ("write", ".yaml"),
    ("open", ".npz"), ("named", ".json"), ("write", ".png"), ("open", ".pt"),
)  # fmt: skip
WHILE_OPEN = ("open", "write", "fsync", "replace")


@each_of("SIGKILL", [*enumerate((TARGETS * 3)[:40])], quick=8)
def kills(place: Path, case: tuple[int, tuple[str, str]], unbroken: Path) -> None:
    """SIGKILL at every kind of moment, mostly while a temporary file is open."""
    number, (event, suffix) = case
    source = random.Random(number)
    events = events_in(unbroken.with_suffix(".rank0"))
    last = source.choice([m for m in events if m.event == event and m.name.endswith(suffix)])
    moment = last._replace(count=source.randint(1, last.count))
    status = start(place, Fault(moment, "SIGKILL")).end()
    check(status == -signal.SIGKILL, f"not killed but {status} at {moment}")
    check(event not in WHILE_OPEN or list(place.rglob(".*.tmp")), "no open file")
    goes_on(place, unbroken)
    shutil.rmtree(place)


@each_of(
    "SIGKILL of one of two processes",
    [(Moment("step", "", 4), 1), (Moment("write", "4.pt", 100), 0), (Moment("step", "", 2), 0),
     (Moment("sample", "", 3), 1), (Moment("line", "log.txt", 6), 0), (Moment("step", "", 5), 1),
     (Moment("write", "3.npz", 3), 0), (Moment("sample", "", 1), 1)],
    quick=2, begin=start_two,
)  # fmt: skip
def kills_of_two(place: Path, case: tuple[Moment, int], unbroken: Path) -> None:
    """The other process ends without saving."""
    moment, rank = case
    processes = start_two(place, Fault(moment, "SIGKILL", rank))
    check(processes[rank].end() == -signal.SIGKILL, "not killed")
    refused(processes[1 - rank], "is gone")
    due = set(range(0, STEPS, SETTINGS["ckpt_saving_steps"]))
    check(due.issuperset(steps_saved(place)), f"saved {steps_saved(place)}")
    goes_on(place, unbroken, start_two)


@each_of(
    "SIGKILL under torchrun's restarts",
    [
        Fault(Moment("step", "", 4), "SIGKILL", 1),
        Fault(Moment("write", "4.pt", 100), "SIGKILL", 0),
        Fault(Moment("sample", "", 2), "SIGKILL", 1),
    ],
    quick=1,
    begin=start_two,
)
def kills_under_torchrun(place: Path, fault: Fault, unbroken: Path) -> None:
    """torchrun restarts the killed process by itself."""
    flags = ["--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    what = json.dumps([*fault.moment, fault.action, fault.rank])
    ended = run(
        "-m", "torch.distributed.run", *flags, TESTS / "faulty.py", what, *options_of(place)
    )
    check(ended.returncode == 0, ended.stdout + ended.stderr)
    check("resumed at step" in ended.stdout, ended.stdout)
    ends_as(place, unbroken)


# Signals


def stopped(process: Process, place: Path) -> int:
    """Wait for a process, which must stop at a signal. Returns the last step it made."""
    status = process.end()
    check(status == STOPPED_STATUS, f"exit status {status}: {process.out()}{process.err()}")
    check(process.err() == "", process.err())
    said = re.search(r"step (\d+), saved in (.*?\.pt)", process.out())
    check(said, process.out())
    check(read_checkpoint(Path(said[2]))["finished_steps"] == int(said[1]), said[0])
    check(not (place / ".lock").exists(), "a lock is left")
    return int(said[1])


@each_of(
    "SIGTERM, SIGINT",
    [
        (Fault(Moment("sample", "", 2), "SIGTERM"), 3, {}),  # during the eval of step 3
        (Fault(Moment("step", "", 4), "SIGINT"), 4, {}),
        (Fault(Moment("step", "", 5), "group SIGTERM"), 5, {"num_workers": 2}),
        (Fault(Moment("write", "2.pt", 9), "SIGTERM"), None, {}),
        (Fault(Moment("line", "log.txt", 4), "SIGTERM"), 2, {}),
        (Fault(Moment("write", "3.png", 1), "SIGINT"), 3, {}),
        (Fault(Moment("step", "", 1), "SIGTERM"), 1, {}),
        (Fault(Moment("fsync", "4.pt", 1), "SIGINT"), None, {}),
    ],
    quick=3,
)
def signals(place: Path, case: tuple[Fault, int | None, dict[str, int]], unbroken: Path) -> None:
    """A signal stops the run at any moment, and the run saves its step first."""
    fault, step, values = case
    at = stopped(start(place, fault, **values), place)
    check(step in (at, None), f"stopped after step {at}")
    check(not list(place.rglob(".*.tmp")), "temporary files are left")
    check(at > 3 or not list((place / "evals").iterdir()), "an abandoned eval is there")
    contents(place)
    finish([start(place, **values)])
    ends_as(place, unbroken, surplus=at)


@each_of(
    "SIGTERM to one of two processes",
    [
        (Fault(Moment("step", "", 4), "SIGTERM", 1), 5),
        (Fault(Moment("sample", "", 2), "SIGINT", 1), 3),  # during the eval of step 3
        (Fault(Moment("write", "2.pt", 9), "SIGTERM", 0), None),
        (Fault(Moment("step", "", 5), "SIGINT", 0), 6),
    ],
    quick=1,
    begin=start_two,
)
def signals_to_one_of_two(place: Path, case: tuple[Fault, int | None], unbroken: Path) -> None:
    """Both processes stop after the same step: the next one or the last one."""
    fault, step = case
    processes = start_two(place, fault)
    at = stopped(processes[0], place)
    check(step in (at, None), f"stopped after step {at}")
    check(processes[1].end() == STOPPED_STATUS, processes[1].err())
    contents(place)
    finish(start_two(place))
    ends_as(place, unbroken, surplus=at)


RARELY = {"ckpt_saving_steps": 3}  # two processes save one step late; this makes it visible


@each_of(
    "SIGUSR1",
    [
        (start, Fault(Moment("step", "", 3), "SIGUSR1"), 3),
        (start_two, Fault(Moment("step", "", 4), "SIGUSR1", 1), 5),
        (start, Fault(Moment("sample", "", 2), "SIGUSR1"), 4),
        (start, Fault(Moment("write", "4.pt", 9), "SIGUSR1"), None),
    ],
    quick=1,
)
def requests_to_save(place: Path, case: tuple[Callable, Fault, int | None], unbroken: Path) -> None:
    """The run saves a checkpoint and continues as before."""
    begin, fault, step = case
    values = RARELY if begin is start_two else {}
    if begin is start_two:
        unbroken = whole(unbroken.with_name("two"), start_two, **RARELY)
    processes = begin(place, fault, **values)
    finish(listed(processes))
    surplus = step or next((k for k in steps_saved(place) if k % 2), None)
    check(step is None or step in steps_saved(place), f"not saved: step {step}")
    ends_as(place, unbroken, surplus)


# Damaged checkpoints


def used(folder: Path) -> tuple[int, list[str], object]:
    """The step from which a run in `folder` would continue, its notes, and its state."""
    config = load_config(*_split(options_of(folder)))
    run = build_run(config, ALONE)
    continue_run(run, [])
    state = run.learner.state
    return state.finished_steps, run.notes, state.state_dict(100)


def _split(options: list[str]) -> tuple[str, list[str]]:
    return options[1], [option.removeprefix("--set=") for option in options[2:]]


def damage(is_quick: bool, folder: Path) -> Tally:
    """A damaged newest checkpoint is named and passed over, unless its values are intact."""
    tally, tries = Tally("damaged newest checkpoint"), 24 if is_quick else 400
    place = whole(folder / "run")
    newest, log = place / "ckpts" / "6.pt", (place / "log.txt").read_bytes()
    original = newest.read_bytes()
    expected = used(place)[2]
    another = whole(folder / "another", model_type="DiT-Nano-2") / "ckpts" / "6.pt"

    def refused_or_harmless(what: str, may_be_harmless: bool = False) -> None:
        step, notes, state = used(place)
        if step == STEPS and may_be_harmless:
            check(is_same(state, expected), f"{what}: other values were loaded")
            return
        check(step == 4, f"{what}: went on from step {step}")
        check(notes[0].startswith("resumed at step 4"), notes)
        check(any(str(newest) in note for note in notes[1:]), notes)

    with tally.attempt("undamaged"):
        refused_or_harmless("undamaged", may_be_harmless=True)
    source = random.Random(3)
    for tenth in range(10):
        with tally.attempt(f"cut at {tenth} tenths"):
            newest.write_bytes(original[: len(original) * tenth // 10])
            refused_or_harmless(f"{tenth} tenths")
    # The last bytes hold the archive's directory and the weights' names and shapes.
    places = [*range(0, 100, 100 // max(1, tries // 8)), *range(-tries // 4, 0)]
    places += [source.randrange(len(original)) for _ in range(tries - len(places))]
    for index in places:
        with tally.attempt(f"byte {index} flipped"):
            flipped = bytearray(original)
            flipped[index] ^= 1 << source.randrange(8)
            newest.write_bytes(flipped)
            refused_or_harmless(f"byte {index}", may_be_harmless=True)
    kinds = {
        "text": lambda: newest.write_text("not a checkpoint"),
        "another model's": lambda: shutil.copyfile(another, newest),
        "without its config": lambda: torch.save(
            {k: v for k, v in read_checkpoint(another).items() if k != "config"}, newest
        ),
        "a folder": lambda: (newest.unlink(), newest.mkdir()),
    }
    for kind, replace in kinds.items():
        with tally.attempt(kind):
            replace()
            refused_or_harmless(kind)
    with tally.attempt("the command goes on"):
        newest.rmdir()
        newest.write_bytes(original[:-1000])
        finish([start(place)], saying=str(newest))
        check(newest.read_bytes() == original or is_same(_read(newest), used(place)[2]), "differs")
    with tally.attempt("none is left"):
        (place / "log.txt").write_bytes(log)
        for path in find_checkpoints(place / "ckpts").values():
            path.write_bytes(path.read_bytes()[:-1000])
        before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
        refused(start(place), " 4 ", str(newest))
        after = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
        check(before == after, "something was changed")
    return tally


FAULTS["damage"] = damage


# Retention

KEPT = {"ckpt_saving_steps": 1, "eval_steps": 1, "keep_last": 2, "keep_every_steps": 3}
EXPECTED = {
    "ckpts": {f"{step}.{end}" for step in (0, 3, 5, 6) for end in ("pt", "json")},
    "evals": {f"{step}.{end}" for step in (3, 5, 6) for end in ("npz", "json")},
}
NOT_OURS = {
    "ckpts": {"9.pt": "of another branch", "9.json": "{}", "best.pt": "not numbered"},
    "evals": {"2_1NFE_42.npz": "", "2_1NFE_42.json": "{}", "9.npz": "of another branch"},
}


@each_of(
    "retention, killed and not",
    [None, Moment("write", "6.pt", 50),  # nothing may be deleted yet
     Moment("unlink", "2.json", 1), Moment("unlink", "4.pt", 1), Moment("named", "6.pt", 1),
     Moment("named", "6.npz", 1), Moment("write", "6.npz", 1), Moment("unlink", "4.npz", 1),
     Moment("named", "3.pt", 1)],
    quick=3,
)  # fmt: skip
def retention(place: Path, killed_at: Moment | None, unbroken: Path) -> None:
    """Once a newer one is whole, old checkpoints and evals are deleted with their records."""
    if killed_at:
        killed = start(place, Fault(killed_at, "SIGKILL"), **KEPT)
        check(killed.end() == -signal.SIGKILL, "not killed")
        contents(place)
        if killed_at[:2] == ("write", "6.pt"):
            check(steps_saved(place) == [0, 3, 4, 5], f"left: {steps_saved(place)}")
    for kind, files in NOT_OURS.items():
        for name, text in files.items():
            (place / kind).mkdir(parents=True, exist_ok=True)
            (place / kind / name).write_text(text)
    if not killed_at:
        (place / "ckpts" / "9.pt").unlink()  # as the only checkpoint, it would be refused
    finish([start(place, **KEPT)])
    for kind, names in EXPECTED.items():
        left = {path.name for path in (place / kind).iterdir()}
        wanted = names | NOT_OURS[kind].keys() - (set() if killed_at else {"9.pt"})
        check(left == wanted, f"{kind}: {sorted(left ^ wanted)} too many or missing")


# Non-finite numbers

IN_DATA = [
    (start, 0, {}),
    (start_two, 1, {}),
    (start, 0, {"accumulation_steps": 2}),
    (start_two, 0, {"ckpt_saving_steps": 1}),
]


def assert_finite(folder: Path, but: tuple[int, ...] = ()) -> None:
    """Check that no checkpoint has weights that are not finite."""
    for step, path in find_checkpoints(folder / "ckpts").items():
        content = read_checkpoint(path)
        for part in ("model", "ema_model"):
            holds = all(tensor.isfinite().all() for tensor in content[part].values())
            check(holds or step in but, f"{path}: {part} is not finite")


def spoil(path: Path, entry: str) -> None:
    """Put a NaN into a checkpoint's weights, their average, or the optimizer's moments."""
    content = read_checkpoint(path)
    if entry == "optimizer":
        values = next(iter(content["optimizer"]["state"].values()))["exp_avg"]
    else:
        values = content[entry]["network.final_layer.linear.weight"]
    values.view(-1)[0] = torch.nan
    save_checkpoint(path, content)


NON_FINITE = [
    *(("data", case) for case in IN_DATA[:2]),
    *(("checkpoint", entry) for entry in ("model", "optimizer")),
    *(("late", key) for key in ("logging_steps", "ckpt_saving_steps")),
    *(("data", case) for case in IN_DATA[2:]),
    ("checkpoint", "ema_model"),
    ("late", "eval_steps"),
]


@each_of("NaN in data and weights", NON_FINITE, quick=6)
def non_finite(place: Path, case: tuple[str, Any], unbroken: Path) -> None:
    """With NaN in a process's data or in a checkpoint, the run stops and saves none of it."""
    kind, what = case
    {"data": nan_in_data, "checkpoint": nan_in_checkpoint, "late": nan_found_late}[kind](
        place, what, unbroken
    )


def nan_in_data(place: Path, what: tuple[Callable, int, dict[str, int]], unbroken: Path) -> None:
    begin, rank, values = what
    # Each microbatch draws its images once.
    count = 5 * values.get("accumulation_steps", 1)
    processes = begin(place, Fault(Moment("clean", "", count), "", rank), **values)
    for process in listed(processes):
        refused(process, "step 5: ", "_MSE")
    check(5 not in steps_saved(place), "the step is saved")
    check(5 not in contents(place)["log.txt"], "the step is logged")
    assert_finite(place)


def nan_in_checkpoint(place: Path, entry: str, unbroken: Path) -> None:
    shutil.copytree(unbroken, place)
    (place / "ckpts" / "6.pt").unlink()
    spoil(place / "ckpts" / "4.pt", entry)
    refused(start(place, ckpt_saving_steps=1), "step ", "not finite")
    assert_finite(place, but=(4,))


def nan_found_late(place: Path, key: str, unbroken: Path) -> None:
    """As on a GPU, step 6 finds that step 4 broke, before it logs, saves or samples."""
    values = {"logging_steps": 0, "ckpt_saving_steps": 0, "eval_steps": 0} | {key: 3}
    options = options_of(place, eval_demo_steps=0, total_steps=9, **values)
    fault = Fault(Moment("clean", "", 4), "")
    process = Process(options, place.with_suffix(".late"), fault, {AS_ON_A_GPU: "yes"})
    refused(process, "step 4: ", "_MSE")
    steps = next(m.count for m in events_in(process.output) if m.event == "step")
    check(steps == 6, f"stopped after step {steps}")
    saved = [0, 3] if key == "ckpt_saving_steps" else [0]
    check(steps_saved(place) == saved, f"saved {steps_saved(place)}")
    assert_finite(place)


# Places that cannot be written


@each_of("failed write beside training", [4, 6, 0, 2], quick=2)
def failed_writes(place: Path, step: int, unbroken: Path) -> None:
    """A background save that fails is reported, at the latest when the run ends."""
    process = start(place, Fault(Moment("save", f"{step}.pt", 1), ""), total_steps=STEPS)
    refused(process, f"{step}.pt: the disk is on fire")
    check("finished" not in process.out(), process.out())
    check(max(contents(place)["log.txt"], default=0) <= step + 2, "the run continues regardless")
    check(steps_saved(place) == list(range(0, step, 2)), steps_saved(place))


@each_of(
    "full disk",
    [Moment("write", "4.pt", 60), Moment("open", "3.npz", 1), Moment("open", "3.png", 1),
     Moment("line", "log.txt", 5), Moment("open", "4.pt", 1), Moment("open", "6.json", 1),
     Moment("open", "config.yaml", 1), Moment("write", "3.npz", 3), Moment("step", "", 2)],
    quick=4, on_own_disk=True,
)  # fmt: skip
def full_disk(place: Path, moment: Moment, unbroken: Path) -> None:
    """The disk fills up just before a write of each kind."""
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=120m", "x", place], check=True)
    # Leave the log little room in its page, which tmpfs has already allocated.
    (place / "log.txt").write_text("." * 3500 + "\n")
    refused(start(place, Fault(moment, "fill")), "No space left on device")
    contents(place)
    check(not list(place.rglob(".*.tmp")), "temporary files take up space")
    (place / BALLAST).unlink()
    goes_on(place, unbroken)
    subprocess.run(["umount", place], check=True)


@each_of(
    "read-only working_dir",
    [Moment("step", "", 3), Moment("write", "4.pt", 50), None, Moment("replace", "3.npz", 1),
     Moment("fsync", "3.png", 1), Moment("lock", ".lock", 1), Moment("unlink", ".lock", 1)],
    quick=3, on_own_disk=True,
)  # fmt: skip
def read_only(place: Path, moment: Moment | None, unbroken: Path) -> None:
    """The working_dir becomes read-only, before the start (None) or during the run."""
    place.mkdir()
    if moment is None:
        finish([start(place, total_steps=2)], saying="finished: all 2 steps")
        Watch(None, place).freeze()
        refused(start(place, total_steps=2), "Read-only file system")
        subprocess.run(["umount", place], check=True)
        return
    process = start(place, Fault(moment, "freeze"))
    if moment.event == "unlink":  # only the lock is left to remove
        finish([process])
    else:
        refused(process, "Read-only file system")
    contents(place)
    subprocess.run(["umount", place], check=True)
    goes_on(place, unbroken)


@each_of(
    "vanished working_dir",
    [Fault(Moment("sample", "", 1), "vanish"), Fault(Moment("write", "4.pt", 50), "destroy"),
     Fault(Moment("write", "3.npz", 2), "vanish"), Fault(Moment("step", "", 3), "destroy"),
     Fault(Moment("fsync", "2.pt", 1), "vanish"), Fault(Moment("line", "log.txt", 4), "vanish")],
    quick=2,
)  # fmt: skip
def vanished(place: Path, fault: Fault, unbroken: Path) -> None:
    """The working_dir is moved or deleted during the run."""
    refused(start(place, fault), str(place), "No such file or directory")
    if fault.action == "vanish":
        check(not place.exists(), "the folder was made again")
        place.with_name(place.name + GONE).rename(place)
    goes_on(place, unbroken)


# Several runs, and processes that hang


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_SECONDS
    while not holds():
        check(time.monotonic() < deadline, "timed out")
        time.sleep(0.01)


def is_stopped(process: Process) -> bool:
    return Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def has_group(number: int) -> bool:
    """Whether any process of a group is left."""
    try:
        os.killpg(number, 0)
    except ProcessLookupError:
        return False
    return True


@each_of("two runs in one working_dir", [0, 2, None], quick=3)
def two_runs(place: Path, workers: int | None, unbroken: Path) -> None:
    """A second run is refused until the first, with so many workers, has died or finished."""
    if workers is None:
        late = Process(
            options_of(place),
            place.with_suffix(".late"),
            Fault(Moment("lock", ".lock", 1), "SIGSTOP"),
        )
        wait_until(lambda: is_stopped(late))
        finish([start(place)])
        before = (place / "log.txt").read_text()
        os.kill(late.pid, signal.SIGCONT)
        finish([late])
        after = (place / "log.txt").read_text().removeprefix(before)
        check("resumed at step 6" in after and "Step: " not in after, after)
        ends_as(place, unbroken)
        return
    first = start(place, Fault(Moment("step", "", 3), "SIGSTOP"), num_workers=workers)
    wait_until(lambda: is_stopped(first))
    second = Process(options_of(place, num_workers=workers), place.with_suffix(".second"))
    refused(second, "working_dir", str(place))
    first.kill()
    goes_on(place, unbroken, num_workers=workers)
    wait_until(lambda: not has_group(first.pid))


@each_of("hanging process", [1, 0], quick=1, begin=start_two)
def hangs(place: Path, rank: int, unbroken: Path) -> None:
    """One of two processes hangs: the other gives up after the time-out."""
    fault = Fault(Moment("step", "", 4), "SIGSTOP", rank)
    processes = start_two(place, fault, timeout_minutes=0.1)
    refused(processes[1 - rank], "silent for 0.1 minutes")
    processes[rank].kill()
    goes_on(place, unbroken, start_two)


# Several machines

MACHINES = {
    "trains": "two machines",
    "continues": "two machines, continuing",
    "killed": "a machine killed",
    "blinks": "link cut for two seconds",
    "cut": "link cut for longer, healed",
    "slow": "link of 50 ms that loses 1 %",
    "late": "a machine that joins late",
    "unshared": "working_dir that is not shared",
    "misled": "wrong address, port in use",
}
for _name in MACHINES:
    FAULTS[f"machines_{_name}"] = lambda is_quick, folder, of=_name: told_by("machines.py", of)
FAULTS["slurm"] = lambda is_quick, folder: told_by("slurm.py")


# Left out of the tests, for their time.
SLOW = {"read_only", "vanished", "two_runs", "hangs", "slurm"} | {f"machines_{n}" for n in MACHINES}


# The command


def run_fault(name: str, is_quick: bool) -> Tally:
    """Try one fault, in its own folder."""
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        return FAULTS[name](is_quick, Path(folder))


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="FAULT", help=f"of {', '.join(FAULTS)}")
    parser.add_argument("--quick", action="store_true", help="only the tries that the tests make")
    parser.add_argument("--json", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if INSIDE in os.environ:
        name, folder = arguments.names
        print(json.dumps([dataclasses.asdict(FAULTS[name](arguments.quick, Path(folder)))]))
        return 0
    tallies = []
    for name in arguments.names or FAULTS:
        started = time.monotonic()
        tallies.append(run_fault(name, arguments.quick))
        print(f"{tallies[-1].row()}   ({time.monotonic() - started:.0f} s)", flush=True)
        for failure in tallies[-1].failures:
            print(f"    {failure}", flush=True)
    print(f"\n{'fault':<34}{'tries':>10}{'survived':>10}{'lost':>10}")
    for tally in tallies:
        print(tally.row())
    return int(any(tally.lost for tally in tallies))


if __name__ == "__main__":
    sys.exit(main())
