"""Fashion-MNIST: fetched once, verified, and padded from 28 to 32 pixels a side.

The files lie where torchvision puts them. They are verified by what they unpack to, because copies
from elsewhere are packed differently; torchvision's own reader verifies nothing, and importing it
after TensorFlow ends the process.
"""

import gzip
import hashlib
import math
import os
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from support.data.images import LabelledImages
from support.system.files import UserError, download, regular_only, reporting_os_errors
from support.system.locks import fetch_once

FOLDER = Path("FashionMNIST", "raw")
URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"
SIDE = 32
BACKGROUND = 0  # of the images, and of the two pixels added on each side
CLASSIFIER_COUNT = 10_000  # the last training images, for the classifier that scores samples
CLASS_NAMES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag"),
    "Ankle boot",
)


class Published(NamedTuple):
    """An unpacked idx file: bytes of this shape after a header."""

    shape: tuple[int, ...]
    sha256: str

    @property
    def header_bytes(self) -> int:
        return 4 + 4 * len(self.shape)  # a magic number, then the sizes


TRAINING = {
    "train-images-idx3-ubyte": Published(
        (60_000, 28, 28), "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888"
    ),
    "train-labels-idx1-ubyte": Published(
        (60_000,), "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9"
    ),
}
TEST = {
    "t10k-images-idx3-ubyte": Published(
        (10_000, 28, 28), "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b"
    ),
    "t10k-labels-idx1-ubyte": Published(
        (10_000,), "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34"
    ),
}


def find_copy(folder: Path) -> Path | None:
    """Where the idx files lie, complete or not: `folder`, torchvision's folder in it, or None."""
    names = (*TRAINING, *TEST)
    places = (folder, folder / FOLDER)
    return next((place for place in places if any(_find(place, name) for name in names)), None)


def load_training_set(folder: Path) -> LabelledImages:
    """The first 50,000 training images, uint8 [N, 32, 32, 1]; missing files are fetched.

    UserError where a file is damaged, or is missing and cannot be fetched.
    """
    return _load(folder, TRAINING).part(slice(-CLASSIFIER_COUNT))


def load_classifier_set(folder: Path) -> LabelledImages:
    """The other 10,000 training images, likewise."""
    return _load(folder, TRAINING).part(slice(-CLASSIFIER_COUNT, None))


def load_test_set(folder: Path) -> LabelledImages:
    """The 10,000 test images, likewise."""
    return _load(folder, TEST)


def _load(folder: Path, files: dict[str, Published]) -> LabelledImages:
    place = find_copy(folder) or folder / FOLDER

    def missing() -> list[str]:
        return [f"{name}.gz" for name in files if _find(place, name) is None]

    def fetch() -> None:
        for name in missing():
            download(f"{URL}/{name}", place / name)

    fetch_once(place, missing, fetch, "put them there yourself")
    pixels, labels = (
        _read(_find(place, name) or place / name, what) for name, what in files.items()
    )
    margin = (SIDE - pixels.shape[1]) // 2
    widths = ((0, 0), (margin, margin), (margin, margin))
    padded = np.pad(pixels, widths, constant_values=BACKGROUND)[..., None]
    return LabelledImages(padded, labels.astype(np.int64))


def _find(place: Path, name: str) -> Path | None:
    """The idx file of this name, packed or as torchvision unpacks it."""
    return next(
        (path for path in (place / f"{name}.gz", place / name) if os.path.exists(path)), None
    )


def _read(path: Path, published: Published) -> np.ndarray:
    """The content of an idx file, uint8; UserError where it is not the published one."""
    # At most one byte more than it should hold: a small file may unpack to anything.
    num_bytes = published.header_bytes + math.prod(published.shape) + 1
    try:
        with (
            reporting_os_errors(f"{path}: cannot be read"),
            open(path, "rb", opener=regular_only) as stored,
        ):
            packed = gzip.GzipFile(fileobj=stored) if path.suffix == ".gz" else stored
            content = packed.read(num_bytes)
    except (EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be unpacked ({error}); delete it to fetch it") from error
    digest = hashlib.sha256(content).hexdigest()
    if digest != published.sha256:
        raise UserError(
            f"{path}: not Fashion-MNIST's published file: the SHA-256 of its content is {digest}, "
            f"not {published.sha256}; delete it, and the next start fetches it"
        )
    return np.frombuffer(content, np.uint8, offset=published.header_bytes).reshape(published.shape)
