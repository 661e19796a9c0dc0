"""The steps that SoFlow's step is compared with, all around the same network."""

from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial

from measuring import ROOT  # noqa: F401 - first: it finds the rest
from torch import nn

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
        return super().forward(divide(batch, len(batch.t)))


class MeanFlow(arena.MeanFlow):
    """The arena's, with the derivative of all rows, also where s = t (its paper's algorithm 1)."""

    def forward(self, batch: Batch) -> StepTerms:
        return super().forward(divide(batch, 0))


def divide(batch: Batch, flow_matching_rows: int) -> Batch:
    """The same rows, so many of them for flow matching; the batch is the global one."""
    return replace(
        batch,
        flow_matching_rows=flow_matching_rows,
        global_flow_matching_count=flow_matching_rows,
        global_consistency_count=len(batch.t) - flow_matching_rows,
    )


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
