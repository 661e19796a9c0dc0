"""SoFlow's mathematics around a network: the solution, the guided velocity and the two losses.

Solution Flow Models, arXiv 2512.15657. Time runs from data (t = 0) to noise (t = 1):

    x_t = alpha(t) x_0 + beta(t) x_1        x_0 clean data, x_1 Gaussian noise
    v_t = alpha'(t) x_0 + beta'(t) x_1      the conditional velocity
    f(x, t, s) = a(t, s) x + b(t, s) F(x, t, s)

F is the network, f(x, t, s) the solution at time s of the probability-flow ODE through x at time t,
and s <= l <= t. Everything here is a deterministic function of a batch already drawn; the only
randomness is the network's dropout.
"""

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
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
    _check_times(times, x)
    return times.view(-1, *[1] * (x.dim() - 1))


def _check_times(times: Tensor, x: Tensor) -> None:
    if times.shape != x.shape[:1]:
        raise ValueError(f"times must be [{len(x)}], one per sample, not {list(times.shape)}")


def sample_mean(x: Tensor) -> Tensor:
    """[B, C, H, W] -> [B], the mean over each sample's elements."""
    return x.flatten(1).mean(1)


class Query(NamedTuple):
    """What the network is asked: F(x, t, s) of some samples under these conditions."""

    x: Tensor  # [B, C, H, W]
    t: Tensor  # [B]
    s: Tensor  # [B]
    labels: Tensor | None = None  # [B]; None: the null class
    augment_labels: Tensor | None = None  # [B, 6]
    dropout_seed: int | None = None
    may_be_coarse: bool = False  # whether a lower precision will do


@dataclass(frozen=True)
class Execution:
    """How the passes of a step run: their cost depends on it, and their rounding, nothing else."""

    # Of the flow matching and guidance passes. The consistency passes keep the weights' precision:
    # their difference is divided by t - l, and would be little but rounding. None: all keep it.
    coarse_dtype: torch.dtype | None = None
    # Guidance passes take along the samples that need none, so that shapes are always the same.
    fixed_shapes: bool = False


@dataclass(frozen=True)
class _OnPath:
    """The samples of one loss at their places on the path."""

    samples: Samples
    labels: Tensor | None  # [B], with the null class where the label is dropped
    t: Tensor  # [B]
    x_t: Tensor  # [B, C, H, W]
    velocity_t: Tensor  # [B, C, H, W]
    guided: Tensor  # [K] places of the samples that guidance acts on

    def query(self, s: Tensor, may_be_coarse: bool) -> Query:
        """F(x_t, t, s)."""
        augment_labels, seed = self.samples.augment_labels, self.samples.dropout_seed
        return Query(self.x_t, self.t, s, self.labels, augment_labels, seed, may_be_coarse)

    def guidance_query(self, places: Tensor | slice, is_null: bool) -> Query:
        """F(x_t, t, t) of the samples at some places, under the null class or their own."""
        t = self.t[places]
        labels = None if is_null or self.labels is None else self.labels[places]
        return Query(self.x_t[places], t, t, labels, may_be_coarse=True)


