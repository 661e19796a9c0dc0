"""From noise to images: the one sampler, which training and inference both call."""

import contextlib
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


@torch.inference_mode()
def sample(model: Method, noises: Sequence[Tensor], labels: Tensor | None = None) -> Tensor:
    """x_0, [B, C, H, W], in as many jumps as there are noises, [B, C, H, W] each.

    Jump i starts at t_i = 1 - i/n, from the first noise or from the last jump's x_0 brought back to
    t_i with a fresh noise, and ends at 0. The labels are [B], or None for the null class.
    """
    x = noises[0]
    zeros = x.new_zeros(len(x))
    for jump, noise in enumerate(noises):
        t = torch.full_like(zeros, 1 - jump / len(noises))
        if jump > 0:
            x, _ = model.interpolate(x, noise, t)
        x = model.jump(x, t, zeros, labels)
    return x


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
        draws = request.stream.draw(places, request.num_jumps)
        noises = [noise.to(processes.device) for noise in draws.noises]
        labels = None if draws.labels is None else draws.labels.to(processes.device)
        images = decode(sample(model, noises, labels))
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
