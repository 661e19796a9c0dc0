"""The data sets: what each is made of, and how it is loaded and checked."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from soflow.config import Config
from soflow.files import UserError
from soflow.images import to_images

# N examples, B samples of a part, C channels, H = W side

DIGITS_TRAINING_COUNT = 1_197
DIGITS_LEVELS = 16


@dataclass(frozen=True)
class DataSpec:
    """What a network and a sampler must know of a data set; recorded in every checkpoint."""

    channels: int
    size: int
    class_names: tuple[str, ...]
    num_examples: int

    @property
    def num_classes(self) -> int:
        """The number of classes, the null class not counted."""
        return len(self.class_names)

    @property
    def shape(self) -> tuple[int, int, int]:
        """[C, H, W] of one sample."""
        return (self.channels, self.size, self.size)

    def to_dict(self) -> dict[str, int | list[str]]:
        """Plain types only."""
        return {
            "channels": self.channels,
            "size": self.size,
            "num_classes": self.num_classes,
            "class_names": list(self.class_names),
            "num_examples": self.num_examples,
        }


class RawBatch(NamedTuple):
    """Samples as stored, [B, ...], and their labels, [B] int64; on the CPU."""

    stored: Tensor
    labels: Tensor


class PixelData(Dataset):
    """Images in memory: uint8 [N, C, H, W] with labels [N]."""

    def __init__(self, pixels: Tensor, labels: Tensor, class_names: tuple[str, ...]):
        self.pixels, self.labels = pixels, labels
        self.spec = DataSpec(pixels.shape[1], pixels.shape[2], class_names, len(pixels))

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, indices: list[int]) -> RawBatch:
        chosen = torch.tensor(indices)
        return RawBatch(self.pixels[chosen], self.labels[chosen])

    def clean(self, stored: Tensor, source: torch.Generator) -> Tensor:
        """x_0, float -1..1, of stored pixels on any device; nothing is drawn for pixels."""
        return to_images(stored)


class DigitsSplit(NamedTuple):
    """Pixels uint8 [N, 8, 8, 1] and labels int64 [N] of the two halves."""

    training_pixels: np.ndarray
    training_labels: np.ndarray
    held_out_pixels: np.ndarray
    held_out_labels: np.ndarray


def digits_split() -> DigitsSplit:
    """scikit-learn's 1,797 digits: 1,197 to train on and 600 held out, by a fixed permutation."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.round(digits.images * (255 / DIGITS_LEVELS)).astype(np.uint8)[..., None]
    labels = digits.target.astype(np.int64)
    # RandomState's stream is frozen: the split is the same with every version of NumPy.
    order = np.random.RandomState(0).permutation(len(pixels))
    training, held_out = np.split(order, [DIGITS_TRAINING_COUNT])
    return DigitsSplit(pixels[training], labels[training], pixels[held_out], labels[held_out])


def load_digits_data(config: Config) -> PixelData:
    """The digits to train on."""
    split = digits_split()
    pixels = torch.from_numpy(split.training_pixels).permute(0, 3, 1, 2).contiguous()
    names = tuple(str(digit) for digit in range(10))
    return PixelData(pixels, torch.from_numpy(split.training_labels), names)


class Source(NamedTuple):
    """A kind of data set: what it is made of, and how to load it."""

    channels: int
    num_classes: int | None  # None: known only from the data themselves
    load: Callable[[Config], PixelData]


SOURCES = {"Digits": Source(1, 10, load_digits_data)}


def build_data(config: Config) -> PixelData:
    """The data set that the config names; UserError where it is missing, damaged or too small."""
    data = SOURCES[config.dataset_type].load(config)
    if len(data) < config.batch_size:
        raise UserError(
            f"batch_size: {config.batch_size} is more than the {len(data)} examples "
            f"of {config.dataset_path or config.dataset_type}"
        )
    return data
