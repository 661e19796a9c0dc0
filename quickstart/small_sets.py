"""The small data sets whose samples are scored without a download: their splits and classifiers.

The shape of samples says which of the sets they belong to.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from support.data import digits, fashion
from support.data.images import LabelledImages
from support.scores.npz import read_archive
from support.system.files import UserError

READ_IMAGES = 1_000
HERE = Path(__file__).resolve().parent
DEFAULT_FOLDER = Path("data/fashion")  # as in configs/fashion.yaml; digits need none


class Split(NamedTuple):
    """What runs train on, what the classifier trains on, and what neither sees."""

    training: LabelledImages
    classifier: LabelledImages
    held_out: LabelledImages


@dataclass(frozen=True)
class SmallSet:
    """A data set of grey images, recognised by their shape [H, W, 1]."""

    noun: str  # for its images
    shape: tuple[int, int, int]
    graph: Path  # its classifier, as a frozen graph
    scored_count: int  # images in each row of a table
    load: Callable[[Path], Split]  # from its folder, if it has one


def load_digits(folder: Path) -> Split:
    """There are so few digits that the classifier trains on the same ones as runs."""
    training = digits.load_training_set()
    return Split(training, training, digits.load_test_set())


def load_fashion(folder: Path) -> Split:
    """The classifier has 10,000 of the training images to itself."""
    loads = (fashion.load_training_set, fashion.load_classifier_set, fashion.load_test_set)
    return Split(*(load(folder) for load in loads))


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


def set_of(paths: list[Path]) -> SmallSet:
    """The small set that all these archives belong to; UserError where there is none."""
    first, *others = map(_set_of, paths)
    for path, other in zip(paths[1:], others, strict=True):
        if other is not first:
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


def read_samples(path: Path, fewest: int = 0) -> LabelledImages:
    """The images of an archive, with the labels they were sampled for.

    UserError where it holds no labels, or fewer images.
    """
    with read_archive(path) as archive:
        held, *shape = archive.images_header().shape
        if "arr_1" not in archive:
            raise UserError(f"{path}: holds no labels (arr_1), as samples do now; sample it again")
        labels = archive.labels(held)
        if held < fewest:
            raise UserError(f"{path}: must hold {fewest} images, not {[held, *shape]}")
        return LabelledImages(np.concatenate(list(archive.batches(READ_IMAGES))), labels)
