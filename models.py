"""SoFlow around a network: the solution, the guided velocity, the two losses.

Solution Flow Models, arXiv 2512.15657. Time runs from data (t = 0) to noise (t = 1):

    x_t = alpha(t) x_0 + beta(t) x_1        x_0 clean data, x_1 Gaussian noise
    v_t = alpha'(t) x_0 + beta'(t) x_1      the conditional velocity
    f(x, t, s) = a(t, s) x + b(t, s) F(x, t, s)

F is the network. f(x, t, s) is the solution at time s of the probability-flow ODE through x at
time t, with s <= l < t. The losses are deterministic functions of a batch that is already drawn;
the only randomness left is dropout, and the batch carries the seeds of its masks.

`SoFlow.losses` is the training step's mathematics, from top to bottom. To change the method, derive
from SoFlow and override one of the methods it calls.
"""

import contextlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from backbone import Backbone, NetworkRequest
from dit import DiT
from schedules import PATHS, SOLUTION_FORMS, guidance_decay
from unet import UNet

# B samples of a microbatch: V for flow matching, then B - V for consistency. K of the B keep their
# label. C channels, H = W side. Times are [B] until `widen` makes them [B, 1, 1, 1].


@dataclass(frozen=True)
class Objective:
    """The objective's settings: CFG scale w, mix m, decay time tau, loss weight p and eps.

    With w = 1 there is no guidance, and m and tau have no effect.
    """

    cfg_scale: float = 1.0
    mix_ratio: float = 1.0
    cfg_decay_time: float = 1.0
    p: float = 1.0
    eps: float = 0.01


@dataclass(frozen=True)
class Execution:
    """How the network runs. It affects cost and rounding, and nothing else."""

    # The dtype of autocast where low precision is safe; None: the weights' own dtype everywhere.
    autocast_dtype: torch.dtype | None = None
    # Guidance takes every row, those with dropped labels too: a compiled network needs one shape.
    fixed_shapes: bool = False


