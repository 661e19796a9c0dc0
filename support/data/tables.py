"""Tables of pictures, parquet or arrow files: their image and label columns, and a row's bytes.

Rows keep their order: a group of a parquet file's rows can only be read as a whole.
"""

import functools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from support.data.folders import LabelledFiles, numbered_classes, packed, with_progress
from support.system.files import UserError, shorten

if TYPE_CHECKING:
    import pyarrow as pa

# The column that is meant where several could be.
IMAGE_NAMES = ("image", "img", "jpg", "png")
LABEL_NAMES = ("label", "labels", "fine_label", "cls")


class TableRow(NamedTuple):
    """A picture in a table."""

    table: str
    name: str
    column: str
    group: int  # of rows that are stored together
    row: int  # in the group

    def __str__(self) -> str:
        return os.path.join(os.path.dirname(self.table), self.name)

    def read(self, most: int | None = None) -> bytes:
        """Its bytes, or its first `most`; OSError where the row has none."""
        cell = _read_group(self.table, self.group, self.column)[self.row].as_py()
        content = cell["bytes"] if isinstance(cell, dict) else cell
        if content is None:
            raise OSError(f"column {self.column} has no bytes here")
        return content[:most]

    @property
    def num_bytes(self) -> int:
        return len(self.read())


@dataclass(frozen=True)
class TableRows(LabelledFiles):
    """Pictures in tables."""

    tables: list[str]
    column: str
    places: np.ndarray  # int64 [N, 3]: the table's number, the group, and the row in it

    @property
    def names_tell_labels(self) -> bool:
        return False

    def __getitem__(self, index: int) -> TableRow:
        table, group, row = self.places[index].tolist()
        name = os.fsdecode(self.names[index])
        return TableRow(self.tables[table], name, self.column, group, row)

    def __iter__(self) -> Iterator[TableRow]:
        return (self[index] for index in range(len(self)))

    def sizes(self) -> Iterator[int]:
        """For each picture the bytes of its table: its own would have to be read."""
        return iter(np.array(self.some_sizes())[self.places[:, 0]].tolist())

    def checked_sizes(self) -> Iterable[int]:
        return self.sizes()

    def some_sizes(self) -> list[int]:
        return [os.stat(table).st_size for table in self.tables]


class Layout(NamedTuple):
    """What the columns of a table are."""

    image: str
    label: str
    class_names: list[str]  # none where the table does not say


def list_tables(source: Path, tables: Sequence[str]) -> TableRows:
    """The pictures in tables, row by row; UserError where a column or a label is missing."""
    layouts, names, labels, places = [], [], [], []
    for number, table in enumerate(with_progress(tables, len(tables), "reading labels", "table")):
        layout, own, groups = _read_labels(table)
        layouts.append(layout)
        if layout != layouts[0]:
            raise UserError(f"{table}: has other columns or classes than {tables[0]}")
        labels.append(own)
        names += [f"{os.path.basename(table)}:{row}" for row in range(len(own))]
        rows = [np.arange(count) for count in groups]
        which = np.repeat(np.arange(len(groups)), groups)
        places.append(np.stack([np.full(len(own), number), which, np.concatenate(rows)], axis=1))
    if not names:
        raise UserError(f"{source}: holds no pictures: its tables have no rows")
    image, _, class_names = layouts[0]
    return TableRows(
        folder=source,
        names=packed(names),
        labels=np.concatenate(labels),
        class_names=class_names or numbered_classes(np.concatenate(labels), str(source)),
        notes=[],
        tables=[*tables],
        column=image,
        places=np.concatenate(places).astype(np.int64),
    )


def _read_labels(table: str) -> tuple[Layout, np.ndarray, list[int]]:
    """The layout of a table, its labels, and the number of rows in each group."""
    try:
        if _is_parquet(table):
            import pyarrow.parquet as pq

            with pq.ParquetFile(table) as file:
                layout, metadata = _layout(table, file.schema_arrow), file.metadata
                column = file.read(columns=[layout.label], use_threads=False).column(0)
            groups = [metadata.row_group(k).num_rows for k in range(metadata.num_row_groups)]
        else:
            opened = _open_arrow(table)
            layout = _layout(table, opened.schema)
            column = opened.column(layout.label)
            groups = [len(chunk) for chunk in column.chunks]
    except UserError:
        raise
    except Exception as error:  # pyarrow raises several kinds on damaged files
        raise UserError(f"{table}: not a readable table ({shorten(error)})") from error
    if column.null_count:
        raise UserError(f"{table}: column {layout.label} lacks {column.null_count} labels")
    labels = column.to_numpy().astype(np.int64)
    allowed = len(layout.class_names) or np.iinfo(np.int64).max
    for row in np.flatnonzero((labels < 0) | (labels >= allowed)):
        raise UserError(f"{table}:{row}: has the {layout.label} {labels[row]}, which is no class")
    return layout, labels, groups or [0]


def _layout(table: str, schema: "pa.Schema") -> Layout:
    """The columns of pictures and labels: as `datasets` describes them, else by type and name."""
    import pyarrow as pa

    said = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    features: dict[str, Any] = said.get("info", {}).get("features", {})

    def choose(kind: str, usual: tuple[str, ...], described: str, fitting: list[str]) -> str:
        known = [name for name in fitting if features.get(name, {}).get("_type") == described]
        found = known or fitting
        meant = found if len(found) == 1 else [name for name in usual if name in found]
        if not meant:
            listed = ", ".join(schema.names)
            raise UserError(f"{table}: has {len(found)} {kind} columns; its columns are {listed}")
        return meant[0]

    def is_binary(of: "pa.DataType") -> bool:
        return pa.types.is_binary(of) or pa.types.is_large_binary(of)

    pictures, integers = [], []
    for column in schema:
        kind = column.type
        if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
            kind = kind.field("bytes").type
        if is_binary(kind):
            pictures.append(column.name)
        if pa.types.is_integer(kind):
            integers.append(column.name)
    image = choose("image", IMAGE_NAMES, "Image", pictures)
    label = choose("label", LABEL_NAMES, "ClassLabel", integers)
    return Layout(image, label, features.get(label, {}).get("names") or [])


def _is_parquet(table: str) -> bool:
    return table.lower().endswith(".parquet")


@functools.lru_cache(maxsize=2)
def _read_group(table: str, group: int, column: str) -> "pa.Array":
    """A column's cells in a group of rows."""
    if not _is_parquet(table):
        return _open_arrow(table).column(column).chunk(group)
    import pyarrow.parquet as pq

    with pq.ParquetFile(table) as file:
        return file.read_row_group(group, [column], use_threads=False).column(0)


@functools.lru_cache(maxsize=512)
def _open_arrow(table: str) -> "pa.Table":
    """An arrow file, mapped into memory: a stream, as `datasets` writes them, or with an index."""
    import pyarrow as pa

    mapped = pa.memory_map(table)
    try:
        return pa.ipc.open_stream(mapped).read_all()
    except pa.ArrowInvalid:
        return pa.ipc.open_file(mapped).read_all()
