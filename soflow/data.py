"""What a batch is: the data sets, the parts of a global batch, and the order of samples."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from soflow.config import Config
from soflow.files import UserError
from soflow.images import to_images
from soflow.randomness import generator

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


@dataclass(frozen=True)
class BatchPlan:
    """How a global batch is cut into parts: by process first, then by accumulation step.

    Part q of P takes part of the flow matching samples, which come first in the global batch, and
    part of the consistency samples; all parts have the same size.
    """

    batch_size: int
    flow_matching_count: int
    world_size: int
    accumulation_steps: int

    def __post_init__(self):
        if self.batch_size % self.num_parts:
            raise UserError(
                f"batch_size: {self.batch_size} cannot be cut into {self.world_size} processes x "
                f"{self.accumulation_steps} accumulation_steps = {self.num_parts} equal parts"
            )

    @property
    def num_parts(self) -> int:
        """Parts of a global batch, over all processes."""
        return self.world_size * self.accumulation_steps

    @property
    def consistency_count(self) -> int:
        """Consistency samples of the global batch."""
        return self.batch_size - self.flow_matching_count

    def parts_of(self, rank: int) -> range:
        """The parts that process `rank` takes in turn."""
        return range(rank * self.accumulation_steps, (rank + 1) * self.accumulation_steps)

    def flow_matching_samples(self, part: int) -> range:
        """Places in the global batch of the part's flow matching samples."""
        return range(self._bound(part), self._bound(part + 1))

    def consistency_samples(self, part: int) -> range:
        """Places in the global batch of the part's consistency samples."""
        size = self.batch_size // self.num_parts
        first = self.flow_matching_count
        # What flow matching leaves of the part: so that parts are equal though shares are not.
        return range(
            first + part * size - self._bound(part),
            first + (part + 1) * size - self._bound(part + 1),
        )

    def _bound(self, part: int) -> int:
        return self.flow_matching_count * part // self.num_parts

    def __str__(self) -> str:
        processes = "process" if self.world_size == 1 else "processes"
        size = self.batch_size // self.num_parts
        return (
            f"{self.batch_size} = {self.world_size} {processes} x {size} "
            f"x {self.accumulation_steps} accumulation"
        )


class DataOrder:
    """Which example stands where: a new permutation for each epoch, the last samples dropped."""

    def __init__(self, num_examples: int, batch_size: int, seed: int):
        self.num_examples, self.batch_size, self.seed = num_examples, batch_size, seed
        self.steps_per_epoch = num_examples // batch_size
        self._permutation = lru_cache(maxsize=1)(self._draw_permutation)

    def _draw_permutation(self, epoch: int) -> Tensor:
        source = generator(self.seed, "data order", epoch)
        return torch.randperm(self.num_examples, generator=source)

    def global_batch(self, step: int) -> Tensor:
        """[batch_size] example indices of the step that follows `step` finished steps."""
        epoch, place = divmod(step, self.steps_per_epoch)
        start = place * self.batch_size
        return self._permutation(epoch)[start : start + self.batch_size]


class PartSampler(Sampler[list[int]]):
    """The example indices of a process's parts, step after step, from any step on."""

    def __init__(self, order: DataOrder, plan: BatchPlan, rank: int, steps: range):
        self.order, self.plan, self.rank, self.steps = order, plan, rank, steps

    def __len__(self) -> int:
        return len(self.steps) * self.plan.accumulation_steps

    def __iter__(self) -> Iterator[list[int]]:
        for step in self.steps:
            batch = self.order.global_batch(step)
            for part in self.plan.parts_of(self.rank):
                places = [
                    *self.plan.flow_matching_samples(part),
                    *self.plan.consistency_samples(part),
                ]
                yield batch[places].tolist()


def build_loader(
    data: PixelData, config: Config, plan: BatchPlan, rank: int, start_step: int, pin_memory: bool
) -> DataLoader:
    """The `RawBatch`es of this process's parts from `start_step` to the last step."""
    order = DataOrder(len(data), config.batch_size, config.seed)
    sampler = PartSampler(order, plan, rank, range(start_step, config.total_steps))
    return DataLoader(
        data,
        sampler=sampler,
        batch_size=None,  # the sampler yields whole parts
        num_workers=config.num_workers,
        prefetch_factor=config.prefetch_factor if config.num_workers else None,
        pin_memory=pin_memory,
        # A generator of its own: starting workers must not draw from anybody else's.
        generator=generator(config.seed, "loader workers"),
    )