@dataclass(frozen=True)
class Batch:
    """One microbatch, with all its draws: rows [:V] for flow matching, the others for consistency.

    A row of flow matching has s = l = t. `null_mask` marks the rows whose label is dropped; None
    drops none. It stays on the CPU: the number of rows in the guidance call follows from it, and
    must not cost a wait for the device.
    """

    x_0: Tensor  # [B, C, H, W] clean data
    x_1: Tensor  # [B, C, H, W] noise
    t: Tensor  # [B]
    l: Tensor  # [B]  # noqa: E741 - the paper's letter
    s: Tensor  # [B]
    flow_matching_rows: int  # V
    # The sizes of both parts of the global batch, over all processes and microbatches.
    global_flow_matching_count: int
    global_consistency_count: int
    labels: Tensor | None = None  # [B] int64
    null_mask: Tensor | None = None  # [B] bool
    augment_labels: Tensor | None = None  # [B, 6]
    dropout_seeds: tuple[int, int] = (0, 0)  # of flow matching and of consistency

    def parts(self) -> tuple["Batch", "Batch"]:
        """The rows for flow matching and the rows for consistency."""
        V = self.flow_matching_rows
        return self.rows(slice(None, V), V), self.rows(slice(V, None), 0)

    def rows(self, chosen: slice | list[int], flow_matching_rows: int) -> "Batch":
        """Some of the rows, of which the first so many are for flow matching."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        cut: Any = {name: v[chosen] for name, v in values.items() if isinstance(v, Tensor)}
        return replace(self, **cut, flow_matching_rows=flow_matching_rows)


class LossTerms(NamedTuple):
    """A loss of each sample, [B] each: the value, the mean square of its error, the loss weight.

    The two losses define their weights differently; do not compare them.
    """

    loss: Tensor
    squared_error: Tensor
    weight: Tensor


class StepTerms(NamedTuple):
    """The objective of a step and its metrics by name; summed over microbatches, the step's values.

    Use the objective for its gradient alone: it contains the surrogate, whose value means nothing.
    """

    loss: Tensor
    metrics: dict[str, Tensor]


# The formulas


def check_times(times: Tensor, x: Tensor) -> None:
    """ValueError unless `times` are [B], one for each sample of x [B, C, H, W]."""
    if times.shape != x.shape[:1]:
        raise ValueError(f"times must be [{len(x)}], one per sample, not {list(times.shape)}")


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


# Methods


class Method(nn.Module):
    """An objective for a network, and the step from t to s that a trained one takes.

    The attribute `network` gives parameters their names in checkpoints. A method defines `forward`,
    from a drawn batch to its StepTerms, and `jump`. METHODS lists the methods that configs name.
    """

    sampler = "renoise"  # the sampler that images are made by unless another is asked for

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
        """Take the settings that the objective or the sampler needs from a config's keys."""

    def jump(self, x_t: Tensor, t: Tensor, s: Tensor, labels: Tensor | None) -> Tensor:
        """x_s, [B, C, H, W], from x_t; times are [B], labels [B] or None for the null label."""
        raise NotImplementedError

    # The losses that `squared_errors` measures. A method without them has no held-out loss.
    error_names: tuple[str, ...] = ()

    def squared_errors(self, batch: Batch) -> dict[str, Tensor]:
        """The unweighted squared error of each row of each loss, by its name."""
        raise NotImplementedError

    def evaluate(
        self,
        x: Tensor,
        t: Tensor,
        s: Tensor,
        labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
        dropout_seed: int | None = None,
        autocast_ok: bool = False,
    ) -> Tensor:
        """F(x, t, s), [B, C, H, W], in the dtype of x; ValueError unless times are [B].

        labels are [B] int64 or None for the null label, augment_labels [B, 6]. Equal dropout seeds
        give equal masks. `autocast_ok` says that low precision does no harm here.
        """
        check_times(t, x)
        check_times(s, x)
        if len(x) == 0:
            return x
        given = {"labels": labels, "augment_labels": augment_labels}
        if dropout_seed is not None and self._takes_dropout_seed():
            given["dropout_seed"] = torch.tensor(dropout_seed)
        given = {name: value for name, value in given.items() if value is not None}
        dtype = self.execution.autocast_dtype if autocast_ok else None
        with torch.autocast(x.device.type, dtype) if dtype else contextlib.nullcontext():
            return self.network(x, t, t - s, **given).to(x.dtype)

    def _takes_dropout_seed(self) -> bool:
        """Whether the network drops out now, with masks from a seed."""
        return self.network.training and getattr(self.network, "uses_dropout_seed", False)

    def interpolate(self, x_0: Tensor, x_1: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """x_t and v_t, [B, C, H, W] each."""
        alpha, beta, alpha_prime, beta_prime = (widen(value, x_0) for value in self.path(t))
        # x_t = alpha(t) x_0 + beta(t) x_1
        x_t = alpha * x_0 + beta * x_1
        # v_t = alpha'(t) x_0 + beta'(t) x_1
        v_t = alpha_prime * x_0 + beta_prime * x_1
        return x_t, v_t

    def drop_labels(self, batch: Batch) -> Batch:
        """The batch with the null label in the rows that null_mask marks."""
        if batch.labels is None or batch.null_mask is None:
            return batch
        null_mask = batch.null_mask.to(batch.labels.device, non_blocking=True)
        labels = torch.where(null_mask, self.null_labels(batch.labels), batch.labels)
        return replace(batch, labels=labels)

    def null_labels(self, like: Tensor) -> Tensor:
        """The null label for each row of `like`, [B]."""
        if self.null_label is None:
            raise ValueError("labels are dropped, but the network has no null label")
        return torch.full_like(like, self.null_label, dtype=torch.int64)


class Guidance(NamedTuple):
    """The network's velocities for classifier-free guidance, [B, C, H, W]; right in kept rows."""

    v_null: Tensor  # under the null label
    v_label: Tensor | None  # under the row's own label; None where mix_ratio is 1


class SoFlow(Method):
    """A network F with its path and solution form, trained by two losses, sampled by f."""

    objective = Objective()

    def configure(self, settings: Mapping[str, Any]) -> None:
        self.objective = Objective(**{f.name: settings[f.name] for f in fields(Objective)})

    def forward(self, batch: Batch) -> StepTerms:
        """The objective of one microbatch: the mean of both losses over the global batch's samples.

        Dividing by global counts makes the objective independent of how the batch is cut over
        processes and accumulation steps: losses and metrics of all microbatches add up.
        """
        flow_matching, consistency = self.losses(batch)
        num_vel, num_con = batch.global_flow_matching_count, batch.global_consistency_count
        loss = (flow_matching.loss.sum() + consistency.loss.sum()) / (num_vel + num_con)
        metrics = {
            "Vel_MSE": flow_matching.squared_error.sum() / max(num_vel, 1),
            "Vel_Weight": flow_matching.weight.sum() / max(num_vel, 1),
            "Con_MSE": consistency.squared_error.sum() / max(num_con, 1),
            "Con_Weight": consistency.weight.sum() / max(num_con, 1),
        }
        return StepTerms(loss, metrics)

    def losses(self, batch: Batch) -> tuple[LossTerms, LossTerms]:
        """The flow matching loss, [V], and the solution consistency loss, [B - V], of each row.

        The network is called three times at most, each time with all the rows that need it.
        """
        batch = self.drop_labels(batch)
        vel, con = batch.parts()
        V = batch.flow_matching_rows
        x_t, v_t = self.interpolate(batch.x_0, batch.x_1, batch.t)

        # 1. Without gradient, if there is guidance: v(x_t, t) without a label and with it
        guidance = self.guidance(x_t, batch)

        # 2. With gradient: F(x_t, t, s), where s = t for flow matching
        F_vel, F_con = self.predict(x_t, batch)
        form = self.solution_form(vel.t, vel.t)
        velocity = velocity_of(x_t[:V], F_vel, form.a_s, form.b_s)
        v_star = self.target_velocity(v_t, guidance, velocity.detach(), batch)
        flow_matching = self.flow_matching_loss(velocity, v_star[:V], form.b_s)

        # 3. Stop-gradient: F(x_l, l, s) with the dropout masks of 2., a little down the path:
        #    x_l = x_t + v* (l - t)
        x_l = x_t[V:] + v_star[V:] * widen(con.l - con.t, x_t[V:])
        with torch.no_grad():
            F_l = self.evaluate(
                x_l, con.l, con.s, con.labels, con.augment_labels, con.dropout_seeds[1]
            )
        at_t, at_l = self.solution_form(con.t, con.s), self.solution_form(con.l, con.s)
        f_t = solution_of(x_t[V:], F_con.detach(), at_t.a, at_t.b)
        f_l = solution_of(x_l, F_l, at_l.a, at_l.b)
        return flow_matching, self.consistency_loss(F_con, f_t, f_l, con.t - con.l, at_t.b)

    def predict(self, x_t: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """F(x_t, t, t) of the rows for flow matching, F(x_t, t, s) of those for consistency.

        In one call, unless the two differ: flow matching tolerates autocast, and consistency
        divides a difference of two outputs by t - l, which does not. So do their dropout masks.
        """
        V = batch.flow_matching_rows
        if self.execution.autocast_dtype is None and not self._takes_dropout_seed():
            F = self.evaluate(x_t, batch.t, batch.s, batch.labels, batch.augment_labels)
            return F[:V], F[V:]
        vel, con = batch.parts()
        vel_seed, con_seed = batch.dropout_seeds
        return (
            self.evaluate(x_t[:V], vel.t, vel.s, vel.labels, vel.augment_labels, vel_seed, True),
            self.evaluate(x_t[V:], con.t, con.s, con.labels, con.augment_labels, con_seed),
        )

    @torch.no_grad()
    def guidance(self, x_t: Tensor, batch: Batch) -> Guidance | None:
        """v(x_t, t) under the null label and under the row's own, in one call; None without CFG.

        Only rows that keep their label need them. Flow matching predicts v under its own label
        anyway: it gets it from there, and `v_label` of its rows stays empty here.
        """
        V, needs_label = batch.flow_matching_rows, self.objective.mix_ratio < 1
        kept = self.kept_rows(batch)
        if batch.labels is None or not kept:
            return None
        null_rows = [*range(len(x_t))] if self.execution.fixed_shapes else kept
        label_rows = [row for row in null_rows if row >= V and needs_label]
        sizes = [len(null_rows), len(label_rows)]
        rows = torch.tensor(null_rows + label_rows).to(x_t.device, non_blocking=True)
        nulls, own = rows.split(sizes)

        labels = torch.cat([self.null_labels(nulls), batch.labels[own]])
        x, t, seed = x_t[rows], batch.t[rows], batch.dropout_seeds[0]
        F, form = self.evaluate(x, t, t, labels, None, seed, True), self.solution_form(t, t)
        v_null, v_label = velocity_of(x, F, form.a_s, form.b_s).split(sizes)
        empty = torch.zeros_like(x_t)
        return Guidance(
            empty.index_copy(0, nulls, v_null),
            empty.index_copy(0, own, v_label) if needs_label else None,
        )

    def kept_rows(self, batch: Batch) -> list[int]:
        """The rows that keep their label; none without guidance."""
        if self.objective.cfg_scale <= 1:
            return []
        if batch.null_mask is None:
            return [*range(len(batch.x_0))]
        return [row for row, is_null in enumerate(batch.null_mask.tolist()) if not is_null]

    @torch.no_grad()
    def target_velocity(
        self, v_t: Tensor, guidance: Guidance | None, velocity: Tensor, batch: Batch
    ) -> Tensor:
        """v*, [B, C, H, W]: guided in rows that keep their label, v_t in the others.

        `velocity` is flow matching's own prediction, [V, C, H, W].
        """
        if guidance is None:
            return v_t
        w, m = self.objective.cfg_scale, self.objective.mix_ratio
        kappa = guidance_decay(batch.t, self.objective.cfg_decay_time)
        # v_g = v_t + kappa(t) (w - 1) (v_t - v_null)
        v_star = v_t + widen(kappa * (w - 1), v_t) * (v_t - guidance.v_null)
        if guidance.v_label is not None:
            # v* = m v_g + (1 - m) v_label
            v_label = torch.cat([velocity, guidance.v_label[len(velocity) :]])
            v_star = torch.lerp(v_label, v_star, m)
        if batch.null_mask is None:
            return v_star
        null_mask = batch.null_mask.to(v_t.device, non_blocking=True)
        return torch.where(null_mask.view(-1, 1, 1, 1), v_t, v_star)

    def loss_weight(self, squared_error: Tensor, scale: Tensor | float = 1) -> Tensor:
        """The adaptive loss weight of each sample, [B]."""
        # weight = 1 / (scale (e + eps)^p)
        return 1 / (scale * (squared_error + self.objective.eps) ** self.objective.p)

    def flow_matching_loss(self, velocity: Tensor, v_star: Tensor, b_s: Tensor) -> LossTerms:
        """The weighted squared error of the velocity, [V] each; b_s is that of (t, t)."""
        # e = mean of (v(x_t, t) - v*)^2;  weight = 1 / (|b_s(t, t)| (e + eps)^p)
        error = sample_mean((velocity - v_star).square())
        weight = self.loss_weight(error.detach(), b_s.abs())
        return LossTerms(weight * error, error.detach(), weight)

    def consistency_loss(
        self, F_t: Tensor, f_t: Tensor, f_l: Tensor, gap: Tensor, b: Tensor
    ) -> LossTerms:
        """The solution consistency loss, [B - V] each; gap is t - l and b that of (t, s).

        The loss is a surrogate, the mean of sign(b) F_t weight q with all but F_t held constant. It
        has the gradient of weight (f_t - f_l)^2 / (2 |b| (t - l)), with weight and f_l held
        constant: of d f_t / d F_t = b and 1 / |b| only the sign is left. So nothing is divided by
        b, which may be small. The value may be negative and means nothing; the mean of q^2 does.
        """
        # q = (f(x_t, t, s) - f(x_l, l, s)) / (t - l);  weight = 1 / (mean of q^2 + eps)^p
        q = (f_t - f_l) / widen(gap, f_t)
        error = sample_mean(q.square())
        weight = self.loss_weight(error)
        # mean of sign(b(t, s)) F_t weight q
        slope = widen(b.sign() * weight, q) * q
        return LossTerms(sample_mean(F_t * slope), error, weight)

    error_names = ("velocity", "consistency")

    def squared_errors(self, batch: Batch) -> dict[str, Tensor]:
        errors = (terms.squared_error for terms in self.losses(batch))
        return dict(zip(self.error_names, errors, strict=True))

    def velocity(
        self,
        x_t: Tensor,
        t: Tensor,
        labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
    ) -> Tensor:
        """d/ds f(x, t, s) at s = t, which is a_s(t, t) x + b_s(t, t) F(x, t, t)."""
        F, form = self.evaluate(x_t, t, t, labels, augment_labels), self.solution_form(t, t)
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
        F, form = self.evaluate(x_t, t, s, labels, augment_labels), self.solution_form(t, s)
        return solution_of(x_t, F, form.a, form.b)

    def jump(self, x_t: Tensor, t: Tensor, s: Tensor, labels: Tensor | None) -> Tensor:
        return self.solution(x_t, t, s, labels)


# Building


METHODS: dict[str, type[Method]] = {"SoFlow": SoFlow}


def add_method(spec: str) -> str:
    """List the class NAME of FILE.py in METHODS; `spec` is FILE.py:NAME. Returns its name there.

    This runs the file. ValueError where it does not exist or has no such Method.
    """
    file, _, name = spec.rpartition(":")
    path = Path(file).expanduser()
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    loaded = importlib.util.spec_from_file_location(path.stem, path)
    if loaded is None or loaded.loader is None:
        raise ValueError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(loaded)
    loaded.loader.exec_module(module)
    method = getattr(module, name, None)
    if not (isinstance(method, type) and issubclass(method, Method)):
        raise ValueError(f"{path} has no class {name} that derives from models.Method")
    METHODS[f"{path.name}:{name}"] = method
    return f"{path.name}:{name}"


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
