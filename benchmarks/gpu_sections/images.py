"""Images: how fast they are sampled, whether they are the CPU's, and how fast the VAE is."""

import copy
import functools
import itertools
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from measuring import NUM_CLASSES, ROOT, data_shape, in_turns
from PIL import Image

# isort: split
import torch
from torch import Tensor, nn

from gpu_sections.bench import LEAST_BATCH, Bench, Skipped, Task, Value, plural
from models import Method
from sampler import SampleRequest, sample, sample_pixels
from support.data.images import to_pixels
from support.data.vae import decode, encode
from support.system.hardware import allow_tf32
from support.system.randomness import PerImageStream

JUMPS = (1, 2)
# What stabilityai/sd-vae-ft-mse is, and one small enough for a test.
VAE_LEVELS, TINY_VAE_LEVELS = (128, 256, 512, 512), (8, 8, 8, 8)
VAE_BATCHES = {256: 32, 512: 8}


def no_decoder(x_0: Tensor) -> Tensor:
    """Three channels of latents in place of pictures."""
    return x_0[:, :3]


# Sampling


def sampling_tasks(bench: Bench) -> list[Task]:
    """Each model in one and in two steps, without a VAE."""
    return [
        Task(f"{model_type} {plural(jumps, 'step')}", functools.partial(rate, bench, *case))
        for case in itertools.product(bench.batches, JUMPS)
        for model_type, jumps in [case]
    ]


def rate(bench: Bench, model_type: str, jumps: int) -> Iterator[Value]:
    """Images a second through the loop of inference.py, draws and pixels included."""
    model, stream = model_of(bench, model_type)
    count, turns = (4, 1) if bench.is_tiny else (256, 3)
    request = SampleRequest(count, min(count, 64), jumps, stream)

    def work() -> None:
        for _ in sample_pixels(model, request, bench.processes, no_decoder):
            pass

    seconds = statistics.median(in_turns({"loop": work}, turns)["loop"])
    yield Value(f"{model_type} {plural(jumps, 'step')}", count / seconds, "images/s")


@functools.lru_cache(maxsize=1)
def model_of(bench: Bench, model_type: str) -> tuple[Method, PerImageStream]:
    """An averaged model, and the draws for its images."""
    learner = bench.learner(model_type, LEAST_BATCH)
    config = learner.config
    classes = NUM_CLASSES if config.is_conditional else None
    return learner.state.ema_model.eval(), PerImageStream(42, classes, data_shape(config))


# Beside the CPU's


def picture_tasks(bench: Bench) -> list[Task]:
    """The first model's images, with TF32 and without."""
    model_type = next(iter(bench.batches))
    return [
        Task(f"{model_type} {precision}", functools.partial(differences, bench, model_type, case))
        for precision in ("fp32", "tf32")
        for case in [precision]
    ]


def differences(bench: Bench, model_type: str, precision: str) -> Iterator[Value]:
    """How far pixels lie from those that the CPU makes of the same draws."""
    if precision == "tf32":
        bench.need_cuda()
    model, stream = model_of(bench, model_type)
    on_cpu = copy.deepcopy(model).to("cpu")
    allow_tf32(bench.device, precision == "tf32")
    for jumps in JUMPS:
        draws = stream.draw(range(2 if bench.is_tiny else 16), jumps)
        expected = sample(on_cpu, draws.noises, draws.labels)
        labels = None if draws.labels is None else draws.labels.to(bench.device)
        found = sample(model, [noise.to(bench.device) for noise in draws.noises], labels).cpu()
        off = (to_pixels(found).int() - to_pixels(expected).int()).abs()
        name = f"{model_type} {precision}, {plural(jumps, 'step')}"
        yield Value(f"{name}: greatest difference", off.max().item(), "of 255")
        yield Value(f"{name}: pixels that differ", (off > 0).float().mean().item(), "share")


# The VAE


def vae_tasks(bench: Bench) -> list[Task]:
    """Both directions at both sizes, and latents made of JPEGs from end to end."""
    sizes = {32: 2} if bench.is_tiny else VAE_BATCHES
    return [
        *(
            Task(f"{direction.__name__} {size}", functools.partial(vae_rate, bench, *case))
            for case in itertools.product((encode, decode), sizes.items())
            for direction, (size, _) in [case]
        ),
        Task("extraction", functools.partial(extraction, bench, min(sizes))),
    ]


@functools.cache
def vae_of(bench: Bench) -> nn.Module:
    """A VAE of the published shape with random weights: as fast, and nothing is fetched."""
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        raise Skipped(f"not installed: {error.name}") from error
    levels = TINY_VAE_LEVELS if bench.is_tiny else VAE_LEVELS
    with bench.device:
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * len(levels),
            up_block_types=("UpDecoderBlock2D",) * len(levels),
            block_out_channels=levels,
            layers_per_block=2,
            latent_channels=4,
            norm_num_groups=4 if bench.is_tiny else 32,
        )
    return vae.eval().requires_grad_(False)


def vae_rate(bench: Bench, direction: Any, size_and_batch: tuple[int, int]) -> Iterator[Value]:
    """Images a second, in float32 without TF32."""
    size, batch = size_and_batch
    vae = vae_of(bench)
    allow_tf32(bench.device, False)
    if direction is encode:
        images = torch.rand(batch, 3, size, size, device=bench.device)
        work = functools.partial(encode, vae, images, batch)
    else:
        latents = torch.randn(batch, 4, size // 8, size // 8, device=bench.device)
        work = functools.partial(decode, vae, latents, batch)
    seconds = statistics.median(in_turns({"vae": work}, 1 if bench.is_tiny else 3)["vae"])
    yield Value(f"{direction.__name__} {size}", batch / seconds, "images/s")


def extraction(bench: Bench, size: int) -> Iterator[Value]:
    """Images a second of latent_dataset.py on generated JPEGs, by its own count."""
    vae_of(bench).save_pretrained(bench.folder / "vae")
    vae_of.cache_clear()
    count = 8 if bench.is_tiny else 1024
    write_pictures(bench.folder / "pictures", count, (48, 40) if bench.is_tiny else (500, 375))
    command = [sys.executable, ROOT / "latent_dataset.py", f"--image-size={size}"]
    command += ["--data-path", bench.folder / "pictures", "--save-path", bench.folder / "latents"]
    command += ["--vae", bench.folder / "vae", f"--device={bench.device.type}"]
    command += ["--num-workers=0"] if bench.is_tiny else ["--num-workers=8"]
    finished = subprocess.run(map(str, command), capture_output=True, text=True, check=False)
    found = re.search(r"([\d.]+) images/s; the VAE", finished.stdout)
    if finished.returncode or not found:
        raise RuntimeError(f"latent_dataset.py: {(finished.stderr or finished.stdout)[-300:]}")
    yield Value(f"extraction {size} of {count} JPEGs", float(found[1]), "images/s")


def write_pictures(folder: Path, count: int, size: tuple[int, int]) -> None:
    """JPEGs of blurred noise in two class folders."""
    source = np.random.default_rng(0)
    for index in range(count):
        path = folder / f"class{index % 2}" / f"{index}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        blotches = Image.fromarray(source.integers(256, size=(12, 16, 3), dtype=np.uint8))
        blotches.resize(size, Image.Resampling.BICUBIC).save(path, quality=90)
