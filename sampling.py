"""From noise to images: the one sampler, which training and inference both call."""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from config import Config
from models import Method
from support.data import vae
from support.data.images import ImageBatch, to_pixels
from support.scores.npz import write_images
from support.system.processes import Processes
from support.system.randomness import SamplingStream

IMAGES_AT_ONCE = 8  # turned into pixels

# B images of a batch, C channels, H = W side; images are float -1..1, pixels uint8 [B, H, W, C]


def even_times(steps: int) -> tuple[float, ...]:
    """t_0 = 1, ..., t_n = 0 for n jumps, evenly apart."""
    return tuple(1 - jump / steps for jump in range(steps)) + (0.0,)


def renoise(
    model: Method, noises: Sequence[Tensor], labels: Tensor | None, times: Sequence[float]
) -> Tensor:
    """The published sampler: every jump ends at 0, and a fresh noise brings x back to the next t.

    Takes a noise for each jump.
    """
    x = noises[0]
    zeros = x.new_zeros(len(x))
    for jump, (t, noise) in enumerate(zip(times[:-1], noises, strict=True)):
        starts = torch.full_like(zeros, t)
        if jump > 0:
            x, _ = model.interpolate(x, noise, starts)
        x = model.jump(x, starts, zeros, labels)
    return x


def chain(
    model: Method, noises: Sequence[Tensor], labels: Tensor | None, times: Sequence[float]
) -> Tensor:
    """Each jump starts where the last one ended: x_0 is a function of the one noise it takes."""
    x = noises[0]
    ones = x.new_ones(len(x))
    for t, s in itertools.pairwise(times):
        x = model.jump(x, t * ones, s * ones, labels)
    return x


SAMPLERS: dict[str, Callable[..., Tensor]] = {"renoise": renoise, "chain": chain}


def noises_needed(sampler: str, jumps: int) -> int:
    return 1 if sampler == "chain" else jumps


@torch.inference_mode()
def sample(
    model: Method,
    noises: Sequence[Tensor],
    labels: Tensor | None = None,
    times: Sequence[float] | None = None,
    sampler: str = "renoise",
) -> Tensor:
    """x_0, [B, C, H, W], of noises, [B, C, H, W] each, by jumps from `times[0]` = 1 down to 0.

    The times are evenly apart, a jump for each noise, where none are given. The labels are [B], or
    None for the null class.
    """
    return SAMPLERS[sampler](model, noises, labels, times or even_times(len(noises)))


def places_of(rank: int, num_images: int, world_size: int, batch_size: int) -> Iterator[range]:
    """Which images process `rank` makes, at most batch_size in each round of all processes.

    In a round rank r's come after those of the ranks below it. All make equally many: the last
    places may lie beyond num_images, by less than world_size, and are to be cut.
    """
    per_process = -(-num_images // world_size)
    for start in range(0, per_process, batch_size):
        count = min(batch_size, per_process - start)
        first = start * world_size + rank * count
        yield range(first, first + count)


class SampleRequest(NamedTuple):
    """How many images, in batches of how many per process, in how many jumps, from which draws."""

    num_images: int
    batch_size: int
    num_jumps: int
    stream: SamplingStream
    times: tuple[float, ...] | None = None  # None: evenly apart
    sampler: str = "renoise"  # of SAMPLERS


def find_decoder(config: Config) -> vae.FoundVae | None:
    """What the config's x_0 are decoded by, for `decoding`; None where they are images already.

    Quick where the VAE is on this machine, so that its absence is noticed before the work.
    """
    return vae.find_vae(config.vae) if config.is_latent else None


def decoder_record(config: Config) -> dict[str, str | float]:
    """What a result's record says of the decoder; nothing where there is none."""
    found = find_decoder(config)
    if found is None:
        return {}
    return {
        "vae": found.name,
        "vae_revision": found.revision,
        "latent_scale": vae.LATENT_SCALE,
    }


@contextlib.contextmanager
def decoding(config: Config, device: torch.device) -> Iterator[Callable[[Tensor], Tensor]]:
    """The function from x_0 to images, float -1..1; a VAE is on the device for the block alone."""
    found = find_decoder(config)
    if found is None:
        yield lambda x_0: x_0
        return
    with vae.on_device(vae.load_on_host(found), device) as loaded:
        yield lambda x_0: vae.decode(loaded, x_0, config.vae_batch_size)


def sample_pixels(
    model: Method,
    request: SampleRequest,
    processes: Processes,
    decode: Callable[[Tensor], Tensor],
) -> Iterator[ImageBatch]:
    """Images in output order, on the main process; the others yield nothing.

    All processes have to iterate to the end. `decode` turns x_0 into images.
    """
    rank, world_size = processes.rank, processes.world_size
    for places in places_of(rank, request.num_images, world_size, request.batch_size):
        num_noises = noises_needed(request.sampler, request.num_jumps)
        draws = request.stream.draw(places, num_noises)
        noises = [noise.to(processes.device) for noise in draws.noises]
        labels = None if draws.labels is None else draws.labels.to(processes.device)
        times = request.times or even_times(request.num_jumps)
        images = decode(sample(model, noises, labels, times, request.sampler))
        pixels = _pixels_of(images)
        wanted = request.num_images - places.start  # on the main process, the first of all
        all_pixels = _gather(pixels, wanted, processes)
        all_labels = None if labels is None else _gather(labels, wanted, processes)
        if all_pixels is not None:  # on the main process
            yield ImageBatch(all_pixels, all_labels)


def _pixels_of(images: Tensor) -> Tensor:
    """uint8 [B, H, W, C] of float images [B, C, H, W], a few at a time.

    What that takes meanwhile is small beside the images: large blocks that come and go leave gaps
    in the heap, and a process that grows by them for its first thousands of images.
    """
    parts = images.split(IMAGES_AT_ONCE)
    return torch.cat([to_pixels(part.float()).permute(0, 2, 3, 1) for part in parts])


def _gather(values: Tensor, wanted: int, processes: Processes) -> np.ndarray | None:
    """The processes' values in rank order, at most `wanted` of them, on the main process."""
    gathered = processes.gather_on_main(values)
    return None if gathered is None else torch.cat(gathered)[:wanted].cpu().numpy()


def write_samples(
    path: Path,
    batches: Iterator[ImageBatch],
    num_images: int,
    is_main: bool,
    write_its_record: Callable[[], None],
    report: Callable[[ImageBatch], None] = lambda batch: None,
) -> None:
    """Stream `sample_pixels` to an .npz, which appears only when all images are in it.

    The images are `arr_0`; their labels, where there are classes, follow as `arr_1`, int64 [N].
    Every process calls this; the main one writes, and tells `report` of every batch written. The
    record is written just before, so that a kill leaves no archive without one.
    """
    if not is_main:
        for _ in batches:
            raise AssertionError("only the main process gets images")
        return
    # In one piece from the start: small arrays that stay, between batches that come and go, would
    # leave the heap no gap for the next batch, and it would grow by each.
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
        write_its_record()
