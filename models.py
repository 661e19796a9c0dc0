"""SoFlow's mathematics around a network: the solution, the guided velocity and the two losses.

Solution Flow Models, arXiv 2512.15657. Time runs from data (t = 0) to noise (t = 1):

    x_t = alpha(t) x_0 + beta(t) x_1        x_0 clean data, x_1 Gaussian noise
    v_t = alpha'(t) x_0 + beta'(t) x_1      the conditional velocity
    f(x, t, s) = a(t, s) x + b(t, s) F(x, t, s)

F is the network, f(x, t, s) the solution at time s of the probability-flow ODE through x at time t,
and s <= l <= t. Everything here is a deterministic function of a batch already drawn; the only
randomness is the network's dropout.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dit import DiT, parse_model_type
from schedules import PATHS, SOLUTION_FORMS, ConsistencyTimes, guidance_decay
from unet import UNet

# B batch, V its flow matching samples, C channels, H = W side; times are [B] until widened


@dataclass(frozen=True)
class Objective:
    """What is minimised: guidance w, mix m, decay time tau, and the loss weight's p and eps."""

    cfg_scale: float
    mix_ratio: float
    cfg_decay_time: float
    p: float
    eps: float


class LossTerms(NamedTuple):
    """A loss with the mean square of its error and its mean weight, the numbers worth watching."""

    loss: Tensor
    squared_error: Tensor
    weight: Tensor

    def mean(self) -> "LossTerms":
        """Means over the samples, from terms of [B] each."""
        return LossTerms(*(term.mean() for term in self))

    def share(self, global_count: int) -> "LossTerms":
        """This part's share of the mean over `global_count` samples of all parts."""
        return LossTerms(*(term.sum() / max(global_count, 1) for term in self))


class StepTerms(NamedTuple):
    """A step's objective, and the two losses' terms; sums over all parts are the step's values."""

    loss: Tensor
    flow_matching: LossTerms
    consistency: LossTerms


@dataclass(frozen=True)
class Samples:
    """Samples of one loss, all drawn but their times.

    null_mask marks dropped labels. It stays on the CPU: from it follows how many samples the
    guidance passes take, which must not cost a wait for the device. None drops no label.
    """

    x_0: Tensor  # [B, C, H, W] clean data
    x_1: Tensor  # [B, C, H, W] noise
    labels: Tensor | None = None  # [B] int64
    null_mask: Tensor | None = None  # [B] bool
    augment_labels: Tensor | None = None  # [B, 6]
    dropout_seed: int | None = None  # None: the network takes its masks from the global generator


@dataclass(frozen=True)
class Batch:
    """One part of a step's global batch, drawn: the samples and times of each loss.

    The counts are those of all parts together.
    """

    flow_matching: Samples
    flow_matching_t: Tensor  # [V]
    consistency: Samples
    consistency_times: ConsistencyTimes
    global_flow_matching_count: int
    global_consistency_count: int


def widen(times: Tensor, x: Tensor) -> Tensor:
    """[B] -> [B, 1, 1, 1], to multiply x [B, C, H, W]."""
    if times.shape != x.shape[:1]:
        raise ValueError(f"times must be [{len(x)}], one per sample, not {list(times.shape)}")
    return times.view(-1, *[1] * (x.dim() - 1))


def sample_mean(x: Tensor) -> Tensor:
    """[B, C, H, W] -> [B], the mean over each sample's elements."""
    return x.flatten(1).mean(1)


