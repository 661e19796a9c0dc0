"""The latent file imagenet_latent.hdf5: its attributes, its frame for a writer, its reader.

Entries: `latents` [N, 2C, S, S], the posterior's mean and then its standard deviation, or
[N, C, S, S], points, in the autoencoder's own scale; `labels` int64 [N]; for the published code,
which reads them, int64 scalars `amount` = N and `latent_size` = S. Attributes say what made the
file; the published code writes none, and its C is 4.
"""

import contextlib
import io
import math
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import IO, Any

import h5py
import numpy as np
import torch
from pydantic import TypeAdapter
from torch import Tensor

from support.data.autoencoders import LATENT_SCALE, LatentForm, Numbers
from support.system.files import UserError, identify, shorten

LATENT_FILE = "imagenet_latent.hdf5"
DEFAULT_CLASSES = 1000  # ImageNet's, for a file without attributes
ROWS_LOOKED_AT = 256  # before training
# Standard deviation of normalised means, about 1. Those of sd-vae-ft-mse that were scaled already
# have about 0.2, and those that were divided by the scale once more about 5.
USUAL_DEVIATIONS = (2 * LATENT_SCALE, 15 * LATENT_SCALE)
MAX_DEFLATION = 1100  # the most by which HDF5's compression can shrink values
FLOATS = (np.float16, np.float32, np.float64)

# N rows, B of them read at a time, C channels, S latent side


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that determines a file's latents; files of two recipes must not be mixed."""

    images_sha256: str  # of the pictures' names and sizes
    image_size: int  # side of the pictures, in pixels
    vae_sha256: str  # of the weights, by `weights_digest`
    dtype: str  # float32 or float16
    seed: int
    exif: str = "ignore"  # apply: pictures were turned upright first; older files lack it
    precision: str = ""  # of the VAE: fp32, tf32 or bf16; older files lack it

    def differences(self, other: "Recipe") -> str:
        """How another recipe differs from this one; empty if it does not."""
        pairs = [(f.name, getattr(self, f.name), getattr(other, f.name)) for f in fields(Recipe)]
        return "; ".join(
            f"{name} {there} there, {here} now"
            for name, there, here in pairs
            if there not in ("", here)  # an older file may not say
        )


@dataclass(frozen=True, kw_only=True)
class LatentInfo(Recipe, LatentForm):
    """A file's attributes, under the same names; older files lack some of the form's."""

    vae: str  # as the user named it
    vae_revision: str  # the hub's commit; empty for a folder
    latent_scale: Numbers = field()  # always there
    class_names: tuple[str, ...]
    class_counts: tuple[int, ...]
    code_version: str

    def write(self, attributes: h5py.AttributeManager) -> None:
        # Folder names may hold any bytes, attributes only UTF-8.
        names = [name.encode(errors="replace").decode() for name in self.class_names]
        values = {
            **vars(self),
            "class_names": np.array(names, h5py.string_dtype()),
            "class_counts": np.array(self.class_counts, np.int64),
        }
        attributes.update(values)

    @classmethod
    def read(cls, attributes: Mapping[str, Any]) -> "LatentInfo":
        """What `write` wrote; ValueError for anything else."""
        known = {field.name for field in fields(cls)} & {*attributes}
        values = {name: np.asarray(attributes[name]).tolist() for name in known}
        return TypeAdapter(cls).validate_python(values)


# Writing


def write_frame(file: IO[bytes], labels: np.ndarray, info: LatentInfo) -> None:
    """Write a latent file that lacks only the values of `latents`; `file` is empty.

    The values are one run of bytes at `locate_latents`, to be written there without HDF5: a killed
    process cannot damage the file's structure, and the same input gives the same bytes.
    """
    size = info.image_size // info.pixels_per_latent
    # In a sparse file elsewhere: where the disk is full, HDF5 crashes instead of failing.
    with tempfile.TemporaryFile() as frame:
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
            shape = (len(labels), info.stored_channels, size, size)
            kind = h5py.h5t.py_create(np.dtype(info.dtype).newbyteorder("<"))
            space = h5py.h5s.create_simple(shape)
            latents = h5py.h5d.create(entries.id, b"latents", kind, space, layout)
            start = latents.get_offset()
        end = start + math.prod(shape) * np.dtype(info.dtype).itemsize
        frame.seek(0)
        file.write(frame.read(start))
        frame.seek(end)
        file.seek(end)
        shutil.copyfileobj(frame, file)


