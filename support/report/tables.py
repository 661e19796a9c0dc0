"""Tables of a report, as Markdown, CSV and LaTeX; the page makes its own HTML of them."""

import csv
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

from support.scores.summary import Value, differ
from support.system.files import UserError, atomic_write, refuse_foreign
from support.system.settings import either

LATEX_SPECIAL = str.maketrans(
    {character: f"\\{character}" for character in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    | {"±": r"$\pm$"}
)


@dataclass
class Table:
    """Rows of values, None for missing ones, and which cells are the best of their column."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    best: set[tuple[int, int]] = field(default_factory=set)  # row, column
    notes: Sequence[str] = ()  # lines under it

    def cells(
        self, escape: Callable[[str], str], bold: Callable[[str], str]
    ) -> Iterable[list[str]]:
        """The rows as text in some format."""
        for i, row in enumerate(self.rows):
            texts = [escape(text_of(value)) for value in row]
            yield [bold(text) if (i, j) in self.best else text for j, text in enumerate(texts)]


def mark_best(table: Table, better: dict[str, str]) -> None:
    """Mark the "lower" or "higher" values of the columns in `better`, unless all are the same.

    A mean over seeds is marked too if the deviations do not show that it differs from the best.
    """
    for column in better.keys() & {*table.columns}:
        j = table.columns.index(column)
        cells = {i: row[j] for i, row in enumerate(table.rows) if row[j] is not None}
        values = {i: c if isinstance(c, Value) else Value(c) for i, c in cells.items()}
        finite = {i: value for i, value in values.items() if isfinite(value.mean)}
        if finite and len({*values.values()}) > 1:
            choose = min if better[column] == "lower" else max
            best = choose(finite.values(), key=lambda value: value.mean)
            marked = (i for i, v in finite.items() if v.mean == best.mean or not differ(v, best))
            table.best |= {(i, j) for i in marked}


def text_of(value: Any) -> str:
    """A value for a reader: four digits of a number with a fraction, two of a deviation."""
    if value is None:
        return "-"
    if isinstance(value, Value):
        return text_of(value.mean) if value.spread is None else value.with_spread(" ± ")
    return f"{value:#.4g}".rstrip(".") if isinstance(value, float) else str(value)


def as_markdown(table: Table) -> str:
    """A table as GitHub shows it."""

    def escape(text: str) -> str:
        return text.replace("|", "\\|")

    head = [[escape(column) for column in table.columns], ["---"] * len(table.columns)]
    rows = [*head, *table.cells(escape, "**{}**".format)]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def as_csv(table: Table) -> str:
    """For other programs: values in full, nothing bold, deviations in columns of their own."""
    columns: list[list] = []
    for name, *cells in zip(table.columns, *table.rows, strict=True):
        if any(isinstance(cell, Value) for cell in cells):
            columns.append([name, *(cell and cell.mean for cell in cells)])
            columns.append([f"{name} deviation", *(cell and cell.spread for cell in cells)])
        else:
            columns.append([name, *cells])
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows(zip(*columns, strict=True))
    return file.getvalue()


def as_latex(table: Table) -> str:
    """As a LaTeX tabular, which needs the package booktabs."""

    def escape(text: str) -> str:
        return text.translate(LATEX_SPECIAL)

    columns = [escape(column) for column in table.columns]
    rows = [columns, *table.cells(escape, "\\textbf{{{}}}".format)]
    head, *body = (f"{' & '.join(row)} \\\\\n" for row in rows)
    begin, end = f"\\begin{{tabular}}{{l{'r' * (len(columns) - 1)}}}\n", "\\end{tabular}\n"
    return f"{begin}\\toprule\n{head}\\midrule\n{''.join(body)}\\bottomrule\n{end}"


FORMATS = {".md": as_markdown, ".csv": as_csv, ".tex": as_latex}
# In the head of a table of runs, which tells it from other files.
MARKS = {".md": b"| step | NFE |", ".csv": b",step,NFE,", ".tex": b" & step & NFE &"}


def check_place(path: Path) -> None:
    """UserError if the file has no known ending, or exists and is not such a table."""
    if path.suffix not in FORMATS:
        raise UserError(f"--table {path}: must end in {either(FORMATS)}")
    refuse_foreign(path, MARKS[path.suffix], "say another --table")


def write_table(path: Path, table: Table) -> None:
    """Write a table in the format of the file's ending."""
    with atomic_write(path) as file:
        file.write(FORMATS[path.suffix](table).encode(errors="replace"))
