"""A config's data set, and the batches that training takes of it."""

from collections.abc import Iterator

from config import Config
from support.data.batches import BatchPlan, build_loader
from support.data.build import build_data
from support.data.datasets import RawBatch, TrainingData


def data_of(config: Config, *further, **options) -> TrainingData:
    """The data set; further arguments go to `build_data`."""
    return build_data(config.data_request(), *further, **options)


def batches_of(
    config: Config, data: TrainingData, plan: BatchPlan, rank: int = 0, start_step: int = 0
) -> Iterator[RawBatch]:
    """The loader, from a step to the last."""
    steps = range(start_step, config.total_steps)
    workers = (config.num_workers, config.prefetch_factor)
    return build_loader(data, plan, rank, steps, config.seed, *workers)
