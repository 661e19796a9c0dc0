"""Read a run's folder: metrics, held-out losses, scores, pictures, checkpoints, warnings, state.

Whatever cannot be read is noted and passed over, so that every run that has logged anything has a
report.
"""

import contextlib
import fcntl
import json
import re
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from support.report.curves import Curve
from support.scores.table import SCORES, Yardstick, listed, origin_of, read_record, read_records
from support.system.files import (
    UserError,
    natural_key,
    numbered_files,
    reporting_os_errors,
)
from support.system.settings import read_yaml

LOG_LINE = re.compile(r"(?P<time>\d{4}-\d\d-\d\d \d\d:\d\d:\d\d) (?P<text>.*)")
MODEL = re.compile(r".+ parameters on .+; batch .+")
# Lines of the log that a reader should not miss.
WARNING = re.compile(
    r"resumed at step|changed: |passed over|not finite|goes on without|stopped by a signal"
    r"|cannot be read|left out|the order of the data"
)
POSITIONS = ("step", "epoch", "images")  # of a line in training; no metrics
MADE_BY = ("code_version", "torch", "device")


class Score(NamedTuple):
    """The scores of a sample file, and what they depend on."""

    step: int
    nfe: int | None
    num_images: int | None
    values: Mapping[str, float]
    yardstick: Yardstick


class HeldOut(NamedTuple):
    """Which held-out loss a curve shows."""

    loss: str  # velocity or consistency
    whose: str  # "weights" or "average"
    bin: int
    num_bins: int


@dataclass
class RecordedRun:
    """Everything that was read from a run's folder."""

    folder: Path
    name: str
    settings: dict[str, Any] = field(default_factory=dict)  # those of the newest checkpoint
    curves: dict[str, Curve] = field(default_factory=dict)
    held_out: dict[HeldOut, Curve] = field(default_factory=dict)
    scores: list[Score] = field(default_factory=list)
    pictures: dict[int, Path] = field(default_factory=dict)
    checkpoint_bytes: dict[int, int] = field(default_factory=dict)
    made_by: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)  # from the log
    notes: list[str] = field(default_factory=list)  # about what could not be read
    last_step: int = 0
    total_steps: int | None = None
    last_line: str = ""  # when the log's last line was written
    holder: str = ""  # where a process trains it now, in words


def read_runs(folders: Sequence[Path]) -> list[RecordedRun]:
    """The runs in these folders, named by folder, or by path if folders have the same name."""
    names = [folder.resolve().name for folder in folders]
    return [
        read_run(folder, name if names.count(name) == 1 else str(folder))
        for folder, name in zip(folders, names, strict=True)
    ]


def read_run(folder: Path, name: str) -> RecordedRun:
    """The run in a folder; UserError if the folder holds none."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of a run")
    if not any((folder / file).exists() for file in ("log.txt", "metrics.jsonl")):
        raise UserError(f"{folder}: holds no run: neither metrics.jsonl nor log.txt is there")
    run = RecordedRun(folder, name)
    read_log(folder / "log.txt", run)
    rows: dict[int, dict[str, Any]] = {}
    for step, row in read_lines(folder / "metrics.jsonl", run.notes):
        rows.setdefault(step, {}).update(row)
    # Scores have a record in evals/, which also says what they depend on.
    run.curves = {name: curve for name, curve in curves_of(rows).items() if name not in SCORES}
    run.last_step = max(rows, default=0)
    try:
        run.settings = read_yaml(folder / "config.yaml")
    except UserError as error:
        run.notes.append(str(error))
    run.held_out = read_held_out(folder / "held_out.jsonl", run.notes)
    run.scores = read_scores(folder / "evals")
    run.pictures = numbered_files(folder / "figs", ".png")
    read_checkpoints(folder / "ckpts", run)
    run.total_steps = whole_number(run.settings, "total_steps")
    run.holder = holder_of(folder / ".lock")
    broken = sorted((path.name for path in folder.glob("broken_step_*.json")), key=natural_key)
    run.warnings += [f"a step was not finite: {name} tells more" for name in broken]
    return run


def whole_number(record: Mapping[str, Any], key: str) -> int | None:
    """The value of `key`, if it is a whole number and not negative."""
    value = record.get(key)
    return value if type(value) is int and value >= 0 else None


def read_lines(path: Path, notes: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """The lines of a .jsonl file, by their step; unreadable ones are noted."""
    unreadable = []
    for number, line in enumerate(_text_of(path).splitlines(), start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict) and (step := whole_number(row, "step")) is not None:
            yield step, row
        else:
            unreadable.append(f"line {number}")
    if unreadable:
        notes.append(f"{path}: {listed(unreadable)} cannot be read, passed over")


def _text_of(path: Path) -> str:
    """A file's text; empty if there is no file."""
    with reporting_os_errors(f"{path}: cannot be read"):
        return path.read_text(errors="replace") if path.exists() else ""


