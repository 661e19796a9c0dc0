"""What people would train instead of SoFlow, around the same network: the losses of two others.

Modules that take a `Batch` and an `Objective` as a `SoFlow` does, so that a `Learner` runs the same
step with all three: exchange of gradients, their norm, optimizer, average. And what the arithmetic
of each step is.
"""

from typing import NamedTuple

import torch
from measuring import NUM_CLASSES, data_shape
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

# isort: split
from config import Config
from models import Batch, Objective, Samples, SoFlow, StepTerms, build_model, sample_mean, widen
from schedules import consistency_times

# B samples of the whole batch, both parts together


class _Baseline(nn.Module):
    """A loss of the whole batch on a SoFlow's network."""

    def __init__(self, model: SoFlow):
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> StepTerms:
        """The loss as a step's objective; the metrics that SoFlow has beside it are zero."""
        parts = (batch.flow_matching, batch.consistency)
        samples = Samples(
            torch.cat([part.x_0 for part in parts]),
            torch.cat([part.x_1 for part in parts]),
            *(_cat([getattr(part, name) for part in parts]) for name in ("labels", "null_mask")),
        )
        t = torch.cat([batch.flow_matching_t, batch.consistency_times.t])
        s = torch.cat([batch.flow_matching_t, batch.consistency_times.s])
        loss = self.loss(samples, t, s, self.model.objective)
        metrics = ("Vel_MSE", "Vel_Weight", "Con_MSE", "Con_Weight")
        return StepTerms(loss, dict(zip(metrics, loss.new_zeros(4), strict=True)))

    def loss(self, samples: Samples, t: Tensor, s: Tensor, objective: Objective) -> Tensor:
        """The mean over the samples, whose labels are dropped by their mask."""
        raise NotImplementedError

    def labels(self, samples: Samples) -> Tensor | None:
        """[B], the null class where the label is dropped."""
        return self.model.drop_labels(samples)


class FlowMatching(_Baseline):
    """Plain flow matching (Lipman et al., arXiv 2210.02747), unguided: many steps to sample.

    mean |F(x_t, t, t) - v_t|^2
    """

    def loss(self, samples: Samples, t: Tensor, s: Tensor, objective: Objective) -> Tensor:
        x_t, velocity_t = self.model.interpolate(samples.x_0, samples.x_1, t)
        velocity = self.model.velocity(x_t, t, self.labels(samples))
        return (velocity - velocity_t).square().mean()


class MeanFlow(_Baseline):
    """MeanFlow (Geng et al., arXiv 2505.13447): one step to sample, and Jacobian-vector products.

    u(z_t, r, t) is the average velocity from t to r, which is our s. With its guided velocity

        v~ = w v_t + kappa u(z_t, t, t | c) + (1 - w - kappa) u(z_t, t, t)

    the target is u_tgt = v~ - (t - r) du/dt, du/dt being the Jacobian-vector product of u with the
    tangents (v~, 0, 1) of (z, r, t), over the whole batch (algorithm 1), and the loss is
    |u - u_tgt|^2 with the adaptive weight 1 / (|u - u_tgt|^2 + eps)^p.
    """

    def loss(self, samples: Samples, t: Tensor, s: Tensor, objective: Objective) -> Tensor:
        x_t, velocity_t = self.model.interpolate(samples.x_0, samples.x_1, t)
        guided = self._guided(samples, x_t, t, velocity_t, objective)
        labels = self.labels(samples)
        conditions = {} if labels is None else {"labels": labels}

        def average_velocity(x: Tensor, r: Tensor, t: Tensor) -> Tensor:
            return self.model.network(x, t, t - r, **conditions)

        tangents = (guided, torch.zeros_like(s), torch.ones_like(t))
        # The fused kernels have no forward-mode derivative.
        with sdpa_kernel(SDPBackend.MATH):
            u, du_dt = torch.func.jvp(average_velocity, (x_t, s, t), tangents)
        error = sample_mean((u - (guided - widen(t - s, x_t) * du_dt).detach()).square())
        weight = 1 / (error.detach() + objective.eps) ** objective.p
        return (weight * error).mean()

    @torch.no_grad()
    def _guided(
        self, samples: Samples, x_t: Tensor, t: Tensor, velocity_t: Tensor, objective: Objective
    ) -> Tensor:
        """v~, [B, C, H, W]; v_t where the label is dropped. One call of the network for both."""
        if objective.cfg_scale <= 1:
            return velocity_t
        # Our m v_g + (1 - m) u(. | c) is theirs with w = m w', kappa = 1 - m.
        scale, kappa = objective.mix_ratio * objective.cfg_scale, 1 - objective.mix_ratio
        null_labels = torch.full_like(samples.labels, self.model.null_label)
        own, null = self.model.velocity(
            x_t.repeat(2, 1, 1, 1), t.repeat(2), torch.cat([samples.labels, null_labels])
        ).chunk(2)
        guided = scale * velocity_t + kappa * own + (1 - scale - kappa) * null
        return torch.where(widen(samples.null_mask.to(t.device), x_t), velocity_t, guided)


def _cat(tensors: list[Tensor | None]) -> Tensor | None:
    return None if tensors[0] is None else torch.cat(tensors)


STEPS = {"SoFlow": lambda model: model, "flow matching": FlowMatching, "MeanFlow": MeanFlow}


class Flops(NamedTuple):
    """FLOPs of one sample's matrix products and convolutions: in a step, and in a forward."""

    step: float
    forward: float


def count_flops(config: Config, name: str) -> Flops:
    """What a sample takes in the step of that name, a tenth of the labels being dropped."""
    # The UNet's dropout needs a device; its FLOPs are the same for every sample.
    device, count = ("meta", 40) if config.is_conditional else ("cpu", 2)
    with torch.device(device):
        model = build_model(**config.model_arguments(data_shape(config)[0], NUM_CLASSES))
    model.configure(config.to_dict())
    batch = exact_batch(config, count, device)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as of_step:
        STEPS[name](model)(batch).loss.backward()
    parts = (batch.flow_matching, batch.consistency)
    x = torch.cat([part.x_0 for part in parts])
    labels = torch.cat([part.labels for part in parts]) if config.is_conditional else None
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as of_forward:
        model.eval().solution(x, x[:, 0, 0, 0], x[:, 0, 0, 0], labels)
    return Flops(of_step.get_total_flops() / count, of_forward.get_total_flops() / count)


def exact_batch(config: Config, count: int, device: str) -> Batch:
    """Samples on `device`, of which exactly a tenth have dropped labels where there are labels."""
    V = int(count * config.velocity_loss_ratio)

    def samples(count: int) -> Samples:
        shape = (count, *data_shape(config))
        x_0, x_1 = torch.empty(shape, device=device), torch.empty(shape, device=device)
        if not config.is_conditional:
            return Samples(x_0, x_1, dropout_seed=1)
        null_mask = torch.arange(count) < count // 10  # on the CPU, as always
        labels = torch.empty(count, dtype=torch.int64, device=device)
        return Samples(x_0, x_1, labels, null_mask)

    t = torch.empty(count, device=device)
    times = consistency_times(t[V:], t[V:], 0.1)
    return Batch(samples(V), t[:V], samples(count - V), times, V, count - V)
