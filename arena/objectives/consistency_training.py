"""Consistency training in the form of easy consistency tuning (Geng et al., arXiv 2406.14548).

f(x, t) = f(x, t, 0) predicts the data in one step. It is trained to give the same result at x_t and
at the point with the same data and noise at an earlier time l:

    loss = |f(x_t, t) - stopgrad f(x_l, l)|^2 / (t - l) / (|f_t - f_l|^2 + c^2)^(1/2)

The gap fraction (t - l) / t falls over training from 1, where this is regression to the data, to
near 0: our l_schedule in place of the paper's mapping function. With q = (f_t - f_l) / (t - l) and
c proportional to t - l, the loss is q^2 / (q^2 + eps)^(1/2): our adaptive loss weight with p = 1/2.
The paper trains without guidance and starts from a diffusion model; here training starts fresh.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from models import Batch, Method, StepTerms, sample_mean, solution_of, widen

# B batch, C channels, H = W side


class ConsistencyTraining(Method):
    """Trained on the rows for consistency; their s is not used."""

    p, eps = 0.5, 0.01

    def configure(self, settings: Mapping[str, Any]) -> None:
        self.p, self.eps = settings["p"], settings["eps"]

    def forward(self, batch: Batch) -> StepTerms:
        _, con = self.drop_labels(batch).parts()
        t, share = con.t, (con.t - con.l) / (con.t - con.s)
        l = t * (1 - share)  # noqa: E741
        # The same data and noise at both times.
        x_t, _ = self.interpolate(con.x_0, con.x_1, t)
        x_l, _ = self.interpolate(con.x_0, con.x_1, l)
        f_t = self.f(x_t, t, con.labels)
        with torch.no_grad():
            f_l = self.f(x_l, l, con.labels)
        q = (f_t - f_l) / widen(t - l, x_t)
        error = sample_mean(q.square())
        weight = 1 / (error.detach() + self.eps) ** self.p
        count = batch.global_consistency_count
        metrics = {"Con_MSE": error.detach().sum() / count}
        return StepTerms((weight * error).sum() / count, metrics)

    def f(self, x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        """f(x, t, 0), [B, C, H, W]."""
        zero = torch.zeros_like(t)
        F = self.evaluate(x, t, zero, labels)
        form = self.solution_form(t, zero)
        return solution_of(x, F, form.a, form.b)

    def jump(self, x_t: Tensor, t: Tensor, s: Tensor, labels: Tensor | None) -> Tensor:
        """x_s from the predicted data and the noise that x_t then contains."""
        x_0 = self.f(x_t, t, labels)
        alpha, beta, *_ = (widen(value, x_t) for value in self.path(t))
        x_1 = (x_t - alpha * x_0) / beta
        return self.interpolate(x_0, x_1, s)[0]
