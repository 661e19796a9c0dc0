"""Image archives: an .npz with uint8 `arr_0` [N, H, W, C], written and read as streams.

Further arrays may follow, such as the images' labels: `arr_1`, as in ADM's labeled files.

The layout is what `numpy.savez` makes (a stored zip member `arr_0.npy`, npy header 1.0), so that
`numpy.load(path)["arr_0"]` reads it; neither side ever holds all the images. The reader also takes
deflated members and header 2.0. It trusts no size that a file declares and never unpickles.
"""

import contextlib
import io
import math
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NoReturn, cast

import numpy as np
from numpy.typing import DTypeLike

from support.system.files import UserError, atomic_write, one_line, regular_only

MEMBER = "arr_0.npy"

HEADER_LIMIT_BYTES = 10_000  # as numpy.load
READ_LIMIT_BYTES = 1 << 20
IMAGE_LIMIT_BYTES = 3 * 8192 * 8192
BATCH_LIMIT_BYTES = 1 << 26
DEFLATE_LIMIT = 1032  # deflate cannot shrink further than 1032 to 1


class ImageWriter:
    """Appends batches of pixels to an open archive; see `write_images`."""

    def __init__(self, member: IO[bytes], path: Path, num_images: int):
        self._member, self._path, self._num_images = member, path, num_images
        self._image_shape: tuple[int, ...] | None = None
        self.written_images = 0
        self.further_arrays: dict[str, np.ndarray] = {}  # written after the images

    def append(self, pixels: np.ndarray) -> None:
        """Write `pixels`, uint8 [B, H, W, C]; every batch has the same H, W, C."""
        if pixels.dtype != np.uint8 or pixels.ndim != 4:
            raise ValueError(
                f"pixels must be uint8 [B, H, W, C], not {pixels.dtype} {pixels.shape}"
            )
        if self._image_shape is None:
            self._image_shape = pixels.shape[1:]
            shape = (self._num_images, *self._image_shape)
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(self._member, header)
        if pixels.shape[1:] != self._image_shape:
            raise ValueError(f"image shape changed from {self._image_shape} to {pixels.shape[1:]}")
        if self.written_images + len(pixels) > self._num_images:
            raise ValueError(f"more than the {self._num_images} images announced")
        self._member.write(np.ascontiguousarray(pixels).data)
        self.written_images += len(pixels)


@contextlib.contextmanager
def write_images(path: str | Path, num_images: int) -> Iterator[ImageWriter]:
    """A writer of exactly `num_images` images; `path` appears only when all of them are in it."""
    path = Path(path)
    with atomic_write(path) as file:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            # The size is unknown when the member starts, so its header must have room for zip64.
            with archive.open(zipfile.ZipInfo(MEMBER), "w", force_zip64=True) as member:
                writer = ImageWriter(member, path, num_images)
                yield writer
            for name, array in writer.further_arrays.items():
                with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, array, allow_pickle=False)
        if writer.written_images != num_images:
            raise ValueError(f"{writer.written_images} of {num_images} images were written")


