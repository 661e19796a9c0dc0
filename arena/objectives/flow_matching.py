"""Flow matching (Lipman et al. 2023, arXiv 2210.02747): the velocity, sampled in many steps.

    loss = |v(x_t, t) - v_t|^2

The network gets a gap of 0. Guidance (Ho & Salimans, arXiv 2207.12598) acts at sampling:

    v_w(x, t) = v(x, t | none) + w (v(x, t | label) - v(x, t | none))
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from models import Batch, Method, StepTerms, sample_mean, widen

# B batch, C channels, H = W side


class FlowMatching(Method):
    """Trained on the rows for flow matching; a jump is a step of Euler's method."""

    sampler = "chain"
    cfg_scale = 1.0

    def configure(self, settings: Mapping[str, Any]) -> None:
        self.cfg_scale = settings["cfg_scale"]

    def forward(self, batch: Batch) -> StepTerms:
        vel, _ = self.drop_labels(batch).parts()
        x_t, v_t = self.interpolate(vel.x_0, vel.x_1, vel.t)
        velocity = self.evaluate(x_t, vel.t, vel.t, vel.labels)
        error = sample_mean((velocity - v_t).square())
        loss = error.sum() / batch.global_flow_matching_count
        return StepTerms(loss, {"Vel_MSE": loss.detach()})

    def jump(self, x_t: Tensor, t: Tensor, s: Tensor, labels: Tensor | None) -> Tensor:
        if self.cfg_scale == 1 or labels is None:
            velocity = self.evaluate(x_t, t, t, labels)
        else:
            both = torch.cat([labels, self.null_labels(labels)])
            x_2, t_2 = torch.cat([x_t, x_t]), torch.cat([t, t])
            label, null = self.evaluate(x_2, t_2, t_2, both).chunk(2)
            velocity = null + self.cfg_scale * (label - null)
        return x_t + widen(s - t, x_t) * velocity
