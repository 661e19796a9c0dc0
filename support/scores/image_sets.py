"""Sets of images to score or to compare with: an .npz, a folder of pictures, a known data set."""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from support.data import cifar10, fashion
from support.data.folders import LabelledFiles, find_pictures, left_out_note
from support.data.images import (
    EXTENSIONS,
    LabelledImages,
    PictureSource,
    read_image,
    to_pixels,
)
from support.data.sources import SHARDS, list_source, shards_of
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
    num_folders = len({os.path.dirname(path) for path in found.paths})
    note = left_out_note(found.left_out)
    return _picture_set(str(folder), found.paths, num_folders, note, image_size, exif)


def _picture_set(
    name: str,
    paths: Sequence[PictureSource] | LabelledFiles,
    num_classes: int,
    note: str,
    image_size: int | None,
    exif: str,
) -> ImageSet:
    read = functools.partial(read_image, crop_size=image_size, apply_exif=exif == "apply")
    image_shape = read(paths[0]).shape

    def picture(path: PictureSource) -> np.ndarray:
        pixels = read(path)
        if pixels.shape != image_shape:
            raise UserError(
                f"{path}: is {list(pixels.shape)}, {os.path.basename(str(paths[0]))} is "
                f"{list(image_shape)}; "
                "--image_size crops all to one size"
            )
        return pixels

    def batches() -> Iterator[np.ndarray]:
        for start in range(0, len(paths), READ_IMAGES):
            indices = range(start, min(start + READ_IMAGES, len(paths)))
            yield np.stack([picture(paths[index]) for index in indices])

    return ImageSet(
        name,
        len(paths),
        image_shape,
        batches,
        is_by_class=len(paths) > SPLIT_IMAGES and num_classes > 1,
        exif=exif,
        left_out_note=note,
    )


def array_images(name: str, pixels: np.ndarray) -> ImageSet:
    """Images in memory, uint8 [N, H, W, C]."""
    batches = np.array_split(pixels, range(READ_IMAGES, len(pixels), READ_IMAGES))
    return ImageSet(name, len(pixels), pixels.shape[1:], lambda: iter(batches))


def noise_images(count: int, image_shape: tuple[int, ...]) -> ImageSet:
    """Gaussian noise: the worst that a model can do."""

    def batches() -> Iterator[np.ndarray]:
        random_state = np.random.RandomState(0)
        for start in range(0, count, READ_IMAGES):
            shape = (min(READ_IMAGES, count - start), *image_shape)
            yield to_pixels(random_state.standard_normal(shape))

    return ImageSet("Gaussian noise", count, image_shape, batches)


def part_of(images: ImageSet, count: int) -> ImageSet:
    """`count` of the images, spread evenly, so that a set sorted by class keeps some of each."""
    is_kept = evenly(images.num_images, count)

    def batches() -> Iterator[np.ndarray]:
        seen = 0
        for pixels in images.batches():
            yield pixels[is_kept[seen : seen + len(pixels)]]
            seen += len(pixels)

    return replace(images, num_images=count, batches=batches)


def evenly(num_images: int, count: int) -> np.ndarray:
    """Which of the images are taken for `count` of them: bool [N]."""
    is_kept = np.zeros(num_images, bool)
    is_kept[np.arange(count) * num_images // count] = True
    return is_kept


class DataSet(NamedTuple):
    """How a copy of a data set is found; the part that is the reference, and the other one."""

    find: Callable[[Path], Path | None]
    reference: Callable[[Path], LabelledImages]
    other: Callable[[Path], LabelledImages]


# Of CIFAR-10 the training images are the reference, as usual; of Fashion-MNIST the test images,
# which neither a run nor our classifier trains on.
DATA_SETS = (
    DataSet(cifar10.find_copy, cifar10.load_training_set, cifar10.load_test_set),
    DataSet(fashion.find_copy, fashion.load_test_set, fashion.load_training_set),
)


def data_set_at(source: Path) -> DataSet | None:
    """The known data set in a folder."""
    return next((known for known in DATA_SETS if source.is_dir() and known.find(source)), None)


def other_part(source: str | Path) -> ImageSet:
    """The part of the data set at `source` that is not the reference; of others, all images."""
    source = Path(source)
    if known := data_set_at(source):
        return array_images(f"other part of {source}", known.other(source).pixels)
    return find_images(source)


def find_images(
    source: str | Path,
    image_size: int | None = None,
    exif: str | None = None,
    index_folder: Path | None = None,
) -> ImageSet:
    """The images of `source`: an .npz, a known data set, pictures in a folder or in SHARDS.

    The index of tars is kept in `index_folder`.
    """
    source = Path(source)
    known = data_set_at(source)
    is_other_file = source.is_file() and not source.name.lower().endswith(SHARDS)
    if not known and not is_other_file and shards_of(source):
        files = list_source(source, index_folder)
        by_class = (len(files.class_names), "; ".join(files.notes))
        return _picture_set(str(source), files, *by_class, image_size, exif or "apply")
    if not source.exists():
        raise UserError(f"{source}: no such file or folder")
    if source.is_dir() and known is None:
        return folder_images(source, image_size, exif or "apply")
    if source.is_file() and source.name.lower().endswith(EXTENSIONS):
        raise UserError(f"{source}: a single picture; give a folder of pictures")
    for flag, value in (("image_size", image_size), ("exif", exif)):
        if value is not None:
            raise UserError(f"{source}: --{flag} is for folders of pictures")
    if known:
        return array_images(str(source), known.reference(source).pixels)
    return archive_images(source)
