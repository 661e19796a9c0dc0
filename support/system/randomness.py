"""Who draws what: every draw belongs to a seed, a purpose and a position, and to nothing else.

No generator's state is ever saved or shared: continuing at step k, or sampling image i in another
batch or process, derives the same generators again.
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


def draw_logit_normal(count: int, mean: float, std: float, source: torch.Generator) -> Tensor:
    """[count] draws of sigmoid(std N + mean), on the CPU."""
    return torch.sigmoid(std * torch.randn(count, generator=source) + mean)


def draw_null_mask(count: int, drop_rate: float, source: torch.Generator) -> Tensor:
    """[count] bool on the CPU, True with probability drop_rate."""
    return torch.rand(count, generator=source) < drop_rate


class ImageDraws(NamedTuple):
    """All that a batch of images is made from: labels [B] and noises [B, C, H, W] each."""

    labels: Tensor | None
    noises: list[Tensor]


class SamplingStream(Protocol):
    """A source of labels and noise for images identified by their place in the output."""

    def draw(self, images: Sequence[int], num_noises: int) -> ImageDraws: ...


class PerImageStream:
    """Draws that depend on (seed, image index) alone: any batch size, process or device.

    Drawn by NumPy's counter-based Philox generator, whose normals do not depend on the processor's
    vector width, as torch's do.
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
    """The reference's draws: one generator per process on its device, used batch after batch.

    Per batch: labels (also where the network takes none), the first noise, then one noise per
    re-noising. What is drawn depends on the batch size and on the number of processes.
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
        """The next draws for a batch of as many images; which images does not matter."""
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
