"""Random draws, each determined by a seed, a purpose and a position.

No generator's state is saved or shared: a run that continues at step k, or another process that
samples image i, derives the same generators again.
"""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor


def derive_seed(seed: int, purpose: str, *position: int, bits: int = 63) -> int:
    """A non-negative integer of `bits` bits (at most 256), from SHA-256 of its arguments."""
    text = "/".join([str(seed), purpose, *map(str, position)])
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest, "big") >> (256 - bits)


def generator(
    seed: int, purpose: str, *position: int, device: torch.device | str = "cpu"
) -> torch.Generator:
    """A fresh torch generator for one purpose at one position."""
    return torch.Generator(device).manual_seed(derive_seed(seed, purpose, *position))


class ImageDraws(NamedTuple):
    """All that a batch of images is made from: labels [B] and noises [B, C, H, W] each."""

    labels: Tensor | None
    noises: list[Tensor]


class SamplingStream(Protocol):
    """A source of labels and noise for images, which have their place in the output as number."""

    def draw(self, images: Sequence[int], num_noises: int) -> ImageDraws: ...


class PerImageStream:
    """Draws that depend on (seed, image number) alone, not on batch size, process or device.

    They come from NumPy's counter-based Philox generator. Unlike torch's, its normals do not depend
    on the processor's vector width.
    """

    def __init__(self, seed: int, num_classes: int | None, shape: tuple[int, int, int]):
        self.seed, self.num_classes, self.shape = seed, num_classes, shape

    def draw(self, images: Sequence[int], num_noises: int) -> ImageDraws:
        """Labels and noises of `images`; the first noise is the same for any number of noises."""
        labels = None
        if self.num_classes is not None:
            sources = [self._source("sampling label", image) for image in images]
            labels = torch.tensor([int(source.integers(self.num_classes)) for source in sources])
        return ImageDraws(labels, [self._noise(images, step) for step in range(num_noises)])

    def _noise(self, images: Sequence[int], step: int) -> Tensor:
        sources = [self._source("sampling noise", image, step) for image in images]
        drawn = [source.standard_normal(self.shape, dtype=np.float32) for source in sources]
        return torch.from_numpy(np.stack(drawn))

    def _source(self, purpose: str, *position: int) -> np.random.Generator:
        key = derive_seed(self.seed, purpose, *position, bits=128)
        return np.random.Generator(np.random.Philox(key=key))


class ReferenceStream:
    """The reference's draws, batch after batch, from one generator per process on its device.

    A batch draws labels (even if the network takes none), the first noise, then one noise for each
    further step. The draws depend on the batch size and the number of processes.
    """

    def __init__(
        self,
        seed: int,
        rank: int,
        num_classes: int,
        shape: tuple[int, int, int],
        is_conditional: bool,
        device: torch.device,
    ):
        self.num_classes, self.shape = num_classes, shape
        self.is_conditional, self.device = is_conditional, device
        self._source = torch.Generator(device).manual_seed(seed + rank)

    def draw(self, images: Sequence[int], num_noises: int) -> ImageDraws:
        """The next draws for a batch of this size; the numbers of the images do not matter."""
        labels = torch.randint(
            self.num_classes, (len(images),), generator=self._source, device=self.device
        )
        size = (len(images), *self.shape)
        noises = [
            torch.randn(size, generator=self._source, device=self.device) for _ in range(num_noises)
        ]
        return ImageDraws(labels if self.is_conditional else None, noises)


class GivenLabels:
    """Another stream's noise with labels from a list, repeated to fill: image i takes label i."""

    def __init__(self, stream: SamplingStream, labels: Sequence[int]):
        self.stream, self.labels = stream, labels

    def draw(self, images: Sequence[int], num_noises: int) -> ImageDraws:
        labels = torch.tensor([self.labels[image % len(self.labels)] for image in images])
        return self.stream.draw(images, num_noises)._replace(labels=labels)


class PerSeedStream:
    """Image i is the first image of seeds[i], wherever it stands in a list or batch."""

    def __init__(self, seeds: Sequence[int], num_classes: int | None, shape: tuple[int, int, int]):
        self._streams = [PerImageStream(seed, num_classes, shape) for seed in seeds]

    def draw(self, images: Sequence[int], num_noises: int) -> ImageDraws:
        draws = [self._streams[image].draw([0], num_noises) for image in images]
        noises = [torch.cat(step) for step in zip(*(one.noises for one in draws), strict=True)]
        labels = [one.labels for one in draws if one.labels is not None]
        return ImageDraws(torch.cat(labels) if labels else None, noises)


class GivenNoise:
    """Another stream's draws with a given first noise, [N, C, H, W]."""

    def __init__(self, stream: SamplingStream, noise: Tensor):
        self.stream, self.noise = stream, noise

    def draw(self, images: Sequence[int], num_noises: int) -> ImageDraws:
        draws = self.stream.draw(images, num_noises)
        return draws._replace(noises=[self.noise[list(images)], *draws.noises[1:]])
