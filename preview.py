"""What a run would be and take, before it starts: by arithmetic, and by timing a few steps."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from config import Config, as_yaml
from models import build_model
from support.data.datasets import DATASETS, count_classes
from support.data.vae import PIXELS_PER_LATENT
from support.runs.budget import count_parameters, describe_needs, state_bytes
from support.runs.rehearsal import Rehearsal
from support.system.command import is_first_process
from support.system.processes import world_size_asked_for

if TYPE_CHECKING:
    from train import Run

FORWARDS = 4.4  # of a sample that a step takes, about


def describe(config: Config) -> None:
    """Print what a run would be and need, without device or files."""
    dataset = DATASETS[config.dataset_type]
    num_classes = count_classes(config.data_request())
    with torch.device("meta"):
        model = build_model(**config.model_arguments(dataset.channels, num_classes))
    pixels = dataset.channels * config.data_size**2
    if dataset.is_latent:
        pixels = 3 * (PIXELS_PER_LATENT * config.data_size) ** 2
    say(as_yaml(config).rstrip())
    say(f"# model: {config.model_type}, {count_parameters(model)}")
    plan, eval_bytes = config.batch_plan(world_size_asked_for()), config.eval_num_samples * pixels
    for line in describe_needs(model, plan, config.result_schedule(), eval_bytes):
        say(f"# {line}")


def time_steps(run: Run, step: Callable[[], object]) -> None:
    """Print what steps of a run on made-up data take here."""
    config, learner = run.config, run.learner
    rehearsal = Rehearsal(
        step,
        lambda: seconds_of_a_forward(run),
        FORWARDS * len(run.data) * learner.plan.accumulation_steps,
        run.processes.device,
        config.total_steps,
        config.batch_size,
        state_bytes(learner.state.model),
    )
    for line in itertools.chain(run.notes, rehearsal.run()):
        say(f"# {line}")
    learner.guard.refuse()


@torch.inference_mode()
def seconds_of_a_forward(run: Run) -> float:
    """What one sample takes through the network, on the CPU."""
    x, t = torch.zeros(1, *run.data.spec.shape), torch.ones(1)
    labels = run.data.labels[:1] if run.config.is_conditional else None
    started = time.monotonic()
    run.learner.state.ema_model.jump(x, t, 0 * t, labels)
    return time.monotonic() - started


def say(text: str) -> None:
    """Print, once for all processes, before what follows takes its time."""
    if is_first_process():
        print(text, flush=True)
