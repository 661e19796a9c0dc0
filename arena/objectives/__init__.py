"""The objectives of the arena. Importing this package lets configs name them as their `method`."""

from arena.objectives.consistency_training import ConsistencyTraining
from arena.objectives.flow_matching import FlowMatching
from arena.objectives.mean_flow import MeanFlow
from arena.objectives.shortcut import Shortcut
from models import METHODS, SoFlow

COMPARED = (SoFlow, MeanFlow, Shortcut, ConsistencyTraining, FlowMatching)
OBJECTIVES = {kind.__name__: kind for kind in COMPARED}
METHODS.update(OBJECTIVES)
