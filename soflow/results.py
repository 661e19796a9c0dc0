"""What is known of a folder of samples: scores as lines, as records and as a table.

A folder has eval_results.txt, which people read and older runs left, and eval_results.jsonl.
"""

import contextlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path

from soflow.files import UserError, append_line, natural_key

COLUMNS = ("IS", "FID", "sFID", "FD", "sFD", "prec", "recall")
LINE = re.compile(r"(?P<file>.+) # (?P<scores>IS: .+)", re.DOTALL)


@dataclass(frozen=True)
class Stamp:
    """Size and time of a file: what tells whether it is the one that was scored."""

    size_bytes: int
    modified_ns: int

    @classmethod
    def of(cls, path: Path) -> "Stamp":
        try:
            status = path.stat()
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from error
        return cls(status.st_size, status.st_mtime_ns)


@dataclass
class Results:
    """eval_results.txt, which people read and older runs left, and eval_results.jsonl, the truth.

    A record is written before its line; a line that a killed process did not write is added when
    the folder is opened again.
    """

    folder: Path
    lines: dict[str, list[str]] = field(default_factory=dict)  # file name -> scores as text
    records: dict[str, dict] = field(default_factory=dict)  # file name -> its last record

    @classmethod
    def open(cls, folder: Path) -> "Results":
        results = cls(folder)
        for text in _whole_lines(folder / "eval_results.txt"):
            if match := LINE.fullmatch(text.rstrip()):
                results.lines.setdefault(match["file"], []).append(match["scores"])
        for text in _whole_lines(folder / "eval_results.jsonl"):
            if record := _parse_record(text):
                results.records[record["file"]] = record
        for name, record in results.records.items():
            if format_scores(record["scores"]) not in results.lines.get(name, []):
                results._add_line(name, record)
        return results

    def has(self, name: str, stamp: Stamp, reference_sha256: str, graph_sha256: str) -> bool:
        """Whether a file is scored: by a line without a record, or by a record that still fits."""
        record = self.records.get(name)
        if record is None:
            return name in self.lines
        return (
            record.get("size_bytes") == stamp.size_bytes
            and record.get("modified_ns") == stamp.modified_ns
            and _digest(record, "reference") == reference_sha256
            and _digest(record, "graph") == graph_sha256
        )

    def add(self, record: dict) -> None:
        """Keep a new record and its line."""
        append_line(self.folder / "eval_results.jsonl", json.dumps(record))
        self.records[record["file"]] = record
        self._add_line(record["file"], record)

    def _add_line(self, name: str, record: dict) -> None:
        text = format_scores(record["scores"])
        append_line(self.folder / "eval_results.txt", f"{name} # {text}")
        self.lines.setdefault(name, []).append(text)

    def table(self) -> str:
        """All files with their last scores, in natural order."""
        rows = {name: parse_scores(texts[-1]) for name, texts in self.lines.items()}
        columns = [column for column in COLUMNS if any(column in row for row in rows.values())]
        width = max(map(len, rows), default=4)
        lines = [f"{'file':{width}}" + "".join(f"{column:>12}" for column in columns)]
        for name in sorted(rows, key=natural_key):
            cells = (rows[name].get(column) for column in columns)
            texts = ("-" if cell is None else f"{cell:.4f}" for cell in cells)
            lines.append(f"{name:{width}}" + "".join(f"{text:>12}" for text in texts))
        return printable("\n".join(lines))


def format_scores(scores: dict[str, float]) -> str:
    """`IS: .., FID: .., sFID: .., prec: .., recall: ..` in full precision."""
    return ", ".join(f"{column}: {scores[column]!r}" for column in COLUMNS if column in scores)


def parse_scores(text: str) -> dict[str, float]:
    """The inverse of `format_scores`; what it does not understand is left out."""
    scores = {}
    for column, number in re.findall(r"(\w+): ([^\s,]+)", text):
        with contextlib.suppress(ValueError):
            scores[column] = float(number)
    return scores


def _whole_lines(path: Path) -> list[str]:
    """Lines of a file that end; what follows the last line end was torn by a killed process."""
    try:
        text = path.read_bytes().decode(errors="surrogateescape") if path.exists() else ""
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    return text.split("\n")[:-1]


def _parse_record(text: str) -> dict | None:
    """A record as `score_file` makes it, or None: torn lines and other content are passed over."""
    try:
        record = json.loads(text)
        scores = {column: float(value) for column, value in record["scores"].items()}
        return {**record, "file": str(record["file"]), "scores": scores}
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return None


def _digest(record: dict, part: str) -> str | None:
    value = record.get(part)
    return value.get("sha256") if isinstance(value, dict) else None


def printable(text: str) -> str:
    """`text` with those bytes of file names replaced that are not UTF-8."""
    return text.encode(errors="replace").decode()
