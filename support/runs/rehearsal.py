"""Timing a few training steps on made-up data, before a run starts."""

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator

import torch

from support.runs.budget import size
from support.runs.logbook import device_name, duration, peak_memory_gb
from support.system.files import UserError
from support.system.hardware import free_memory_bytes, is_out_of_memory, limit_memory

LEAST_STEPS, LEAST_SECONDS = 4, 10  # a process becomes faster over its first dozen short steps


def time_steps(
    step: Callable[[], object], device: torch.device, total_steps: int, batch_size: int
) -> Iterator[str]:
    """Take a few steps; yields each line about them as soon as it is known."""

    yield (
        f"timing at least {LEAST_STEPS} steps and {LEAST_SECONDS} s on {device_name(device)}; the "
        "second half counts; Ctrl-C ends this"
    )
    seconds: list[float] = []
    while len(seconds) < LEAST_STEPS or sum(seconds) < LEAST_SECONDS:
        started = time.monotonic()
        step()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        seconds.append(time.monotonic() - started)
        if len(seconds) == 1:
            left = duration(max(LEAST_SECONDS, (LEAST_STEPS - 1) * seconds[0]))
            yield f"first step: {seconds[0]:.3g} s; the timing takes about {left} more"
    seconds = seconds[len(seconds) // 2 :]
    median = statistics.median(seconds)
    yield (
        f"time: {median:.3g} s a step ({min(seconds):.3g} to {max(seconds):.3g}), "
        f"{batch_size / median:.1f} images/s; {total_steps:,} steps take "
        f"{duration(total_steps * median)}, without loading data, demos, evals and saving"
    )
    yield f"measured memory: at most {peak_memory_gb(device):.3g} GB in this process"


@contextlib.contextmanager
def within_memory(device: torch.device) -> Iterator[None]:
    """A block in which running out of the machine's free memory is a UserError."""
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
            "more accumulation_steps, activation_checkpointing, or a smaller batch_size or "
            "model_type need less"
        ) from error
