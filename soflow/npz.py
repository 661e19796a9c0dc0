"""Image archives: an .npz whose one array `arr_0` is uint8 [N, H, W, C], written and read as streams.

The layout is what `numpy.savez` makes (a stored zip member `arr_0.npy`, npy header 1.0), so that
`numpy.load(path)["arr_0"]` reads it; neither side ever holds all the images.
"""

import contextlib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from soflow.files import UserError, atomic_write

MEMBER = "arr_0.npy"


class ImageWriter:
    """Appends batches of pixels to an open archive; see `write_images`."""

    def __init__(self, member, path: Path, num_images: int):
        self._member, self._path, self._num_images = member, path, num_images
        self._image_shape: tuple[int, ...] | None = None
        self.written_images = 0

    def append(self, pixels: np.ndarray) -> None:
        """Write `pixels`, uint8 [B, H, W, C]; every batch has the same H, W, C."""
        if pixels.dtype != np.uint8 or pixels.ndim != 4:
            raise ValueError(f"pixels must be uint8 [B, H, W, C], not {pixels.dtype} {pixels.shape}")
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
        with (
            zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive,
            # The size is unknown when the member starts, so its header must have room for zip64.
            archive.open(zipfile.ZipInfo(MEMBER), "w", force_zip64=True) as member,
        ):
            writer = ImageWriter(member, path, num_images)
            yield writer
        if writer.written_images != num_images:
            raise ValueError(f"{writer.written_images} of {num_images} images were written")