class _Guidance(NamedTuple):
    """Velocities that guidance takes from the network, [K, C, H, W] each."""

    flow_matching_null: Tensor
    consistency_null: Tensor
    consistency_own: Tensor | None = None  # flow matching's own is the prediction that it makes


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
        self.execution = Execution()

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
    ) -> Tensor:
        """d/ds f(x, t, s) at s = t, which is a_s(t, t) x + b_s(t, t) F(x, t, t)."""
        query = Query(x_t, t, t, labels, augment_labels)
        return self._velocity_of(query, self._run(query))

    def solution(
        self,
        x_t: Tensor,
        t: Tensor,
        s: Tensor,
        labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
    ) -> Tensor:
        """f(x, t, s): where the path that is at x_t at time t is at time s."""
        query = Query(x_t, t, s, labels, augment_labels)
        return self._solution_of(query, self._run(query))

    def _velocity_of(self, query: Query, output: Tensor) -> Tensor:
        """The velocity at (x, t), of an `output` F(x, t, t) that is there already."""
        form = self.solution_form(query.t, query.t)
        return widen(form.a_s, query.x) * query.x + widen(form.b_s, query.x) * output

    def _solution_of(self, query: Query, output: Tensor) -> Tensor:
        """f(x, t, s), of an `output` F(x, t, s) that is there already."""
        form = self.solution_form(query.t, query.s)
        return widen(form.a, query.x) * query.x + widen(form.b, query.x) * output

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
        nothing, no_times = Samples(x_0[:0], x_1[:0]), ConsistencyTimes(t[:0], t[:0], t[:0])
        return self(Batch(samples, t, nothing, no_times, len(x_0), 0), objective).flow_matching

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
        nothing, times = Samples(x_0[:0], x_1[:0]), ConsistencyTimes(t, l, s)
        return self(Batch(nothing, t[:0], samples, times, 0, len(x_0)), objective).consistency

    def forward(self, batch: Batch, objective: Objective) -> StepTerms:
        """One step's objective on one part of the global batch, normalised by the global counts.

        Each loss is weighted by its share of the global batch: every sample counts alike. Summed
        over all parts, `loss` and its gradients are those of the whole batch.

        The network runs three times: for guidance, with gradient, and at the times l; each time on
        the samples of both losses at once, where dropout and precision let it.
        """
        times = batch.consistency_times
        flow_matching = self._on_path(batch.flow_matching, batch.flow_matching_t, objective)
        consistency = self._on_path(self._seeded(batch.consistency), times.t, objective)
        guidance = self._guidance(flow_matching, consistency, objective)
        asked_v = flow_matching.query(flow_matching.t, may_be_coarse=True)
        asked_t = consistency.query(times.s, may_be_coarse=False)
        output_v, output_t = self._ask(asked_v, asked_t)

        predicted = self._velocity_of(asked_v, output_v)
        own = predicted.detach()[flow_matching.guided]
        target = _guided_velocity(flow_matching, guidance.flow_matching_null, own, objective)
        velocity_terms = self._flow_matching_terms(asked_v, predicted, target, objective)
        target = _guided_velocity(
            consistency, guidance.consistency_null, guidance.consistency_own, objective
        )
        solution_terms = self._consistency_terms(asked_t, output_t, target, times, objective)

        velocity_count = batch.global_flow_matching_count
        solution_count = batch.global_consistency_count
        loss = velocity_terms.loss.sum() + solution_terms.loss.sum()
        return StepTerms(
            loss / (velocity_count + solution_count),
            velocity_terms.share(velocity_count),
            solution_terms.share(solution_count),
        )

    def _on_path(self, samples: Samples, t: Tensor, objective: Objective) -> _OnPath:
        """x_t and v_t, with the labels that the network gets and the places of the guided."""
        is_guided = objective.cfg_scale > 1 and len(t) > 0
        if is_guided and samples.labels is None:
            raise ValueError("guidance (cfg_scale > 1) needs labels")
        guided = _kept_places(samples) if is_guided else torch.arange(0)
        return _OnPath(
            samples,
            self._drop_labels(samples),
            t,
            *self.interpolate(samples.x_0, samples.x_1, t),
            guided.to(t.device, non_blocking=True),
        )

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

    def _seeded(self, samples: Samples) -> Samples:
        """The samples, with a seed by which two passes drop the same where there may be dropout."""
        if samples.dropout_seed is None and self.training:
            return replace(samples, dropout_seed=int(torch.randint(2**62, ())))
        return samples

    @torch.no_grad()
    def _guidance(
        self, flow_matching: _OnPath, consistency: _OnPath, objective: Objective
    ) -> _Guidance:
        """The guided samples' velocities under the null class and, where it is mixed in, their own.

        Flow matching makes the latter anyway.
        """
        asked = [(flow_matching, True), (consistency, True)]
        if objective.mix_ratio < 1:
            asked.append((consistency, False))
        takes_all = self.execution.fixed_shapes and objective.cfg_scale > 1
        queries = [
            on_path.guidance_query(slice(None) if takes_all else on_path.guided, is_null)
            for on_path, is_null in asked
        ]
        outputs = self._ask(*queries)
        velocities = [self._velocity_of(*pair) for pair in zip(queries, outputs, strict=True)]
        if takes_all:
            velocities = [
                velocity[on_path.guided]
                for velocity, (on_path, _) in zip(velocities, asked, strict=True)
            ]
        return _Guidance(*velocities)

    def _flow_matching_terms(
        self, asked: Query, predicted: Tensor, target: Tensor, objective: Objective
    ) -> LossTerms:
        """The flow matching loss of each sample, [B] each, of the predicted velocity."""
        error = sample_mean((predicted - target).square())
        with torch.no_grad():
            scale = self.solution_form(asked.t, asked.t).b_s.abs()
            weight = 1 / (scale * (error + objective.eps) ** objective.p)
        return LossTerms(weight * error, error.detach(), weight)

    def _consistency_terms(
        self,
        asked_t: Query,
        output_t: Tensor,
        target: Tensor,
        times: ConsistencyTimes,
        objective: Objective,
    ) -> LossTerms:
        """The solution consistency loss of each sample, [B] each, of F(x_t, t, s)."""
        x_t = asked_t.x
        t, l, s = times  # noqa: E741
        with torch.no_grad():
            # Conditions and masks of the pass at t: f_t - f_l must not see two different networks.
            asked_l = asked_t._replace(x=x_t + target * widen(l - t, x_t), t=l)
            (output_l,) = self._ask(asked_l)
            solution_t = self._solution_of(asked_t, output_t)
            quotient = (solution_t - self._solution_of(asked_l, output_l)) / widen(t - l, x_t)
            squared_error = sample_mean(quotient.square())
            weight = 1 / (squared_error + objective.eps) ** objective.p
            # d f_t / d F_t = b(t, s), so the sign alone is left of b / |b|.
            sign = self.solution_form(t, s).b.sign()
            slope = widen(sign * weight, x_t) * quotient
        return LossTerms(sample_mean(output_t * slope), squared_error, weight)

    # Asking the network

    def _ask(self, *queries: Query) -> list[Tensor]:
        """F of each query; one call of the network serves all that may run alike."""
        outputs = [query.x[:0] for query in queries]  # as it is where nobody is asked about
        alike: dict[tuple, list[int]] = {}
        for index, query in enumerate(queries):
            if len(query.x) > 0:
                alike.setdefault(self._way_of_running(query), []).append(index)
        for indices in alike.values():
            joined = self._join([queries[index] for index in indices])
            sizes = [len(queries[index].x) for index in indices]
            for index, output in zip(indices, self._run(joined).split(sizes), strict=True):
                outputs[index] = output
        return outputs

    def _way_of_running(self, query: Query) -> tuple:
        """What queries must have in common to share a call of the network."""
        seed = query.dropout_seed if self._uses_seeds() else None
        return seed, self._is_coarse(query), query.augment_labels is None

    def _join(self, queries: list[Query]) -> Query:
        """The samples of all in one query."""
        if len(queries) == 1:
            return queries[0]
        if any(query.labels is not None for query in queries):
            queries = [self._with_labels(query) for query in queries]
        columns = zip(*(query[:5] for query in queries), strict=True)
        return Query(*map(_join_columns, columns), *queries[0][5:])

    def _with_labels(self, query: Query) -> Query:
        """The query, its null class spelt out."""
        if query.labels is not None:
            return query
        if self.null_label is None:
            raise ValueError("guidance needs a network with a null class")
        return query._replace(labels=torch.full_like(query.t, self.null_label, dtype=torch.int64))

    def _uses_seeds(self) -> bool:
        """Whether the network drops out, by a seed that it is given."""
        return self.training and getattr(self.network, "uses_dropout_seed", False)

    def _run(self, query: Query) -> Tensor:
        """F(x, t, s), with those conditions that there are."""
        for times in (query.t, query.s):
            _check_times(times, query.x)
        has_seed = query.dropout_seed is not None and self._uses_seeds()
        conditions = {
            "labels": query.labels,
            "augment_labels": query.augment_labels,
            "dropout_seed": torch.tensor(query.dropout_seed) if has_seed else None,
        }
        given = {name: value for name, value in conditions.items() if value is not None}
        with self._precision_of(query):
            output = self.network(query.x, query.t, query.t - query.s, **given)
        return output.to(query.x.dtype)

    def _precision_of(self, query: Query) -> contextlib.AbstractContextManager:
        """A block in which the network runs as coarsely as the query lets it."""
        if not self._is_coarse(query):
            return contextlib.nullcontext()
        return torch.autocast(query.x.device.type, self.execution.coarse_dtype)

    def _is_coarse(self, query: Query) -> bool:
        return query.may_be_coarse and self.execution.coarse_dtype is not None


