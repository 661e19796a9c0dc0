"""Trackers that a run sends its numbers to (`log_to`): TensorBoard, Weights & Biases, Trackio.

Each is a thin adapter of the library's own client, which is imported when it is used.
"""

import importlib.util
import sys
import types
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from support.system.files import UserError, atomic_write

PROJECT = "soflow"


class Tracker(NamedTuple):
    """A run of a tracker: what sends it the numbers of a step, and what ends it."""

    add: Callable[[int, Mapping[str, float]], object]
    close: Callable[[], object]


def tensorboard(folder: Path, run_id: str, settings: Mapping[str, Any], step: int) -> Tracker:
    """Event files in the run's folder tensorboard/."""
    # This module keeps TensorBoard from importing TensorFlow, which takes seconds and memory.
    sys.modules.setdefault("tensorboard.compat.notf", types.ModuleType("notf"))
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def add(step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)

    return Tracker(add, writer.close)


def weights_and_biases(
    folder: Path, run_id: str, settings: Mapping[str, Any], step: int
) -> Tracker:
    """A run of wandb; its own settings decide whether it is online."""
    import wandb

    run = wandb.init(
        project=PROJECT,
        id=run_id,
        name=folder.name,
        resume="allow",
        dir=str(folder),
        config=dict(settings),
        settings=wandb.Settings(quiet=True),
    )
    return Tracker(lambda step, numbers: run.log(dict(numbers), step=step), run.finish)


def trackio(folder: Path, run_id: str, settings: Mapping[str, Any], step: int) -> Tracker:
    """A run of trackio, in its own folder (TRACKIO_DIR)."""
    import trackio

    name = f"{folder.name}-{run_id}"
    run = trackio.init(PROJECT, name=name, resume="allow", config=dict(settings))
    return Tracker(lambda step, numbers: run.log(dict(numbers), step=step), run.finish)


# Each continues the run of a folder and an identity after a step; it keeps the config's values.
TRACKERS: dict[str, Callable[[Path, str, Mapping[str, Any], int], Tracker]] = {
    "tensorboard": tensorboard,
    "wandb": weights_and_biases,
    "trackio": trackio,
}


def check_installed(names: Sequence[str]) -> None:
    """UserError where a tracker's package, of the same name, is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"log_to: {name} is not installed; pip install {name}")


class Trackers:
    """The trackers of one run. One that fails is reported once and dropped; training goes on."""

    def __init__(self, report: Callable[[str], None]):
        self._report = report
        self._open: dict[str, Tracker] = {}

    def open(
        self, names: Sequence[str], folder: Path, settings: Mapping[str, Any], step: int
    ) -> None:
        """Start, or continue the same runs after `step`."""
        for name in names:
            opened = self._attempt(name, TRACKERS[name], folder, run_id(folder), settings, step)
            if opened is not None:
                self._open[name] = opened

    def add(self, step: int, numbers: Mapping[str, float]) -> None:
        """Send the numbers of a step to all of them."""
        for name, tracker in list(self._open.items()):
            self._attempt(name, tracker.add, step, numbers)

    def close(self) -> None:
        """Close all of them."""
        for name, tracker in list(self._open.items()):
            self._attempt(name, tracker.close)

    def _attempt(self, name: str, act: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return act(*arguments)
        except Exception as error:  # any of a library's, and of the network's
            self._open.pop(name, None)
            self._report(f"log_to: {name} failed and is dropped ({type(error).__name__}: {error})")
            return None


def run_id(folder: Path) -> str:
    """The identity of a run for trackers, made once and kept in its folder."""
    path = folder / "run_id"
    if not path.exists():
        with atomic_write(path) as file:
            file.write(uuid.uuid4().hex[:8].encode())
    return path.read_text().strip()
