"""Reading a run's folder: metrics, held-out losses, scores, pictures, checkpoints, warnings.

What the run was made by is read where it stands; what cannot be read is noted and passed over, so
that there is a report of every run that has logged anything.
"""

import contextlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from support.report.curves import Curve
from support.scores.table import Yardstick, origin_of, read_record, read_records
from support.system.files import UserError, numbered_files, regular_only
from support.system.settings import read_yaml

LOG_LINE = re.compile(r"(?P<time>\d{4}-\d\d-\d\d \d\d:\d\d:\d\d) (?P<text>.*)")
METRICS_LINE = re.compile(r"Step: (?P<step>\d+)/(?P<total>\d+) \([^)]*\), (?P<metrics>.*)")
RESUMED = re.compile(r"resumed at step (?P<step>\d+) ")
MODEL = re.compile(r".+ parameters on .+; batch .+")
# Lines of the log that a reader should not miss.
WARNING = re.compile(
    r"resumed at step|changed: |passed over|not finite|goes on without|stopped by a signal"
    r"|cannot be read|left out|the order of the data"
)
NAMES_IN_LOG = {"Memory": "Memory_GB", "Images/s": "Images_Per_Second"}  # as metrics.jsonl has them
POSITIONS = ("step", "epoch", "images")  # where a line stands, not how the run does
NAMED_LINES = 3
MADE_BY = ("code_version", "torch", "device")


class Score(NamedTuple):
    """What a sample file's scores are, and what they depend on."""

    step: int
    jumps: int | None  # NFE
    num_images: int | None
    values: Mapping[str, float]
    yardstick: Yardstick


class HeldOut(NamedTuple):
    """Which held-out loss a curve is of."""

    loss: str  # velocity or consistency
    whose: str  # the weights' or the average's
    bin: int
    num_bins: int


@dataclass
class RecordedRun:
    """All that a run's folder tells."""

    folder: Path
    name: str
    settings: dict[str, Any] = field(default_factory=dict)  # that it went on with last
    curves: dict[str, Curve] = field(default_factory=dict)
    held_out: dict[HeldOut, Curve] = field(default_factory=dict)
    scores: list[Score] = field(default_factory=list)
    pictures: dict[int, Path] = field(default_factory=dict)
    checkpoint_bytes: dict[int, int] = field(default_factory=dict)
    made_by: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)  # what the log warns of
    notes: list[str] = field(default_factory=list)  # what could not be read
    last_step: int = 0
    total_steps: int | None = None

    @property
    def seconds(self) -> float | None:
        """How long the steps took that the run's lines are of, where they say it."""
        curve = self.curves.get("Seconds")
        return None if curve is None else float(curve.values.sum())


def read_runs(folders: Sequence[Path]) -> list[RecordedRun]:
    """The runs in these folders, each named by its folder, or its path where that is not enough."""
    names = [folder.resolve().name for folder in folders]
    return [
        read_run(folder, name if names.count(name) == 1 else str(folder))
        for folder, name in zip(folders, names, strict=True)
    ]


def read_run(folder: Path, name: str) -> RecordedRun:
    """The run in a folder; UserError where nothing there is one's."""
    log, metrics = folder / "log.txt", folder / "metrics.jsonl"
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of a run")
    if not (log.exists() or metrics.exists()):
        raise UserError(f"{folder}: holds no run: neither metrics.jsonl nor log.txt is there")
    run = RecordedRun(folder, name)
    rows = read_log(log, run)
    if not metrics.exists():
        run.notes.append(f"{folder}: no metrics.jsonl, as of an older run; curves are from log.txt")
    # Lines of the log stand in for what metrics.jsonl lacks.
    for row in read_lines(metrics, run.notes):
        if (step := whole_number(row, "step")) is not None:
            rows[step] = row
    run.curves = curves_of(rows)
    run.last_step = max(rows, default=0)
    run.settings = read_settings(folder / "config.yaml", run.notes)
    run.held_out = read_held_out(folder / "held_out.jsonl", run.notes)
    run.scores = read_scores(folder / "evals")
    run.pictures = numbered_files(folder / "figs", ".png")
    read_checkpoints(folder / "ckpts", run)
    if run.total_steps is None:
        run.total_steps = whole_number(run.settings, "total_steps")
    run.warnings += [
        f"step {step} was not finite: broken_step_{step}.json tells more"
        for step in broken_steps(folder)
    ]
    return run


# Metrics


def curves_of(rows: Mapping[int, Mapping[str, Any]]) -> dict[str, Curve]:
    """Every number of the rows but their places, over the steps, in the order of the newest row."""
    points: dict[str, dict[int, float]] = {name: {} for name in rows[max(rows)]} if rows else {}
    for step, row in rows.items():
        for name, value in row.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                points.setdefault(name, {})[step] = float(value)
    return {
        name: Curve.of(values)
        for name, values in points.items()
        if values and name not in POSITIONS
    }


