"""MeanFlow (Geng et al. 2025, arXiv 2505.13447): the average velocity, by forward derivatives.

u(x, s, t) is the average velocity from t to s (their r): x_s = x_t - (t - s) u(x_t, s, t). It
equals SoFlow's network F with the Euler form. The paper's identity and loss:

    u = v - (t - s) du/dt,    du/dt = v d_x u + d_t u
    loss = |u - stopgrad(v~ - (t - s) du/dt)|^2,    weight 1 / (error + c)^p

v~ is v_t, or with guidance (omega = m w and kappa = 1 - m of our keys)

    v~ = omega v_t + kappa u(x_t, t, t | label) + (1 - omega - kappa) u(x_t, t, t | none)
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from models import Batch, Method, StepTerms, sample_mean, widen

# B batch, C channels, H = W side


class MeanFlow(Method):
    """Rows for flow matching have s = t, rows for consistency s < t.

    Where s = t the derivative is multiplied by 0, so it is not computed. This leaves the gradient
    alone and saves time, which keeps the comparison fair.
    """

    sampler = "chain"
    cfg_scale, mix_ratio, p, eps = 1.0, 1.0, 1.0, 0.01

    def configure(self, settings: Mapping[str, Any]) -> None:
        self.cfg_scale, self.mix_ratio = settings["cfg_scale"], settings["mix_ratio"]
        self.p, self.eps = settings["p"], settings["eps"]

    def forward(self, batch: Batch) -> StepTerms:
        vel, con = self.drop_labels(batch).parts()
        instant, average = self.errors(vel, is_instant=True), self.errors(con)
        total = batch.global_flow_matching_count + batch.global_consistency_count
        errors = torch.cat([instant, average])
        weight = 1 / (errors.detach() + self.eps) ** self.p
        metrics = {
            "Vel_MSE": instant.detach().sum() / max(batch.global_flow_matching_count, 1),
            "Avg_MSE": average.detach().sum() / max(batch.global_consistency_count, 1),
        }
        return StepTerms((weight * errors).sum() / total, metrics)

    def errors(self, batch: Batch, is_instant: bool = False) -> Tensor:
        """The squared error of each row, [B]; with `is_instant`, all have s = t."""
        t, s, labels = batch.t, batch.s, batch.labels
        if len(t) == 0:
            return t
        x_t, v_t = self.interpolate(batch.x_0, batch.x_1, t)
        v = self.guided_velocity(batch, x_t, v_t)
        if is_instant:
            u = self.evaluate(x_t, t, t, labels)
            return sample_mean((u - v).square())
        u, du_dt = self.with_derivative(x_t, s, t, v, labels)
        return sample_mean((u - (v - widen(t - s, x_t) * du_dt).detach()).square())

    def with_derivative(
        self, x_t: Tensor, s: Tensor, t: Tensor, v: Tensor, labels: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """u and du/dt along v, [B, C, H, W] each, by one forward-mode derivative."""
        conditions = {} if labels is None else {"labels": labels}

        def u(x: Tensor, s: Tensor, t: Tensor) -> Tensor:
            return self.network(x, t, t - s, **conditions)

        tangents = (v, torch.zeros_like(s), torch.ones_like(t))
        # Fused attention has no forward-mode derivative.
        with sdpa_kernel(SDPBackend.MATH):
            value, derivative, *_ = torch.func.jvp(u, (x_t, s, t), tangents)
        return value, derivative

    @torch.no_grad()
    def guided_velocity(self, batch: Batch, x_t: Tensor, v_t: Tensor) -> Tensor:
        """v~, [B, C, H, W]; v_t where the label is dropped."""
        if self.cfg_scale <= 1 or batch.labels is None:
            return v_t
        omega, kappa = self.mix_ratio * self.cfg_scale, 1 - self.mix_ratio
        both = torch.cat([batch.labels, self.null_labels(batch.labels)])
        x_2, t_2 = torch.cat([x_t, x_t]), torch.cat([batch.t, batch.t])
        label, null = self.evaluate(x_2, t_2, t_2, both).chunk(2)
        guided = omega * v_t + kappa * label + (1 - omega - kappa) * null
        if batch.null_mask is None:
            return guided
        return torch.where(widen(batch.null_mask.to(x_t.device), x_t), v_t, guided)

    def jump(self, x_t: Tensor, t: Tensor, s: Tensor, labels: Tensor | None) -> Tensor:
        u = self.evaluate(x_t, t, s, labels)
        # x_s = x_t - (t - s) u(x_t, s, t)
        return x_t - widen(t - s, x_t) * u