def curves_of(rows: Mapping[int, Mapping[str, Any]]) -> dict[str, Curve]:
    """Every number of the rows over the steps, in the order of the newest row."""
    points: dict[str, dict[int, float]] = {}
    for step in sorted(rows, reverse=True):
        for name, value in rows[step].items():
            if type(value) in (int, float) and name not in POSITIONS:
                points.setdefault(name, {})[step] = float(value)
    return {name: Curve.of(values) for name, values in points.items()}


def read_log(path: Path, run: RecordedRun) -> None:
    """Take from log.txt the model, the warnings and the time of the last line."""
    for line in _text_of(path).splitlines():
        if not (found := LOG_LINE.fullmatch(line)):
            continue
        run.last_line = found["time"]
        if MODEL.fullmatch(found["text"]):
            run.made_by["model"] = found["text"]
        if WARNING.search(found["text"]):
            run.warnings.append(line)


def holder_of(lock: Path) -> str:
    """Who trains a run, by its lock: "this machine", another's name, or nobody ("")."""
    try:
        with lock.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return "this machine"
    except OSError:
        return ""
    # A killed process leaves an unlocked file. So does a live one on a file system without locks.
    host = read_record(lock).get("host", "")
    return "" if host == socket.gethostname() else str(host)


def read_held_out(path: Path, notes: list[str]) -> dict[HeldOut, Curve]:
    """The held-out losses over the steps, one curve for each bin of t."""
    points: dict[HeldOut, dict[int, float]] = {}
    for step, row in read_lines(path, notes):
        for whose, losses in row.items():
            for loss, bins in losses.items() if isinstance(losses, dict) else ():
                if isinstance(bins, list) and all(isinstance(v, int | float) for v in bins):
                    for number, value in enumerate(bins):
                        key = HeldOut(loss, whose, number, len(bins))
                        points.setdefault(key, {})[step] = float(value)
    return {key: Curve.of(values) for key, values in points.items()}


def read_scores(folder: Path) -> list[Score]:
    """The scores of the sample files whose step is known, by step."""
    found = []
    for name, record in read_records(folder).items():
        num_images = whole_number(record, "num_images")
        origin = record if "step" in record else origin_of(folder / name, num_images)
        step, nfe = whole_number(origin, "step"), whole_number(origin, "NFE")
        if step is not None:
            found.append(Score(step, nfe, num_images, record["scores"], Yardstick.of(record)))
    return sorted(found, key=lambda score: (score.step, score.nfe or 0))


def read_checkpoints(folder: Path, run: RecordedRun) -> None:
    """Take from ckpts/ the sizes, and from the newest record what made the run.

    Its settings are newer than those of config.yaml if the run continued with others.
    """
    paths = numbered_files(folder, ".pt")
    for step, path in paths.items():
        with contextlib.suppress(OSError):  # deleted meanwhile
            run.checkpoint_bytes[step] = path.stat().st_size
    if paths:
        record = read_record(paths[max(paths)].with_suffix(".json"))
        run.made_by |= {key: record[key] for key in MADE_BY if key in record}
        if isinstance(settings := record.get("config"), dict):
            run.settings = settings
