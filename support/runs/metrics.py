"""metrics.jsonl: a run's numbers by name, one JSON object for each line of metrics in the log."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from support.system.files import append_line, atomic_write

METRICS_FILE = "metrics.jsonl"
HELD_OUT_FILE = "held_out.jsonl"


def append_numbers(path: Path, numbers: Mapping[str, Any]) -> None:
    """Add a line; `numbers` has the `step` that it is of. A number that is not finite is null."""
    # JSON has no word for NaN; a run ends at one, so that none is lost by this.
    finite = {name: None if value != value else value for name, value in numbers.items()}
    append_line(path, json.dumps(finite, allow_nan=False))


def cut_after(path: Path, step: int) -> None:
    """Leave of a file of numbers what is not later than `step`, at once or not at all.

    Lines are in the order of their steps; one without its end, which a kill left, is cut, too.
    """
    if not path.exists():
        return
    content = path.read_bytes()
    end = 0
    for line in content.splitlines(keepends=True):
        if not line.endswith(b"\n") or _step_of(line) > step:
            break
        end += len(line)
    if end < len(content):
        with atomic_write(path) as file:
            file.write(content[:end])


def _step_of(line: bytes) -> float:
    """The step of a line; before all others where it cannot be read: whoever reads it says so."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError, RecursionError):
        return -1
