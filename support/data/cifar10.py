"""CIFAR-10: fetched once, and read by torchvision.

torchvision unpickles the files, so their published MD5 is verified first. It is imported only when
there is something to read, because the evaluator works without torch.
"""

import os
import shutil
import tarfile
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from support.data.images import LabelledImages
from support.system.files import UserError, atomic_write, download, make_folder
from support.system.locks import done_by_one

FOLDER = "cifar-10-batches-py"
CLASS_NAMES = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)


def find_copy(folder: Path) -> Path | None:
    """Where CIFAR-10's batches are, complete or not: `folder`, a folder in it, or None."""
    places = (folder, folder / FOLDER)
    batches = [f"data_batch_{number}" for number in range(1, 6)]
    # os.path, because Path.exists raises where a folder may not be entered.
    there = [place for place in places if any(os.path.exists(place / name) for name in batches)]
    return there[0] if there else None


def load_training_set(folder: Path) -> LabelledImages:
    """The 50,000 training images, uint8 [N, 32, 32, 3]; missing files are fetched into `folder`.

    UserError where a file is damaged, or is missing and cannot be fetched.
    """
    return _load(folder, is_training=True)


def load_test_set(folder: Path) -> LabelledImages:
    """The 10,000 test images, likewise."""
    return _load(folder, is_training=False)


def _load(folder: Path, is_training: bool) -> LabelledImages:
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
    return LabelledImages(images.data, np.array(images.targets, np.int64))


def _published(folder: Path, is_training: bool) -> Any:
    """torchvision's class for one half of the data set, with the batches' folder as its root."""
    try:
        from torchvision.datasets import CIFAR10
    except ImportError as error:
        raise UserError(
            f"{folder}: reading CIFAR-10 needs torchvision, which is not installed here; "
            "requirements_soflow.txt has it"
        ) from error

    class OneHalf(CIFAR10):
        base_folder = ""
        # The other half need not be there.
        train_list: ClassVar = CIFAR10.train_list if is_training else []
        test_list: ClassVar = [] if is_training else CIFAR10.test_list
        md5_of: ClassVar = dict(
            [*train_list, *test_list, (CIFAR10.meta["filename"], CIFAR10.meta["md5"])]
        )

    return OneHalf


def _missing(place: Path, published: Any) -> list[str]:
    return [name for name in published.md5_of if not os.path.exists(place / name)]


def _fetch(folder: Path, place: Path, published: Any) -> None:
    """Complete `place` from the archive in `folder`, which is downloaded if it is not there."""
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
    """Write the published files that `place` lacks."""
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
    """UserError where the file at `path` is not the published one."""
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
