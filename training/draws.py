"""The draws of a training step: noise, times, dropped labels, flips, augmentation, dropout seeds.

Every draw belongs to (seed, purpose, step, microbatch) and to nothing else, so that a continued run
draws what an unbroken one would have drawn.
"""

import torch
from torch import Tensor

from augmentation import augment, draw_augmentation
from config import Config
from models import Batch, Samples
from schedules import consistency_times
from support.data.batches import BatchPlan
from support.data.datasets import RawBatch, TrainingData
from support.system.randomness import derive_seed, draw_logit_normal, draw_null_mask, generator

# V samples of the microbatch are for flow matching, C for consistency


def draw_batch(
    config: Config,
    plan: BatchPlan,
    data: TrainingData,
    raw: RawBatch,
    step: int,
    microbatch: int,
    device: torch.device,
) -> Batch:
    """One microbatch of the global batch that follows `step` finished steps, on `device`."""

    def source(purpose: str, device: torch.device | str = "cpu") -> torch.Generator:
        return generator(config.seed, purpose, step, microbatch, device=device)

    def times(purpose: str, count: int, index: int) -> Tensor:
        mean, std = config.time_mean[index], config.time_std[index]
        drawn = draw_logit_normal(count, mean, std, source(purpose))
        return drawn.to(device, non_blocking=True)

    x_0 = data.clean(raw.stored.to(device, non_blocking=True), source("latents", device))
    if config.horizontal_flips:
        is_flipped = torch.rand(len(x_0), generator=source("horizontal flips")) < 0.5
        is_flipped = is_flipped.to(device, non_blocking=True)[:, None, None, None]
        x_0 = torch.where(is_flipped, x_0.flip(-1), x_0)
    augment_labels = None
    if config.augment_probability:
        parameters = draw_augmentation(len(x_0), config.augment_probability, source("augmentation"))
        x_0 = augment(x_0, parameters)
        augment_labels = parameters.labels.to(device, non_blocking=True)
    x_1 = torch.randn(x_0.shape, generator=source("noise", device), device=device)
    labels = raw.labels.to(device, non_blocking=True) if config.is_conditional else None
    null_mask = None
    if config.cfg_drop_rate:
        null_mask = draw_null_mask(len(x_0), config.cfg_drop_rate, source("null mask"))

    def samples(rows: slice, loss: str) -> Samples:
        return Samples(
            x_0=x_0[rows],
            x_1=x_1[rows],
            labels=None if labels is None else labels[rows],
            null_mask=None if null_mask is None else null_mask[rows],
            augment_labels=None if augment_labels is None else augment_labels[rows],
            dropout_seed=derive_seed(config.seed, f"{loss} dropout", step, microbatch),
        )

    V = len(plan.first_samples(microbatch))
    C = len(x_0) - V
    drawn_s, drawn_t = times("consistency s", C, index=1), times("consistency t", C, index=2)
    return Batch(
        samples(slice(None, V), "flow matching"),
        times("flow matching t", V, index=0),
        samples(slice(V, None), "consistency"),
        consistency_times(drawn_t, drawn_s, config.gap_fraction_at(step)),
        plan.first_count,
        plan.other_count,
    )
