"""CIFAR-10's files: fetched once, verified, and read without running what a pickle may ask for.

Without torch, so that the evaluator can read batches too; torchvision says what was published.
"""

import hashlib
import io
import pickle
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from support.system.files import (
    UserError,
    atomic_write,
    download,
    make_folder,
    natural_key,
    one_at_a_time,
    one_line,
    regular_only,
)

FOLDER = "cifar-10-batches-py"
FILE_LIMIT_BYTES = 1 << 28  # the archive has 170 MB, a batch 31 MB
IMAGE_SHAPE = (32, 32, 3)


@dataclass(frozen=True)
class Cifar10Batch:
    """`pixels` uint8 [N, 32, 32, 3], `labels` int64 [N]."""

    pixels: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class Cifar10Training:
    """The training images with their labels; label k is `class_names[k]`."""

    pixels: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]


# The training set, as published


@dataclass(frozen=True)
class Published:
    """What CIFAR-10 consists of: where its archive is, and the MD5 of that and of every file."""

    url: str
    archive: str
    archive_md5: str
    training_files: tuple[str, ...]
    names_file: str
    md5: dict[str, str]


def published() -> Published:
    """torchvision's table of digests."""
    from torchvision.datasets import CIFAR10

    names_file = CIFAR10.meta["filename"]
    return Published(
        CIFAR10.url,
        CIFAR10.filename,
        CIFAR10.tgz_md5,
        tuple(name for name, _ in CIFAR10.train_list),
        names_file,
        {**dict(CIFAR10.train_list + CIFAR10.test_list), names_file: CIFAR10.meta["md5"]},
    )


def load_training_set(folder: Path) -> Cifar10Training:
    """The 50,000 training images of the copy in `folder`, which is fetched where there is none.

    A file is read once, and its bytes are verified before they are unpickled. Raises UserError
    where one is damaged, or is missing and cannot be fetched.
    """
    table = published()
    place = folder if (folder / table.training_files[0]).is_file() else folder / FOLDER
    if _missing(place, table):
        make_folder(folder)
        with one_at_a_time(folder / f".{table.archive}.lock") as has_waited:
            missing = _missing(place, table)
            # Whoever waited does not try in turn: on a machine without a network, that adds up.
            if missing and has_waited:
                raise _not_fetched(
                    folder, place, table, f"another process failed to fetch {table.archive}"
                )
            if missing:
                _fetch(folder, place, table)
    batches = [
        parse_batch(_verified(_read(path), table.md5[path.name], path), path)
        for path in (place / name for name in table.training_files)
    ]
    names_path = place / table.names_file
    names = _verified(_read(names_path), table.md5[table.names_file], names_path)
    return Cifar10Training(
        np.concatenate([batch.pixels for batch in batches]),
        np.concatenate([batch.labels for batch in batches]),
        _class_names(names, names_path),
    )


def _missing(place: Path, table: Published) -> list[str]:
    """The files that training needs and that are not there."""
    needed = (*table.training_files, table.names_file)
    return [name for name in needed if not (place / name).exists()]


def _fetch(folder: Path, place: Path, table: Published) -> None:
    """Fill up `place` from the archive in `folder`, downloaded for the purpose if need be."""
    archive = folder / table.archive
    if archive.exists():
        _unpack(archive, place, table)
        return
    try:
        download(table.url, archive)
        _unpack(archive, place, table)
    except UserError as error:
        raise _not_fetched(folder, place, table, str(error)) from error
    finally:
        archive.unlink(missing_ok=True)


def _not_fetched(folder: Path, place: Path, table: Published, reason: str) -> UserError:
    return UserError(
        f"{place}: lacks {', '.join(_missing(place, table))}; {reason}; put {table.archive} from "
        f"{table.url} into {folder} yourself"
    )


def _unpack(archive: Path, place: Path, table: Published) -> None:
    """Write the published files that `place` lacks, each of them whole."""
    content = _verified(_read(archive), table.archive_md5, archive)
    make_folder(place)
    with tarfile.open(fileobj=io.BytesIO(content)) as members:
        for name, md5 in table.md5.items():
            if not (place / name).exists():
                member = members.extractfile(f"{FOLDER}/{name}").read()
                with atomic_write(place / name) as file:
                    file.write(_verified(member, md5, archive))


def _verified(content: bytes, md5: str, path: Path) -> bytes:
    """`content`, which is what was published; UserError where it is not."""
    actual = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if actual != md5:
        raise UserError(
            f"{path}: not the published file, its MD5 is {actual} instead of {md5}; delete it, "
            "and the next start fetches it"
        )
    return content


