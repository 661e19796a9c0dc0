"""A run's numbers by name: their means, metrics.jsonl, and what trackers are told of them."""

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from support.runs.trackers import Trackers
from support.system.files import UserError, append_line, atomic_write
from support.system.processes import Processes

METRICS_FILE = "metrics.jsonl"
HELD_OUT_FILE = "held_out.jsonl"


class Interval:
    """Sums of metrics between two log lines; they stay on the device until they are wanted."""

    def __init__(self):
        self._sums: dict[str, torch.Tensor] = {}  # this process's share
        self._steps = 0
        self.start_clock()

    def start_clock(self) -> None:
        """Let the seconds count from here: setting up is not training."""
        self._started = time.monotonic()

    def add(self, metrics: Mapping[str, torch.Tensor]) -> None:
        """Add one step's metrics, by name."""
        for name, value in metrics.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._steps += 1

    def close(self, processes: Processes) -> tuple[dict[str, float], float, int]:
        """Metrics summed over the processes and averaged over the steps, seconds, and the steps."""
        sums = processes.sum_over_ranks(torch.stack([*self._sums.values()]))
        means = dict(zip(self._sums, (sums / self._steps).tolist(), strict=True))
        return means, time.monotonic() - self._started, self._steps

    def state_dict(self, processes: Processes) -> dict[str, Any]:
        """What a checkpoint keeps between two log lines: by process, so that sums go on exactly."""
        sums = [sum_.item() for sum_ in self._sums.values()]
        return {"names": [*self._sums], "sums": processes.gather(sums), "steps": self._steps}

    def load_state_dict(self, state: Mapping[str, Any], processes: Processes) -> None:
        """Go on from a checkpoint's sums; of another number of processes, the first takes all."""
        shares = state["sums"]
        if len(shares) != processes.world_size:
            total = [sum(values) for values in zip(*shares, strict=True)]
            shares = [total, *[[0.0] * len(total)] * (processes.world_size - 1)]
        sums = torch.tensor(shares[processes.rank], device=processes.device)
        self._sums = dict(zip(state["names"], sums, strict=True))
        self._steps = state["steps"]


class Metrics:
    """Where the numbers of each line of metrics in the log go by name: files and trackers.

    Silent on all but the main process.
    """

    def __init__(
        self,
        folder: Path,
        batch_size: int,
        images_per_epoch: int,
        is_main: bool,
        report: Callable[[str], None],
    ):
        self._folder, self._is_main = folder, is_main
        self._batch_size, self._images_per_epoch = batch_size, images_per_epoch
        self._trackers = Trackers(report)

    def open(self, log_to: Sequence[str], settings: Mapping[str, Any], step: int) -> None:
        """Begin after `step`, of whose checkpoint the run goes on: what is later is cut."""
        if self._is_main:
            for name in (METRICS_FILE, HELD_OUT_FILE):
                cut_after(self._folder / name, step)
            self._trackers.open(log_to, self._folder, settings, step)

    def add(self, step: int, numbers: Mapping[str, float]) -> None:
        """One line of metrics.jsonl, and the same numbers for the trackers."""
        if not self._is_main:
            return
        images = step * self._batch_size
        numbers = {"epoch": images / self._images_per_epoch, "images": images, **numbers}
        now = datetime.now(UTC).isoformat(timespec="seconds")
        append_numbers(self._folder / METRICS_FILE, {"step": step, **numbers, "Time": now})
        self._trackers.add(step, numbers)

    def add_held_out(self, step: int, errors: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
        """One line of held_out.jsonl: for each set of weights and loss, a number for each bin."""
        if not self._is_main:
            return
        append_numbers(self._folder / HELD_OUT_FILE, {"step": step, **errors})
        named = {
            f"held_out/{whose}/{loss}/{place}": value
            for whose, losses in errors.items()
            for loss, bins in losses.items()
            for place, value in enumerate(bins)
        }
        self._trackers.add(step, named)

    @contextlib.contextmanager
    def closing(self) -> Iterator[None]:
        """A block at whose end, however it comes, trackers have what they were told."""
        try:
            yield
        finally:
            self._trackers.close()


def append_numbers(path: Path, numbers: Mapping[str, Any]) -> None:
    """Add a line; `numbers` has the `step` that it is of. A number that is not finite is null."""
    append_line(path, json.dumps(_finite(numbers), allow_nan=False))


def _finite(value: Any) -> Any:
    """The same with null for what JSON has no word for, however deep in lists and mappings."""
    if isinstance(value, Mapping):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def cut_after(path: Path, step: int) -> None:
    """Leave of a file of numbers what is not later than `step`, at once or not at all.

    Lines are in the order of their steps; one without its end, which a kill left, is cut, too.
    """
    if not path.exists():
        return
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    end = 0
    for line in content.splitlines(keepends=True):
        if not line.endswith(b"\n") or _step_of(line) > step:
            break
        end += len(line)
    if end < len(content):
        with atomic_write(path) as file:
            file.write(content[:end])


def _step_of(line: bytes) -> float:
    """The step of a line; before all others where it cannot be read: whoever reads it says so."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError, RecursionError):
        return -1
