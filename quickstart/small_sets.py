"""The small data sets that samples are scored on without a download: their splits and classifiers.

Samples say by their shape which of the sets they are of.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from support.data import fashion
from support.data.datasets import digits_split
from support.scores.npz import read_archive
from support.system.files import UserError

READ_IMAGES = 1_000


class Images(NamedTuple):
    """`pixels` uint8 [N, H, W, 1], `labels` int64 [N]."""

    pixels: np.ndarray
    labels: np.ndarray

    def first(self, count: int) -> "Images":
        return Images(self.pixels[:count], self.labels[:count])


class Split(NamedTuple):
    """What is trained on, what the classifier is trained on, and what both never see."""

    training: Images
    classifier: Images
    held_out: Images


@dataclass(frozen=True)
class SmallSet:
    """A data set of grey images, known by their shape [H, W, 1]."""

    noun: str  # of its images
    shape: tuple[int, int, int]
    graph: Path  # its classifier, frozen
    scored_count: int  # images of each row of a table
    load: Callable[[Path], Split]  # of the folder that it lies in, where it lies in one


def load_digits(folder: Path) -> Split:
    """scikit-learn's; with so few of them, the classifier is trained on what runs train on."""
    split = digits_split()
    training = Images(split.training_pixels, split.training_labels)
    return Split(training, training, Images(split.held_out_pixels, split.held_out_labels))


def load_fashion(folder: Path) -> Split:
    """Fashion-MNIST, of whose training images the classifier has 10,000 for itself."""
    loads = (fashion.load_training_set, fashion.load_classifier_set, fashion.load_test_set)
    parts = [load(folder) for load in loads]
    return Split(*(Images(part.pixels, part.labels) for part in parts))


HERE = Path(__file__).resolve().parent
SMALL_SETS = {
    "Digits": SmallSet("digits", (8, 8, 1), HERE / "digit_classifier.pb", 600, load_digits),
    "FashionMNIST": SmallSet(
        "clothes",
        (fashion.SIDE, fashion.SIDE, 1),
        HERE / "fashion_classifier.pb",
        5_000,
        load_fashion,
    ),
}
DEFAULT_FOLDER = Path("data/fashion")  # as in configs/fashion.yaml; digits need none


def set_of(paths: list[Path]) -> SmallSet:
    """The small set that all these archives hold images of; UserError where there is none."""
    first = _set_of(paths[0])
    for path in paths[1:]:
        if (other := _set_of(path)) is not first:
            raise UserError(
                f"{path}: holds {other.noun}, and {paths[0]} {first.noun}; "
                "name archives of one kind"
            )
    return first


def _set_of(path: Path) -> SmallSet:
    with read_archive(path) as archive:
        shape = archive.images_header().shape[1:]
    for small in SMALL_SETS.values():
        if small.shape == shape:
            return small
    known = " nor ".join(f"{small.noun} {list(small.shape)}" for small in SMALL_SETS.values())
    raise UserError(f"{path}: holds images of {list(shape)}, neither {known}")


def read_samples(path: Path, count: int | None = None) -> Images:
    """The first `count` images of an archive, or all, and the labels they were sampled for.

    UserError where it holds fewer, or no labels.
    """
    with read_archive(path) as archive:
        held, *shape = archive.images_header().shape
        if held < (count or 0):
            raise UserError(f"{path}: must hold {count} images, not {[held, *shape]}")
        if "arr_1" not in archive:
            raise UserError(f"{path}: holds no labels (arr_1), as samples do now; sample it again")
        labels = archive.labels(held)
        if count:
            return Images(next(archive.batches(count)), labels[:count])
        return Images(np.concatenate(list(archive.batches(READ_IMAGES))), labels)