@torch.no_grad()
def _guided_velocity(
    on_path: _OnPath, null_velocity: Tensor, own_velocity: Tensor | None, objective: Objective
) -> Tensor:
    """v*, the target velocity, [B, C, H, W].

    v* = m v_g + (1 - m) velocity(x_t, t, label), v_g = v_t + kappa(t) (w - 1) (v_t - v_u),
    with v_u the velocity of the null class. Samples with a dropped label keep v_t.
    """
    if len(on_path.guided) == 0:
        return on_path.velocity_t
    t, velocity_t = on_path.t[on_path.guided], on_path.velocity_t[on_path.guided]
    strength = (objective.cfg_scale - 1) * guidance_decay(t, objective.cfg_decay_time)
    guided = velocity_t + widen(strength, velocity_t) * (velocity_t - null_velocity)
    if objective.mix_ratio < 1:
        guided = torch.lerp(own_velocity, guided, objective.mix_ratio)
    return on_path.velocity_t.index_copy(0, on_path.guided, guided)


def _kept_places(samples: Samples) -> Tensor:
    """Indices, on the CPU, of the samples whose label is kept."""
    if samples.null_mask is None:
        return torch.arange(len(samples.x_0))
    return torch.nonzero(~samples.null_mask).squeeze(1)


def _join_columns(tensors: Iterable[Tensor | None]) -> Tensor | None:
    """One after the other along the batch; None where there are none."""
    given = [tensor for tensor in tensors if tensor is not None]
    return torch.cat(given) if given else None


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
