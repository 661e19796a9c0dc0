"""SoFlow's mathematics around a network: the solution, the guided velocity and the two losses.

Solution Flow Models, arXiv 2512.15657. Time runs from data (t = 0) to noise (t = 1):

    x_t = alpha(t) x_0 + beta(t) x_1        x_0 clean data, x_1 Gaussian noise
    v_t = alpha'(t) x_0 + beta'(t) x_1      the conditional velocity
    f(x, t, s) = a(t, s) x + b(t, s) F(x, t, s)

F is the network, f(x, t, s) the solution at time s of the probability-flow ODE through x at time t,
and s <= l < t. Everything here is a deterministic function of a batch already drawn; the only
randomness is the network's dropout.

Where a loss says `yield`, it asks the network: it hands out passes and gets their outputs back. The
passes that both losses ask for at the same time share a call where they may (see `passes`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from backbone import Backbone, NetworkRequest
from dit import DiT
from passes import Execution, Pass, Passes, check_times, run_passes, run_together
from schedules import PATHS, SOLUTION_FORMS, ConsistencyTimes, guidance_decay
from unet import UNet

# B batch, K of its samples are guided, C channels, H = W side; times are [B] until widened


@dataclass(frozen=True)
class Objective:
    """What is minimised: guidance w, mix m, decay time tau, and the loss weight's p and eps.

    With w = 1 there is no guidance, and m and tau have no effect.
    """

    cfg_scale: float = 1.0
    mix_ratio: float = 1.0
    cfg_decay_time: float = 1.0
    p: float = 1.0
    eps: float = 0.01


class LossTerms(NamedTuple):
    """A loss, the mean square of its error and its weight: of each sample, [B], or their means.

    The weights of the two losses are defined differently, and are not to be compared.
    """

    loss: Tensor
    squared_error: Tensor
    weight: Tensor

    def share(self, global_count: int) -> "LossTerms":
        """Of terms of [B] each, their share of the mean over the global batch's samples."""
        return LossTerms(*(term.sum() / max(global_count, 1) for term in self))


class StepTerms(NamedTuple):
    """A step's objective and its metrics by name; sums over microbatches are the step's values.

    The objective is for its gradient: its value, with the surrogate in it, says nothing.
    """

    loss: Tensor
    metrics: dict[str, Tensor]


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
    # One of the global generator's, unless it is given.
    dropout_seed: int = field(default_factory=lambda: int(torch.randint(2**62, ())))


@dataclass(frozen=True)
class Batch:
    """One microbatch of a step's global batch, drawn: the samples and times of each loss.

    The counts are those of the whole batch.
    """

    flow_matching: Samples
    flow_matching_t: Tensor  # [B] of these samples
    consistency: Samples
    consistency_times: ConsistencyTimes
    global_flow_matching_count: int
    global_consistency_count: int


# The mathematics


def widen(times: Tensor, x: Tensor) -> Tensor:
    """[B] -> [B, 1, 1, 1], to multiply x [B, C, H, W]."""
    check_times(times, x)
    return times.view(-1, *[1] * (x.dim() - 1))


def sample_mean(x: Tensor) -> Tensor:
    """[B, C, H, W] -> [B], the mean over each sample's elements."""
    return x.flatten(1).mean(1)