def _read(path: Path) -> bytes:
    try:
        with open(path, "rb", opener=regular_only) as file:
            content = file.read(FILE_LIMIT_BYTES + 1)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    if len(content) > FILE_LIMIT_BYTES:
        raise UserError(f"{path}: larger than anything of CIFAR-10")
    return content


# Pickles


def training_batches(folder: str | Path) -> list[Path]:
    """The `data_batch_*` files in `folder` or in its `cifar-10-batches-py`, in order; or none."""
    places = [Path(folder), Path(folder) / FOLDER]
    paths = [path for place in places for path in place.glob("data_batch_?")]
    return sorted(paths, key=lambda path: natural_key(path.name))


def read_batch(path: str | Path) -> Cifar10Batch:
    """The images and labels of one batch file; UserError where it is not one."""
    return parse_batch(_read(Path(path)), path)


def parse_batch(data: bytes, path: str | Path) -> Cifar10Batch:
    """The images and labels of the bytes of a batch file; UserError names `path`."""
    try:
        content = _parse(data)
        rows = content["data"].array()
        pixels = rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        labels = content["labels"]
        # Before NumPy sees them: a few lists, each many times in the next, make an endless array.
        if not isinstance(labels, list) or not all(isinstance(label, int) for label in labels):
            raise UserError("its labels are no list of whole numbers")
        if len(labels) != len(pixels):
            raise UserError(f"{len(pixels)} images but {len(labels)} labels")
        return Cifar10Batch(np.ascontiguousarray(pixels), np.array(labels, np.int64))
    except Exception as error:  # a hostile pickle can raise anything
        raise UserError(f"{path}: not a batch of CIFAR-10 ({one_line(error)})") from error


def _class_names(data: bytes, path: Path) -> tuple[str, ...]:
    try:
        return tuple(_text(name) for name in _parse(data)["label_names"])
    except Exception as error:
        raise UserError(f"{path}: not CIFAR-10's class names ({one_line(error)})") from error


def _parse(data: bytes) -> dict:
    content = _PlainUnpickler(data).load()
    return {_text(key): value for key, value in content.items()}


def _text(value: bytes | str) -> str:
    """`str` of Python 2 arrives as bytes, that of Python 3 as str."""
    return value.decode() if isinstance(value, bytes) else value


class _ArrayState:
    """Stands for a numpy array in a pickle: keeps the state, builds nothing from it."""

    def __init__(self, *_):
        self.state: tuple = ()

    def __setstate__(self, state: tuple):
        self.state = state

    def array(self) -> np.ndarray:
        _, shape, dtype, is_fortran, data = self.state
        if dtype.name not in (b"u1", "u1"):
            raise UserError("its images are not uint8")
        return np.frombuffer(data, np.uint8).reshape(shape, order="F" if is_fortran else "C")


class _Dtype:
    """Stands for a numpy dtype in a pickle."""

    def __init__(self, name, *_):
        self.name = name

    def __setstate__(self, state: tuple):
        pass


# The one in Python, on purpose: the one in C allocates whatever memo size a pickle asks for.
class _PlainUnpickler(pickle._Unpickler):
    _STAND_INS = {  # noqa: RUF012
        ("numpy.core.multiarray", "_reconstruct"): _ArrayState,
        ("numpy._core.multiarray", "_reconstruct"): _ArrayState,
        ("numpy", "ndarray"): None,
        ("numpy", "dtype"): _Dtype,
        ("_codecs", "encode"): None,
    }
    dispatch = dict(pickle._Unpickler.dispatch)  # noqa: RUF012

    def __init__(self, data: bytes):
        super().__init__(io.BytesIO(data), encoding="bytes")
        self._encodable_bytes = len(data)

    def find_class(self, module: str, name: str):
        if (module, name) not in self._STAND_INS:
            raise UserError(f"it asks for {module}.{name}, which is refused")
        return self._encode if name == "encode" else self._STAND_INS[module, name]

    def _encode(self, text: str, encoding: str) -> bytes:
        # A pickle can ask again and again for the same text.
        self._encodable_bytes -= len(text)
        if self._encodable_bytes < 0:
            raise UserError("it unpacks to more than it holds")
        return text.encode("latin1")

    def _refuse(self) -> None:
        raise UserError("it holds what no batch of CIFAR-10 does")

    # Takes as much memory as the pickle says, before it looks whether so much is there.
    dispatch[pickle.BYTEARRAY8[0]] = _refuse
