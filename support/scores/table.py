"""What is known about the sample files of a folder: their scores, as records and as lines."""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from support.system.files import UserError, append_line, regular_only


class Meaning(NamedTuple):
    """What a reader is told about a score or a metric."""

    sentence: str
    better: str = ""  # "lower" or "higher", if the value alone says which run is better
    section: str = ""  # of a report, if its curve is not with those of training


# All scores there are, in the order of columns.
SCORES = {
    "IS": Meaning("Inception Score: clear and varied samples score high.", "higher"),
    "FID": Meaning("Distance between samples and reference in Inception's features.", "lower"),
    "sFID": Meaning("The same in spatial features, which keep positions in the image.", "lower"),
    "FD": Meaning("Distance between samples and reference in the graph's features.", "lower"),
    "sFD": Meaning("The same in spatial features, which keep positions in the image.", "lower"),
    "KID": Meaning("Kernel distance in Inception's features; fair to few images.", "lower"),
    "KD": Meaning("Kernel distance in the graph's features; fair to few images.", "lower"),
    "prec": Meaning("Precision: the share of samples that look real.", "higher"),
    "recall": Meaning("Recall: the share of the real variety that the samples cover.", "higher"),
}
COLUMNS = tuple(SCORES)
FRECHET = ("FID", "sFID", "FD", "sFD")
KERNEL = ("KID", "KD")
LINE_COLUMNS = [column for column in COLUMNS if column not in KERNEL]  # as in ADM's lines
SAMPLES_NAME = re.compile(
    r"(?P<step>[0-9]{1,18})(_(?P<NFE>[0-9]{1,18})NFE_(?P<seed>[0-9]+))?"
)  # no .npz
CHECKPOINT_NAME = re.compile(r"(.*/)?(?P<step>[0-9]{1,18})\.pt", re.DOTALL)
FEW_IMAGES = 10_000  # with fewer, Frechet distances are far too large
RECORD_LIMIT_BYTES = 1 << 20


class Stamp(NamedTuple):
    """Size and time of files, which tell whether they are still those that were scored."""

    size_bytes: int
    modified_ns: int

    @classmethod
    def of(cls, *paths: str | Path) -> "Stamp":
        """The total size and the latest time."""
        try:
            found = [os.stat(path) for path in paths]
        except OSError as error:
            raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from error
        return cls(sum(s.st_size for s in found), max(s.st_mtime_ns for s in found))


class Yardstick(NamedTuple):
    """What measured the scores; scores of the same yardstick can be compared."""

    reference_sha256: str | None
    graph_sha256: str | None
    distances: str | None

    @classmethod
    def of(cls, record: Mapping) -> "Yardstick":
        """The yardstick of a record."""
        reference, graph = (part(record, key).get("sha256") for key in ("reference", "graph"))
        return cls(reference, graph, record.get("distances", "exact"))


@dataclass
class Results:
    """eval_results.jsonl, the records, and eval_results.txt, a line for each, for people.

    A record is written before its line. A line that a killed process did not write is added when
    the folder is opened again.
    """

    folder: Path
    records: dict[str, dict] = field(default_factory=dict)  # file name -> its last record

    @classmethod
    def open(cls, folder: Path) -> "Results":
        results = cls(folder, read_records(folder))
        written = set(_whole_lines(folder / "eval_results.txt"))
        for line in map(line_of, results.records.values()):
            if line not in written:
                append_line(folder / "eval_results.txt", line)
        return results

    def has(self, name: str, stamp: Stamp, yardstick: Yardstick, replicates: int = 0) -> bool:
        """Whether a file has a record that still fits, with intervals by so many replicates."""
        record = self.records.get(name, {})
        known = (record.get("size_bytes"), record.get("modified_ns"), Yardstick.of(record))
        return known == (*stamp, yardstick) and replicates in (0, record.get("bootstrap"))

    def add(self, record: dict) -> None:
        """Keep a new record and its line."""
        append_line(self.folder / "eval_results.jsonl", json.dumps(record))
        self.records[record["file"]] = record
        append_line(self.folder / "eval_results.txt", line_of(record))


def line_of(record: Mapping) -> str:
    """`{file} # IS: .., FID: .., sFID: .., prec: .., recall: ..` in full precision."""
    scores = record["scores"]
    texts = [f"{column}: {scores[column]!r}" for column in LINE_COLUMNS if column in scores]
    return f"{record['file']} # {', '.join(texts)}"


def read_records(folder: Path) -> dict[str, dict]:
    """The last record of each file in a folder's eval_results.jsonl."""
    found = map(_parse_record, _whole_lines(folder / "eval_results.jsonl"))
    return {record["file"]: record for record in found if record}


def listed(names: list[str]) -> str:
    """The first names, and how many more there are."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def origin_of(path: Path, num_images: int | None = None) -> dict[str, int]:
    """`step` and `NFE` of a sample file, as far as its record or else its name tells.

    The record is {stem}.json beside it. It is ignored if it is about another number of images.
    """
    match = SAMPLES_NAME.fullmatch(path.stem)
    named = {key: match[key] for key in ("step", "NFE")} if match else {}
    origin = {key: int(text) for key, text in named.items() if text}
    record = read_record(path.with_suffix(".json"))
    if num_images not in (None, record.get("num_images")):
        return origin
    if match := CHECKPOINT_NAME.fullmatch(str(record.get("checkpoint"))):
        origin["step"] = int(match["step"])
    told = {"step": record.get("finished_steps"), "NFE": record.get("NFE")}
    return origin | {key: value for key, value in told.items() if type(value) is int}


def read_record(path: Path) -> dict:
    """The record in a .json; empty if there is none that can be read."""
    try:
        with open(path, "rb", opener=regular_only) as file:
            record = json.loads(file.read(RECORD_LIMIT_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def _whole_lines(path: Path) -> list[str]:
    """The complete lines of a file; a killed process may have left a part of one at the end."""
    try:
        text = path.read_bytes().decode(errors="surrogateescape") if path.exists() else ""
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    return text.split("\n")[:-1]


def _parse_record(text: str) -> dict | None:
    """A record as `Results.add` writes it; None for torn lines and other content."""
    try:
        record = json.loads(text)
        scores = {column: float(value) for column, value in record["scores"].items()}
        return {**record, "file": str(record["file"]), "scores": scores}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def part(record: Mapping, key: str) -> dict:
    value = record.get(key)
    return value if isinstance(value, dict) else {}


def printable(text: str) -> str:
    """`text` with a replacement for bytes of file names that are not UTF-8."""
    return text.encode(errors="replace").decode()