def solution_of(x: Tensor, F: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """f(x, t, s), [B, C, H, W], of F = F(x, t, s) and the solution form's a, b [B] at (t, s)."""
    # f(x, t, s) = a(t, s) x + b(t, s) F(x, t, s)
    return widen(a, x) * x + widen(b, x) * F


def velocity_of(x: Tensor, F: Tensor, a_s: Tensor, b_s: Tensor) -> Tensor:
    """v(x, t), [B, C, H, W], of F = F(x, t, t) and the derivatives in s, [B], at s = t."""
    # v(x, t) = d/ds f(x, t, s) at s = t = a_s(t, t) x + b_s(t, t) F(x, t, t);
    # the term b dF/ds vanishes, as b(t, t) = 0
    return widen(a_s, x) * x + widen(b_s, x) * F


@torch.no_grad()
def guided_velocity(
    v_t: Tensor, v_null: Tensor, v_label: Tensor | None, kappa: Tensor, objective: Objective
) -> Tensor:
    """v*, [K, C, H, W], of samples that keep their label; kappa is [K].

    v_null and v_label are the network's velocities without and with the label; the latter is not
    needed where mix_ratio is 1.
    """
    w, m = objective.cfg_scale, objective.mix_ratio
    # v_g = v_t + kappa(t) (w - 1) (v_t - v_null)
    v_g = v_t + widen(kappa * (w - 1), v_t) * (v_t - v_null)
    # v* = m v_g + (1 - m) v_label
    return v_g if v_label is None or m == 1 else torch.lerp(v_label, v_g, m)


def target_velocity(
    v_t: Tensor,
    t: Tensor,
    kept: Tensor,
    v_null: Tensor,
    v_label: Tensor | None,
    objective: Objective,
) -> Tensor:
    """v*, [B, C, H, W]: guided at the K places `kept`, and v_t where the label is dropped."""
    if len(kept) == 0:
        return v_t
    kappa = guidance_decay(t[kept], objective.cfg_decay_time)
    return v_t.index_copy(0, kept, guided_velocity(v_t[kept], v_null, v_label, kappa, objective))


def flow_matching_terms(
    velocity: Tensor, v_star: Tensor, b_s: Tensor, objective: Objective
) -> LossTerms:
    """The flow matching loss of each sample, [B] each; b_s is that of (t, t)."""
    # e = mean of (v(x_t, t) - v*)^2
    error = sample_mean((velocity - v_star).square())
    with torch.no_grad():
        # weight = 1 / (|b_s(t, t)| (e + eps)^p)
        weight = 1 / (b_s.abs() * (error + objective.eps) ** objective.p)
    return LossTerms(weight * error, error.detach(), weight)


def consistency_terms(
    F_t: Tensor, f_t: Tensor, f_l: Tensor, gap: Tensor, b: Tensor, objective: Objective
) -> LossTerms:
    """The solution consistency loss of each sample, [B] each; gap is t - l and b that of (t, s).

    The loss is a surrogate, the mean of sign(b) F_t weight q with all but F_t held constant. It has
    the gradient of weight (f_t - f_l)^2 / (2 |b| (t - l)), weight and f_l held constant: of
    d f_t / d F_t = b and 1 / |b| the sign is left, so that nothing is divided by b, which may be
    small. The value may be negative and says nothing; the mean of q^2 does.
    """
    with torch.no_grad():
        # q = (f(x_t, t, s) - f(x_l, l, s)) / (t - l)
        q = (f_t - f_l) / widen(gap, f_t)
        squared_error = sample_mean(q.square())
        # weight = 1 / (mean of q^2 + eps)^p
        weight = 1 / (squared_error + objective.eps) ** objective.p
        slope = widen(b.sign() * weight, q) * q
    # mean of sign(b(t, s)) F_t weight q
    return LossTerms(sample_mean(F_t * slope), squared_error, weight)


# Methods


class Method(nn.Module):
    """A way to train a network and to jump with it: what SoFlow is, and what a new one has to be.

    It holds the network as `network` (the names in checkpoints start so), and defines `forward`,
    from a batch already drawn to its StepTerms, and `jump`. It stands in METHODS under its name.
    """

    def __init__(
        self, network: nn.Module, noising_type: str = "Linear", coefficient_type: str = "Euler"
    ):
        super().__init__()
        self.network = network
        self.null_label: int | None = getattr(network, "null_label", None)
        self.path = _choose(PATHS, "noising_type", noising_type)
        self.solution_form = _choose(SOLUTION_FORMS, "coefficient_type", coefficient_type)
        self.execution = Execution()

    def configure(self, settings: Mapping[str, Any]) -> None:
        """Take from a config's keys what the loss depends on, or the jumps."""

    def loss(self, batch: Batch) -> StepTerms:
        """The objective on one microbatch: `forward`, which DistributedDataParallel calls."""
        return self(batch)

    def jump(self, x_t: Tensor, t: Tensor, s: Tensor, labels: Tensor | None) -> Tensor:
        """x_s, [B, C, H, W], of x_t; times are [B], labels [B] or None for the null class."""
        raise NotImplementedError

    # What `squared_errors` gives; a method without can be trained, and has no held-out loss.
    error_names: tuple[str, ...] = ()

    def squared_errors(self, batch: Batch) -> dict[str, Tensor]:
        """The squared error of each sample, [B], in each of the losses, unweighted."""
        raise NotImplementedError

    def interpolate(self, x_0: Tensor, x_1: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """x_t and v_t, [B, C, H, W] each."""
        alpha, beta, alpha_prime, beta_prime = (widen(value, x_0) for value in self.path(t))
        # x_t = alpha(t) x_0 + beta(t) x_1
        x_t = alpha * x_0 + beta * x_1
        # v_t = alpha'(t) x_0 + beta'(t) x_1
        v_t = alpha_prime * x_0 + beta_prime * x_1
        return x_t, v_t

    def drop_labels(self, samples: Samples) -> Tensor | None:
        """The labels, [B], with the null class where the mask says so."""
        if samples.labels is None or samples.null_mask is None:
            return samples.labels
        null_mask = samples.null_mask.to(samples.labels.device, non_blocking=True)
        return torch.where(null_mask, self.null_labels(samples.labels), samples.labels)

    def null_labels(self, like: Tensor) -> Tensor:
        """The label of the null class for each of `like`, [B]."""
        if self.null_label is None:
            raise ValueError("labels are dropped, but the network has no null class")
        return torch.full_like(like, self.null_label, dtype=torch.int64)


class SoFlow(Method):
    """A network F with its path and solution form, trained by two losses, sampled by f."""

    objective = Objective()

    def configure(self, settings: Mapping[str, Any]) -> None:
        self.objective = Objective(**{f.name: settings[f.name] for f in fields(Objective)})

    def forward(self, batch: Batch) -> StepTerms:
        """One step's objective on one microbatch, normalised by the global counts.

        Each loss is weighted by its share of the global batch: every sample counts alike. Summed
        over all microbatches, `loss` and its gradients are the batch's. The network is called three
        times, or two without guidance, where precision and dropout allow both losses in one:

            guidance:       v_null            v_null, v_label
            with gradient:  F(x_t, t, t)      F(x_t, t, s)
            without:                          F(x_l, l, s)
        """
        flow_matching, consistency = self._both(batch)
        counts = (batch.global_flow_matching_count, batch.global_consistency_count)
        loss = (flow_matching.loss.sum() + consistency.loss.sum()) / sum(counts)
        vel, con = flow_matching.share(counts[0]), consistency.share(counts[1])
        metrics = {
            "Vel_MSE": vel.squared_error,
            "Vel_Weight": vel.weight,
            "Con_MSE": con.squared_error,
            "Con_Weight": con.weight,
        }
        return StepTerms(loss, metrics)

    error_names = ("velocity", "consistency")

    def squared_errors(self, batch: Batch) -> dict[str, Tensor]:
        both = (terms.squared_error for terms in self._both(batch))
        return dict(zip(self.error_names, both, strict=True))

    def _both(self, batch: Batch) -> list[LossTerms]:
        """Both losses of each sample, in passes that they share."""
        return run_together(
            self.network,
            self.execution,
            self._flow_matching(batch.flow_matching, batch.flow_matching_t, self.objective),
            self._consistency(batch.consistency, batch.consistency_times, self.objective),
        )

    def _flow_matching(
        self, samples: Samples, t: Tensor, objective: Objective
    ) -> Passes[LossTerms]:
        """The flow matching loss of each sample: the velocity is to be v*."""
        x_t, v_t = self.interpolate(samples.x_0, samples.x_1, t)
        labels, kept = self.drop_labels(samples), kept_places(samples, objective)
        (v_null,) = yield from self._velocities(x_t, t, kept, objective, None)

        conditions = (labels, samples.augment_labels, samples.dropout_seed)
        (F_t,) = yield (Pass(x_t, t, t, *conditions, may_be_coarse=True),)
        form = self.solution_form(t, t)
        velocity = velocity_of(x_t, F_t, form.a_s, form.b_s)
        # v_label is what is predicted here anyway, without its gradient: it costs no pass.
        v_star = target_velocity(v_t, t, kept, v_null, velocity.detach()[kept], objective)
        return flow_matching_terms(velocity, v_star, form.b_s, objective)

    def _consistency(
        self, samples: Samples, times: ConsistencyTimes, objective: Objective
    ) -> Passes[LossTerms]:
        """The consistency loss of each sample: f at s is to be the same from x_t and from x_l."""
        t, l, s = times  # noqa: E741
        x_t, v_t = self.interpolate(samples.x_0, samples.x_1, t)
        labels, kept = self.drop_labels(samples), kept_places(samples, objective)
        label_sets = (None, labels) if objective.mix_ratio < 1 else (None,)
        v_null, *v_label = yield from self._velocities(x_t, t, kept, objective, *label_sets)
        v_star = target_velocity(v_t, t, kept, v_null, v_label[0] if v_label else None, objective)

        # The same conditions and dropout masks at t and at l: f must not be of two networks. And
        # full precision: their difference is divided by t - l.
        conditions = (labels, samples.augment_labels, samples.dropout_seed)
        (F_t,) = yield (Pass(x_t, t, s, *conditions),)
        # x_l = x_t + v* (l - t)
        x_l = x_t + v_star * widen(l - t, x_t)
        (F_l,) = yield (Pass(x_l, l, s, *conditions, needs_gradient=False),)

        at_t, at_l = self.solution_form(t, s), self.solution_form(l, s)
        f_t = solution_of(x_t, F_t.detach(), at_t.a, at_t.b)
        f_l = solution_of(x_l, F_l, at_l.a, at_l.b)
        return consistency_terms(F_t, f_t, f_l, t - l, at_t.b, objective)

    def _velocities(
        self,
        x_t: Tensor,
        t: Tensor,
        places: Tensor,
        objective: Objective,
        *label_sets: Tensor | None,
    ) -> Passes[list[Tensor]]:
        """The velocities, [K, C, H, W], at K places of x_t under each of these labels [B].

        For guidance, and none is asked for without it: without gradient, and in lower precision
        where that will do. No dropout seed and no augmentation labels are given: our networks with
        labels have neither.
        """
        if objective.cfg_scale <= 1:
            return [x_t[places] for _ in label_sets]
        null_labels = self.null_labels(t)
        label_sets = tuple(null_labels if labels is None else labels for labels in label_sets)
        outputs = yield tuple(
            Pass(x_t, t, t, labels, wanted=places, needs_gradient=False, may_be_coarse=True)
            for labels in label_sets
        )
        form = self.solution_form(t[places], t[places])
        return [velocity_of(x_t[places], F, form.a_s, form.b_s) for F in outputs]

    # For callers who have one loss, one velocity or one jump to compute

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
        loss = self._flow_matching(samples, t, objective)
        (terms,) = run_together(self.network, self.execution, loss)
        return terms.share(len(x_0))

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
        """The surrogate of the consistency loss, which divides by no b; see `consistency_terms`."""
        # Both passes are to drop the same.
        seed = int(torch.randint(2**62, ())) if self.training else 0
        samples = Samples(x_0, x_1, labels, null_mask, augment_labels, seed)
        loss = self._consistency(samples, ConsistencyTimes(t, l, s), objective)
        (terms,) = run_together(self.network, self.execution, loss)
        return terms.share(len(x_0))

    def velocity(
        self,
        x_t: Tensor,
        t: Tensor,
        labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
    ) -> Tensor:
        """d/ds f(x, t, s) at s = t, which is a_s(t, t) x + b_s(t, t) F(x, t, t)."""
        (F,) = run_passes(self.network, self.execution, [Pass(x_t, t, t, labels, augment_labels)])
        form = self.solution_form(t, t)
        return velocity_of(x_t, F, form.a_s, form.b_s)

    def solution(
        self,
        x_t: Tensor,
        t: Tensor,
        s: Tensor,
        labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
    ) -> Tensor:
        """f(x, t, s): where the path that is at x_t at time t is at time s."""
        (F,) = run_passes(self.network, self.execution, [Pass(x_t, t, s, labels, augment_labels)])
        form = self.solution_form(t, s)
        return solution_of(x_t, F, form.a, form.b)

    def jump(self, x_t: Tensor, t: Tensor, s: Tensor, labels: Tensor | None) -> Tensor:
        return self.solution(x_t, t, s, labels)


def kept_places(samples: Samples, objective: Objective) -> Tensor:
    """[K] places of the samples that keep their label, on which guidance acts; none without it."""
    device = samples.x_0.device
    if objective.cfg_scale <= 1 or len(samples.x_0) == 0:
        return torch.arange(0, device=device)
    if samples.null_mask is None:
        return torch.arange(len(samples.x_0), device=device)
    # Counted on the CPU, where it waits for no device.
    return torch.nonzero(~samples.null_mask).squeeze(1).to(device, non_blocking=True)


# Building


METHODS: dict[str, type[Method]] = {"SoFlow": SoFlow}

BACKBONES: dict[str, type[Backbone]] = {"UNet": UNet, "DiT": DiT}


def _choose(table: Mapping[str, Any], key: str, name: str) -> Any:
    if name not in table:
        raise ValueError(f"{key} {name!r} is not one of {', '.join(table)}")
    return table[name]


def backbone_of(model_type: str) -> type[Backbone]:
    """The class in BACKBONES that `model_type` names; ValueError where there is none."""
    for backbone in BACKBONES.values():
        if backbone.recognises(model_type):
            return backbone
    written = " nor ".join(backbone.written for backbone in BACKBONES.values())
    raise ValueError(f"model_type {model_type!r} is neither {written}")


def build_model(
    model_type: str,
    data_channels: int,
    data_size: int,
    num_classes: int,
    cfg_drop_rate: float,
    noising_type: str = "Linear",
    coefficient_type: str = "Euler",
    dropout: float = 0.30,
    method: str = "SoFlow",
) -> Method:
    """One of METHODS around the backbone that `model_type` names, with fresh weights.

    They are drawn from torch's global generator. The label table of a DiT has a row for the null
    class where cfg_drop_rate > 0; `dropout` is the UNet's. ValueError where a name is unknown or
    the data do not fit the network.
    """
    backbone = backbone_of(model_type)
    if misfit := backbone.misfit(model_type, data_size):
        raise ValueError(" ".join(misfit))
    request = NetworkRequest(
        model_type, data_size, data_channels, num_classes, cfg_drop_rate > 0, dropout
    )
    network = backbone.build(request)
    return _choose(METHODS, "method", method)(network, noising_type, coefficient_type)
