"""CIFAR-10: fetched once, and read by torchvision.

torchvision knows the MD5 of each published file, which tells what unpickling it does. It is
imported when there is something to read: the evaluator does without torch otherwise.
"""

import os
import shutil
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from support.system.files import UserError, atomic_write, download, make_folder
from support.system.locks import done_by_one

FOLDER = "cifar-10-batches-py"


@dataclass(frozen=True)
class Cifar10Images:
    """`pixels` uint8 [N, 32, 32, 3], `labels` int64 [N]; label k is `class_names[k]`."""

    pixels: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]


def find_copy(folder: Path) -> Path | None:
    """The place of CIFAR-10's batches, whole or not: `folder`, a folder in it, or None."""
    places = (folder, folder / FOLDER)
    batches = [f"data_batch_{number}" for number in range(1, 6)]
    # os.path, because Path.exists raises where a folder may not be entered.
    there = [place for place in places if any(os.path.exists(place / name) for name in batches)]
    return there[0] if there else None


def load_training_set(folder: Path) -> Cifar10Images:
    """The 50,000 training images of the copy in `folder`; files that are missing are fetched.

    Raises UserError where one is damaged, or is missing and cannot be fetched.
    """
    return _load(folder, is_training=True)


def load_test_set(folder: Path) -> Cifar10Images:
    """The 10,000 test images, as `load_training_set` gives the others."""
    return _load(folder, is_training=False)


def _load(folder: Path, is_training: bool) -> Cifar10Images:
    published = _published(folder, is_training)
    place = find_copy(folder) or folder / FOLDER
    reason = f"another process failed to fetch {published.filename}"
    done_by_one(
        folder / f".{published.filename}.lock",
        lambda: _fetch(folder, place, published),
        is_due=lambda: bool(_missing(place, published)),
        refusal=lambda: _not_fetched(folder, place, published, reason),
    )
    for name, md5 in published.md5_of.items():
        _verify(place / name, md5)
    images = published(place, train=is_training)
    return Cifar10Images(images.data, np.array(images.targets, np.int64), tuple(images.classes))


def _published(folder: Path, is_training: bool) -> Any:
    """torchvision's class of one half of the data set, its root being the folder of the batches."""
    try:
        from torchvision.datasets import CIFAR10
    except ImportError as error:
        raise UserError(
            f"{folder}: reading CIFAR-10 needs torchvision, which is not installed here; "
            "requirements_soflow.txt has it"
        ) from error

    class OneHalf(CIFAR10):
        base_folder = ""
        # A copy without the other half is whole enough.
        train_list: ClassVar = CIFAR10.train_list if is_training else []
        test_list: ClassVar = [] if is_training else CIFAR10.test_list
        md5_of: ClassVar = dict(
            [*train_list, *test_list, (CIFAR10.meta["filename"], CIFAR10.meta["md5"])]
        )

    return OneHalf


def _missing(place: Path, published: Any) -> list[str]:
    return [name for name in published.md5_of if not os.path.exists(place / name)]


def _fetch(folder: Path, place: Path, published: Any) -> None:
    """Fill up `place` from the archive in `folder`, downloaded for the purpose if need be."""
    archive = folder / published.filename
    if os.path.exists(archive):
        _unpack(archive, place, published)
        return
    try:
        download(published.url, archive)
        _unpack(archive, place, published)
    except UserError as error:
        raise _not_fetched(folder, place, published, str(error)) from error
    finally:
        archive.unlink(missing_ok=True)


def _not_fetched(folder: Path, place: Path, published: Any, reason: str) -> UserError:
    return UserError(
        f"{place}: lacks {', '.join(_missing(place, published))}; {reason}; put "
        f"{published.filename} from {published.url} into {folder} yourself"
    )


def _unpack(archive: Path, place: Path, published: Any) -> None:
    """Write the published files that `place` lacks, each of them whole."""
    _verify(archive, published.tgz_md5)
    make_folder(place)
    missing = {f"{FOLDER}/{name}": place / name for name in _missing(place, published)}
    with tarfile.open(archive) as members:
        for member in members:
            content = members.extractfile(member) if member.name in missing else None
            if content:
                with atomic_write(missing[member.name]) as file:
                    shutil.copyfileobj(content, file)


def _verify(path: Path, md5: str) -> None:
    """UserError where the file at `path` is not the one that was published."""
    from torchvision.datasets.utils import calculate_md5

    try:
        actual = calculate_md5(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    if actual != md5:
        raise UserError(
            f"{path}: not the published file, its MD5 is {actual} instead of {md5}; delete it, "
            "and the next start fetches it"
        )
