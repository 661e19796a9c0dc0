"""The optimizers that a run can have."""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

# RAdam has no fused form.
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "AdamW": partial(torch.optim.AdamW, fused=True),
    "RAdam": torch.optim.RAdam,
}


def build_optimizer(
    name: str, model: nn.Module, lr: float, betas: tuple[float, float], weight_decay: float
) -> torch.optim.Optimizer:
    """The optimizer of OPTIMIZERS: one group of all parameters, in the state dict's order."""
    return OPTIMIZERS[name](model.parameters(), lr=lr, betas=betas, weight_decay=weight_decay)
