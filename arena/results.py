"""The arena's results on disk: a JSON object a line, each of one data set and one part."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from support.system.files import atomic_write

RESULTS_FILE, COSTS_FILE = "results.jsonl", "costs.jsonl"
FILES = (RESULTS_FILE, COSTS_FILE)

Row = dict[str, Any]


def read_rows(path: Path) -> list[Row]:
    """The rows of a file; none where it is not there."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def add_rows(path: Path, new: Iterable[Row]) -> None:
    """Write rows to a file; those of other parts, or of another data set, stay."""
    new = list(new)
    replaced = {_kind(row) for row in new}
    kept = [row for row in read_rows(path) if _kind(row) not in replaced]
    with atomic_write(path) as file:
        file.write("".join(json.dumps(row) + "\n" for row in [*kept, *new]).encode())


def _kind(row: Row) -> tuple[Any, Any]:
    return row["data"], row.get("part")
