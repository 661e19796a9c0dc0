"""CIFAR-10's pickled batches, read without running what a pickle may ask for, and without torch."""

import io
import pickle
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from soflow.files import UserError, natural_key, one_line

FILE_LIMIT_BYTES = 1 << 26  # a batch has 31 MB
IMAGE_SHAPE = (32, 32, 3)


@dataclass(frozen=True)
class Cifar10Batch:
    """`pixels` uint8 [N, 32, 32, 3], `labels` int64 [N]."""

    pixels: np.ndarray
    labels: np.ndarray


def training_batches(folder: str | Path) -> list[Path]:
    """The `data_batch_*` files in `folder` or in its `cifar-10-batches-py`, in order; or none."""
    places = [Path(folder), Path(folder) / "cifar-10-batches-py"]
    paths = [path for place in places for path in place.glob("data_batch_?")]
    return sorted(paths, key=lambda path: natural_key(path.name))


def read_batch(path: str | Path) -> Cifar10Batch:
    """The images and labels of one batch file; UserError where it is not one."""
    try:
        with open(path, "rb") as file:
            data = file.read(FILE_LIMIT_BYTES + 1)
        if len(data) > FILE_LIMIT_BYTES:
            raise UserError("larger than any batch")
        content = _PlainUnpickler(io.BytesIO(data), encoding="bytes").load()
        rows = content[b"data"].array()
        labels = np.array(content[b"labels"], np.int64)
        pixels = rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        if labels.shape != (len(pixels),):
            raise UserError(f"{len(pixels)} images but labels {list(labels.shape)}")
    except Exception as error:  # a hostile pickle can raise anything
        raise UserError(f"{path}: not a batch of CIFAR-10 ({one_line(error)})") from error
    return Cifar10Batch(np.ascontiguousarray(pixels), labels)


class _ArrayState:
    """Stands for a numpy array in a pickle: keeps the state, builds nothing from it."""

    def __init__(self, *_):
        self.state: tuple = ()

    def __setstate__(self, state: tuple):
        self.state = state

    def array(self) -> np.ndarray:
        _, shape, dtype, is_fortran, data = self.state
        if dtype.name not in (b"u1", "u1") or is_fortran:
            raise UserError("its images are not uint8")
        return np.frombuffer(data, np.uint8).reshape(shape)


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
        ("_codecs", "encode"): lambda text, encoding: text.encode("latin1"),
    }

    def find_class(self, module: str, name: str):
        if (module, name) not in self._STAND_INS:
            raise UserError(f"it asks for {module}.{name}, which is refused")
        return self._STAND_INS[module, name]
