"""The objectives of the arena, by name."""

import importlib.util
import sys

from arena.objectives.consistency_training import ConsistencyTraining
from arena.objectives.flow_matching import FlowMatching
from arena.objectives.mean_flow import MeanFlow
from arena.objectives.shortcut import Shortcut
from models import METHODS, SoFlow

OBJECTIVES = {
    "SoFlow": SoFlow,
    "MeanFlow": MeanFlow,
    "Shortcut": Shortcut,
    "ConsistencyTraining": ConsistencyTraining,
    "FlowMatching": FlowMatching,
}


def make_known(objective: str) -> str:
    """Let configs name an objective, one of these or a user's FILE.py:NAME; gives its name."""
    METHODS.update(OBJECTIVES)
    file, _, name = objective.rpartition(":")
    if file:
        spec = importlib.util.spec_from_file_location(f"{__name__}.of_users.{name}", file)
        assert spec and spec.loader, "a .py file"
        sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        METHODS[name] = getattr(module, name)
    return name
