"""Batches: how a global batch is cut into microbatches, the order of examples, the loader."""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from support.data.datasets import RawBatch, TrainingData
from support.system.files import UserError
from support.system.randomness import generator
from support.system.signals import leave_to_parent

# The fields of a BatchPlan, by their names in checkpoints, which older versions chose.
STORED_NAMES = ("batch_size", "flow_matching_count", "world_size", "accumulation_steps")


@dataclass(frozen=True)
class BatchPlan:
    """How a global batch is cut into microbatches: by process first, then by accumulation step.

    The first `first_count` samples of a global batch are of one kind, the others of another. Every
    microbatch takes its share of both kinds, and all microbatches have the same size.
    """

    batch_size: int
    first_count: int
    world_size: int
    accumulation_steps: int

    def __post_init__(self):
        if self.batch_size % self.num_microbatches:
            raise UserError(
                f"batch_size: {self.batch_size} cannot be cut into {self.world_size} processes "
                f"x {self.accumulation_steps} accumulation_steps = {self.num_microbatches} equal "
                "parts"
            )

    @property
    def num_microbatches(self) -> int:
        """Microbatches in a global batch, over all processes."""
        return self.world_size * self.accumulation_steps

    @property
    def microbatch_size(self) -> int:
        return self.batch_size // self.num_microbatches

    def microbatches_of(self, rank: int) -> range:
        """The microbatches of process `rank`, in order."""
        return range(rank * self.accumulation_steps, (rank + 1) * self.accumulation_steps)

    def samples(self, microbatch: int) -> list[int]:
        """The microbatch's places in the global batch: those of the first kind come first."""
        return [*self.first_samples(microbatch), *self.other_samples(microbatch)]

    def first_samples(self, microbatch: int) -> range:
        return range(self._bound(microbatch), self._bound(microbatch + 1))

    def other_samples(self, microbatch: int) -> range:
        # They fill up the microbatch, so that all have the same size even where shares differ.
        start, end = (
            self.first_count + part * self.microbatch_size - self._bound(part)
            for part in (microbatch, microbatch + 1)
        )
        return range(start, end)

    def _bound(self, microbatch: int) -> int:
        return self.first_count * microbatch // self.num_microbatches

    def record(self) -> dict[str, int]:
        """The plan as checkpoints store it."""
        return dict(zip(STORED_NAMES, dataclasses.astuple(self), strict=True))

    @classmethod
    def from_record(cls, record: Mapping[str, int]) -> "BatchPlan":
        """The plan that `record` stored."""
        return cls(*(record[name] for name in STORED_NAMES))

    def __str__(self) -> str:
        processes = "process" if self.world_size == 1 else "processes"
        return (
            f"{self.batch_size} = {self.world_size} {processes} x {self.microbatch_size} "
            f"x {self.accumulation_steps} accumulation"
        )


class DataOrder:
    """The order of examples: a new permutation for each epoch; the incomplete last batch goes."""

    def __init__(self, num_examples: int, batch_size: int, seed: int):
        self.num_examples, self.batch_size, self.seed = num_examples, batch_size, seed
        self.steps_per_epoch = num_examples // batch_size
        self._permutation = lru_cache(maxsize=1)(self._draw_permutation)

    def _draw_permutation(self, epoch: int) -> Tensor:
        source = generator(self.seed, "data order", epoch)
        return torch.randperm(self.num_examples, generator=source)

    def global_batch(self, step: int) -> Tensor:
        """[batch_size] example indices for the step that follows `step` finished steps."""
        epoch, place = divmod(step, self.steps_per_epoch)
        start = place * self.batch_size
        return self._permutation(epoch)[start : start + self.batch_size]


def microbatch_indices(
    order: DataOrder, plan: BatchPlan, rank: int, steps: range
) -> Iterator[list[int]]:
    """The example indices of a process's microbatches in `steps`, one microbatch after another."""
    for step in steps:
        batch = order.global_batch(step)
        for microbatch in plan.microbatches_of(rank):
            yield batch[plan.samples(microbatch)].tolist()


class _Guarded(Dataset):
    """`data`, with UserErrors returned instead of raised.

    An error raised in a loader worker reaches the training process with the worker's traceback in
    its text, and the user would see more than one line.
    """

    def __init__(self, data: TrainingData):
        self.data = data

    def __getitem__(self, indices: list[int]) -> RawBatch | list[int] | UserError:
        try:
            return self.data.prepare(indices)
        except UserError as error:
            return error


def build_loader(
    data: TrainingData,
    plan: BatchPlan,
    rank: int,
    steps: range,
    seed: int,
    num_workers: int = 0,
    prefetch_factor: int | None = None,
    pin_memory: bool = False,
) -> Iterator[RawBatch]:
    """The batches of this process's microbatches in `steps`, one microbatch after another.

    UserError at the batch that holds an unreadable example.
    """
    order = DataOrder(len(data), plan.batch_size, seed)
    loader = DataLoader(
        _Guarded(data),
        sampler=microbatch_indices(order, plan, rank, steps),
        batch_size=None,  # the sampler yields whole microbatches
        num_workers=num_workers,
        prefetch_factor=prefetch_factor if num_workers else None,
        pin_memory=pin_memory,
        worker_init_fn=leave_to_parent,
        # Its own generator, so that starting workers draws from nobody else's.
        generator=generator(seed, "loader workers"),
    )
    for prepared in loader:
        if isinstance(prepared, UserError):
            raise prepared
        batch = data.deliver(prepared)
        yield batch if not pin_memory else RawBatch(*(tensor.pin_memory() for tensor in batch))
