"""The sampler: from noise to images. Training and inference call the same functions.

x_0 comes from noise by steps from time 1 down to 0. It is an image, or a VAE's latent to decode.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from config import Config
from models import Method
from support.data import autoencoders, vae
from support.data.images import ImageBatch, to_pixels
from support.scores.npz import write_images
from support.system.files import UserError, shorten
from support.system.processes import Processes
from support.system.randomness import SamplingStream

IMAGES_AT_ONCE = 8  # converted to pixels

# B images of a batch, C channels, H = W side; images are float -1..1, pixels uint8 [B, H, W, C]


def even_times(steps: int) -> tuple[float, ...]:
    """t_0 = 1, ..., t_n = 0 for n evenly spaced steps."""
    return (*(1 - step / steps for step in range(steps)), 0.0)


def check_times(times: Sequence[float | str], place: str) -> tuple[float, ...]:
    """The times if they fall from 1 to 0; else a UserError that names `place`."""
    try:
        values = tuple(map(float, times))
    except (TypeError, ValueError):
        raise UserError(f"{place}: {shorten(times)} is not a list of numbers") from None
    falls = all(t > s for t, s in itertools.pairwise(values))
    if len(values) < 2 or values[0] != 1 or values[-1] != 0 or not falls:
        raise UserError(f"{place}: {shorten(values)} do not fall from 1 to 0, as 1,0.6,0 does")
    return values


# Samplers


def renoise(
    model: Method, noises: Sequence[Tensor], labels: Tensor | None, times: Sequence[float]
) -> Tensor:
    """The published sampler: each step ends at 0, and a fresh noise leads back to the next time."""
    x = noises[0]
    zeros = x.new_zeros(len(x))
    for step, (t, noise) in enumerate(zip(times[:-1], noises, strict=True)):
        starts = torch.full_like(zeros, t)
        if step > 0:
            x, _ = model.interpolate(x, noise, starts)
        x = model.jump(x, starts, zeros, labels)
    return x


def chain(
    model: Method, noises: Sequence[Tensor], labels: Tensor | None, times: Sequence[float]
) -> Tensor:
    """Each step starts where the last one ended: x_0 is a function of one noise."""
    x = noises[0]
    ones = x.new_ones(len(x))
    for t, s in itertools.pairwise(times):
        x = model.jump(x, t * ones, s * ones, labels)
    return x


class Sampler(NamedTuple):
    """A way through the times, and whether it takes a fresh noise for each step."""

    run: Callable[[Method, Sequence[Tensor], Tensor | None, Sequence[float]], Tensor]
    takes_fresh_noise: bool


SAMPLERS = {"renoise": Sampler(renoise, True), "chain": Sampler(chain, False)}


@torch.inference_mode()
def sample(
    model: Method,
    noises: Sequence[Tensor],
    labels: Tensor | None = None,
    times: Sequence[float] | None = None,
    sampler: str = "renoise",
) -> Tensor:
    """x_0, [B, C, H, W], of noises, [B, C, H, W] each, at these times.

    By default there is one evenly spaced step for each noise. The labels are [B], or None for the
    null label.
    """
    return SAMPLERS[sampler].run(model, noises, labels, times or even_times(len(noises)))


# Decoding


def find_decoder(config: Config) -> vae.FoundVae | None:
    """The VAE that decodes the config's x_0; None if they are images.

    Call it early: a missing VAE is then reported before the work.
    """
    return vae.find_vae(config.vae) if config.is_latent else None


def decoder_record(config: Config, data: Mapping[str, Any]) -> dict[str, Any]:
    """The decoder's part of a result's record; empty if there is none.

    `data` is the record of the training data, which says how latents were normalised.
    """
    found = find_decoder(config)
    if found is None:
        return {}
    return {
        "vae": found.name,
        "vae_revision": found.revision,
        "vae_sha256": vae.vae_digest(found),
        "latent_scale": autoencoders.LatentForm.of_record(data).latent_scale,
    }


@contextlib.contextmanager
def decoding(
    config: Config, data: Mapping[str, Any], device: torch.device
) -> Iterator[Callable[[Tensor], Tensor]]:
    """The function from x_0 to images; a VAE is on the device during the block only.

    `data` is the record of the training data, which says how latents were normalised.
    """
    found = find_decoder(config)
    if found is None:
        yield lambda x_0: x_0
        return
    with vae.on_device(vae.load_on_host(found), device) as loaded:
        form = autoencoders.LatentForm.of_record(data)
        yield lambda x_0: autoencoders.decode(loaded, x_0, config.vae_batch_size, form)


# Many images


class SampleRequest(NamedTuple):
    """How many images, in what batches per process, in how many steps, from which draws."""

    num_images: int
    batch_size: int
    num_steps: int
    stream: SamplingStream
    times: tuple[float, ...] | None = None  # None: evenly spaced
    sampler: str = "renoise"  # of SAMPLERS


class Sampled(NamedTuple):
    """A batch of one process: x_0 float32 [B, C, H, W], and what it shows."""

    x_0: Tensor
    pixels: Tensor  # uint8 [B, H, W, C]
    labels: Tensor | None  # [B]


def places_of(rank: int, num_images: int, world_size: int, batch_size: int) -> Iterator[range]:
    """Which images process `rank` makes: at most batch_size in each round of all processes.

    In a round, those of rank r follow those of lower ranks. All processes make equally many; the
    last places may lie beyond num_images, by less than world_size, and are dropped.
    """
    per_process = -(-num_images // world_size)
    for start in range(0, per_process, batch_size):
        count = min(batch_size, per_process - start)
        first = start * world_size + rank * count
        yield range(first, first + count)


def sample_batches(
    model: Method, request: SampleRequest, processes: Processes, decode: Callable[[Tensor], Tensor]
) -> Iterator[Sampled]:
    """This process's batches of the request; `decode` turns x_0 into images."""
    device, rank, world_size = processes.device, processes.rank, processes.world_size
    dtype = next((weight.dtype for weight in model.parameters()), torch.float32)
    times = request.times or even_times(request.num_steps)
    num_noises = len(times) - 1 if SAMPLERS[request.sampler].takes_fresh_noise else 1
    for places in places_of(rank, request.num_images, world_size, request.batch_size):
        draws = request.stream.draw(places, num_noises)
        noises = [noise.to(device, dtype) for noise in draws.noises]
        labels = None if draws.labels is None else draws.labels.to(device)
        x_0 = sample(model, noises, labels, times, request.sampler).float()
        yield Sampled(x_0, pixels_of(refuse_non_finite(decode(x_0))), labels)


