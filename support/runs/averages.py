"""Averages of a model's weights over training: exponential ones, and ones by a power of time.

theta_k are the weights after step k. An average that moves after every step is

    average_k = (1 - w_k) average_{k-1} + w_k theta_k

with w_k = 1 - decay for an exponential one, and w_k = 1 - (1 - 1/k)^(gamma + 1) for one in which
theta_k counts in proportion to k^gamma (Karras et al. 2024, arXiv 2312.02696, section 3).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

LARGEST_STD = 0.28  # the widest possible, of equal shares, has 0.2887
PREFIX = "power-"  # of the names of averages by a power of time


class Rule(Protocol):
    """How fast an average follows: w of a move after `step` that covers the last `steps` steps."""

    @property
    def name(self) -> str: ...

    def weight(self, step: int, steps: int) -> float: ...


@dataclass(frozen=True)
class Exponential:
    """By a decay per step."""

    decay: float

    @property
    def name(self) -> str:
        return str(self.decay)

    def weight(self, step: int, steps: int) -> float:
        return 1 - self.decay**steps


@dataclass(frozen=True)
class PowerFunction:
    """By a power of time whose profile has this standard deviation, relative to the time so far."""

    relative_std: float

    @property
    def name(self) -> str:
        return f"{PREFIX}{self.relative_std}"

    def weight(self, step: int, steps: int) -> float:
        before = max(step - steps, 0)
        return 1 - (before / step) ** (gamma_of(self.relative_std) + 1)


def gamma_of(relative_std: float) -> float:
    """The exponent gamma of a power function average with this relative standard deviation.

    std^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)), of which gamma is the largest root.
    """
    x = relative_std**-2
    # (gamma + 2)^2 (gamma + 3) - x (gamma + 1) = 0
    roots = np.roots([1.0, 7.0, 16.0 - x, 12.0 - x])
    return float(roots.real.max())


def last_move(step: int, every_steps: int) -> int:
    """The last step up to this one after which averages moved: 1, 1 + every, 1 + 2 every..."""
    return step - (step - 1) % every_steps


def find_average(asked: str, names: Sequence[str]) -> str | None:
    """The name among these that is meant: 0.9990 is 0.999; None where there is none."""
    if asked in names:
        return asked
    try:
        return next(name for name in names if _is_number(name) and float(name) == float(asked))
    except (ValueError, StopIteration):
        return None


def _is_number(name: str) -> bool:
    try:
        float(name)
    except ValueError:
        return False
    return True


# Averages of other lengths, after training (section 3 there)


class Profile(NamedTuple):
    """How much the weights after step k count in a power function average: as k^gamma."""

    gamma: float
    step: float

    def overlap(self, other: "Profile") -> float:
        """The integral over time of the product of both, each of which has the integral 1."""
        first, last = sorted((self, other), key=lambda profile: profile.step)
        # p(k) = (gamma + 1) k^gamma / step^(gamma + 1) for 0 < k <= step
        product = (self.gamma + 1) * (other.gamma + 1) / (self.gamma + other.gamma + 1)
        return product * (first.step / last.step) ** last.gamma / last.step


class Combination(NamedTuple):
    """What each of some averages counts in one that was not kept, and how far it is from that."""

    shares: np.ndarray
    error: float  # of the profile, in its norm, relative to the norm of the wanted one


def combine(kept: Sequence[Profile], wanted: Profile) -> Combination:
    """The combination of kept averages that is nearest to the wanted one, by least squares.

    The shares add up to 1: what training does not change is to stay as it is.
    """
    # |sum_i x_i p_i - p|^2 = x A x - 2 b x + c, least under sum_i x_i = 1 where A x + m = b, with
    # m the constraint's multiplier
    A = np.array([[one.overlap(other) for other in kept] for one in kept])
    b = np.array([one.overlap(wanted) for one in kept])
    c = wanted.overlap(wanted)
    ones = np.ones((len(kept), 1))
    system = np.block([[A, ones], [ones.T, np.zeros((1, 1))]])
    shares = np.linalg.lstsq(system, np.append(b, 1.0), rcond=None)[0][:-1]
    squared_error = max(shares @ A @ shares - 2 * b @ shares + c, 0.0)
    return Combination(shares, (squared_error / c) ** 0.5)


class Average:
    """Moves the weights of one model after those of another.

    Their tensors are listed once: to walk through a large model takes longer than to move it.
    """

    def __init__(self, averaged: nn.Module, model: nn.Module, rule: Rule, every_steps: int):
        self.every_steps, self.rule = every_steps, rule
        self._averages: list[Tensor] = [*averaged.parameters()]
        self._parameters: list[Tensor] = [*model.parameters()]
        self._buffers = [*zip(averaged.buffers(), model.buffers(), strict=True)]

    @torch.no_grad()
    def follow(self, finished_steps: int) -> None:
        """After step 1, 1 + every, 1 + 2 every...: move by the rule's weight, copy buffers.

        An average that moves every step is computed in float32. One that moves seldom is computed
        in float64, where that costs next to nothing, and stored in float32.
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
