"""Shortcut models (Frans et al. 2025, arXiv 2410.12557): one step equals two half steps.

F(x, t, s) is the paper's s(x, t, d), the velocity over a step of d = t - s; at d = 0 it is the
instantaneous velocity. Most of the batch trains flow matching, the rest self-consistency, here in
our direction of time:

    |F(x_t, t, t) - v_t|^2
    |F(x_t, t, t - 2d) - stopgrad(F_1 + F_2) / 2|^2
        F_1 = F(x_t, t, t - d),  x' = x_t - d F_1,  F_2 = F(x', t - d, t - 2d)

2d is one of 1, 1/2, ..., 1/64 with equal probability, and t a multiple of it. The network gets the
smallest d = 1/128 as d = 0. Guidance acts there alone, since larger steps learn from it:

    F_w = F(. | none) + w (F(. | label) - F(. | none))

The paper's targets come from an EMA of the weights. Here they come from the weights themselves: in
the arena's few training steps an EMA lags too far behind for the longest steps, which learn from it
through seven halvings (docs/arena.md).
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from models import Batch, Method, StepTerms, sample_mean, widen

# B batch, C channels, H = W side

SMALLEST = 128  # steps of the finest grid


class Shortcut(Method):
    """Rows for consistency train self-consistency, at times of their own."""

    sampler = "chain"
    cfg_scale = 1.0

    def configure(self, settings: Mapping[str, Any]) -> None:
        self.cfg_scale = settings["cfg_scale"]

    def forward(self, batch: Batch) -> StepTerms:
        vel, con = self.drop_labels(batch).parts()
        x_t, v_t = self.interpolate(vel.x_0, vel.x_1, vel.t)
        F = self.evaluate(x_t, vel.t, vel.t, vel.labels)
        velocity = sample_mean((F - v_t).square())
        consistency = self.self_consistency(con, *draw_steps(con))
        counts = (batch.global_flow_matching_count, batch.global_consistency_count)
        metrics = {
            "Vel_MSE": velocity.detach().sum() / max(counts[0], 1),
            "Self_MSE": consistency.detach().sum() / max(counts[1], 1),
        }
        return StepTerms((velocity.sum() + consistency.sum()) / sum(counts), metrics)

    def self_consistency(self, batch: Batch, t: Tensor, d: Tensor) -> Tensor:
        """The squared error of each row, [B], over a step of 2d from t."""
        x_t, _ = self.interpolate(batch.x_0, batch.x_1, t)
        labels = batch.labels
        with torch.no_grad():
            F_1 = self.guided(x_t, t, d, labels)
            F_2 = self.guided(x_t - widen(d, x_t) * F_1, t - d, d, labels)
        return sample_mean((self.ask(x_t, t, 2 * d, labels) - (F_1 + F_2) / 2).square())

    def guided(self, x: Tensor, t: Tensor, d: Tensor, labels: Tensor | None) -> Tensor:
        """F over the step d; the smallest d counts as 0, with guidance."""
        is_finest = d <= 1 / SMALLEST
        asked = torch.where(is_finest, torch.zeros_like(d), d)
        if self.cfg_scale == 1 or labels is None:
            return self.ask(x, t, asked, labels)
        both = torch.cat([labels, self.null_labels(labels)])
        x_2, t_2, asked_2 = (torch.cat([one, one]) for one in (x, t, asked))
        label, null = self.ask(x_2, t_2, asked_2, both).chunk(2)
        return torch.where(widen(is_finest, x), null + self.cfg_scale * (label - null), label)

    def ask(self, x: Tensor, t: Tensor, d: Tensor, labels: Tensor | None) -> Tensor:
        return self.evaluate(x, t, t - d, labels)

    def jump(self, x_t: Tensor, t: Tensor, s: Tensor, labels: Tensor | None) -> Tensor:
        # x_s = x_t - d F(x_t, t, s)
        return x_t - widen(t - s, x_t) * self.ask(x_t, t, t - s, labels)


def draw_steps(batch: Batch) -> tuple[Tensor, Tensor]:
    """t and d, [B] each, from the microbatch's seed for dropout masks."""
    source = torch.Generator().manual_seed(batch.dropout_seeds[1])
    count = len(batch.x_0)
    levels = SMALLEST.bit_length() - 1  # 2d = 1, 1/2, ..., 2 / SMALLEST
    step = 0.5 ** torch.randint(levels, (count,), generator=source)
    t = step * (1 + (torch.rand(count, generator=source) / step).floor())
    return t.to(batch.x_0), (step / 2).to(batch.x_0)
