"""The exponential moving average of a model's weights."""

import torch
from torch import Tensor, nn


def is_ema_step(finished_steps: int, every_steps: int) -> bool:
    """Whether the average moves after step `finished_steps`: after 1, 1 + every, 1 + 2 every..."""
    return (finished_steps - 1) % every_steps == 0


@torch.no_grad()
def update_ema(ema_model: nn.Module, model: nn.Module, decay: float, every_steps: int) -> None:
    """Move the average towards the model by 1 - decay^every_steps; buffers are copied.

    An average that moves every step is computed in float32. One that moves seldom is computed in
    float64, where that costs next to nothing, and stored in float32.
    """
    weight = 1 - decay**every_steps
    averages: list[Tensor] = [*ema_model.parameters()]
    parameters: list[Tensor] = [*model.parameters()]
    if every_steps == 1:
        torch._foreach_lerp_(averages, parameters, weight)
    else:
        for average, parameter in zip(averages, parameters, strict=True):
            # MPS has no float64.
            precise = torch.float32 if average.device.type == "mps" else torch.float64
            average.copy_(torch.lerp(average.to(precise), parameter.to(precise), weight))
    for copied, buffer in zip(ema_model.buffers(), model.buffers(), strict=True):
        copied.copy_(buffer)
