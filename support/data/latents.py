"""The latent file, imagenet_latent.hdf5: what it says of itself, its writer's frame, its reader.

Entries: `latents` [N, 8, S, S], the VAE's posterior mean and then its standard deviation, in the
VAE's own scale; `labels` int64 [N]; int64 scalars `amount` = N and `latent_size` = S. Attributes
say what made the file; the published code writes none.
"""

import contextlib
import io
import itertools
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import h5py
import numpy as np
import torch
from pydantic import TypeAdapter
from torch import Tensor

from support.data.vae import LATENT_CHANNELS, LATENT_SCALE, PIXELS_PER_LATENT
from support.system.files import UserError, shorten

LATENT_FILE = "imagenet_latent.hdf5"
MOMENT_CHANNELS = 2 * LATENT_CHANNELS
UNSAID_CLASSES = 1000  # of a file without attributes: ImageNet's
ROWS_LOOKED_AT = 256  # of the values, before training
MAX_DEFLATION = 1100  # times that HDF5's own compression can shrink: a file can promise no more
CHUNK_LIMIT_BYTES = 1 << 28  # unpacked whole for the sake of one row; h5py's own choice is 1 MB
NEIGHBOURS_AT_ONCE = 256  # rows of one call of the system, which takes 1024 buffers at most
FLOATS = (np.float16, np.float32, np.float64)

# N rows, B of them read at a time, S latent side


@dataclass(frozen=True)
class LatentInfo:
    """What a file's attributes say of it, under the same names."""

    vae: str  # as it was named
    vae_revision: str  # the hub's commit; nothing for a folder
    vae_sha256: str  # of the weights, by `digests.weights_digest`
    latent_scale: float  # by which latents are to be multiplied: the file has them without it
    image_size: int  # side of the pictures, in pixels
    dtype: str  # float32 or float16
    seed: int
    images_sha256: str  # of the pictures' names and sizes
    class_names: tuple[str, ...]
    class_counts: tuple[int, ...]
    code_version: str
    exif: str = "ignore"  # apply: pictures were turned upright first; older files do not say
    precision: str = ""  # fp32, tf32 or bf16, that the VAE computed in; older files do not say

    def write(self, attributes: h5py.AttributeManager) -> None:
        # No more than what UTF-8 has a form for: folder names may hold any bytes.
        names = [name.encode(errors="replace").decode() for name in self.class_names]
        values = {
            **vars(self),
            "class_names": np.array(names, h5py.string_dtype()),
            "class_counts": np.array(self.class_counts, np.int64),
        }
        for name, value in values.items():
            attributes[name] = value

    @classmethod
    def read(cls, attributes: Mapping[str, Any]) -> "LatentInfo":
        """What `write` wrote; ValueError for anything else."""
        values = {name: attributes[name] for name in cls.__annotations__ if name in attributes}
        plain = {name: np.asarray(value).tolist() for name, value in values.items()}
        return TypeAdapter(cls).validate_python(plain)


def write_frame(file: IO[bytes], labels: np.ndarray, info: LatentInfo) -> None:
    """Write to an empty file a latent file in which all but the values of `latents` is there.

    The values are one run of bytes at `locate_latents`, to be written there without HDF5: a process
    killed in the middle cannot spoil the structure, which is not touched again.
    """
    # Made in memory: on a full disk HDF5 does not fail, it crashes.
    frame = _SparseFile()
    size = info.image_size // PIXELS_PER_LATENT
    with h5py.File(_create_file(frame)) as entries:
        info.write(entries.attrs)
        entries.create_dataset("labels", data=labels.astype(np.int64))
        entries["amount"] = np.int64(len(labels))
        entries["latent_size"] = np.int64(size)
        layout = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        layout.set_layout(h5py.h5d.CONTIGUOUS)
        layout.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        layout.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
        layout.set_obj_track_times(False)
        shape = (len(labels), MOMENT_CHANNELS, size, size)
        kind = h5py.h5t.py_create(np.dtype(info.dtype).newbyteorder("<"))
        h5py.h5d.create(entries.id, b"latents", kind, h5py.h5s.create_simple(shape), layout)
    frame.copy_to(file)


