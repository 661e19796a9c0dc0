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
from models import Batch, Method, SoFlow, StepTerms, build_model

# B samples of the whole batch, both parts together


class FlowMatching(arena.FlowMatching):
    """The arena's, on both parts of the batch."""

    def forward(self, batch: Batch) -> StepTerms:
        batch = self.drop_labels(batch)
        x_t, v_t = self.interpolate(batch.x_0, batch.x_1, batch.t)
        return terms_of((self.velocity(x_t, batch.t, batch.labels) - v_t).square().mean())


class MeanFlow(arena.MeanFlow):
    """The arena's, with the derivative of all samples, also where s = t (algorithm 1 there)."""

    def forward(self, batch: Batch) -> StepTerms:
        errors = self.errors(self.drop_labels(batch))
        return terms_of((errors / (errors.detach() + self.eps) ** self.p).mean())


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
    x, t = batch.x_0, batch.t
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as of_forward:
        model.eval().solution(x, t, t, batch.labels)
    return Flops(of_step.get_total_flops() / count, of_forward.get_total_flops() / count)


def exact_batch(config: Config, count: int, device: str) -> Batch:
    """Samples on `device`, of which exactly a tenth have dropped labels where there are labels."""
    V = int(count * config.velocity_loss_ratio)
    x = torch.empty(count, *data_shape(config), device=device)
    t, labels, null_mask = torch.empty(count, device=device), None, None
    if config.is_conditional:
        labels = torch.empty(count, dtype=torch.int64, device=device)
        null_mask = torch.arange(count) % 10 == 0  # on the CPU, as always
    return Batch(x, x, t, t, t, V, V, count - V, labels, null_mask, dropout_seeds=(1, 1))
