"""CIFAR-10: fetched once, verified by the published MD5 of each file, and only then unpickled.

torchvision knows where the files are and their MD5. It is imported only when there is something to
read, because the evaluator works without torch.
"""

import hashlib
import os
import pickle
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np

from support.data.images import LabelledImages
from support.system.files import UserError, atomic_write, download, make_folder
from support.system.locks import done_by_one

FOLDER = "cifar-10-batches-py"
SIDE = 32
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
    published = _published(folder)
    md5_of = dict(published.train_list if is_training else published.test_list)
    place = find_copy(folder) or folder / FOLDER
    archive = folder / published.filename

    def missing() -> list[str]:
        return [name for name in md5_of if not os.path.exists(place / name)]

    def not_fetched(reason: str) -> UserError:
        return UserError(
            f"{place}: lacks {', '.join(missing())}; {reason}; put {archive.name} from "
            f"{published.url} into {folder} yourself"
        )

    def fetch() -> None:
        if os.path.exists(archive):
            _unpack(archive, published.tgz_md5, place, missing())
            return
        try:
            download(published.url, archive)
            _unpack(archive, published.tgz_md5, place, missing())
        except UserError as error:
            raise not_fetched(str(error)) from error
        finally:
            archive.unlink(missing_ok=True)

    done_by_one(
        folder / f".{archive.name}.lock",
        fetch,
        is_due=lambda: bool(missing()),
        refusal=lambda: not_fetched(f"another process failed to fetch {archive.name}"),
    )
    for name, md5 in md5_of.items():
        _verify(place / name, md5)
    batches = [pickle.loads((place / name).read_bytes(), encoding="latin1") for name in md5_of]
    pixels = np.concatenate([batch["data"] for batch in batches]).reshape(-1, 3, SIDE, SIDE)
    labels = np.concatenate([batch["labels"] for batch in batches])
    return LabelledImages(np.ascontiguousarray(pixels.transpose(0, 2, 3, 1)), labels)


def _published(folder: Path) -> Any:
    """torchvision's class, which knows the address and the MD5 of every file."""
    try:
        from torchvision.datasets import CIFAR10
    except ImportError as error:
        raise UserError(
            f"{folder}: reading CIFAR-10 needs torchvision, which is not installed here; "
            "requirements_soflow.txt has it"
        ) from error
    return CIFAR10


def _unpack(archive: Path, md5: str, place: Path, names: list[str]) -> None:
    """Write the files of these names from the archive, which must have this MD5."""
    _verify(archive, md5)
    make_folder(place)
    wanted = {f"{FOLDER}/{name}": place / name for name in names}
    with tarfile.open(archive) as members:
        for member in members:
            content = members.extractfile(member) if member.name in wanted else None
            if content:
                with atomic_write(wanted[member.name]) as file:
                    shutil.copyfileobj(content, file)


def _verify(path: Path, md5: str) -> None:
    """UserError where the file at `path` is not the published one."""
    try:
        with open(path, "rb") as file:
            actual = hashlib.file_digest(file, "md5").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    if actual != md5:
        raise UserError(
            f"{path}: not the published file, its MD5 is {actual} instead of {md5}; delete it, "
            "and the next start fetches it"
        )
