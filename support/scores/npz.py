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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NoReturn, cast

import numpy as np
from numpy.typing import DTypeLike

from support.system.files import UserError, atomic_write, shorten

MEMBER = "arr_0.npy"

HEADER_LIMIT_BYTES = 10_000  # as numpy.load
BATCH_LIMIT_BYTES = 1 << 26
PIECE_BYTES = 1 << 20  # of one read: zipfile copies what it reads
DEFLATE_LIMITS = {zipfile.ZIP_STORED: 1, zipfile.ZIP_DEFLATED: 1032}  # no format packs further


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

    def __init__(self, path: Path, archive: zipfile.ZipFile):
        self.path = path
        self._archive = archive

    def __contains__(self, name: str) -> bool:
        return f"{name}.npy" in self._archive.NameToInfo

    def header(self, name: str) -> ArrayHeader:
        """The checked header of one array: no pickles, and as many bytes as it declares."""
        info = self._member(name)
        with self._reading(name), self._open(info) as member:
            # numpy reads as much header as the file asks for, so it gets no more than this.
            start = io.BytesIO(member.read(HEADER_LIMIT_BYTES))
        try:
            version = np.lib.format.read_magic(start)
            parse = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }[version]
            shape, is_fortran, dtype = parse(start, max_header_size=HEADER_LIMIT_BYTES)
        except KeyError:
            self._refuse(name, f"npy header {version[0]}.{version[1]}, only 1.0 and 2.0 are read")
        except Exception as error:  # numpy's parser lets many kinds through on a damaged header
            self._refuse(name, f"not a readable npy array: {shorten(error)}", error)
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
        return header

    def batches(self, batch_images: int) -> Iterator[np.ndarray]:
        """The images of `arr_0` in order: uint8 [B, H, W, C], B at most `batch_images`.

        Large images come in smaller batches, so that one never exceeds 64 MiB (or one image).
        Raises UserError in the middle where the data end early or their checksum is wrong.
        """
        header = self.images_header()
        num_images, *image_shape = header.shape
        batch_images = max(1, min(batch_images, BATCH_LIMIT_BYTES // math.prod(image_shape)))
        with self._reading("arr_0"):
            member = self._open(self._member("arr_0"))
            member.read(header.header_bytes)
        with member:
            for start in range(0, num_images, batch_images):
                count = min(batch_images, num_images - start)
                pixels = np.empty((count, *image_shape), np.uint8)
                with self._reading("arr_0"):
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
        """The one integer in `name`."""
        return int(self._read(name, "iu", (), "one integer")[()])

    def labels(self, count: int) -> np.ndarray:
        """The labels [count] of the images, which are in `arr_1`."""
        return self._read("arr_1", "iu", (count,), f"{count} labels")

    def text(self, name: str) -> str:
        """The one string in `name`."""
        with self._reading(name):  # some bytes are no characters
            return str(self._read(name, "U", (), "one short string")[()])

    def _read(self, name: str, kinds: str, shape: tuple[int, ...], wanted: str) -> np.ndarray:
        """The array `name`; UserError unless it has this shape and one of these kinds of dtype."""
        header = self.header(name)
        if header.dtype.kind not in kinds or header.shape != shape:
            found = f"{header.dtype} {list(header.shape)}"
            self._refuse(name, f"must be {wanted}, not {found}")
        with self._reading(name), self._archive.open(self._member(name)) as member:
            return np.lib.format.read_array(member, allow_pickle=False)

    def _member(self, name: str) -> zipfile.ZipInfo:
        if name not in self:
            members = sorted(self._archive.NameToInfo)
            arrays = [member.removesuffix(".npy") for member in members if member.endswith(".npy")]
            found = ", ".join(arrays[:8]) or "no arrays"
            raise UserError(f"{self.path}: has no {name} (found: {found})")
        info = self._archive.getinfo(f"{name}.npy")
        if info.compress_type not in DEFLATE_LIMITS:
            self._refuse(name, "is neither stored nor deflated; write it with numpy.savez")
        packed_bytes = min(info.compress_size, self.path.stat().st_size)
        if info.file_size > DEFLATE_LIMITS[info.compress_type] * packed_bytes:
            self._refuse(
                name, f"declares {info.file_size} bytes, which this file cannot hold: damaged"
            )
        return info

    def _open(self, info: zipfile.ZipInfo) -> io.BufferedIOBase:
        # What it gives for reading has `readinto`, which its signature does not say.
        return cast(zipfile.ZipExtFile, self._archive.open(info))

    @contextlib.contextmanager
    def _reading(self, name: str) -> Iterator[None]:
        """Turns everything that zip and zlib say about a damaged member into one UserError."""
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
    """A reader of the arrays in the .npz at `path`; UserError where it is not one."""
    path = Path(path)
    try:
        archive = zipfile.ZipFile(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    except Exception as error:  # zipfile lets struct, value and unicode errors through
        raise UserError(f"{path}: not a whole .npz archive ({shorten(error)})") from error
    with archive:
        yield ArchiveReader(path, archive)


def _fill(member: io.BufferedIOBase, pixels: np.ndarray) -> None:
    """Fill `pixels` from `member`, whose checksum zipfile compares when the last byte is read."""
    view = memoryview(pixels).cast("B")
    while view:
        if not (count := member.readinto(view[:PIECE_BYTES])):
            raise EOFError(f"{len(view)} bytes are missing")
        view = view[count:]
