"""Averages of a model's weights over training (EMA): exponential and power function averages.

theta_k are the weights after step k. An average that moves after every step is

    average_k = (1 - w_k) average_{k-1} + w_k theta_k

with w_k = 1 - decay for an exponential average. For a power function average, in which theta_k
counts in proportion to k^gamma, w_k = 1 - (1 - 1/k)^(gamma + 1) (Karras et al. 2024, arXiv
2312.02696, section 3).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

LARGEST_STD = 0.28  # equal shares, the widest possible average, have 0.2887
PREFIX = "power-"  # of the names of power function averages


@dataclass(frozen=True)
class Exponential:
    """An exponential average, by its decay per step."""

    decay: float

    @property
    def name(self) -> str:
        return str(self.decay)

    def weight(self, step: int, steps: int) -> float:
        return 1 - self.decay**steps


@dataclass(frozen=True)
class PowerFunction:
    """A power function average, by its profile's standard deviation relative to the time so far."""

    relative_std: float

    @property
    def name(self) -> str:
        return f"{PREFIX}{self.relative_std}"

    def weight(self, step: int, steps: int) -> float:
        before = max(step - steps, 0)
        return 1 - (before / step) ** (gamma_of(self.relative_std) + 1)


# How fast an average follows: `weight` is that of a move after `step` that covers `steps` steps.
Rule = Exponential | PowerFunction


def gamma_of(relative_std: float) -> float:
    """The exponent gamma of a power function average with this relative standard deviation.

    gamma is the largest root of std^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)).
    """
    x = relative_std**-2
    # (gamma + 2)^2 (gamma + 3) - x (gamma + 1) = 0
    roots = np.roots([1.0, 7.0, 16.0 - x, 12.0 - x])
    return float(roots.real.max())


def last_move(step: int, every_steps: int) -> int:
    """The last step so far after which averages moved: 1, 1 + every, 1 + 2 every..."""
    return step - (step - 1) % every_steps


# Averages of other lengths, made after training


class Profile(NamedTuple):
    """How much the weights after each step k count in a power function average: as k^gamma."""

    gamma: float
    step: float

    def overlap(self, other: "Profile") -> float:
        """The integral of the product of both profiles, each of which integrates to 1."""
        first, last = sorted((self, other), key=lambda profile: profile.step)
        # p(k) = (gamma + 1) k^gamma / step^(gamma + 1) for 0 < k <= step
        product = (self.gamma + 1) * (other.gamma + 1) / (self.gamma + other.gamma + 1)
        return product * (first.step / last.step) ** last.gamma / last.step


class Combination(NamedTuple):
    """The share of each kept average in a new one, and how far that is from the wanted one."""

    shares: np.ndarray
    error: float  # norm of the profile's error, relative to the norm of the wanted profile


def combine(kept: Sequence[Profile], wanted: Profile) -> Combination:
    """The combination of kept averages nearest to the wanted one, by least squares.

    The shares add up to 1, so that weights which training does not change stay as they are.
    """
    # Minimise |sum_i x_i p_i - p|^2 = x A x - 2 b x + c subject to sum_i x_i = 1: A x + m = b, with
    # m the multiplier of the constraint
    A = np.array([[one.overlap(other) for other in kept] for one in kept])
    b = np.array([one.overlap(wanted) for one in kept])
    c = wanted.overlap(wanted)
    ones = np.ones((len(kept), 1))
    system = np.block([[A, ones], [ones.T, np.zeros((1, 1))]])
    shares = np.linalg.lstsq(system, np.append(b, 1.0), rcond=None)[0][:-1]
    squared_error = max(shares @ A @ shares - 2 * b @ shares + c, 0.0)
    return Combination(shares, (squared_error / c) ** 0.5)


class Average:
    """Moves the weights of one model towards those of another.

    Lists their tensors once: walking through a large model takes longer than moving it.
    """

    def __init__(self, averaged: nn.Module, model: nn.Module, rule: Rule, every_steps: int):
        self.every_steps, self.rule = every_steps, rule
        self._averages: list[Tensor] = [*averaged.parameters()]
        self._parameters: list[Tensor] = [*model.parameters()]
        self._buffers = [*zip(averaged.buffers(), model.buffers(), strict=True)]

    @torch.no_grad()
    def follow(self, finished_steps: int) -> None:
        """After steps 1, 1 + every, 1 + 2 every...: move by the rule's weight, copy buffers.

        An average that moves every step is computed in float32. One that moves less often is
        computed in float64, at little cost, and stored in float32.
        """
        if last_move(finished_steps, self.every_steps) != finished_steps:
            return
        weight = self.rule.weight(finished_steps, self.every_steps)
        if self.every_steps == 1:
            torch._foreach_lerp_(self._averages, self._parameters, weight)
        else:
            for average, parameter in zip(self._averages, self._parameters, strict=True):
                # MPS has no float64.
                precise = torch.float32 if average.device.type == "mps" else torch.float64
                average.copy_(torch.lerp(average.to(precise), parameter.to(precise), weight))
        for copied, buffer in self._buffers:
            copied.copy_(buffer)