def _create_file(target: IO[bytes]) -> h5py.h5f.FileID:
    """An empty HDF5 file in `target`, always with the same bytes."""
    access = h5py.h5p.create(h5py.h5p.FILE_ACCESS)
    access.set_fileobj_driver(h5py.h5fd.fileobj_driver, target)
    # For attributes above 64 KiB, which the names of many classes need.
    access.set_libver_bounds(h5py.h5f.LIBVER_V18, h5py.h5f.LIBVER_V18)
    root = h5py.h5p.create(h5py.h5p.FILE_CREATE)
    root.set_obj_track_times(False)
    return h5py.h5f.create(b"frame", h5py.h5f.ACC_TRUNC, root, access)


def locate_latents(path: Path) -> tuple[int, int]:
    """Where a file of `write_frame` has the latents' values: offset and bytes of a row."""
    with h5py.File(path, "r", locking=False) as file:
        latents = file["latents"]
        return latents.id.get_offset(), latents.nbytes // len(latents)


# Reading


class LatentReader:
    """Rows of a latent file, opened by each process that reads; UserError for a bad file.

    Rows are read by the system's own calls if the file has the values as they are, and by h5py if
    they are compressed or in chunks. The file is not mapped into memory: if it were cut short
    meanwhile, the process would die without a message.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._process: int | None = None
        self._file: Any = None
        with _opened(self.path) as file, self._explained():
            latents, labels = _dataset(file, "latents"), _dataset(file, "labels")
            self.shape, self.dtype = latents.shape, latents.dtype
            self.info = LatentInfo.read(file.attrs) if "vae" in file.attrs else None
            self.form = self.info or LatentForm()
            self._check_shapes(latents, labels)
            self._check_storage(latents)
            self._check_storage(labels)
            self.labels = torch.from_numpy(labels[()].astype(np.int64))
            # Not there if the values are in chunks.
            self._offset = latents.id.get_offset() if latents.dtype.isnative else None

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def size(self) -> int:
        return self.shape[2]

    @property
    def is_plain(self) -> bool:
        """Whether the file has the values as they are, to be read without h5py."""
        return self._offset is not None

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes' names; the numbers of ImageNet's classes if the file does not say."""
        if self.info:
            return self.info.class_names
        return tuple(str(label) for label in range(DEFAULT_CLASSES))

    def read(self, indices: Sequence[int]) -> Tensor:
        """Latents as stored, [B, 2C or C, S, S], of rows in any order, repeated or not.

        UserError names a row whose values are not finite.
        """
        rows = np.asarray(indices, np.int64)
        if self.is_plain:
            values = np.empty((len(rows), *self.shape[1:]), self.dtype)
            self._read_plain(rows.tolist(), values)
        else:
            # h5py wants rows in ascending order, each once.
            ascending, places = np.unique(rows, return_inverse=True)
            with self._explained():
                values = self._own_file()[ascending][places]
            values = values.astype(self.dtype.newbyteorder("="))
        moments = torch.from_numpy(values)
        # One sum is quicker than a look at every value: it is finite only if they all are.
        if not moments.sum(dtype=torch.float32).isfinite():
            bad = rows[~moments.isfinite().flatten(1).all(dim=1).numpy()]
            if bad.size:
                raise UserError(f"{self.path}: row {bad.min()} has values that are not finite")
        return moments

    def fetch(self, indices: Sequence[int]) -> None:
        """Bring rows of a plain file into the system's cache, for `read` in any process."""
        scratch = np.empty(self.shape[1:], self.dtype)
        self._read_plain(indices, [scratch] * len(indices))

    def check_values(self) -> list[str]:
        """Look at rows spread over the file; UserError if they cannot be an autoencoder's latents.

        For a file that says which VAE made it, returns lines about what is unusual.
        """
        count = min(ROWS_LOOKED_AT, len(self))
        rows = np.unique(np.linspace(0, len(self) - 1, count).astype(np.int64))
        moments = self.read(rows.tolist())
        channels = self.form.latent_channels
        if (bad := rows[(moments[:, channels:] < 0).flatten(1).any(dim=1).numpy()]).size:
            raise UserError(
                f"{self.path}: row {bad[0]} has negative standard deviations: channels {channels} "
                f"to {2 * channels - 1} of latents must be those of the VAE's posterior"
            )
        # An interrupted merge leaves such rows.
        if (bad := rows[(moments == 0).flatten(1).all(dim=1).numpy()]).size:
            raise UserError(f"{self.path}: row {bad[0]} is all zeros: the file is not complete")
        means = moments[:, :channels].double()
        deviation = self.form.normalise(means).std().item()
        if USUAL_DEVIATIONS[0] <= deviation <= USUAL_DEVIATIONS[1]:
            return []
        found = (
            f"{self.path}: the latents' standard deviation is {means.std():.2g}, and that of x_0 "
            f"{deviation:.2g}; usual is about 1"
        )
        if self.info is None:  # nothing says that they are unscaled
            raise UserError(f"{found}; if they are scaled already, divide them by {LATENT_SCALE}")
        return [found]

    def __getstate__(self) -> dict[str, Any]:
        """Without what is open: loader workers that are not forked get a copy."""
        return {**vars(self), "_process": None, "_file": None}

    def _own_file(self) -> Any:
        """The open file of this process; a loader worker must not share its parent's."""
        if self._process != os.getpid():
            self._file = io.FileIO(self.path) if self.is_plain else _opened(self.path)["latents"]
            self._process = os.getpid()
        return self._file

    def _read_plain(self, rows: Sequence[int], buffers: Iterable[np.ndarray]) -> None:
        """Read each row into its buffer."""
        row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        with self._explained():
            descriptor = self._own_file().fileno()
            for row, buffer in zip(rows, buffers, strict=True):
                if os.preadv(descriptor, [buffer], self._offset + row * row_bytes) < row_bytes:
                    raise UserError(
                        f"{self.path}: ends before row {row} of {len(self)} does: it was cut short "
                        "or replaced after it was opened"
                    )

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """A block whose errors, of the system or of h5py, become a UserError."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:  # h5py raises many kinds on damaged files
            raise UserError(f"{self.path}: cannot be read ({shorten(error)})") from error

    def _check_shapes(self, latents: h5py.Dataset, labels: h5py.Dataset) -> None:
        shape = latents.shape
        channels, info = self.form.stored_channels, self.info
        if len(shape) != 4 or shape[1] != channels or shape[2] != shape[3] or 0 in shape:
            raise UserError(
                f"{self.path}: latents have the shape {list(shape)}; it must be [N, {channels}, "
                "S, S]"
            )
        if info and info.image_size != info.pixels_per_latent * shape[2]:
            raise UserError(
                f"{self.path}: image_size is {info.image_size}; latents with side {shape[2]} are "
                f"of pictures with {info.pixels_per_latent * shape[2]} pixels a side"
            )
        if latents.dtype.newbyteorder("=") not in FLOATS:
            raise UserError(f"{self.path}: latents are {latents.dtype}; they must be float32")
        if labels.shape != shape[:1] or labels.dtype.kind not in "iu":
            raise UserError(
                f"{self.path}: labels are {labels.dtype} {list(labels.shape)}; they must be int64 "
                f"[{shape[0]}]"
            )

    def _check_storage(self, dataset: h5py.Dataset) -> None:
        """UserError if an array cannot be in the file.

        Checked before anything is read: a few bytes can declare an array larger than any memory.
        """
        # One piece of the file can stand for many chunks, which then count as stored.
        stored = min(dataset.id.get_storage_size(), os.path.getsize(self.path))
        is_packed = dataset.id.get_create_plist().get_nfilters() > 0
        if dataset.nbytes > stored * (MAX_DEFLATION if is_packed else 1):
            raise UserError(
                f"{self.path}: {dataset.name[1:]} {list(dataset.shape)} need {dataset.nbytes} "
                f"bytes and the file has {stored} of them: it is not complete"
            )


def _opened(path: Path) -> h5py.File:
    if not path.is_file():
        raise UserError(f"{path}: does not exist; latent_dataset.py makes it from pictures")
    try:
        if not h5py.is_hdf5(path):
            raise ValueError(f"it is {identify(path)}")
        # Nobody writes a file under this name, and some network drives refuse locks.
        return h5py.File(path, "r", locking=False)
    except Exception as error:  # h5py raises several kinds on damaged files
        raise UserError(f"{path}: not a readable HDF5 file ({shorten(error)})") from error


def _dataset(file: h5py.File, name: str) -> h5py.Dataset:
    """The entry `name`; UserError unless its values are in this very file."""
    path = file.filename
    link = file.get(name, getlink=True)
    if link is None:
        raise UserError(f"{path}: has no entry {name}: not a file of latents")
    entry = file[name] if isinstance(link, h5py.HardLink) else None
    # Other links, or values kept elsewhere, would make us read files that nobody named.
    if not isinstance(entry, h5py.Dataset) or entry.is_virtual or entry.external:
        raise UserError(f"{path}: {name} is not an array in this file")
    return entry
