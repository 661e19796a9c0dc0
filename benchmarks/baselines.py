"""What people would train instead of SoFlow, around the same network, and what each step takes.

The arena's objectives, on the whole batch as their papers have it: a `Learner` runs the same step
with all three, exchange of gradients, norm, optimizer and average.
"""

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import NamedTuple

import torch
from measuring import NUM_CLASSES, data_shape
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

# isort: split
import arena.objectives as arena
from config import Config
from models import Batch, Method, Samples, SoFlow, StepTerms, build_model
from schedules import consistency_times

# B samples of the whole batch, both parts together


class FlowMatching(arena.FlowMatching):
    """The arena's, on both parts of the batch."""

    def forward(self, batch: Batch) -> StepTerms:
        samples, t, _ = whole(batch)
        x_t, v_t = self.interpolate(samples.x_0, samples.x_1, t)
        return terms_of((self.velocity(x_t, t, self.drop_labels(samples)) - v_t).square().mean())


class MeanFlow(arena.MeanFlow):
    """The arena's, with the derivative of all samples, also where s = t (algorithm 1 there)."""

    def forward(self, batch: Batch) -> StepTerms:
        errors = self.errors(*whole(batch))
        return terms_of((errors / (errors.detach() + self.eps) ** self.p).mean())


def whole(batch: Batch) -> tuple[Samples, Tensor, Tensor]:
    """The samples of both parts together, and their t and s."""
    parts = (batch.flow_matching, batch.consistency)
    samples = Samples(
        torch.cat([part.x_0 for part in parts]),
        torch.cat([part.x_1 for part in parts]),
        *(_cat([getattr(part, name) for part in parts]) for name in ("labels", "null_mask")),
    )
    t = torch.cat([batch.flow_matching_t, batch.consistency_times.t])
    s = torch.cat([batch.flow_matching_t, batch.consistency_times.s])
    return samples, t, s


def _cat(tensors: list[Tensor | None]) -> Tensor | None:
    return None if tensors[0] is None else torch.cat(tensors)


def terms_of(loss: Tensor) -> StepTerms:
    """The loss as a step's objective; the metrics that SoFlow has beside it are zero."""
    metrics = ("Vel_MSE", "Vel_Weight", "Con_MSE", "Con_Weight")
    return StepTerms(loss, dict(zip(metrics, loss.new_zeros(4), strict=True)))


def around(kind: type[Method], model: SoFlow) -> Method:
    """Another method on a SoFlow's network, with its path and settings."""
    method = kind(model.network)
    method.path, method.execution = model.path, model.execution
    method.configure(asdict(model.objective))
    return method


STEPS: dict[str, Callable[[SoFlow], nn.Module]] = {
    "SoFlow": lambda model: model,
    "flow matching": partial(around, FlowMatching),
    "MeanFlow": partial(around, MeanFlow),
}


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