@dataclass(frozen=True)
class ArrayHeader:
    """What an .npy member says it holds, after that was held against the member's real size."""

    dtype: np.dtype
    shape: tuple[int, ...]
    is_fortran: bool
    header_bytes: int

    @property
    def data_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class ArchiveReader:
    """The arrays of an open .npz; see `read_archive`. Errors name the file and the array."""

    def __init__(self, path: Path, archive: zipfile.ZipFile, file_bytes: int):
        self.path = path
        self._archive, self._file_bytes = archive, file_bytes
        arrays = [info for info in archive.infolist() if info.filename.endswith(".npy")]
        self._members = {info.filename.removesuffix(".npy"): info for info in arrays}
        self._counts = Counter(info.filename.removesuffix(".npy") for info in arrays)

    def __contains__(self, name: str) -> bool:
        return name in self._members

    def header(self, name: str) -> ArrayHeader:
        """The checked header of one array: no pickles, and as many bytes as it declares."""
        info = self._member(name)
        with self._reading(name), self._open(info) as member:
            # numpy reads as much header as the file asks for, so it gets no more than this.
            start = io.BytesIO(_read_at_most(member, HEADER_LIMIT_BYTES))
        try:
            version = np.lib.format.read_magic(start)
            parse = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }[version]
            shape, is_fortran, dtype = parse(start, max_header_size=HEADER_LIMIT_BYTES)
        except KeyError:
            self._refuse(name, f"npy header {version[0]}.{version[1]}, only 1.0 and 2.0 are read")
        except Exception as error:  # numpy's parser lets many kinds through on a hostile header
            self._refuse(name, f"not a readable npy array: {one_line(error)}", error)
        if dtype.hasobject:
            self._refuse(name, "holds pickled objects, which are never unpickled")
        header = ArrayHeader(dtype, shape, is_fortran, start.tell())
        if min(shape, default=1) < 0 or header.header_bytes + header.data_bytes != info.file_size:
            present = info.file_size - header.header_bytes
            self._refuse(
                name, f"{dtype} {list(shape)} needs {header.data_bytes} bytes, {present} are there"
            )
        return header

    def images_header(self) -> ArrayHeader:
        """The header of `arr_0`, which is uint8 [N, H, W, C] with at least one image."""
        header = self.header("arr_0")
        if header.dtype != np.uint8 or len(header.shape) != 4 or header.is_fortran:
            order = " in Fortran order" if header.is_fortran else ""
            self._refuse(
                "arr_0",
                f"must be uint8 [N, H, W, C], not {header.dtype} {list(header.shape)}{order}",
            )
        if not header.data_bytes:
            self._refuse("arr_0", f"holds no images, its shape is {list(header.shape)}")
        if math.prod(header.shape[1:]) > IMAGE_LIMIT_BYTES:
            self._refuse("arr_0", f"images larger than 8192 x 8192: {list(header.shape[1:])}")
        return header

    def batches(self, batch_images: int) -> Iterator[np.ndarray]:
        """The images of `arr_0` in order: uint8 [B, H, W, C], B at most `batch_images`.

        Large images come in smaller batches, so that one never exceeds 64 MiB (or one image).
        Raises UserError in the middle where the data end early or their checksum is wrong.
        """
        header = self.images_header()
        num_images, *image_shape = header.shape
        batch_images = max(1, min(batch_images, BATCH_LIMIT_BYTES // math.prod(image_shape)))
        with self._open_data("arr_0", header) as member:
            for start in range(0, num_images, batch_images):
                pixels = np.empty((min(batch_images, num_images - start), *image_shape), np.uint8)
                with self._reading("arr_0"):
                    _fill(member, pixels)
                yield pixels

    def floats(
        self, name: str, shape: tuple[int, ...], dtype: DTypeLike = np.float64
    ) -> np.ndarray:
        """The float array `name` as `dtype`; UserError unless it has `shape` and is finite."""
        header = self.header(name)
        if header.dtype.kind != "f" or header.dtype.itemsize > 8 or header.shape != shape:
            self._refuse(
                name, f"must be float {list(shape)}, not {header.dtype} {list(header.shape)}"
            )
        values = self._read(name, header).astype(dtype, copy=False)
        if not np.isfinite(values).all():
            self._refuse(name, "holds values that are not finite")
        return values

    def integer(self, name: str) -> int:
        """The one integer in `name`."""
        header = self.header(name)
        if header.dtype.kind not in "iu" or header.shape != ():
            self._refuse(name, f"must be one integer, not {header.dtype} {list(header.shape)}")
        return int(self._read(name, header)[()])

    def text(self, name: str) -> str:
        """The one string in `name`."""
        header = self.header(name)
        if header.dtype.kind != "U" or header.shape != () or header.data_bytes > 1 << 16:
            self._refuse(name, f"must be one short string, not {header.dtype} {list(header.shape)}")
        try:
            return str(self._read(name, header)[()])
        except ValueError as error:
            self._refuse(name, "is not a readable string", error)

    def _read(self, name: str, header: ArrayHeader) -> np.ndarray:
        flat = np.empty(math.prod(header.shape), header.dtype)
        with self._open_data(name, header) as member, self._reading(name):
            _fill(member, flat.view(np.uint8) if flat.size else flat)
        return flat.reshape(header.shape, order="F" if header.is_fortran else "C")

    def _member(self, name: str) -> zipfile.ZipInfo:
        if name not in self._members:
            found = ", ".join(sorted(self._members)[:8]) or "no arrays"
            raise UserError(f"{self.path}: has no {name} (found: {found})")
        if self._counts[name] > 1:  # readers differ in which they take
            self._refuse(name, "stands in this file more than once")
        info = self._members[name]
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            self._refuse(name, "is neither stored nor deflated; write it with numpy.savez")
        ratio = DEFLATE_LIMIT if info.compress_type == zipfile.ZIP_DEFLATED else 1
        if info.compress_size > self._file_bytes or info.file_size > ratio * info.compress_size:
            self._refuse(
                name, f"declares {info.file_size} bytes, which this file cannot hold: damaged"
            )
        return info

    def _open(self, info: zipfile.ZipInfo) -> io.BufferedIOBase:
        # What it gives for reading has `readinto`, which its signature does not say.
        return cast(zipfile.ZipExtFile, self._archive.open(info))

    @contextlib.contextmanager
    def _open_data(self, name: str, header: ArrayHeader) -> Iterator[io.BufferedIOBase]:
        with self._reading(name):
            member = self._open(self._member(name))
            _read_at_most(member, header.header_bytes)
        with member:
            yield member

    @contextlib.contextmanager
    def _reading(self, name: str) -> Iterator[None]:
        """Turns everything that zip and zlib say about a damaged member into one UserError."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            self._refuse(name, f"damaged or cut short: {one_line(error)}", error)

    def _refuse(self, name: str, reason: str, cause: Exception | None = None) -> NoReturn:
        raise UserError(f"{self.path}: {name}: {reason}") from cause


@contextlib.contextmanager
def read_archive(path: str | Path) -> Iterator[ArchiveReader]:
    """A reader of the arrays in the .npz at `path`; UserError where it is not one."""
    path = Path(path)
    try:
        file = _SmallReads(path, opener=regular_only)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    with file:
        try:
            file_bytes = file.seek(0, io.SEEK_END)
            if file_bytes == 0:
                raise UserError(f"{path}: is empty")
            archive = zipfile.ZipFile(file)
        except UserError:
            raise
        except Exception as error:  # zipfile lets struct, value and unicode errors through
            raise UserError(f"{path}: not a whole .npz archive ({one_line(error)})") from error
        with archive:
            yield ArchiveReader(path, archive, file_bytes)


class _SmallReads(io.FileIO):
    """A file that refuses large single reads: zipfile reads a directory of any declared size."""

    def read(self, size: int | None = -1) -> bytes:
        if size is not None and size > READ_LIMIT_BYTES:
            raise ValueError(f"a single record of {size} bytes")
        return super().read(size)


def _fill(member: io.BufferedIOBase, target: np.ndarray) -> None:
    """Fill `target`, contiguous uint8, from `member`; EOFError where it ends before.

    The member's checksum is compared by zipfile when its last byte is read.
    """
    view = memoryview(target).cast("B") if target.size else memoryview(b"")
    while len(view):
        count = member.readinto(view[:READ_LIMIT_BYTES])
        if not count:
            raise EOFError(f"{len(view)} bytes are missing")
        view = view[count:]


def _read_at_most(member: io.BufferedIOBase, size: int) -> bytes:
    """`size` bytes, or fewer where `member` ends before."""
    pieces = []
    while size and (piece := member.read(size)):
        pieces.append(piece)
        size -= len(piece)
    return b"".join(pieces)