def read_log(path: Path, run: RecordedRun) -> dict[int, dict[str, Any]]:
    """The numbers by step that log.txt has; what else it tells goes to the run.

    A run that went on at step k takes back what was logged of later steps.
    """
    rows: dict[int, dict[str, Any]] = {}
    for line in _text_of(path).splitlines():
        if not (found := LOG_LINE.fullmatch(line)):
            continue
        text = found["text"]
        if metrics := METRICS_LINE.match(text):
            rows[int(metrics["step"])] = dict(_metrics_in(metrics["metrics"]))
            run.total_steps = int(metrics["total"])
            continue
        if text.startswith("fresh run"):
            rows = {}
        elif resumed := RESUMED.match(text):
            rows = {step: row for step, row in rows.items() if step <= int(resumed["step"])}
        elif MODEL.fullmatch(text):
            run.made_by["model"] = text
        if WARNING.search(text):
            run.warnings.append(f"{found['time']} {text}")
    return rows


def _metrics_in(text: str) -> Iterator[tuple[str, float]]:
    """Names and numbers of a line's "name: number unit" parts; what is no number is left out."""
    for part in text.split(", "):
        name, _, value = part.partition(": ")
        with contextlib.suppress(ValueError, IndexError):
            yield NAMES_IN_LOG.get(name, name), float(value.split()[0])


def read_lines(path: Path, notes: list[str]) -> Iterator[dict[str, Any]]:
    """The objects of a .jsonl file, none where there is no file; what is unreadable is noted."""
    unreadable = []
    for number, line in enumerate(_text_of(path).splitlines(), start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict):
            yield row
        else:
            unreadable.append(number)
    if unreadable:
        named = ", ".join(f"line {number}" for number in unreadable[:NAMED_LINES])
        more = len(unreadable) - NAMED_LINES
        named += f" and {more} more" if more > 0 else ""
        notes.append(f"{path}: {named} cannot be read, passed over")


def _text_of(path: Path) -> str:
    """A file's text; none where there is no file."""
    try:
        with open(path, "rb", opener=regular_only) as file:
            return file.read().decode(errors="replace")
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error


def broken_steps(folder: Path) -> list[int]:
    """The steps that the run has left the record of a failure of."""
    names = [re.fullmatch(r"broken_step_(\d+)\.json", path.name) for path in folder.iterdir()]
    return sorted(int(name[1]) for name in names if name)


# What lies beside them


def read_settings(path: Path, notes: list[str]) -> dict[str, Any]:
    """The run's config as plain values; none where it cannot be read."""
    try:
        return read_yaml(path)
    except UserError as error:
        notes.append(str(error))
        return {}


def whole_number(record: Mapping[str, Any], key: str) -> int | None:
    """The value of `key`, if it is one and not below 0."""
    value = record.get(key)
    return value if type(value) is int and value >= 0 else None


def read_held_out(path: Path, notes: list[str]) -> dict[HeldOut, Curve]:
    """The held-out losses over the steps, each bin of t by itself."""
    points: dict[HeldOut, dict[int, float]] = {}
    for row in read_lines(path, notes):
        step = whole_number(row, "step")
        for key, value in _held_out_in(row):
            if step is not None:
                points.setdefault(key, {})[step] = value
    return {key: Curve.of(values) for key, values in points.items()}


def _held_out_in(row: Mapping[str, Any]) -> Iterator[tuple[HeldOut, float]]:
    """The losses of one line; what has another form is left out."""
    for whose, losses in row.items():
        for loss, bins in losses.items() if isinstance(losses, dict) else ():
            if isinstance(bins, list) and all(isinstance(value, int | float) for value in bins):
                for number, value in enumerate(bins):
                    yield HeldOut(loss, whose, number, len(bins)), float(value)


def read_scores(folder: Path) -> list[Score]:
    """The scores of the sample files whose step is known, by step."""
    found = []
    for name, record in read_records(folder).items():
        num_images = whole_number(record, "num_images")
        origin = record if "step" in record else origin_of(folder / name, num_images)
        step, jumps = whole_number(origin, "step"), whole_number(origin, "NFE")
        if step is not None:
            found.append(Score(step, jumps, num_images, record["scores"], Yardstick.of(record)))
    return sorted(found, key=lambda score: (score.step, score.jumps or 0))


def read_checkpoints(folder: Path, run: RecordedRun) -> None:
    """Sizes of the checkpoints, and what the newest was made by.

    Its settings are newer than those of config.yaml, where a run went on with others.
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
