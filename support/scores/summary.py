"""A folder's scores as a table, with groups of seeds and what a reader should not conclude."""

from collections.abc import Mapping, Sequence
from math import floor, inf, log10
from pathlib import Path
from typing import NamedTuple

import numpy as np

from support.scores.table import (
    COLUMNS,
    FEW_IMAGES,
    FRECHET,
    KERNEL,
    SAMPLES_NAME,
    Yardstick,
    listed,
    part,
    printable,
    read_record,
)
from support.system.files import natural_key

RETRAINING = 0.013  # of FID: what training again may change (arXiv 2606.20536)
# Entries of the record beside a sample file in which the files of a group agree.
GROUPED_BY = ("weights_sha256", "labels", "noise_stream", "sampler")


class Value(NamedTuple):
    """A score, and what is known of its spread: half an interval, or a deviation over seeds."""

    mean: float
    spread: float | None = None

    def text(self, column: str) -> str:
        digits = 6 if column in KERNEL else 4
        return f"{self.mean:.{digits}f}" if self.spread is None else self.with_spread("±")

    def with_spread(self, sign: str) -> str:
        """Both numbers, to two digits of the spread."""
        spread = self.spread or 0.0
        digits = max(0, 1 - floor(log10(spread))) if 0 < spread < inf else 4
        return f"{self.mean:.{digits}f}{sign}{spread:.{digits}f}"


def summary(folder: Path, records: Mapping[str, dict], yardstick: Yardstick) -> str:
    """All files with their last scores, in natural order; then groups of seeds; then remarks."""
    records = {name: records[name] for name in sorted(records, key=natural_key)}
    columns = [name for name in COLUMNS if any(name in r["scores"] for r in records.values())]
    values = {name: _values(record) for name, record in records.items()}
    rows = [["file", "images", "step", "NFE", *columns, "distances"]]
    rows += [_row(name, record, columns, values[name]) for name, record in records.items()]
    for name, members in seed_groups(folder, records).items():
        scores = [record["scores"] for record in members]
        spread = {name: over_seeds([of.get(name) for of in scores]) for name in columns}
        known = {column: value for column, value in spread.items() if value}
        rows.append(_row(name, members[0], columns, known))
    name_width, *widths = (max(map(len, column)) for column in zip(*rows, strict=True))
    lines = [
        "  ".join([name.ljust(name_width), *map(str.rjust, cells, widths)]) for name, *cells in rows
    ]
    shown = [column for column in columns if column in FRECHET]
    few = [name for name, record in records.items() if _fewest_images(record) < FEW_IMAGES]
    foreign = [name for name, r in records.items() if Yardstick.of(r)[:2] != yardstick[:2]]
    alike = {name: values[name] for name in records if name not in foreign}
    fair = "".join(f", not {column}" for column in columns if column in KERNEL)
    remarks = {
        f"fewer than {FEW_IMAGES:,} images bias {', '.join(shown)} upwards{fair}": few,
        "by another reference or graph": foreign,
        **indistinct(alike, [column for column in columns if column in ("FID", "FD")]),
    }
    lines += [f"{remark}: {listed(names)}" for remark, names in remarks.items() if names]
    return printable("\n".join(lines))


def seed_groups(folder: Path, records: Mapping[str, dict]) -> dict[str, list[dict]]:
    """The records of files that differ in their seed alone, by a name for the group."""
    groups: dict[tuple, list[dict]] = {}
    for name, record in records.items():
        match = SAMPLES_NAME.fullmatch(Path(name).stem)
        if match and match["seed"]:
            beside = read_record(folder / Path(name).with_suffix(".json"))
            same = [str(beside.get(key)) for key in GROUPED_BY]
            title = f"{match['step']}_{match['NFE']}NFE"
            key = (title, record["num_images"], Yardstick.of(record), *same)
            groups.setdefault(key, []).append(record)
    return {
        f"{title}, mean of {len(members)} seeds": members
        for (title, *_), members in groups.items()
        if len(members) > 1
    }


def indistinct(values: Mapping[str, Mapping[str, Value]], columns: list[str]) -> dict:
    """Remarks on files whose distance does not show them to be worse than the best one."""
    remarks = {}
    for column in columns:
        found = {name: of[column] for name, of in values.items() if column in of}
        best = min(found, key=lambda name: found[name].mean, default=None)
        if best is None:
            continue
        low = found.pop(best)
        overlap = [name for name, value in found.items() if not differ(low, value)]
        near = [n for n, v in found.items() if v.mean - low.mean < RETRAINING * low.mean]
        remarks[f"{column} not shown to differ from {best}, by the intervals"] = overlap
        remarks[
            f"{column} within {RETRAINING:.1%} of {best}, as retraining alone gives "
            "(arXiv 2606.20536)"
        ] = near
    return remarks


def differ(a: Value, b: Value) -> bool:
    """Whether two values differ by more than their intervals; True where one has none."""
    if a.spread is None or b.spread is None:
        return True
    return abs(a.mean - b.mean) > (a.spread**2 + b.spread**2) ** 0.5


def _values(record: Mapping) -> dict[str, Value]:
    halves = part(record, "intervals")
    return {column: Value(value, halves.get(column)) for column, value in record["scores"].items()}


def over_seeds(values: Sequence[float | None]) -> Value | None:
    """The mean and, of two values or more, the deviation; None where a value is missing."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return None
    with np.errstate(invalid="ignore"):  # of an infinite value
        deviation = float(np.std(known, ddof=1)) if len(known) > 1 else None
    return Value(float(np.mean(known)), deviation)


def _row(name: str, record: Mapping, columns: list[str], values: Mapping[str, Value]) -> list[str]:
    counts = (record.get(key) for key in ("num_images", "step", "NFE"))
    texts = [values[column].text(column) if column in values else "-" for column in columns]
    return [
        name,
        *("-" if count is None else str(count) for count in counts),
        *texts,
        str(Yardstick.of(record).distances),
    ]


def _fewest_images(record: Mapping) -> int:
    """The number of images of a file, or behind the statistics of its reference, if smaller."""
    sources = part(part(record, "reference"), "statistics").values()
    counts = [source.get("num_images") for source in sources if isinstance(source, dict)]
    counts.append(record.get("num_images"))
    return min((count for count in counts if isinstance(count, int)), default=FEW_IMAGES)
