"""What a step of SoFlow is measured against, around the same network, as learners run it."""

from collections.abc import Callable
from dataclasses import asdict
from functools import partial

from measuring import ROOT  # noqa: F401 - first: it finds the rest
from torch import Tensor, nn

# isort: split
import arena.objectives as arena
from models import Batch, LossTerms, Method, SoFlow, StepTerms


class TwoLosses(SoFlow):
    """SoFlow with each loss on its own, in network calls of its own, as the published code does."""

    def losses(self, batch: Batch) -> tuple[LossTerms, LossTerms]:
        flow_matching, consistency = batch.parts()
        return super().losses(flow_matching)[0], super().losses(consistency)[1]


class FlowMatching(arena.FlowMatching):
    """The arena's, on all rows of the batch."""

    def forward(self, batch: Batch) -> StepTerms:
        batch = self.drop_labels(batch)
        x_t, v_t = self.interpolate(batch.x_0, batch.x_1, batch.t)
        return terms_of((self.velocity(x_t, batch.t, batch.labels) - v_t).square().mean())


class MeanFlow(arena.MeanFlow):
    """The arena's, with the derivative of all rows, also where s = t (its paper's algorithm 1)."""

    def forward(self, batch: Batch) -> StepTerms:
        errors = self.errors(self.drop_labels(batch))
        return terms_of((errors / (errors.detach() + self.eps) ** self.p).mean())


def terms_of(loss: Tensor) -> StepTerms:
    """The loss, with zeros for SoFlow's metrics: all steps then handle as many."""
    metrics = ("Vel_MSE", "Vel_Weight", "Con_MSE", "Con_Weight")
    return StepTerms(loss, dict(zip(metrics, loss.new_zeros(4), strict=True)))


def around(kind: type[Method], model: SoFlow) -> Method:
    """Another method on a SoFlow's network, with its path, solution form and settings."""
    method = kind(model.network)
    method.path, method.solution_form = model.path, model.solution_form
    method.execution = model.execution
    method.configure(asdict(model.objective))
    return method


STEPS: dict[str, Callable[[SoFlow], nn.Module]] = {
    "SoFlow": lambda model: model,
    "losses apart": partial(around, TwoLosses),
    "flow matching": partial(around, FlowMatching),
    "MeanFlow": partial(around, MeanFlow),
}
