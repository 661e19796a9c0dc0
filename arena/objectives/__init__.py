"""The objectives of the arena by name; importing this makes them known to configs as `method`."""

import importlib.util
from pathlib import Path

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
METHODS.update(OBJECTIVES)


def add_objective(text: str) -> None:
    """Make a user's objective known, FILE.py:NAME: a class that derives from models.Method."""
    file, _, name = text.rpartition(":")
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    assert spec and spec.loader, "a .py file"
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    METHODS[name] = getattr(module, name)
