"""Fashion-MNIST: fetched once, verified, and padded from 28 to 32 pixels a side.

The files are torchvision's, where it puts them and from where it fetches them. Its reader is not
used: that takes only what it has unpacked itself, without a look at it. A copy elsewhere, Debian's
for one, is packed with another header: so digests are those of the unpacked files. The published
ones unpack to these. And torchvision is imported only to fetch them: together with TensorFlow, when
that comes first, it ends the process.
"""

import gzip
import hashlib
import math
import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from support.system.files import UserError, download, regular_only
from support.system.locks import done_by_one

FOLDER = Path("FashionMNIST", "raw")
DEBIANS_FOLDER = "fashion-mnist"
SIDE = 32
BACKGROUND = 0  # of the pictures, and of the two pixels that are added on each side
CLASSIFIER_COUNT = 10_000  # the last training images: a classifier's that scores the others
CLASS_NAMES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag"),
    "Ankle boot",
)


class Published(NamedTuple):
    """What an idx file holds once it is unpacked: bytes of this shape behind a header."""

    shape: tuple[int, ...]
    sha256: str

    @property
    def header_bytes(self) -> int:
        return 4 + 4 * len(self.shape)  # a magic number, then the sizes

    @property
    def total_bytes(self) -> int:
        return self.header_bytes + math.prod(self.shape)


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


@dataclass(frozen=True)
class FashionImages:
    """`pixels` uint8 [N, 32, 32, 1], `labels` int64 [N]; label k is `class_names[k]`."""

    pixels: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...] = CLASS_NAMES

    def part(self, chosen: slice) -> "FashionImages":
        return FashionImages(self.pixels[chosen], self.labels[chosen])


def find_copy(folder: Path) -> Path | None:
    """The place of the idx files, whole or not: `folder`, torchvision's or Debian's in it, or None.

    A link to Debian's folder comes to lie in `folder` where that is there already.
    """
    places = (folder, folder / FOLDER, folder / DEBIANS_FOLDER)
    names = (*TRAINING, *TEST)
    return next((place for place in places if any(_find(place, name) for name in names)), None)


def load_training_set(folder: Path) -> FashionImages:
    """The first 50,000 training images of the copy in `folder`; missing files are fetched.

    Raises UserError where one is damaged, or is missing and cannot be fetched.
    """
    return _load(folder, TRAINING).part(slice(None, -CLASSIFIER_COUNT))


def load_classifier_set(folder: Path) -> FashionImages:
    """The other 10,000 training images, as `load_training_set` gives its own."""
    return _load(folder, TRAINING).part(slice(-CLASSIFIER_COUNT, None))


def load_test_set(folder: Path) -> FashionImages:
    """The 10,000 test images, as `load_training_set` gives the others."""
    return _load(folder, TEST)


def _load(folder: Path, files: dict[str, Published]) -> FashionImages:
    place = find_copy(folder) or folder / FOLDER

    def missing() -> list[str]:
        return [f"{name}.gz" for name in files if _find(place, name) is None]

    def not_fetched(reason: str) -> UserError:
        return UserError(
            f"{place}: lacks {', '.join(missing())}; {reason}; put them there yourself, or name "
            "the folder of Debian's package dataset-fashion-mnist"
        )

    def fetch() -> None:
        try:
            for name in missing():
                download(f"{_url()}{name}", place / name)
        except UserError as error:
            raise not_fetched(str(error)) from error

    done_by_one(
        place / ".fashion-mnist.lock",
        fetch,
        is_due=lambda: bool(missing()),
        refusal=lambda: not_fetched("another process failed to fetch them"),
    )
    pixels, labels = (
        _read(_find(place, name) or place / name, what) for name, what in files.items()
    )
    margin = (SIDE - pixels.shape[1]) // 2
    widths = ((0, 0), (margin, margin), (margin, margin))
    padded = np.pad(pixels, widths, constant_values=BACKGROUND)[..., None]
    return FashionImages(padded, labels.astype(np.int64))


def _url() -> str:
    """Where the files are published."""
    try:
        from torchvision.datasets import FashionMNIST
    except ImportError as error:
        raise UserError(
            "fetching them needs torchvision, which is not installed here; "
            "requirements_soflow.txt has it"
        ) from error
    return FashionMNIST.mirrors[0]


def _find(place: Path, name: str) -> Path | None:
    """The idx file of this name, packed or as torchvision unpacks it."""
    return next(
        (path for path in (place / f"{name}.gz", place / name) if os.path.exists(path)), None
    )


def _read(path: Path, published: Published) -> np.ndarray:
    """The content of an idx file, uint8; UserError where it is not the published one."""
    wanted_bytes = published.total_bytes
    try:
        with open(path, "rb", opener=regular_only) as stored:
            # One byte more than it should hold, and no more: a small file may unpack to anything.
            if path.suffix == ".gz":
                with gzip.GzipFile(fileobj=stored) as unpacked:
                    content = unpacked.read(wanted_bytes + 1)
            else:
                content = stored.read(wanted_bytes + 1)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise _refused(path, f"it cannot be unpacked: {error}") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    if len(content) != wanted_bytes:
        kind = "more" if len(content) > wanted_bytes else f"{len(content)}"
        raise _refused(path, f"it holds {kind} bytes instead of {wanted_bytes}")
    digest = hashlib.sha256(content).hexdigest()
    if digest != published.sha256:
        raise _refused(path, f"the SHA-256 of its content is {digest}, not {published.sha256}")
    return np.frombuffer(content, np.uint8, offset=published.header_bytes).reshape(published.shape)


def _refused(path: Path, why: str) -> UserError:
    return UserError(
        f"{path}: not Fashion-MNIST's published file, {why}; delete it, and the next start "
        "fetches it"
    )
