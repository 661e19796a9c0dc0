"""Our optimizers beside torch's own."""

import copy

import pytest
import torch
from torch import Tensor, nn

from support.runs.optimizers import RAdam

FIRST_RECTIFIED = 6  # step, for a beta_2 of 0.999


def descend(optimizer, parameters: list[Tensor], steps: range) -> list[Tensor]:
    """The parameters after steps that each have their own gradients and learning rate."""
    for step in steps:
        source = torch.Generator().manual_seed(step)
        for parameter in parameters:
            gradient = torch.randn(parameter.shape, dtype=parameter.dtype, generator=source)
            parameter.grad = gradient * 10.0 ** (step % 5 - 4)
        optimizer.param_groups[0]["lr"] = 1e-2 / (1 + step)
        optimizer.step()
    return [parameter.detach().clone() for parameter in parameters]


def parameters_of(dtype: torch.dtype) -> list[Tensor]:
    source = torch.Generator().manual_seed(0)
    shapes = ((3, 4), (5,))
    return [nn.Parameter(torch.randn(s, dtype=dtype, generator=source)) for s in shapes]


SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.999), "weight_decay": 0.1, "eps": 1e-3}


@pytest.mark.parametrize(("dtype", "within"), [(torch.float64, 1e-12), (torch.float32, 3e-6)])
@pytest.mark.parametrize("last", [1, FIRST_RECTIFIED - 1, FIRST_RECTIFIED, 40])
def test_radam_is_torchs_own_to_rounding(last, dtype, within):
    found = []
    for kind in (RAdam, torch.optim.RAdam):
        parameters = parameters_of(dtype)
        optimizer = kind(parameters, **SETTINGS)
        found.append(descend(optimizer, parameters, range(last)))
        assert optimizer.param_groups[0]["eps"] == SETTINGS["eps"]
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=within, atol=within)


@pytest.mark.parametrize("before", [3, 20])
def test_radam_goes_on_from_torchs_own_state(before):
    parameters = parameters_of(torch.float64)
    theirs = torch.optim.RAdam(parameters, **SETTINGS)
    descend(theirs, parameters, range(before))
    copies = copy.deepcopy(parameters)
    ours = RAdam(copies, **SETTINGS)
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    steps = range(before, before + 5)
    results = descend(ours, copies, steps), descend(theirs, parameters, steps)
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
