"""SoFlow's functions of time: path, solution form, decay of guidance, and the gap's schedule.

Times run from data (t = 0) to noise (t = 1); `models` says what the letters mean.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Times and the values computed from them are [B], one per sample

MIN_TIME_GAP = 1e-4  # consistency: t >= this, and t - s, t - l >= this
MAX_DECAY_ARGUMENT = 1 - 1e-6
DECAY_RATE = 0.025


class PathPoint(NamedTuple):
    """alpha, beta and their derivatives at some times, [B] each."""

    alpha: Tensor
    beta: Tensor
    alpha_prime: Tensor
    beta_prime: Tensor


def linear_path(t: Tensor) -> PathPoint:
    """alpha = 1 - t, beta = t."""
    one = torch.ones_like(t)
    return PathPoint(1 - t, t, -one, one)


def trig_path(t: Tensor) -> PathPoint:
    """alpha = cos(pi t / 2), beta = sin(pi t / 2)."""
    angle = (math.pi / 2) * t
    cos, sin = angle.cos(), angle.sin()
    return PathPoint(cos, sin, -(math.pi / 2) * sin, (math.pi / 2) * cos)


class SolutionForm(NamedTuple):
    """a, b of f = a x + b F, and their derivatives in s, at some (t, s), [B] each."""

    a: Tensor
    b: Tensor
    a_s: Tensor
    b_s: Tensor


def euler_form(t: Tensor, s: Tensor) -> SolutionForm:
    """a = 1, b = s - t."""
    one = torch.ones_like(t)
    return SolutionForm(one, s - t, torch.zeros_like(t), one)


def trig_form(t: Tensor, s: Tensor) -> SolutionForm:
    """a = cos(pi (s - t) / 2), b = sin(pi (s - t) / 2)."""
    angle = (math.pi / 2) * (s - t)
    cos, sin = angle.cos(), angle.sin()
    return SolutionForm(cos, sin, -(math.pi / 2) * sin, (math.pi / 2) * cos)


PATHS: dict[str, Callable[[Tensor], PathPoint]] = {"Linear": linear_path, "Trig": trig_path}
SOLUTION_FORMS: dict[str, Callable[[Tensor, Tensor], SolutionForm]] = {
    "Euler": euler_form,
    "Trig": trig_form,
}


def guidance_decay(t: Tensor, cfg_decay_time: float) -> Tensor:
    """kappa(t), [B]: 1 up to cfg_decay_time, then falling to 0 at t = 1."""
    if cfg_decay_time >= 1:
        return torch.ones_like(t)
    # Up to cfg_decay_time d is at its bound, where the exponential underflows to 0: kappa = 1.
    d = ((1 - t) / (1 - cfg_decay_time)).clamp(0, MAX_DECAY_ARGUMENT)
    return 1 - torch.exp(-DECAY_RATE * d / (1 - d))


# Each is r(x) from init to end, with x = k/K the share of the steps that are finished.
GAP_SCHEDULES: dict[str, Callable[[float, float, float], float]] = {
    "Const": lambda x, init, end: end,
    "Linear": lambda x, init, end: init + (end - init) * x,
    "Cosine": lambda x, init, end: end + (init - end) * (1 + math.cos(math.pi * x)) / 2,
    "Exponent": lambda x, init, end: init * (end / init) ** x,
}


def gap_fraction(
    schedule: str, step: int, total_steps: int, init_ratio: float, end_ratio: float
) -> float:
    """r(k, K): where l lies between t (r = 0) and s (r = 1) after `step` finished steps."""
    return GAP_SCHEDULES[schedule](step / total_steps, init_ratio, end_ratio)


def warmed_up(learning_rate: float, warmup_steps: int | None, step: int) -> float:
    """The learning rate after `step` finished steps: constant, after a linear rise if any."""
    if not warmup_steps:
        return learning_rate
    return learning_rate * min(1.0, (step + 1) / warmup_steps)


class Times(NamedTuple):
    """A microbatch's times, [B] each: s = l = t for flow matching, s <= l < t for consistency."""

    t: Tensor
    l: Tensor  # noqa: E741 - the paper's letter
    s: Tensor


def logit_normal_times(
    num_flow_matching: int,
    num_consistency: int,
    gap_fraction: float,
    mean: Sequence[float],
    std: Sequence[float],
    source: Callable[[str], torch.Generator],
) -> Times:
    """Logit-normal times, on the CPU: those of flow matching first, then those of consistency.

    `mean` and `std` are of flow matching's t, consistency's s and consistency's t. `source` gives
    the generator of a purpose, which is always the same for the same step.
    """

    def draw(purpose: str, count: int, index: int) -> Tensor:
        normal = torch.randn(count, generator=source(purpose))
        return torch.sigmoid(std[index] * normal + mean[index])

    flow_matching_t = draw("flow matching t", num_flow_matching, 0)
    drawn_s = draw("consistency s", num_consistency, 1)
    drawn_t = draw("consistency t", num_consistency, 2)
    consistency = consistency_times(drawn_t, drawn_s, gap_fraction)
    return Times(*(torch.cat([flow_matching_t, times]) for times in consistency))


def consistency_times(drawn_t: Tensor, drawn_s: Tensor, ratio: float) -> Times:
    """Ordered times made of two independent draws in (0, 1) and the gap fraction r, [B] each."""
    t = drawn_t.clamp(min=MIN_TIME_GAP)
    s = torch.minimum(drawn_s, t - MIN_TIME_GAP)
    between = torch.minimum(t + (s - t) * ratio, t - MIN_TIME_GAP)
    return Times(t, between, s)


# How a microbatch's t, l and s are drawn: `time_sampling` in a config.
TIME_SAMPLING: dict[str, Callable[..., Times]] = {"LogitNormal": logit_normal_times}