def _create_file(target: io.RawIOBase) -> h5py.h5f.FileID:
    """An empty HDF5 file in `target`, the same bytes whenever it is made."""
    access = h5py.h5p.create(h5py.h5p.FILE_ACCESS)
    access.set_fileobj_driver(h5py.h5fd.fileobj_driver, target)
    # Attributes may then have more than 64 KiB, which the names of many classes need.
    access.set_libver_bounds(h5py.h5f.LIBVER_V18, h5py.h5f.LIBVER_V18)
    root = h5py.h5p.create(h5py.h5p.FILE_CREATE)
    root.set_obj_track_times(False)
    return h5py.h5f.create(b"frame", h5py.h5f.ACC_TRUNC, root, access)


class _SparseFile(io.RawIOBase):
    """A file in memory, of which only what was written takes room."""

    def __init__(self):
        self._written: list[tuple[int, bytes]] = []  # offset, content
        self._size = self._position = 0

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = offset + (0, self._position, self._size)[whence]
        return self._position

    def truncate(self, size: int | None = None) -> int:
        self._size = self._position if size is None else size
        return self._size

    def write(self, data: Any) -> int:
        content = bytes(data)
        self._written.append((self._position, content))
        self._position += len(content)
        self._size = max(self._size, self._position)
        return len(content)

    def readinto(self, buffer: Any) -> int:
        view, start = memoryview(buffer).cast("B"), self._position
        view[:] = bytes(len(view))
        for offset, content in self._written:
            first, end = max(start, offset), min(start + len(view), offset + len(content))
            if first < end:
                view[first - start : end - start] = content[first - offset : end - offset]
        self._position += len(view)
        return len(view)

    def copy_to(self, file: IO[bytes]) -> None:
        """Write this into an empty file, as sparsely."""
        for offset, content in self._written:
            file.seek(offset)
            file.write(content)
        file.truncate(self._size)


class Location(NamedTuple):
    """Where in a file the values of `latents` lie, in bytes: in one piece, row after row."""

    offset: int
    row_bytes: int


