"""A run's numbers by name: their means, metrics.jsonl, and the trackers."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from support.runs.trackers import Trackers
from support.system.files import append_line, atomic_write, reporting_os_errors
from support.system.processes import Processes

METRICS_FILE = "metrics.jsonl"
HELD_OUT_FILE = "held_out.jsonl"


class Interval:
    """Sums of metrics between two log lines; they stay on the device until `close`."""

    def __init__(self):
        self._sums: dict[str, torch.Tensor] = {}  # this process's share
        self._steps = 0
        self.start_clock()

    def start_clock(self) -> None:
        """Count the seconds from here: setting up is not training."""
        self._started = time.monotonic()

    def add(self, metrics: Mapping[str, torch.Tensor]) -> None:
        """Add one step's metrics, by name."""
        for name, value in metrics.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._steps += 1

    def close(self, processes: Processes) -> tuple[dict[str, float], float, int]:
        """The metrics, summed over processes and averaged over steps; the seconds; the steps."""
        sums = processes.sum_over_ranks(torch.stack([*self._sums.values()]))
        means = dict(zip(self._sums, (sums / self._steps).tolist(), strict=True))
        return means, time.monotonic() - self._started, self._steps

    def state_dict(self, processes: Processes) -> dict[str, Any]:
        """The sums of each process, from which a continued run goes on exactly."""
        sums = [sum_.item() for sum_ in self._sums.values()]
        return {"names": [*self._sums], "sums": processes.gather(sums), "steps": self._steps}

    def load_state_dict(self, state: Mapping[str, Any], processes: Processes) -> None:
        """Continue a checkpoint's sums; with another number of processes, rank 0 takes all."""
        shares = state["sums"]
        if len(shares) != processes.world_size:
            total = [sum(values) for values in zip(*shares, strict=True)]
            shares = [total, *[[0.0] * len(total)] * (processes.world_size - 1)]
        sums = torch.tensor(shares[processes.rank], device=processes.device)
        self._sums = dict(zip(state["names"], sums, strict=True))
        self._steps = state["steps"]


class Metrics:
    """Writes each log line's numbers, by name, to files and trackers; on rank 0 only."""

    def __init__(self, folder: Path, is_main: bool, report: Callable[[str], None]):
        self._folder, self._is_main = folder, is_main
        self._trackers = Trackers(report)

    def open(self, log_to: Sequence[str], settings: Mapping[str, Any], step: int) -> None:
        """Start after `step`, from whose checkpoint the run continues: later lines are cut."""
        if self._is_main:
            for name in (METRICS_FILE, HELD_OUT_FILE):
                cut_after(self._folder / name, step)
            self._trackers.open(log_to, self._folder, settings, step)

    def add(self, step: int, numbers: Mapping[str, float]) -> None:
        """Write a line of metrics.jsonl, and give the trackers the same numbers."""
        if not self._is_main:
            return
        now = datetime.now(UTC).isoformat(timespec="seconds")
        append_numbers(self._folder / METRICS_FILE, {"step": step, **numbers, "Time": now})
        self._trackers.add(step, numbers)

    def add_held_out(self, step: int, errors: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
        """Write a line of held_out.jsonl: a number for each set of weights, loss and bin."""
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

    def close(self) -> None:
        """Close the trackers."""
        self._trackers.close()


def append_numbers(path: Path, numbers: Mapping[str, Any]) -> None:
    """Append a line of `numbers`, `step` among them; a number that is not finite becomes null."""
    # `json` writes NaN and Infinity, which are no JSON, and passes them to `parse_constant`.
    finite = json.loads(json.dumps(numbers), parse_constant=lambda constant: None)
    append_line(path, json.dumps(finite))


def cut_after(path: Path, step: int) -> None:
    """Cut the lines later than `step` from a file of numbers, atomically.

    Lines are in the order of their steps. A last line without its end, left by a kill, goes too.
    """
    if not path.exists():
        return
    with reporting_os_errors(f"{path}: cannot be read"):
        content = path.read_bytes()
    end = 0
    for line in content.splitlines(keepends=True):
        if not line.endswith(b"\n") or _step_of(line) > step:
            break
        end += len(line)
    if end < len(content):
        with atomic_write(path) as file:
            file.write(content[:end])


def _step_of(line: bytes) -> float:
    """The step of a line; -1 if it cannot be read: it stays, and its reader reports it."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError, RecursionError):
        return -1
