"""Sets of images to score or to compare with: an .npz, a folder of pictures, a known data set."""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from support.data import cifar10, fashion
from support.data.folders import find_pictures, left_out_note
from support.data.images import EXTENSIONS, read_image
from support.scores.measures import NEIGHBOUR, SPLIT_IMAGES
from support.scores.npz import LABELS, ArchiveReader, read_archive
from support.system.files import UserError

READ_IMAGES = 256


@dataclass(frozen=True)
class ImageSet:
    """Images of one shape [H, W, 1 or 3] from somewhere; `batches()` streams them as uint8."""

    name: str
    num_images: int
    image_shape: tuple[int, ...]
    batches: Callable[[], Iterator[np.ndarray]]
    is_by_class: bool = False  # so that a split of the Inception Score sees only some classes
    exif: str = ""  # for pictures: whether EXIF rotation was applied or ignored ("apply", "ignore")
    left_out_note: str = ""  # for a folder: a line about the files in it that are not read

    def __post_init__(self):
        if self.image_shape[2] not in (1, 3):
            raise UserError(
                f"{self.name}: images must be [H, W, 1 or 3], not {list(self.image_shape)}"
            )
        if self.num_images <= NEIGHBOUR:
            raise UserError(
                f"{self.name}: too few images, {self.num_images} of at least {NEIGHBOUR + 1}"
            )


def archive_images(path: str | Path) -> ImageSet:
    """The images of an .npz."""
    with read_archive(path) as archive:
        num_images, *image_shape = archive.images_header().shape
        is_by_class = num_images > SPLIT_IMAGES and _is_sorted_by_label(archive, num_images)

    def batches() -> Iterator[np.ndarray]:
        with read_archive(path) as archive:
            yield from archive.batches(READ_IMAGES)

    return ImageSet(str(path), num_images, tuple(image_shape), batches, is_by_class)


def _is_sorted_by_label(archive: ArchiveReader, num_images: int) -> bool:
    with contextlib.suppress(UserError):  # arr_1 may hold something else
        labels = archive.labels(num_images) if LABELS in archive else np.zeros(1)
        return bool((labels[:-1] <= labels[1:]).all() and labels[0] != labels[-1])
    return False


def folder_images(
    folder: str | Path, image_size: int | None = None, exif: str = "apply"
) -> ImageSet:
    """The pictures in `folder` and below, RGB; with `image_size`, their centre crops.

    They are turned upright as their EXIF data say, unless `exif` is "ignore".
    """
    found = find_pictures(folder)
    paths = found.paths
    read = functools.partial(read_image, crop_size=image_size, apply_exif=exif == "apply")
    image_shape = read(paths[0]).shape

    def picture(path: str) -> np.ndarray:
        pixels = read(path)
        if pixels.shape != image_shape:
            raise UserError(
                f"{path}: is {list(pixels.shape)}, {Path(paths[0]).name} is {list(image_shape)}; "
                "--image_size crops all to one size"
            )
        return pixels

    def batches() -> Iterator[np.ndarray]:
        for start in range(0, len(paths), READ_IMAGES):
            yield np.stack([picture(path) for path in paths[start : start + READ_IMAGES]])

    return ImageSet(
        str(folder),
        len(paths),
        image_shape,
        batches,
        is_by_class=len(paths) > SPLIT_IMAGES
        and len({os.path.dirname(path) for path in paths}) > 1,
        exif=exif,
        left_out_note=left_out_note(found.left_out),
    )


def array_images(name: str, pixels: np.ndarray) -> ImageSet:
    """Images in memory, uint8 [N, H, W, C]."""
    batches = np.array_split(pixels, range(READ_IMAGES, len(pixels), READ_IMAGES))
    return ImageSet(name, len(pixels), pixels.shape[1:], lambda: iter(batches))


# How a copy of a data set is found, and which of its images are the reference: for CIFAR-10 the
# training images, as usual; for Fashion-MNIST the test images, which neither a run nor our
# classifier trains on.
DATA_SETS = (
    (cifar10.find_copy, cifar10.load_training_set),
    (fashion.find_copy, fashion.load_test_set),
)


def find_images(
    source: str | Path, image_size: int | None = None, exif: str | None = None
) -> ImageSet:
    """The images of `source`: an .npz, a folder of a known data set, or a folder of pictures."""
    source = Path(source)
    if not source.exists():
        raise UserError(f"{source}: no such file or folder (--images)")
    load = next((load for find, load in DATA_SETS if source.is_dir() and find(source)), None)
    if source.is_dir() and load is None:
        return folder_images(source, image_size, exif or "apply")
    if source.is_file() and source.name.lower().endswith(EXTENSIONS):
        raise UserError(f"{source}: --images takes a folder of pictures, not a single one")
    for flag, value in (("image_size", image_size), ("exif", exif)):
        if value is not None:
            raise UserError(f"{source}: --{flag} is for folders of pictures")
    return array_images(str(source), load(source).pixels) if load else archive_images(source)