def sample_pixels(
    model: Method, request: SampleRequest, processes: Processes, decode: Callable[[Tensor], Tensor]
) -> Iterator[ImageBatch]:
    """Images in output order on the main process; the others yield nothing.

    All processes have to iterate to the end.
    """
    left = request.num_images
    for batch in sample_batches(model, request, processes, decode):
        pixels = _gather(batch.pixels, left, processes)
        labels = None if batch.labels is None else _gather(batch.labels, left, processes)
        if pixels is not None:  # on the main process
            left -= len(pixels)
            yield ImageBatch(pixels, labels)


def _gather(values: Tensor, wanted: int, processes: Processes) -> np.ndarray | None:
    """The processes' values in rank order, at most `wanted` of them, on the main process."""
    gathered = processes.gather_on_main(values)
    return None if gathered is None else torch.cat(gathered)[:wanted].cpu().numpy()


def refuse_non_finite(images: Tensor) -> Tensor:
    """The images, [B, C, H, W]; UserError if any has nan or inf, which would be drawn black."""
    broken = int((~images.flatten(1).sum(1).isfinite()).sum())
    if broken:
        raise UserError(
            f"{broken} of {len(images)} images have nan or inf: so do the noise or the weights, or "
            "the dtype is too narrow for this model"
        )
    return images


def pixels_of(images: Tensor) -> Tensor:
    """uint8 [B, H, W, C] of float images [B, C, H, W].

    Converts a few at a time: large temporary blocks would fragment the heap, and the process would
    grow with each of its first thousands of images.
    """
    parts = images.split(IMAGES_AT_ONCE)
    return torch.cat([to_pixels(part.float()).permute(0, 2, 3, 1) for part in parts])


def write_samples(
    path: Path,
    batches: Iterator[ImageBatch],
    num_images: int,
    is_main: bool,
    save_record: Callable[[], None],
    report: Callable[[ImageBatch], None] = lambda batch: None,
) -> None:
    """Stream `sample_pixels` to an .npz, which appears once all images are in it.

    The images are `arr_0`; if there are classes, the labels are `arr_1`, int64 [N]. All processes
    call this. The main one writes, calls `report` after each batch, and `save_record` at the end,
    just before the archive appears: a kill leaves no archive without a record.
    """
    if not is_main:
        for _ in batches:
            raise AssertionError("only the main process gets images")
        return
    # Allocated once: small arrays kept between the batches would fragment the heap.
    labels = np.empty(num_images, np.int64)
    done = 0
    with write_images(path, num_images) as writer:
        for batch in batches:
            writer.append(batch.pixels)
            if batch.labels is not None:
                labels[done : done + len(batch.labels)] = batch.labels
                writer.further_arrays["arr_1"] = labels
            done += len(batch.pixels)
            report(batch)
        save_record()
