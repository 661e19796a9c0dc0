"""The exponential moving average of a model's weights."""

import torch
from torch import Tensor, nn


class Average:
    """Moves the weights of one model after those of another.

    Their tensors are listed once: to walk through a large model takes longer than to move it.
    """

    def __init__(self, ema_model: nn.Module, model: nn.Module, decay: float, every_steps: int):
        self.every_steps, self.weight = every_steps, 1 - decay**every_steps
        self._averages: list[Tensor] = [*ema_model.parameters()]
        self._parameters: list[Tensor] = [*model.parameters()]
        self._buffers = [*zip(ema_model.buffers(), model.buffers(), strict=True)]

    @torch.no_grad()
    def follow(self, finished_steps: int) -> None:
        """After step 1, 1 + every, 1 + 2 every...: move by 1 - decay^every_steps, copy buffers.

        An average that moves every step is computed in float32. One that moves seldom is computed
        in float64, where that costs next to nothing, and stored in float32.
        """
        if (finished_steps - 1) % self.every_steps:
            return
        if self.every_steps == 1:
            torch._foreach_lerp_(self._averages, self._parameters, self.weight)
        else:
            for average, parameter in zip(self._averages, self._parameters, strict=True):
                # MPS has no float64.
                precise = torch.float32 if average.device.type == "mps" else torch.float64
                average.copy_(torch.lerp(average.to(precise), parameter.to(precise), self.weight))
        for copied, buffer in self._buffers:
            copied.copy_(buffer)
