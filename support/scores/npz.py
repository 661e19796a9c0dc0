"""Image archives: an .npz with uint8 `arr_0` [N, H, W, C], written and read as streams.

More arrays may follow, such as the labels of the images in `arr_1`, as in ADM's labeled files.

The layout is that of `numpy.savez` (a stored zip member `arr_0.npy`, npy header 1.0), so
`numpy.load(path)["arr_0"]` reads it. Writer and reader never hold all images. The reader also takes
deflated members. It trusts no size that a file declares and never unpickles.
"""

import contextlib
import io
import math
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple, NoReturn

import numpy as np
from numpy.typing import DTypeLike

from support.system.files import UserError, atomic_write, identify, shorten

IMAGES, LABELS = "arr_0", "arr_1"
HEADER_LIMIT_BYTES = 10_000  # as numpy.load
BATCH_LIMIT_BYTES = 1 << 26
PIECE_BYTES = 1 << 20  # per read: zipfile copies what it reads
DEFLATE_LIMITS = {zipfile.ZIP_STORED: 1, zipfile.ZIP_DEFLATED: 1032}  # largest possible ratios


class ImageWriter:
    """Appends batches of pixels to an open archive; see `write_images`."""

    def __init__(self, member: IO[bytes], num_images: int):
        self._member, self._num_images = member, num_images
        self._image_shape: tuple[int, ...] | None = None
        self.written_images = 0
        self.further_arrays: dict[str, np.ndarray] = {}  # written after the images

    def append(self, pixels: np.ndarray) -> None:
        """Write `pixels`, uint8 [B, H, W, C]; all batches have the same H, W, C."""
        if self._image_shape is None:
            self._image_shape = pixels.shape[1:]
            shape = (self._num_images, *self._image_shape)
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(self._member, header)
        if pixels.dtype != np.uint8 or pixels.shape[1:] != self._image_shape or pixels.ndim != 4:
            found = f"{pixels.dtype} {list(pixels.shape)} after [.., {self._image_shape}]"
            raise ValueError(f"pixels must be uint8 [B, H, W, C] of one size, not {found}")
        self._member.write(np.ascontiguousarray(pixels).data)
        self.written_images += len(pixels)


@contextlib.contextmanager
def write_images(path: str | Path, num_images: int) -> Iterator[ImageWriter]:
    """A writer of exactly `num_images` images; `path` appears once all of them are written."""
    with atomic_write(path) as file:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            # The size is unknown when a member starts, so its header must leave room for zip64.
            def member(name: str) -> IO[bytes]:
                return archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True)

            with member(IMAGES) as images:
                writer = ImageWriter(images, num_images)
                yield writer
            for name, array in writer.further_arrays.items():
                with member(name) as further:
                    np.lib.format.write_array(further, array, allow_pickle=False)
        if writer.written_images != num_images:
            raise ValueError(f"{writer.written_images} of {num_images} images were written")


class ArrayHeader(NamedTuple):
    """The header of an .npy member, once it agrees with the member's real size."""

    dtype: np.dtype
    shape: tuple[int, ...]
    is_fortran: bool
    header_bytes: int

    def __str__(self) -> str:
        order = " in Fortran order" if self.is_fortran else ""
        return f"{self.dtype} {list(self.shape)}{order}"


