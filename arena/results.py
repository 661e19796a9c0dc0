"""The arena's results on disk: a JSON object a line, each of one data set and one part."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from support.system.files import UserError, atomic_write

RESULTS_FILE, COSTS_FILE = "results.jsonl", "costs.jsonl"
FILES = (RESULTS_FILE, COSTS_FILE)

Row = dict[str, Any]


def read_rows(path: Path) -> list[Row]:
    """The rows of a file; none where it is not there. UserError names a line that is damaged."""
    rows = []
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or "data" not in row:
            raise UserError(
                f"{path}: line {number} is damaged; delete the file, and arena/run.py writes it "
                "anew from the runs beside it"
            )
        rows.append(row)
    return rows


def add_rows(path: Path, new: Iterable[Row]) -> None:
    """Write rows to a file; those of other parts, or of another data set, stay."""
    new = list(new)
    replaced = {_kind(row) for row in new}
    kept = [row for row in read_rows(path) if _kind(row) not in replaced]
    with atomic_write(path) as file:
        file.write("".join(json.dumps(row) + "\n" for row in [*kept, *new]).encode())


def _kind(row: Row) -> tuple[Any, Any]:
    return row["data"], row.get("part")