def locate_latents(path: Path) -> Location:
    """The place for the values in a file of `write_frame`."""
    with h5py.File(path, "r", locking=False) as file:
        latents = file["latents"]
        return Location(latents.id.get_offset(), latents.nbytes // len(latents))


# Reading


class LatentReader:
    """Rows of a latent file, opened in each process that reads; UserError for a bad file.

    Whole batches are read at once: by the system's own calls where the values lie in the file as
    they are, by h5py in ascending order where they are compressed or in chunks. Not from memory
    mapped onto the file: where that is cut short meanwhile, the process would end without a word.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._process: int | None = None
        self._file: Any = None
        with _opened(self.path) as file, self._explained():
            self._look_at(file)

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def size(self) -> int:
        return self.shape[2]

    @property
    def is_plain(self) -> bool:
        """Whether values lie in the file as they are, and h5py is not needed to read them."""
        return self._offset is not None

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes; numbers up to ImageNet's thousand where the file does not say."""
        if self.info:
            return self.info.class_names
        return tuple(str(label) for label in range(UNSAID_CLASSES))

    def read(self, indices: Sequence[int]) -> Tensor:
        """Moments [B, 8, S, S] of rows in any order, as stored; UserError where one is not finite.

        A row may be asked for more than once.
        """
        rows = np.asarray(indices, np.int64)
        moments = torch.from_numpy(self._read_plain(rows) if self.is_plain else self._unpack(rows))
        # One sum instead of a look at every value: it is finite only if they all are.
        if not moments.sum(dtype=torch.float32).isfinite():
            bad = rows[~moments.isfinite().flatten(1).all(dim=1).numpy()]
            if bad.size:
                raise UserError(f"{self.path}: row {bad.min()} has values that are not finite")
        return moments

    def fetch(self, indices: Sequence[int]) -> None:
        """Have rows in the system's cache, from where `read` of any process has them at once."""
        scratch = np.empty(self.shape[1:], self.dtype)  # one for all: the cache is what matters
        self._fill([scratch] * len(indices), np.asarray(indices, np.int64))

    def check_values(self) -> None:
        """UserError where some of the values, spread over the file, cannot be of latents."""
        count = min(ROWS_LOOKED_AT, len(self))
        rows = np.unique(np.linspace(0, len(self) - 1, count).astype(np.int64))
        moments = self.read(rows.tolist())
        deviations = moments[:, LATENT_CHANNELS:]
        if (bad := rows[(deviations < 0).flatten(1).any(dim=1).numpy()]).size:
            raise UserError(
                f"{self.path}: row {bad[0]} has negative standard deviations: channels 4 to 7 of "
                "latents must be those of the VAE's posterior"
            )
        # What a merge that was cut short leaves where it did not get to.
        if (bad := rows[(moments == 0).flatten(1).all(dim=1).numpy()]).size:
            raise UserError(f"{self.path}: row {bad[0]} is all zeros: the file is not complete")

    def __getstate__(self) -> dict[str, Any]:
        """Without what is open: loader workers that are not forked get a copy."""
        return {**vars(self), "_process": None, "_file": None}

    def _look_at(self, file: h5py.File) -> None:
        latents, labels = _dataset(file, "latents"), _dataset(file, "labels")
        self.shape, self.dtype = latents.shape, latents.dtype
        self._check_shapes(latents, labels, file)
        self.labels = torch.from_numpy(labels[()].astype(np.int64))
        self.info = self._read_info(file)
        # Where the values lie, if they do as they are, in one piece.
        self._offset = latents.id.get_offset() if latents.dtype.isnative else None

    def _own_file(self) -> Any:
        """The open file, of this process alone: a loader worker is not to share it."""
        if self._process != os.getpid():
            self._file = io.FileIO(self.path) if self.is_plain else _opened(self.path)["latents"]
            self._process = os.getpid()
        return self._file

    def _read_plain(self, rows: np.ndarray) -> np.ndarray:
        values = np.empty((len(rows), *self.shape[1:]), self.dtype)
        self._fill(list(values), rows)
        return values

    def _fill(self, buffers: Sequence[np.ndarray], rows: np.ndarray) -> None:
        """Read each row into its buffer, neighbours by one call; UserError at the file's end."""
        row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        with self._explained():
            descriptor = self._own_file().fileno()
            for places in _runs(rows):
                row = int(rows[places[0]])
                wanted = [buffers[place] for place in places]
                got = os.preadv(descriptor, wanted, self._offset + row * row_bytes)
                if got < len(places) * row_bytes:
                    raise UserError(
                        f"{self.path}: ends before row {row + got // row_bytes} of {len(self)} "
                        "does: it was cut short or replaced after it was opened"
                    )

    def _unpack(self, rows: np.ndarray) -> np.ndarray:
        # In ascending order and once each, as h5py wants them.
        ascending, places = np.unique(rows, return_inverse=True)
        with self._explained():
            values = self._own_file()[ascending][places]
        return values.astype(self.dtype.newbyteorder("="))

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """A block in which what the system or h5py cannot read is a UserError."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:  # h5py raises many kinds on damaged files
            raise UserError(f"{self.path}: cannot be read ({shorten(error)})") from error

    def _check_shapes(self, latents: h5py.Dataset, labels: h5py.Dataset, file: h5py.File) -> None:
        shape = latents.shape
        if len(shape) != 4 or shape[1] != MOMENT_CHANNELS or shape[2] != shape[3]:
            raise UserError(
                f"{self.path}: latents have the shape {list(shape)}; it must be [N, 8, S, S]"
            )
        if shape[0] == 0 or shape[2] == 0:
            raise UserError(f"{self.path}: latents are empty, {list(shape)}")
        if latents.dtype.newbyteorder("=") not in FLOATS:
            raise UserError(f"{self.path}: latents are {latents.dtype}; they must be float32")
        if labels.shape != shape[:1] or labels.dtype.kind not in "iu":
            raise UserError(
                f"{self.path}: labels are {labels.dtype} {list(labels.shape)}; they must be int64 "
                f"[{shape[0]}]"
            )
        for name, value in (("amount", shape[0]), ("latent_size", shape[2])):
            scalar = _dataset(file, name)
            if scalar.shape != () or scalar.dtype.kind not in "iu" or scalar[()] != value:
                raise UserError(f"{self.path}: {name} must be the number {value}, as in latents")
        file_bytes = os.path.getsize(self.path)
        for dataset in (latents, labels):
            # Before anything is read: a few bytes can declare an array larger than any memory.
            # One piece of the file can stand for many chunks: more is stored then than is there.
            stored = min(dataset.id.get_storage_size(), file_bytes)
            is_packed = dataset.id.get_create_plist().get_nfilters() > 0
            if dataset.nbytes > stored * (MAX_DEFLATION if is_packed else 1):
                raise UserError(
                    f"{self.path}: {dataset.name[1:]} {list(dataset.shape)} need {dataset.nbytes} "
                    f"bytes and the file has {stored} of them: it is not complete"
                )
            chunk_bytes = math.prod(dataset.chunks or ()) * dataset.dtype.itemsize
            if chunk_bytes > CHUNK_LIMIT_BYTES:
                raise UserError(
                    f"{self.path}: {dataset.name[1:]} come in chunks of {chunk_bytes} bytes, more "
                    f"than {CHUNK_LIMIT_BYTES}: write them with smaller ones"
                )

    def _read_info(self, file: h5py.File) -> LatentInfo | None:
        if "vae" not in file.attrs:
            return None
        try:
            info = LatentInfo.read(file.attrs)
        except Exception as error:  # h5py raises many kinds
            raise UserError(
                f"{self.path}: its attributes are not those of a latent file "
                f"({type(error).__name__}: {shorten(error)})"
            ) from error
        if info.latent_scale != LATENT_SCALE:
            raise UserError(
                f"{self.path}: made for the scale {info.latent_scale}; it must be {LATENT_SCALE}"
            )
        if info.image_size != PIXELS_PER_LATENT * self.size:
            raise UserError(
                f"{self.path}: says that its pictures have {info.image_size} pixels a side, and "
                f"has latents of side {self.size}, which is for {PIXELS_PER_LATENT * self.size}"
            )
        return info


def _runs(rows: np.ndarray) -> Iterator[list[int]]:
    """The places of `rows` in ascending order, those of neighbouring rows together."""
    order = rows.argsort(kind="stable")
    ends = np.flatnonzero(np.diff(rows[order]) != 1) + 1
    for start, end in itertools.pairwise([0, *ends.tolist(), len(rows)]):
        for first in range(start, end, NEIGHBOURS_AT_ONCE):
            yield order[first : min(first + NEIGHBOURS_AT_ONCE, end)].tolist()


def _opened(path: Path) -> h5py.File:
    if not path.is_file():
        raise UserError(f"{path}: does not exist; latent_dataset.py makes it from class folders")
    try:
        # Nobody writes the file under this name, and some network drives refuse locks.
        return h5py.File(path, "r", locking=False)
    except Exception as error:  # h5py raises several kinds on damaged files
        raise UserError(f"{path}: not a readable HDF5 file ({shorten(error)})") from error


def _dataset(file: h5py.File, name: str) -> h5py.Dataset:
    """An entry whose values are in this very file; UserError otherwise."""
    path = file.filename
    link = file.get(name, getlink=True)
    if link is None:
        raise UserError(f"{path}: has no entry {name}: not a file of latents")
    entry = file[name] if isinstance(link, h5py.HardLink) else None
    # Such a link, or values kept elsewhere, would make us read files that nobody named.
    if not isinstance(entry, h5py.Dataset) or entry.is_virtual or entry.external:
        raise UserError(f"{path}: {name} is not an array in this file")
    return entry
