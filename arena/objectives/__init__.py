"""The objectives of the arena, by name."""

import importlib.util
from collections.abc import Iterable
from pathlib import Path

from arena.objectives.consistency_training import ConsistencyTraining
from arena.objectives.flow_matching import FlowMatching
from arena.objectives.mean_flow import MeanFlow
from arena.objectives.shortcut import Shortcut
from models import METHODS, Method, SoFlow

OBJECTIVES = {
    "SoFlow": SoFlow,
    "MeanFlow": MeanFlow,
    "Shortcut": Shortcut,
    "ConsistencyTraining": ConsistencyTraining,
    "FlowMatching": FlowMatching,
}


def make_known(added: Iterable[str] = ()) -> None:
    """Let configs name the objectives as their `method`, and those of users, each FILE.py:NAME."""
    METHODS.update(OBJECTIVES)
    for text in added:
        METHODS[text.rpartition(":")[2]] = read_objective(text)


def read_objective(text: str) -> type[Method]:
    """A user's objective, FILE.py:NAME: a class that derives from models.Method."""
    file, _, name = text.rpartition(":")
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    assert spec and spec.loader, "a .py file"
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)
