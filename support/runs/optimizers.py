"""The optimizers that a run can have."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

OVERWHELMING = 1e20  # an eps so large that the second moment does not count


class RAdam(torch.optim.Adam):
    """RAdam (Liu et al. 2020, arXiv 1908.03265, algorithm 2) by Adam's fused kernel.

    With the moments m and v that both have, and c_1, c_2 the corrections of their bias,

        Adam:   theta -= lr m / c_1 / (sqrt(v) / sqrt(c_2) + eps)
        RAdam:  theta -= lr r m / c_1 / ((sqrt(v) + eps) / sqrt(c_2))   where r can be computed,
                theta -= lr m / c_1                                     in the first steps.

    The second line is Adam with lr r and eps / sqrt(c_2). The third is Adam with an overwhelming
    eps, and lr times that. So the state is that of torch's RAdam, and steps agree to rounding.
    """

    def __init__(self, *args: Any, **settings: Any):
        super().__init__(*args, fused=True, **settings)
        self._steps: int | None = None  # finished; on the host, so that no step waits

    def load_state_dict(self, state_dict: Any) -> None:
        super().load_state_dict(state_dict)
        self._steps = None

    def step(self, closure: Any = None) -> Any:
        if self._steps is None:
            self._steps = max((int(of["step"]) for of in self.state.values()), default=0)
        self._steps += 1
        given = [(group["lr"], group["eps"]) for group in self.param_groups]
        for group, (lr, eps) in zip(self.param_groups, given, strict=True):
            group["lr"], group["eps"] = as_adam(lr, eps, group["betas"][1], self._steps)
        try:
            return super().step(closure)
        finally:
            for group, (lr, eps) in zip(self.param_groups, given, strict=True):
                group["lr"], group["eps"] = lr, eps


def as_adam(lr: float, eps: float, beta_2: float, step: int) -> tuple[float, float]:
    """The learning rate and eps with which Adam makes a step of RAdam; the first step is 1."""
    c_2 = 1 - beta_2**step
    rho_inf = 2 / (1 - beta_2) - 1
    rho = rho_inf - 2 * step * beta_2**step / c_2
    if rho <= 5:
        return lr * OVERWHELMING, OVERWHELMING
    r = math.sqrt((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho))
    return lr * r, eps / math.sqrt(c_2)


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "AdamW": partial(torch.optim.AdamW, fused=True),
    "RAdam": RAdam,
}


def build_optimizer(
    name: str, model: nn.Module, lr: float, betas: tuple[float, float], weight_decay: float
) -> torch.optim.Optimizer:
    """An optimizer of OPTIMIZERS with all parameters in one group, in the state dict's order."""
    return OPTIMIZERS[name](model.parameters(), lr=lr, betas=betas, weight_decay=weight_decay)
