"""What the sections share: their device and sizes, and tasks whose failure is a row."""

import gc
import itertools
import math
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

from measuring import ROOT, bench_config, bench_learner, drawn_batches, raw_batch

# isort: split
import torch

from support.system.files import shorten
from support.system.hardware import is_out_of_memory
from support.system.processes import Processes
from training.learner import Learner

Result = TypeVar("Result")

NEEDS_CUDA = "needs CUDA"
OUT_OF_TIME = "left out: time"
LEAST_BATCH = 4  # of which three samples go to flow matching, one to consistency
# Global batches to begin with; where one does not fit, half of it is tried.
BATCHES = {"DiT-B-4": 256, "DiT-XL-2": 64, "UNet": 128}
TINY_BATCHES = {"DiT-Nano-4": LEAST_BATCH}


class Skipped(Exception):  # noqa: N818 - no error
    """Why there is no value, where that is no failure."""


@dataclass(frozen=True)
class Row:
    """One value of the table, or why it is missing."""

    section: str
    name: str
    value: float | str | None
    unit: str = ""
    error: str | None = None


class Value(NamedTuple):
    """What a task has found; the error says why there is no value."""

    name: str
    value: float | str | None
    unit: str = ""
    error: str | None = None


class Task(NamedTuple):
    """Work that stands or falls together."""

    name: str
    work: Callable[[], Iterable[Value]]


@dataclass(eq=False)
class Bench:
    """Where a section runs, and how much it is to do."""

    processes: Processes
    is_tiny: bool
    folder: Path  # for temporary files
    task_deadline: float = 0.0  # by time.monotonic, of the task under way

    @property
    def device(self) -> torch.device:
        """What is measured."""
        return self.processes.device

    @property
    def batches(self) -> dict[str, int]:
        """Batch sizes by model type."""
        return TINY_BATCHES if self.is_tiny else BATCHES

    def learner(self, model_type: str, batch: int, *overrides: str) -> Learner:
        """A learner of the published recipe; Skipped where the device does without an option."""
        config = bench_config(model_type, batch, *overrides, device=self.device.type)
        with self.device:  # where the initial weights of the largest take a second, not ten
            return bench_learner(config, self.processes, refuse_to_go_without)

    def need_cuda(self) -> None:
        """Skipped unless the device is a GPU."""
        if self.device.type != "cuda":
            raise Skipped(NEEDS_CUDA)

    def on_cuda(self, name: str, value: Callable[[], float], unit: str) -> Value:
        """A value that only a GPU has."""
        if self.device.type != "cuda":
            return Value(name, None, unit, NEEDS_CUDA)
        return Value(name, value(), unit)

    def repeats(self, most: int) -> Iterator[int]:
        """0, 1, ... for as long as the task has time, once at least."""
        for index in range(most):
            yield index
            if time.monotonic() > self.task_deadline:
                return

    def run(self, section: str, tasks: list[Task], deadline: float) -> Iterator[list[Row]]:
        """The rows of each task, in turn."""
        for index, task in enumerate(tasks):
            left = deadline - time.monotonic()
            self.task_deadline = time.monotonic() + left / (len(tasks) - index)
            if left <= 0:
                yield [Row(section, task.name, None, error=OUT_OF_TIME)]
                continue
            yield list(rows_of(section, task))
            free_memory()


def rows_of(section: str, task: Task) -> Iterator[Row]:
    """What a task finds until it ends or fails."""
    try:
        for found in task.work():
            # JSON has no number for what is not finite.
            is_number = not isinstance(found.value, float) or math.isfinite(found.value)
            value = found.value if is_number else str(found.value)
            yield Row(section, found.name, value, found.unit, found.error)
    except Skipped as reason:
        yield Row(section, task.name, None, error=str(reason))
    except Exception as error:  # any kind: the rest of the table does not depend on it
        yield Row(section, task.name, None, error=describe(error))


def describe(error: Exception) -> str:
    """An error in one line, with the last place of ours that it came through."""
    ours = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename).is_relative_to(ROOT) and ".venv" not in frame.filename
    ]
    place = f" ({Path(ours[-1].filename).name}:{ours[-1].lineno})" if ours else ""
    return f"{type(error).__name__}: {shorten(error)[:300]}{place}"


def refuse_to_go_without(note: str) -> None:
    """Skipped for a note that an option is left out: its row would be another's."""
    if "goes on without" in note:
        raise Skipped(note)


def free_memory() -> None:
    """Give back what dead objects held."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def at_largest(batch: int, measure: Callable[[int], Result]) -> tuple[int, Result]:
    """The largest of batch, batch / 2, ... whose measure fits into memory, and the measure."""
    for halvings in itertools.count():
        size = batch >> halvings
        try:
            return size, measure(size)
        except Exception as error:
            if not is_out_of_memory(error) or size < 2 * LEAST_BATCH:
                raise
        free_memory()  # after the error, which holds what was measured
    raise AssertionError


def training_step(learner: Learner) -> Callable[[], object]:
    """The learner's next step on random data, to be called."""
    raw = raw_batch(learner)
    return lambda: learner.step(drawn_batches(learner, raw))


def plural(count: int, thing: str) -> str:
    """1 step, 2 steps."""
    return f"{count} {thing}" + ("s" if count != 1 else "")
