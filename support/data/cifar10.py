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

import numpy as np

from support.data.images import LabelledImages
from support.system.files import UserError, atomic_write, download, reporting_os_errors
from support.system.locks import fetch_once

FOLDER = "cifar-10-batches-py"
SIDE = 32
CLASS_NAMES = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)


def find_copy(folder: Path) -> Path | None:
    """Where CIFAR-10's batches are, complete or not: `folder`, a folder in it, or None."""
    for place in (folder, folder / FOLDER):
        # os.path, because Path.exists raises where a folder may not be entered.
        if any(os.path.exists(place / f"data_batch_{number}") for number in range(1, 6)):
            return place
    return None


def load_training_set(folder: Path) -> LabelledImages:
    """The 50,000 training images, uint8 [N, 32, 32, 3]; missing files are fetched into `folder`.

    UserError where a file is damaged, or is missing and cannot be fetched.
    """
    return _load(folder, is_training=True)


def load_test_set(folder: Path) -> LabelledImages:
    """The 10,000 test images, likewise."""
    return _load(folder, is_training=False)


def _load(folder: Path, is_training: bool) -> LabelledImages:
    from torchvision.datasets import CIFAR10

    md5_of = dict(CIFAR10.train_list if is_training else CIFAR10.test_list)
    place = find_copy(folder) or folder / FOLDER
    archive = folder / CIFAR10.filename

    def missing() -> list[str]:
        return [name for name in md5_of if not os.path.exists(place / name)]

    def fetch() -> None:
        was_there = os.path.exists(archive)
        if not was_there:
            download(CIFAR10.url, archive)
        try:
            _unpack(archive, CIFAR10.tgz_md5, place, missing())
        finally:
            if not was_there:
                archive.unlink()

    advice = f"put {archive.name} from {CIFAR10.url} into {folder} yourself"
    fetch_once(place, missing, fetch, advice)
    for name, md5 in md5_of.items():
        _verify(place / name, md5)
    batches = [pickle.loads((place / name).read_bytes(), encoding="latin1") for name in md5_of]
    pixels = np.concatenate([batch["data"] for batch in batches]).reshape(-1, 3, SIDE, SIDE)
    labels = np.concatenate([batch["labels"] for batch in batches])
    return LabelledImages(np.ascontiguousarray(pixels.transpose(0, 2, 3, 1)), labels)


def _unpack(archive: Path, md5: str, place: Path, names: list[str]) -> None:
    """Write the files of these names from the archive, which must have this MD5."""
    _verify(archive, md5)
    wanted = {f"{FOLDER}/{name}": place / name for name in names}
    with tarfile.open(archive) as members:
        for member in members:
            content = members.extractfile(member) if member.name in wanted else None
            if content:
                with atomic_write(wanted[member.name]) as file:
                    shutil.copyfileobj(content, file)


def _verify(path: Path, md5: str) -> None:
    """UserError where the file at `path` is not the published one."""
    with reporting_os_errors(f"{path}: cannot be read"), open(path, "rb") as file:
        actual = hashlib.file_digest(file, "md5").hexdigest()
    if actual != md5:
        raise UserError(
            f"{path}: not the published file, its MD5 is {actual} instead of {md5}; delete it, "
            "and the next start fetches it"
        )
