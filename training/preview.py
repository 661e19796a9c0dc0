"""What a run needs, before it starts: estimated on any machine, or timed on this one."""

import itertools
import math

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from config import Config, as_yaml
from models import Method, build_model
from support.data.batches import BatchPlan
from support.data.datasets import MadeUpData, outline
from support.runs.budget import activation_bytes, count_parameters, describe_disk, describe_memory
from support.runs.rehearsal import time_steps, within_memory
from support.system.command import is_first_process
from support.system.processes import connected, world_size_asked_for
from training import scoring
from training.draws import draw_batch
from training.execution import set_options
from training.run import assemble_run, draw_batches

COUNTED_IMAGES = 40  # activations are counted for so many, and grow in proportion
# Images in an epoch of the data sets that are always the same; latents are taken for ImageNet's.
EPOCH_IMAGES = {"CIFAR10": 50_000, "Digits": 1_197, "FashionMNIST": 60_000, "Imagenet": 1_281_167}


def describe(config: Config) -> None:
    """Print the resolved config, and what the run needs. Opens no device and writes nothing."""
    model, averages = meta_model(config), 1 + len(config.further_averages())
    plan = config.batch_plan(world_size_asked_for())
    microbatch = plan.batch_size // plan.num_microbatches
    kept_bytes = activations_of(config, min(microbatch, COUNTED_IMAGES))
    kept_bytes *= microbatch / min(microbatch, COUNTED_IMAGES)
    say(as_yaml(config).rstrip())
    for line in (
        f"model: {config.model_type}, {count_parameters(model)}",
        f"batch: {plan}",
        describe_length(config),
        *describe_memory(model, averages, microbatch, kept_bytes),
        describe_disk(
            model, config.result_schedule(), eval_bytes(config), averages, len(config.ema_power)
        ),
        *scoring.describe(config),
    ):
        say(f"# {line}")


def rehearse(config: Config) -> None:
    """Time a few steps of the config here, on made-up data; nothing is written."""
    with (
        connected(config.device, config.timeout_minutes) as processes,
        within_memory(processes.device),
    ):
        plan = config.batch_plan(processes.world_size)
        data = MadeUpData(config.data_request(), plan.batch_size // plan.num_microbatches)
        run = assemble_run(config, processes, plan, data)
        loader = itertools.repeat(data.whole())

        def step() -> None:
            run.learner.step(draw_batches(run, loader))

        lines = time_steps(step, processes.device, config.total_steps, config.batch_size)
        for line in itertools.chain(run.notes, lines):
            say(f"# {line}")
        run.learner.guard.refuse()
        for line in scoring.time_scoring(config, processes.device):
            say(f"# {line}")


def describe_length(config: Config) -> str:
    """A line on the run's steps, images and, where the data set's size is known, epochs."""
    images = config.total_steps * config.batch_size
    line = f"length: {config.total_steps:,} steps, {images:,} images"
    if known := EPOCH_IMAGES.get(config.dataset_type):
        line += f", {images / known:,.1f} epochs of {config.dataset_type}'s {known:,}"
    return line


def eval_bytes(config: Config) -> int:
    """Bytes of the images of one eval."""
    return config.eval_num_samples * math.prod(outline(config.data_request()).image_shape)


def activations_of(config: Config, images: int) -> float:
    """Bytes that autograd keeps of a training loss on so many images, all with their labels."""
    unlabelled = config.model_copy(update={"cfg_drop_rate": 0.0})
    plan = BatchPlan(images, round(images * config.velocity_loss_ratio), 1, 1)
    cpu, data = torch.device("cpu"), MadeUpData(config.data_request(), images)
    batch = draw_batch(unlabelled, plan, data, data.whole(), 0, 0, cpu)
    # Fake tensors say that they are on the CPU. There attention runs fused, as on GPUs.
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = meta_model(config, "cpu")
        # Not compiled: operations are counted one by one.
        model.execution, _ = set_options(
            model.network, cpu, config.precision, False, config.activation_checkpointing
        )
        return activation_bytes(lambda: model(batch).loss, model.parameters())


def meta_model(config: Config, device: str = "meta") -> Method:
    """The model of a config, without contents: on the meta device, or of fake tensors."""
    seen = outline(config.data_request())
    with torch.device(device):
        model = build_model(**config.model_arguments(seen.channels, seen.num_classes))
    model.configure(config.to_dict())
    return model


def say(text: str) -> None:
    """Print at once, and only in the first process."""
    if is_first_process():
        print(text, flush=True)
