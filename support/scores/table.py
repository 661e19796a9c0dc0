"""What is known of a folder of samples: scores as lines, as records and as a table."""

import contextlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from support.system.files import UserError, append_line, natural_key, regular_only

FRECHET = ("FID", "sFID", "FD", "sFD")
COLUMNS = ("IS", *FRECHET, "prec", "recall")
LINE = re.compile(r"(?P<file>.+) # (?P<scores>IS: .+)", re.DOTALL)
SAMPLES_NAME = re.compile(r"(?P<step>[0-9]{1,18})(_(?P<NFE>[0-9]{1,18})NFE_[0-9]+)?")  # no .npz
CHECKPOINT_NAME = re.compile(r"(.*/)?(?P<step>[0-9]{1,18})\.pt", re.DOTALL)
FEW_IMAGES = 10_000  # with fewer, Frechet distances are far too large
RECORD_LIMIT_BYTES = 1 << 20


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


class Yardstick(NamedTuple):
    """What scores are made by; those of the same yardstick can be compared."""

    reference_sha256: str | None
    graph_sha256: str | None
    distances: str | None

    @classmethod
    def of(cls, record: Mapping) -> "Yardstick":
        """The one of a record; records know their distances since there is a choice."""
        reference, graph = (_part(record, key).get("sha256") for key in ("reference", "graph"))
        return cls(reference, graph, record.get("distances", "exact"))


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
        results.records = read_records(folder)
        for name, record in results.records.items():
            if format_scores(record["scores"]) not in results.lines.get(name, []):
                results._add_line(name, record)
        return results

    def has(self, name: str, stamp: Stamp, yardstick: Yardstick) -> bool:
        """Whether a file is scored: by a line without a record, or by a record that still fits."""
        record = self.records.get(name)
        if record is None:
            return name in self.lines
        return (
            record.get("size_bytes") == stamp.size_bytes
            and record.get("modified_ns") == stamp.modified_ns
            and Yardstick.of(record) == yardstick
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

    def table(self, yardstick: Yardstick) -> str:
        """All files with their last scores, in natural order, and what to know when reading it."""
        rows = {name: self._row(name) for name in sorted(self.lines, key=natural_key)}
        columns = [column for column in COLUMNS if any(column in row for row in rows.values())]
        header = ["images", "step", "NFE", *columns, "distances"]
        texts = [["file", *header]]
        texts += [[name, *(_cell(row.get(key)) for key in header)] for name, row in rows.items()]
        name_width, *widths = (max(map(len, column)) for column in zip(*texts, strict=True))
        lines = [
            "  ".join([name.ljust(name_width), *map(str.rjust, cells, widths)])
            for name, *cells in texts
        ]
        frechet = ", ".join(column for column in columns if column in FRECHET)
        remarks = {
            f"{frechet} are biased upwards by fewer than {FEW_IMAGES:,} images": self._few_images(),
            "by another reference or graph, or not known by which": self._foreign(yardstick),
        }
        lines += [f"{remark}: {_listed(names)}" for remark, names in remarks.items() if names]
        return printable("\n".join(lines))

    def _row(self, name: str) -> dict[str, float | str | None]:
        """A file's row by column; of older lines not all is known."""
        record = self.records.get(name)
        if record is None:
            scores = parse_scores(self.lines[name][-1])
            return {**origin_of(self.folder / name), **scores}
        return {
            "images": record.get("num_images"),
            "step": record.get("step"),
            "NFE": record.get("NFE"),
            **record["scores"],
            "distances": str(Yardstick.of(record).distances),
        }

    def _few_images(self) -> list[str]:
        """Files with few images themselves, or in what they were compared with."""
        counts = {
            name: (record.get("num_images"), _part(record, "reference").get("statistics_images"))
            for name, record in self.records.items()
        }
        # Of some references it is not known.
        known = {name: list(filter(None, both)) for name, both in counts.items()}
        return [name for name, both in known.items() if min(both, default=FEW_IMAGES) < FEW_IMAGES]

    def _foreign(self, yardstick: Yardstick) -> list[str]:
        """Files whose scores cannot be compared with those by `yardstick`, as far as is known."""
        wanted = yardstick[:2]
        return [
            name for name in self.lines if Yardstick.of(self.records.get(name, {}))[:2] != wanted
        ]


def read_records(folder: Path) -> dict[str, dict]:
    """The last record of each file that a folder's eval_results.jsonl tells of."""
    found = map(_parse_record, _whole_lines(folder / "eval_results.jsonl"))
    return {record["file"]: record for record in found if record}


def _cell(value: float | str | None) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _listed(names: list[str]) -> str:
    names = sorted(names, key=natural_key)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def origin_of(path: Path, num_images: int | None = None) -> dict[str, int]:
    """`step` and `NFE` of a sample file where they are known, from its record or else its name.

    The record is {stem}.json beside it; it has to tell of as many images, if that is known.
    """
    match = SAMPLES_NAME.fullmatch(path.stem)
    origin = {key: int(text) for key, text in match.groupdict().items() if text} if match else {}
    record = read_record(path.with_suffix(".json"))
    if num_images not in (None, record.get("num_images")):
        return origin
    if match := CHECKPOINT_NAME.fullmatch(str(record.get("checkpoint"))):
        origin["step"] = int(match["step"])
    told = {"step": record.get("finished_steps"), "NFE": record.get("NFE")}
    return origin | {key: value for key, value in told.items() if type(value) is int}


def read_record(path: Path) -> dict:
    """What a .json records of a result; empty where there is none that can be read."""
    try:
        with open(path, "rb", opener=regular_only) as file:
            record = json.loads(file.read(RECORD_LIMIT_BYTES))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


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
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _part(record: Mapping, key: str) -> dict:
    value = record.get(key)
    return value if isinstance(value, dict) else {}


def printable(text: str) -> str:
    """`text` with those bytes of file names replaced that are not UTF-8."""
    return text.encode(errors="replace").decode()
