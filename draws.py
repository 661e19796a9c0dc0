"""The draws of a training step: noise, times, dropped labels, flips, augmentation, dropout seeds.

Every draw belongs to (seed, purpose, step, microbatch) and to nothing else, so that a continued run
draws what an unbroken one would have drawn.
"""

import torch
from torch import Tensor

from augmentation import augment, draw_augmentation
from config import Config
from models import Batch, Samples
from schedules import ConsistencyTimes, consistency_times
from support.data.batches import BatchPlan
from support.data.datasets import RawBatch, TrainingData
from support.system.randomness import derive_seed, draw_logit_normal, draw_null_mask, generator

# B samples of the microbatch, V of them for flow matching


class MicrobatchDraws:
    """The generators of one microbatch of one step."""

    def __init__(self, config: Config, step: int, microbatch: int, device: torch.device):
        self.config, self.step, self.microbatch, self.device = config, step, microbatch, device

    def on_cpu(self, purpose: str) -> torch.Generator:
        """The generator of `purpose`, on the CPU."""
        return generator(self.config.seed, purpose, self.step, self.microbatch)

    def on_device(self, purpose: str) -> torch.Generator:
        """The generator of `purpose`, on the microbatch's device."""
        return generator(self.config.seed, purpose, self.step, self.microbatch, device=self.device)

    def noise(self, like: Tensor) -> Tensor:
        """x_1, shaped like x_0."""
        return torch.randn(like.shape, generator=self.on_device("noise"), device=self.device)

    def flipped(self, x_0: Tensor) -> Tensor:
        """x_0, half of it mirrored left to right by chance, where the config asks for it."""
        if not self.config.horizontal_flips:
            return x_0
        is_flipped = torch.rand(len(x_0), generator=self.on_cpu("horizontal flips")) < 0.5
        return torch.where(is_flipped.to(self.device)[:, None, None, None], x_0.flip(-1), x_0)

    def augmented(self, x_0: Tensor) -> tuple[Tensor, Tensor | None]:
        """x_0 augmented, and what the network is told of it, where the config asks for it."""
        probability = self.config.augment_probability
        if not probability:
            return x_0, None
        source = self.on_cpu("augmentation")
        parameters = draw_augmentation(len(x_0), probability, source)
        return augment(x_0, parameters), parameters.labels.to(self.device, non_blocking=True)

    def null_mask(self, count: int) -> Tensor | None:
        """Which labels are dropped, on the CPU, where the config drops any."""
        if self.config.cfg_drop_rate == 0:
            return None
        return draw_null_mask(count, self.config.cfg_drop_rate, self.on_cpu("null mask"))

    def flow_matching_t(self, count: int) -> Tensor:
        """t of the flow matching samples."""
        return self._times("flow matching t", count, index=0)

    def consistency_times(self, count: int) -> ConsistencyTimes:
        """t, l, s of the consistency samples, with the gap of this step of the schedule."""
        ratio = self.config.gap_fraction_at(self.step)
        drawn_s = self._times("consistency s", count, index=1)
        drawn_t = self._times("consistency t", count, index=2)
        return consistency_times(drawn_t, drawn_s, ratio)

    def dropout_seed(self, loss: str) -> int:
        """The seed of the dropout masks of one loss's passes."""
        return derive_seed(self.config.seed, f"{loss} dropout", self.step, self.microbatch)

    def _times(self, purpose: str, count: int, index: int) -> Tensor:
        mean, std = self.config.time_mean[index], self.config.time_std[index]
        times = draw_logit_normal(count, mean, std, self.on_cpu(purpose))
        return times.to(self.device, non_blocking=True)


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
    draws = MicrobatchDraws(config, step, microbatch, device)
    stored = raw.stored.to(device, non_blocking=True)
    x_0 = draws.flipped(data.clean(stored, draws.on_device("latents")))
    x_0, augment_labels = draws.augmented(x_0)
    x_1 = draws.noise(x_0)
    labels = raw.labels.to(device, non_blocking=True) if config.is_conditional else None
    null_mask = draws.null_mask(len(x_0))
    V = len(plan.flow_matching_samples(microbatch))

    def samples(rows: slice, loss: str) -> Samples:
        return Samples(
            x_0=x_0[rows],
            x_1=x_1[rows],
            labels=None if labels is None else labels[rows],
            null_mask=None if null_mask is None else null_mask[rows],
            augment_labels=None if augment_labels is None else augment_labels[rows],
            dropout_seed=draws.dropout_seed(loss),
        )

    return Batch(
        samples(slice(None, V), "flow matching"),
        draws.flow_matching_t(V),
        samples(slice(V, None), "consistency"),
        draws.consistency_times(len(x_0) - V),
        plan.flow_matching_count,
        plan.consistency_count,
    )
