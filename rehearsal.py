"""A few steps of a run on made-up data: what they take on this machine, before it starts."""

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from learner import Learner
from models import Batch
from soflow.budget import size, state_bytes
from soflow.config import Config
from soflow.data import SOURCES, DataSpec, RawBatch, TrainingData, count_classes
from soflow.files import UserError
from soflow.hardware import free_memory_bytes, is_out_of_memory, limit_memory
from soflow.latents import MOMENT_CHANNELS
from soflow.logbook import device_name, duration, peak_memory_gb
from soflow.vae import draw_latents

TIMED_STEPS = 3
LONG_SECONDS = 60  # beyond that, a user wants to know what they are waiting for
FORWARDS = 4.4  # that a step takes, of each sample


class MadeUpData(TrainingData):
    """As many grey samples as a part of the batch, in the shapes of a config's data set."""

    def __init__(self, config: Config, num_examples: int):
        names = tuple(map(str, range(count_classes(config))))
        channels = SOURCES[config.dataset_type].channels
        spec = DataSpec(channels, config.data_size, names, num_examples)
        super().__init__(spec, torch.arange(num_examples) % len(names))
        self.is_latent = config.is_latent

    def stored(self, indices: list[int]) -> Tensor:
        """Zeros, [B, ...], as the data set itself is stored."""
        side = (self.spec.size, self.spec.size)
        if self.is_latent:
            return torch.zeros(len(indices), MOMENT_CHANNELS, *side)
        return torch.zeros(len(indices), self.spec.channels, *side, dtype=torch.uint8)

    def clean(self, stored: Tensor, source: torch.Generator) -> Tensor:
        """x_0, made of it by the same work."""
        return draw_latents(stored, source) if self.is_latent else super().clean(stored, source)

    def whole(self) -> RawBatch:
        """All of it."""
        return self[list(range(len(self)))]


def rehearse(
    learner: Learner, data: MadeUpData, batches: Callable[[], Iterator[Batch]]
) -> Iterator[str]:
    """Take a few steps; gives each line on them as soon as it is known.

    `batches` draws this process's parts of the next global batch, of `data`.
    """
    config, device = learner.config, learner.processes.device

    def step() -> float:
        """Seconds of one."""
        started = time.monotonic()
        learner.step(batches())
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        return time.monotonic() - started

    yield f"timing {TIMED_STEPS} steps on {device_name(device)}, after one to warm up"
    if device.type == "cpu" and (guess := guessed_seconds(learner, data)) > LONG_SECONDS:
        yield f"each may take {duration(guess)}, going by one sample; Ctrl-C ends this here"
    first = step()
    waiting = ""
    if first > LONG_SECONDS:
        waiting = (
            f"; the others take about {duration(TIMED_STEPS * first)}, and {config.total_steps:,} "
            f"about {duration(config.total_steps * first)}; Ctrl-C ends this here"
        )
    yield f"first step: {first:.3g} s{waiting}"
    seconds = [step() for _ in range(TIMED_STEPS)]
    learner.refuse_non_finite()
    middle = statistics.median(seconds)
    yield (
        f"time: {middle:.3g} s a step ({min(seconds):.3g} to {max(seconds):.3g}), "
        f"{config.batch_size / middle:.1f} images/s; {config.total_steps:,} steps take "
        f"{duration(config.total_steps * middle)}, without loading data, demos, evals and saving"
    )
    yield (
        f"memory: {peak_memory_gb(device):.3g} GB at most in this process; weights, their average, "
        f"gradients and optimizer state are {size(state_bytes(learner.state.model))} of it"
    )


@torch.inference_mode()
def guessed_seconds(learner: Learner, data: MadeUpData) -> float:
    """What a step may take on the CPU, by a forward pass of one sample."""
    x, t = torch.zeros(1, *data.spec.shape), torch.ones(1)
    labels = data.labels[:1] if learner.config.is_conditional else None
    seconds = []
    for _ in range(2):  # the first one warms up
        started = time.monotonic()
        learner.state.ema_model.solution(x, t, 0 * t, labels)
        seconds.append(time.monotonic() - started)
    return FORWARDS * min(seconds) * len(data) * learner.plan.accumulation_steps


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
