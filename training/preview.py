"""What a run would be and take, before it starts: by arithmetic, and by timing a few steps.

Here, or on GPUs that are elsewhere: of those all is an estimate, and every line says so.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from config import Config, as_yaml, load_config
from training.held_out import forwards
from models import BACKBONES, Batch, Method, Samples, backbone_of, build_model
from passes import set_options
from schedules import consistency_times
from support.data.batches import BatchPlan
from support.data.datasets import DATASETS, count_classes
from support.data.vae import PIXELS_PER_LATENT
from support.runs.budget import (
    checkpoint_bytes,
    count_parameters,
    describe_needs,
    gradient_bytes,
    state_bytes,
    weight_bytes,
)
from support.runs.counting import Counts, count
from support.runs.gpus import Gpu, Measurements, find_gpu
from support.runs.rehearsal import Rehearsal
from support.runs.scaling import Estimate, Workload, with_measured_memory
from support.system.command import ROOT, is_first_process
from support.system.files import UserError
from support.system.processes import world_size_asked_for

if TYPE_CHECKING:
    from train import Run

FORWARDS = 4.4  # of a sample that a step takes, about
COUNTED_IMAGES = 40  # whose counts stand for any batch's


def describe(config: Config, gpus: int | None = None, gpu: str | None = None) -> None:
    """Print what a run would be and need, without device or files; also on GPUs of that kind."""
    elsewhere = find_elsewhere(config, gpus, gpu)
    dataset, model = DATASETS[config.dataset_type], hollow_model(config, "meta")
    pixels = dataset.channels * config.data_size**2
    if dataset.is_latent:
        pixels = 3 * (PIXELS_PER_LATENT * config.data_size) ** 2
    say(as_yaml(config).rstrip())
    say(f"# model: {config.model_type}, {count_parameters(model)}")
    plan, eval_bytes = config.batch_plan(world_size_asked_for()), config.eval_num_samples * pixels
    averages = (config.num_averages, len(config.ema_power))
    for line in describe_needs(model, plan, config.result_schedule(), eval_bytes, *averages):
        say(f"# {line}")
    if config.held_out and config.held_out_steps:
        share = forwards(config) / (FORWARDS * config.batch_size * config.held_out_steps)
        say(
            f"# held-out loss: {config.held_out} images every {config.held_out_steps} steps, about "
            f"{100 * share:.2g} % of the run's computing"
        )
    if elsewhere:
        for line in estimate_elsewhere(config, model, *elsewhere).lines():
            say(f"# estimate: {line}")


def time_steps(run: Run, step: Callable[[], object]) -> None:
    """Print what steps of a run on made-up data take here."""
    config, learner = run.config, run.learner
    rehearsal = Rehearsal(
        step,
        lambda: guessed_seconds(run),
        run.processes.device,
        config.total_steps,
        config.batch_size,
        state_bytes(learner.state.model, config.num_averages),
    )
    for line in itertools.chain(run.notes, rehearsal.run()):
        say(f"# {line}")
    learner.guard.refuse()


@torch.inference_mode()
def guessed_seconds(run: Run) -> float:
    """What a step may take on the CPU, by forward passes of one sample; the first warms up."""
    x, t = torch.zeros(1, *run.data.spec.shape), torch.ones(1)
    labels = run.data.labels[:1] if run.config.is_conditional else None
    for _ in range(2):
        started = time.monotonic()
        run.learner.state.ema_model.jump(x, t, 0 * t, labels)
        seconds = time.monotonic() - started
    return FORWARDS * len(run.data) * run.learner.plan.accumulation_steps * seconds


def hollow_model(config: Config, device: str) -> Method:
    """The model that a config asks for, on a device without contents."""
    num_classes = count_classes(config.data_request())
    with torch.device(device):
        model = build_model(
            **config.model_arguments(DATASETS[config.dataset_type].channels, num_classes)
        )
    model.configure(config.to_dict())
    return model


def say(text: str) -> None:
    """Print, once for all processes, before what follows takes its time."""
    if is_first_process():
        print(text, flush=True)


# On GPUs that are elsewhere


def find_elsewhere(
    config: Config, gpus: int | None, gpu: str | None
) -> tuple[BatchPlan, Gpu, Measurements | None] | None:
    """How the batch is cut over the GPUs that are asked for, and what is known of them."""
    if gpus is None and gpu is None:
        return None
    if gpus is None or gpu is None:
        raise UserError("--gpus and --gpu: give both, how many and of what kind")
    if gpus < 1:
        raise UserError(f"--gpus {gpus}: must be 1 or more")
    found = find_gpu(gpu)
    try:
        return config.batch_plan(gpus), *found
    except UserError as error:
        raise UserError(f"--gpus {gpus}: {error}") from None


def estimate_elsewhere(
    config: Config, model: Method, plan: BatchPlan, gpu: Gpu, measured: Measurements | None
) -> Estimate:
    """What the run takes on these GPUs; the model may be on the meta device."""
    counts = {key: count_step(config, key) for key in (False, True)}
    flops, backward_share = step_flops(config, counts[config.activation_checkpointing])
    work = Workload(
        plan=plan,
        flops=flops,
        backward_share=backward_share,
        kernels=counts[config.activation_checkpointing].kernels,
        image_bytes={key: found.kept_bytes / COUNTED_IMAGES for key, found in counts.items()},
        is_checkpointing=config.activation_checkpointing,
        weight_bytes=weight_bytes(model),
        gradient_bytes=gradient_bytes(model),
        state_bytes=state_bytes(model, config.num_averages),
        checkpoint_bytes=checkpoint_bytes(model, config.num_averages),
        saves=len(config.result_schedule().steps("ckpts")),
        total_steps=config.total_steps,
    )
    if measured is None:
        return Estimate.by_figures(work, gpu)
    work = with_measured_memory(work, measured, config.model_type)
    return estimate_by_measurements(config, work, gpu, measured)


def count_step(config: Config, is_checkpointing: bool) -> Counts:
    """What a step of COUNTED_IMAGES takes that drops no label, its optimizer left out."""
    # Fake tensors pass for the CPU's, and attention then runs fused, which keeps less.
    with FakeTensorMode():
        model = hollow_model(config, "cpu")
        options = (config.precision, False, is_checkpointing)  # uncompiled: it counts operations
        model.execution, _ = set_options(model.network, torch.device("cpu"), *options)
        batch = hollow_batch(config)
        return count(lambda: model(batch).loss, model.parameters())


def step_flops(config: Config, counts: Counts) -> tuple[dict[str, float], float]:
    """FLOPs of an image in a step, by precision, and the share of the backward pass.

    Guidance passes are for the samples that keep their label alone.
    """
    unguided = config.model_copy(update={"cfg_scale": 1.0})
    plain = count_step(unguided, False).forward_flops if config.cfg_scale > 1 else None
    full = "fp32" if config.precision == "fp32" else "tf32"
    names = {torch.float32: full, torch.bfloat16: "bf16"}
    flops, backward = {}, sum(counts.backward_flops.values())
    for dtype, forward in counts.forward_flops.items():
        dropped = config.cfg_drop_rate * (forward - plain[dtype]) if plain else 0
        total = forward - dropped + counts.backward_flops[dtype]
        flops[names[dtype]] = total / COUNTED_IMAGES
    return flops, backward / COUNTED_IMAGES / sum(flops.values())


def estimate_by_measurements(
    config: Config, work: Workload, gpu: Gpu, measured: Measurements
) -> Estimate:
    """By the measured step that is most like this one; by the GPU's figures where there is none."""
    for is_compiled in (True, False) if config.compile else (False,):
        rows = {
            model_type: seconds
            for model_type, seconds in measured.step_seconds(config.precision, is_compiled).items()
            if any(backbone.recognises(model_type) for backbone in BACKBONES.values())
        }
        if rows:
            break
    else:
        reason = f"{measured.source} has no step in {config.precision}; so by "
        return Estimate.by_figures(work, gpu, reason)
    ours = backbone_of(config.model_type)
    nearest = min(rows, key=lambda name: (name != config.model_type, backbone_of(name) is not ours))
    published = published_config(nearest, config.precision)
    measured_flops, _ = step_flops(published, count_step(published, False))
    ratio = sum(work.flops.values()) / sum(measured_flops.values())
    row = f"{nearest} {config.precision}" + " compiled" * is_compiled
    scaled = "" if abs(ratio - 1) < 0.001 else f", times {ratio:.3g} for the FLOPs"
    source = f"what {measured.source} has of {row} on {measured.device}{scaled}"
    return Estimate(work, gpu, rows[nearest] * ratio, 0.0, source)


def published_config(model_type: str, precision: str) -> Config:
    """The recipe that benchmarks take for a network."""
    name = "imagenet" if backbone_of(model_type).is_conditional else "cifar"
    settings = (f"model_type={model_type}", f"precision={precision}")
    return load_config(ROOT / "configs" / f"{name}.yaml", settings)


def hollow_batch(config: Config) -> Batch:
    """COUNTED_IMAGES in a batch without contents."""
    V = round(COUNTED_IMAGES * config.velocity_loss_ratio)

    def samples(count: int) -> Samples:
        x = torch.empty(count, DATASETS[config.dataset_type].channels, *[config.data_size] * 2)
        labels = torch.empty(count, dtype=torch.int64) if config.is_conditional else None
        return Samples(x, x, labels, dropout_seed=1)

    t = torch.empty(COUNTED_IMAGES)
    times = consistency_times(t[V:], t[V:], ratio=0.1)
    return Batch(samples(V), t[:V], samples(COUNTED_IMAGES - V), times, V, COUNTED_IMAGES - V)
