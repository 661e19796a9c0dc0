"""The draws of a training step: noise, times, dropped labels, flips, augmentation, dropout seeds.

Every draw follows from (seed, purpose, step, microbatch) alone, so a continued run draws what an
uninterrupted one would have drawn.
"""

import torch

from augmentation import augment, draw_augmentation
from config import Config
from models import Batch
from schedules import TIME_SAMPLING
from support.data.batches import BatchPlan
from support.data.datasets import RawBatch, TrainingData
from support.system.randomness import derive_seed, generator

# B samples of the microbatch: V for flow matching, then C for consistency


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
    null_mask = None
    if config.cfg_drop_rate:
        null_mask = torch.rand(len(x_0), generator=source("null mask")) < config.cfg_drop_rate
    V = len(plan.first_samples(microbatch))
    draw_times = TIME_SAMPLING[config.time_sampling]
    times = draw_times(
        V, len(x_0) - V, config.gap_fraction_at(step), config.time_mean, config.time_std, source
    )
    t, l, s = (values.to(device, non_blocking=True) for values in times)  # noqa: E741
    return Batch(
        x_0=x_0,
        x_1=torch.randn(x_0.shape, generator=source("noise", device), device=device),
        t=t,
        l=l,
        s=s,
        labels=raw.labels.to(device, non_blocking=True) if config.is_conditional else None,
        null_mask=null_mask,
        augment_labels=augment_labels,
        flow_matching_rows=V,
        global_flow_matching_count=plan.first_count,
        global_consistency_count=plan.batch_size - plan.first_count,
        dropout_seeds=(
            derive_seed(config.seed, "flow matching dropout", step, microbatch),
            derive_seed(config.seed, "consistency dropout", step, microbatch),
        ),
    )