class SoFlow(nn.Module):
    """A network F with its path and solution form; state-dict keys start with `network.`."""

    def __init__(
        self, network: nn.Module, noising_type: str = "Linear", coefficient_type: str = "Euler"
    ):
        super().__init__()
        self.network = network
        self.null_label: int | None = getattr(network, "null_label", None)
        self.path = _choose(PATHS, "noising_type", noising_type)
        self.solution_form = _choose(SOLUTION_FORMS, "coefficient_type", coefficient_type)

    def interpolate(self, x_0: Tensor, x_1: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """x_t and v_t, [B, C, H, W] each."""
        alpha, beta, alpha_prime, beta_prime = (widen(c, x_0) for c in self.path(t))
        return alpha * x_0 + beta * x_1, alpha_prime * x_0 + beta_prime * x_1

    def velocity(
        self,
        x_t: Tensor,
        t: Tensor,
        labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
        dropout_seed: int | None = None,
    ) -> Tensor:
        """d/ds f(x, t, s) at s = t, which is a_s(t, t) x + b_s(t, t) F(x, t, t)."""
        form = self.solution_form(t, t)
        kept_part = widen(form.a_s, x_t) * x_t
        output = self._run(x_t, t, t, labels, augment_labels, dropout_seed)
        return kept_part + widen(form.b_s, x_t) * output

    def solution(
        self,
        x_t: Tensor,
        t: Tensor,
        s: Tensor,
        labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
    ) -> Tensor:
        """f(x, t, s): where the path that is at x_t at time t is at time s."""
        return self._solve(x_t, t, s, self._run(x_t, t, s, labels, augment_labels))

    def _run(
        self,
        x: Tensor,
        t: Tensor,
        s: Tensor,
        labels: Tensor | None,
        augment_labels: Tensor | None,
        dropout_seed: int | None = None,
    ) -> Tensor:
        """F(x, t, s), with those conditions that there are."""
        uses_seed = self.training and getattr(self.network, "uses_dropout_seed", False)
        conditions = {
            "labels": labels,
            "augment_labels": augment_labels,
            "dropout_seed": dropout_seed if uses_seed else None,
        }
        given = {name: value for name, value in conditions.items() if value is not None}
        return self.network(x, t, t - s, **given)

    def _solve(self, x: Tensor, t: Tensor, s: Tensor, output: Tensor) -> Tensor:
        """f(x, t, s) of an `output` F(x, t, s) that is there already."""
        form = self.solution_form(t, s)
        return widen(form.a, x) * x + widen(form.b, x) * output

    def flow_matching_loss(
        self,
        x_0: Tensor,
        x_1: Tensor,
        t: Tensor,
        labels: Tensor | None,
        null_mask: Tensor | None,
        objective: Objective,
        augment_labels: Tensor | None = None,
    ) -> LossTerms:
        """The weighted squared error of the velocity, guided where the objective says so."""
        samples = Samples(x_0, x_1, labels, null_mask, augment_labels)
        return self._flow_matching_terms(samples, t, objective).mean()

    def consistency_loss(
        self,
        x_0: Tensor,
        x_1: Tensor,
        t: Tensor,
        l: Tensor,  # noqa: E741
        s: Tensor,
        labels: Tensor | None,
        null_mask: Tensor | None,
        objective: Objective,
        augment_labels: Tensor | None = None,
    ) -> LossTerms:
        """The division-free surrogate of the solution consistency loss.

        Its gradient is that of weight (f_t - f_l)^2 / (2 |b(t, s)| (t - l)). Its value may be
        negative and says nothing; squared_error, the mean square of the quotient
        (f_t - f_l) / (t - l), does.
        """
        samples = Samples(x_0, x_1, labels, null_mask, augment_labels)
        return self._consistency_terms(samples, ConsistencyTimes(t, l, s), objective).mean()

    def forward(self, batch: Batch, objective: Objective) -> StepTerms:
        """One step's objective on one part of the global batch, normalised by the global counts.

        Each loss is weighted by its share of the global batch: every sample counts alike. Summed
        over all parts, `loss` and its gradients are those of the whole batch.
        """
        flow_matching = consistency = _no_samples(batch.flow_matching.x_0)
        if len(batch.flow_matching.x_0):
            flow_matching = self._flow_matching_terms(
                batch.flow_matching, batch.flow_matching_t, objective
            )
        if len(batch.consistency.x_0):
            consistency = self._consistency_terms(
                batch.consistency, batch.consistency_times, objective
            )
        global_batch = batch.global_flow_matching_count + batch.global_consistency_count
        loss = (flow_matching.loss.sum() + consistency.loss.sum()) / global_batch
        return StepTerms(
            loss,
            flow_matching.share(batch.global_flow_matching_count),
            consistency.share(batch.global_consistency_count),
        )

    def _flow_matching_terms(self, samples: Samples, t: Tensor, objective: Objective) -> LossTerms:
        """The flow matching loss of each sample, [B] each."""
        x_t, velocity_t = self.interpolate(samples.x_0, samples.x_1, t)
        labels = self._drop_labels(samples)
        predicted = self.velocity(x_t, t, labels, samples.augment_labels, samples.dropout_seed)
        target = self._guided_velocity(x_t, t, velocity_t, samples, objective, predicted.detach())
        error = sample_mean((predicted - target).square())
        with torch.no_grad():
            scale = self.solution_form(t, t).b_s.abs()
            weight = 1 / (scale * (error + objective.eps) ** objective.p)
        return LossTerms(weight * error, error.detach(), weight)

    def _consistency_terms(
        self, samples: Samples, times: ConsistencyTimes, objective: Objective
    ) -> LossTerms:
        """The solution consistency loss of each sample, [B] each."""
        t, l, s = times  # noqa: E741
        x_t, velocity_t = self.interpolate(samples.x_0, samples.x_1, t)
        labels = self._drop_labels(samples)
        target = self._guided_velocity(x_t, t, velocity_t, samples, objective)
        x_l = x_t + target * widen(l - t, x_t)

        seed = samples.dropout_seed
        if seed is None and self.training:
            seed = int(torch.randint(2**62, ()))
        conditions = (labels, samples.augment_labels, seed)
        output_t = self._run(x_t, t, s, *conditions)
        with torch.no_grad():
            # The masks of the pass above: f_t - f_l must not see two different networks.
            output_l = self._run(x_l, l, s, *conditions)
            solution_t = self._solve(x_t, t, s, output_t)
            solution_l = self._solve(x_l, l, s, output_l)
            quotient = (solution_t - solution_l) / widen(t - l, x_t)
            squared_error = sample_mean(quotient.square())
            weight = 1 / (squared_error + objective.eps) ** objective.p
            # d f_t / d F_t = b(t, s), so the sign alone is left of b / |b|.
            slope = widen(self.solution_form(t, s).b.sign() * weight, x_t) * quotient
        return LossTerms(sample_mean(output_t * slope), squared_error, weight)

    @torch.no_grad()
    def _guided_velocity(
        self,
        x_t: Tensor,
        t: Tensor,
        velocity_t: Tensor,
        samples: Samples,
        objective: Objective,
        predicted: Tensor | None = None,
    ) -> Tensor:
        """v*, the target velocity, [B, C, H, W]; `predicted` saves the pass with the labels.

        v* = m v_g + (1 - m) velocity(x_t, t, label), v_g = v_t + kappa(t) (w - 1) (v_t - v_u),
        with v_u the velocity of the null class. Samples with a dropped label keep v_t.
        """
        if objective.cfg_scale <= 1:
            return velocity_t
        if samples.labels is None:
            raise ValueError("guidance (cfg_scale > 1) needs labels")
        kept = _kept_samples(samples, x_t.device)
        if len(kept) == 0:
            return velocity_t
        kept_x, kept_t, kept_velocity = x_t[kept], t[kept], velocity_t[kept]
        null_velocity = self.velocity(kept_x, kept_t)
        strength = (objective.cfg_scale - 1) * guidance_decay(kept_t, objective.cfg_decay_time)
        guided = kept_velocity + widen(strength, kept_x) * (kept_velocity - null_velocity)
        if objective.mix_ratio < 1:
            if predicted is None:
                own_velocity = self.velocity(kept_x, kept_t, samples.labels[kept])
            else:
                own_velocity = predicted[kept]
            guided = torch.lerp(own_velocity, guided, objective.mix_ratio)
        return velocity_t.index_copy(0, kept, guided)

    def _drop_labels(self, samples: Samples) -> Tensor | None:
        """The labels, [B], with the null class where the mask says so."""
        if samples.labels is None or samples.null_mask is None:
            return samples.labels
        if self.null_label is None:
            if samples.null_mask.any():
                raise ValueError("a label is dropped, but the network has no null class")
            return samples.labels
        null_mask = samples.null_mask.to(samples.labels.device, non_blocking=True)
        return samples.labels.masked_fill(null_mask, self.null_label)


def _kept_samples(samples: Samples, device: torch.device) -> Tensor:
    """Indices of the samples whose label is kept, on `device`."""
    if samples.null_mask is None:
        return torch.arange(len(samples.x_0), device=device)
    kept = torch.nonzero(~samples.null_mask).squeeze(1)
    return kept.to(device, non_blocking=True)


def _no_samples(like: Tensor) -> LossTerms:
    """The terms of a loss that has no samples in this part."""
    empty = like.new_zeros(0)
    return LossTerms(empty, empty, empty)


def _choose(table: dict[str, Callable], key: str, name: str) -> Callable:
    if name not in table:
        raise ValueError(f"{key} {name!r} is not one of {', '.join(table)}")
    return table[name]


def build_network(
    model_type: str,
    data_channels: int,
    data_size: int,
    num_classes: int,
    cfg_drop_rate: float,
    dropout: float = 0.30,
) -> nn.Module:
    """The backbone named by `model_type`, freshly initialised from torch's global generator.

    A DiT's label table has a row for the null class where cfg_drop_rate > 0; `dropout` is the
    UNet's. ValueError where the name is unknown or the data does not fit the network.
    """
    if model_type == "UNet":
        return UNet(data_size, data_channels, dropout)
    try:
        size, patch = parse_model_type(model_type)
    except ValueError as error:
        raise ValueError(f"model_type: {error}, nor UNet") from None
    return DiT(size, patch, data_size, data_channels, num_classes, null_class=cfg_drop_rate > 0)


def build_model(
    model_type: str,
    data_channels: int,
    data_size: int,
    num_classes: int,
    cfg_drop_rate: float,
    noising_type: str = "Linear",
    coefficient_type: str = "Euler",
    dropout: float = 0.30,
) -> SoFlow:
    """A SoFlow around a fresh `build_network`; see there for the arguments."""
    network = build_network(
        model_type, data_channels, data_size, num_classes, cfg_drop_rate, dropout
    )
    return SoFlow(network, noising_type, coefficient_type)
