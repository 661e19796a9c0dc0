"""Tables of a report: for a page, and as Markdown, CSV and LaTeX."""

import csv
import html
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from support.system.files import UserError, atomic_write, refuse_foreign
from support.system.settings import either

LATEX_MEANS_SOMETHING_BY = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
}


@dataclass
class Table:
    """Rows of values, None where there is none, and which cells are the best of their column."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    best: set[tuple[int, int]] = field(default_factory=set)  # row, column

    def cells(
        self, escape: Callable[[str], str], bold: Callable[[str], str]
    ) -> Iterable[list[str]]:
        """The rows as text, in a format's way of writing."""
        for i, row in enumerate(self.rows):
            texts = [escape(text_of(value)) for value in row]
            yield [bold(text) if (i, j) in self.best else text for j, text in enumerate(texts)]


def mark_best(table: Table, better: dict[str, str]) -> None:
    """Mark the lowest or highest value of each column that `better` says this of."""
    for j, column in enumerate(table.columns):
        values = [(row[j], i) for i, row in enumerate(table.rows) if row[j] is not None]
        if column in better and len(values) > 1:
            choose = min if better[column] == "lower" else max
            best = choose(value for value, _ in values)
            table.best |= {(i, j) for value, i in values if value == best}


def text_of(value: Any) -> str:
    """A value as a reader wants it: four digits of a number with a fraction."""
    if value is None:
        return "-"
    return f"{value:#.4g}".rstrip(".") if isinstance(value, float) else str(value)


def as_html(table: Table) -> str:
    """For a page; numbers stand to the right."""
    head = "".join(f"<th>{html.escape(column)}</th>" for column in table.columns)
    rows = table.cells(html.escape, "<b>{}</b>".format)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def as_markdown(table: Table) -> str:
    """A table as GitHub shows it."""
    rows = [
        [escape_markdown(column) for column in table.columns],
        ["---"] * len(table.columns),
        *table.cells(escape_markdown, "**{}**".format),
    ]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def escape_markdown(text: str) -> str:
    return text.replace("|", "\\|")


def as_csv(table: Table) -> str:
    """For other programs: values in full, no value where there is none, nothing bold."""
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows([table.columns, *table.rows])
    return file.getvalue()


def as_latex(table: Table) -> str:
    """A tabular that needs the package booktabs."""
    columns = [escape_latex(column) for column in table.columns]
    rows = [" & ".join(row) for row in table.cells(escape_latex, "\\textbf{{{}}}".format)]
    lines = [
        f"\\begin{{tabular}}{{l{'r' * (len(columns) - 1)}}}",
        "\\toprule",
        f"{' & '.join(columns)} \\\\",
        "\\midrule",
        *(f"{row} \\\\" for row in rows),
        "\\bottomrule",
        "\\end{tabular}",
    ]
    return "\n".join(lines) + "\n"


def escape_latex(text: str) -> str:
    return "".join(LATEX_MEANS_SOMETHING_BY.get(character, character) for character in text)


FORMATS = {".md": as_markdown, ".csv": as_csv, ".tex": as_latex}
# What tells a table of runs from any other, by its first columns.
MARKS = {".md": b"| run | step | NFE |", ".csv": b"run,step,NFE,", ".tex": b"\nrun & step & NFE &"}


def check_place(path: Path) -> None:
    """UserError where a table's file does not end like a format that there is, or is another's."""
    if path.suffix not in FORMATS:
        raise UserError(f"--table {path}: must end in {either(FORMATS)}")
    refuse_foreign(path, MARKS[path.suffix], "say another --table")


def write_table(path: Path, table: Table) -> None:
    """Write a table in the format that the file's ending names."""
    with atomic_write(path) as file:
        file.write(FORMATS[path.suffix](table).encode(errors="replace"))