class ArchiveReader:
    """The arrays of an open .npz; see `read_archive`. Errors name the file and the array."""

    def __init__(self, path: Path, archive: zipfile.ZipFile):
        self.path = path
        self._archive = archive

    @property
    def names(self) -> list[str]:
        """The names of its arrays."""
        members = sorted(self._archive.NameToInfo)
        return [name.removesuffix(".npy") for name in members if name.endswith(".npy")]

    @property
    def found(self) -> str:
        """The names of its arrays, for an error that asks for others."""
        return f"found: {', '.join(self.names[:8]) or 'no arrays'}"

    def __contains__(self, name: str) -> bool:
        return f"{name}.npy" in self._archive.NameToInfo

    def header(self, name: str) -> ArrayHeader:
        """The checked header of one array: no pickles, and as many bytes as it declares."""
        info = self._member(name)
        with self._reading(name), self._archive.open(info) as member:
            # numpy reads as long a header as the file declares, so it gets no more than this.
            start = io.BytesIO(member.read(HEADER_LIMIT_BYTES))
        try:
            if (version := np.lib.format.read_magic(start)) != (1, 0):
                raise ValueError(f"header {version[0]}.{version[1]}, not 1.0")
            shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(start)
        except Exception as error:  # on a damaged header, numpy's parser raises many classes
            self._refuse(name, f"not a readable npy array: {shorten(error)}", error)
        if dtype.hasobject:
            self._refuse(name, "holds pickled objects, which are never unpickled")
        header = ArrayHeader(dtype, shape, is_fortran, start.tell())
        needed, present = math.prod(shape) * dtype.itemsize, info.file_size - header.header_bytes
        if min(shape, default=1) < 0 or needed != present:
            self._refuse(name, f"{header} needs {needed} bytes, {present} are there")
        return header

    def images_header(self) -> ArrayHeader:
        """The header of `arr_0`, which is uint8 [N, H, W, C] with at least one image."""
        header = self.header(IMAGES)
        if header.dtype != np.uint8 or len(header.shape) != 4 or header.is_fortran:
            self._refuse(IMAGES, f"must be uint8 [N, H, W, C], not {header}")
        if not math.prod(header.shape):
            self._refuse(IMAGES, f"holds no images, its shape is {list(header.shape)}")
        return header

    def batches(self, batch_images: int) -> Iterator[np.ndarray]:
        """The images of `arr_0` in order: uint8 [B, H, W, C], B at most `batch_images`.

        Batches of large images are smaller, so that one never exceeds 64 MiB (or one image).
        Raises UserError in the middle if the data end early or their checksum is wrong.
        """
        header = self.images_header()
        num_images, *image_shape = header.shape
        batch_images = max(1, min(batch_images, BATCH_LIMIT_BYTES // math.prod(image_shape)))
        with self._reading(IMAGES):
            member = self._archive.open(self._member(IMAGES))
            member.read(header.header_bytes)
        with member:
            for start in range(0, num_images, batch_images):
                count = min(batch_images, num_images - start)
                pixels = np.empty((count, *image_shape), np.uint8)
                with self._reading(IMAGES):
                    _fill(member, pixels)
                yield pixels

    def floats(
        self, name: str, shape: tuple[int, ...], dtype: DTypeLike = np.float64
    ) -> np.ndarray:
        """The float array `name` as `dtype`; UserError unless it has `shape` and is finite."""
        values = self._read(name, "f", shape, f"float {list(shape)}").astype(dtype, copy=False)
        if not np.isfinite(values).all():
            self._refuse(name, "holds values that are not finite")
        return values

    def integer(self, name: str) -> int:
        """The single integer in `name`."""
        return int(self._read(name, "iu", (), "one integer")[()])

    def labels(self, count: int) -> np.ndarray:
        """The labels [count] of the images, from `arr_1`."""
        return self._read(LABELS, "iu", (count,), f"{count} labels")

    def text(self, name: str) -> str:
        """The single string in `name`."""
        with self._reading(name):  # some bytes are not characters
            return str(self._read(name, "U", (), "one short string")[()])

    def _read(self, name: str, kinds: str, shape: tuple[int, ...], wanted: str) -> np.ndarray:
        """The array `name`; UserError unless it has this shape and one of these kinds of dtype."""
        header = self.header(name)
        if header.dtype.kind not in kinds or header.shape != shape:
            self._refuse(name, f"must be {wanted}, not {header.dtype} {list(header.shape)}")
        with self._reading(name), self._archive.open(self._member(name)) as member:
            return np.lib.format.read_array(member, allow_pickle=False)

    def _member(self, name: str) -> zipfile.ZipInfo:
        if name not in self:
            raise UserError(f"{self.path}: has no {name} ({self.found})")
        info = self._archive.getinfo(f"{name}.npy")
        if info.compress_type not in DEFLATE_LIMITS:
            self._refuse(name, "is neither stored nor deflated; write it with numpy.savez")
        packed_bytes = min(info.compress_size, self.path.stat().st_size)
        if info.file_size > DEFLATE_LIMITS[info.compress_type] * packed_bytes:
            declared = f"declares {info.file_size} bytes"
            self._refuse(name, f"{declared}, which this file cannot hold: damaged")
        return info

    @contextlib.contextmanager
    def _reading(self, name: str) -> Iterator[None]:
        """Turns every error of zip and zlib on a damaged member into a UserError."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            self._refuse(name, f"damaged or cut short: {shorten(error)}", error)

    def _refuse(self, name: str, reason: str, cause: Exception | None = None) -> NoReturn:
        raise UserError(f"{self.path}: {name}: {reason}") from cause


@contextlib.contextmanager
def read_archive(path: str | Path) -> Iterator[ArchiveReader]:
    """A reader of the arrays in the .npz at `path`; UserError if it is not one."""
    path = Path(path)
    try:
        archive = zipfile.ZipFile(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    except Exception as error:  # zipfile also raises struct, value and unicode errors
        raise UserError(f"{path}: not a whole .npz archive ({identify(path)})") from error
    with archive:
        yield ArchiveReader(path, archive)


def _fill(member: IO[bytes], pixels: np.ndarray) -> None:
    """Fill `pixels` from `member`; zipfile checks the checksum when it reads the last byte."""
    view = memoryview(pixels).cast("B")
    while view:
        if not (count := member.readinto(view[:PIECE_BYTES])):  # type: ignore[attr-defined]
            raise EOFError(f"{len(view)} bytes are missing")
        view = view[count:]
