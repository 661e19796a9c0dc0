"""A few steps of a run on made-up data: what they take on this machine, before it starts."""

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from support.runs.budget import size
from support.runs.logbook import device_name, duration, peak_memory_gb
from support.system.files import UserError
from support.system.hardware import free_memory_bytes, is_out_of_memory, limit_memory

LEAST_STEPS, LEAST_SECONDS = 4, 10  # a process becomes faster for its first dozen of short steps
LONG_SECONDS = 60  # beyond that, a user wants to know what they are waiting for


@dataclass(frozen=True)
class Rehearsal:
    """Steps to be timed."""

    step: Callable[[], object]
    guessed_seconds: Callable[[], float]  # of a step, on the CPU
    device: torch.device
    total_steps: int
    batch_size: int  # over all processes
    state_bytes: int  # of weights, averages, gradients and optimizer

    def run(self) -> Iterator[str]:
        """Take a few steps; gives each line on them as soon as it is known."""
        yield (
            f"timing steps on {device_name(self.device)} for {LEAST_SECONDS} s, at least "
            f"{LEAST_STEPS}; the later half counts"
        )
        if self.device.type == "cpu" and (guess := self.guessed_seconds()) > LONG_SECONDS:
            yield f"each may take {duration(guess)}, going by one sample; Ctrl-C ends this here"
        first = self._seconds()
        waiting = ""
        if first > LONG_SECONDS:
            waiting = (
                f"; the others take about {duration((LEAST_STEPS - 1) * first)}, and "
                f"{self.total_steps:,} about {duration(self.total_steps * first)}; Ctrl-C ends "
                "this here"
            )
        yield f"first step: {first:.3g} s{waiting}"
        seconds = [first]
        while len(seconds) < LEAST_STEPS or sum(seconds) < LEAST_SECONDS:
            seconds.append(self._seconds())
        seconds = seconds[len(seconds) // 2 :]
        middle = statistics.median(seconds)
        yield (
            f"time: {middle:.3g} s a step ({min(seconds):.3g} to {max(seconds):.3g}), "
            f"{self.batch_size / middle:.1f} images/s; {self.total_steps:,} steps take "
            f"{duration(self.total_steps * middle)}, without loading data, demos, evals and saving"
        )
        yield (
            f"memory: {peak_memory_gb(self.device):.3g} GB at most in this process; weights, "
            f"their averages, gradients and optimizer state are {size(self.state_bytes)} of it"
        )

    def _seconds(self) -> float:
        """What one step takes."""
        started = time.monotonic()
        self.step()
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return time.monotonic() - started


@contextlib.contextmanager
def within_memory(device: torch.device) -> Iterator[None]:
    """A block in which it is a UserError to ask for more memory than the machine has free."""
    if device.type == "cpu":
        limit_memory()
    free = free_memory_bytes(device)
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            f"a step does not fit into the {size(free)} that are free on {device_name(device)}; "
            "more accumulation_steps, activation_checkpointing, a smaller batch_size or model_type "
            "take less"
        ) from error
