"""Geometric augmentation of training images, with six labels per image for the network.

The part of Karras et al. 2022 (arXiv 2206.00364, appendix F.2) that SoFlow trains its UNet with:
flip, isotropic and anisotropic scaling, translation, resampled through a wavelet's low-pass filter.
Images that the network is asked to generate have no augmentation labels.
"""

# N images, C channels, H height, W width. x runs right and y runs down, in pixels. Upsampled
# sample j stands at pixel position j / 2 (counted from the first pixel, so that j may be negative).

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

SCALE_OCTAVES = 0.2  # standard deviation of log2 of both scalings
TRANSLATION_SIDES = 0.125  # standard deviation of a translation, in sides of the image

# Low-pass filter h of the sym6 wavelet (Daubechies 1992). Its shifts by two are orthonormal, so
# that filtering down undoes filtering up.
SYM6 = (
    0.015404109327027373, 0.0034907120842174702, -0.11799011114819057,
    -0.048311742585633, 0.4910559419267466, 0.787641141030194,
    0.3379294217276218, -0.07263752278646252, -0.021060292512300564,
    0.04472490177066578, 0.0017677118642428036, -0.007800708325034148,
)  # fmt: skip
PEAK = 5  # the tap that connects pixel i to the upsampled sample at the same place


@dataclass(frozen=True)
class AugmentationParameters:
    """The parameters of N images' augmentation: float32 on the CPU, 0 where nothing is drawn."""

    flip: Tensor  # [N], 1 where left and right are exchanged
    scale: Tensor  # [N], in standard deviations
    aniso: Tensor  # [N], in standard deviations
    aniso_angle: Tensor  # [N], radians
    translate: Tensor  # [2, N], right and down, in standard deviations

    @property
    def labels(self) -> Tensor:
        """The augmentation labels, [N, 6]; all 0 for an image that is left as it is."""
        along_x = self.aniso * self.aniso_angle.cos()
        along_y = self.aniso * self.aniso_angle.sin()
        return torch.stack([self.flip, self.scale, along_x, along_y, *self.translate], dim=1)


def draw_augmentation(
    num_images: int, probability: float, generator: torch.Generator
) -> AugmentationParameters:
    """Parameters for `num_images` images, drawn on the CPU from `generator`.

    Scaling, anisotropic scaling and translation each happen with `probability`, independently; a
    flip always has even odds, and so has an anisotropic scaling's angle being other than 0. The
    number of draws does not depend on what is drawn.
    """

    def coin(odds: float) -> Tensor:
        return torch.rand(num_images, generator=generator) < odds

    def normal(happens: Tensor) -> Tensor:
        return torch.randn(num_images, generator=generator).where(happens, 0.0)

    flip = coin(0.5).float()
    scale = normal(coin(probability))
    aniso = normal(coin(probability))
    turns = torch.rand(num_images, generator=generator) - 0.5
    aniso_angle = (2 * math.pi * turns).where(coin(0.5), 0.0)
    translates = coin(probability)
    translate = torch.stack([normal(translates), normal(translates)])
    return AugmentationParameters(flip, scale, aniso, aniso_angle, translate)


def augment(images: Tensor, parameters: AugmentationParameters) -> Tensor:
    """`images` [N, C, H, W] flipped, then scaled and moved: like `images`, on their device.

    Deterministic. What comes into view from outside is the image's reflection up to W - 1 and
    H - 1 pixels away, and 0 beyond.
    """
    H, W = images.shape[2:]
    flip = parameters.flip.to(images.device, non_blocking=True)[:, None, None, None] > 0
    source = _source_map(parameters, H, W)
    pad_x, pad_y = _padding(source, H, W)
    padded = F.pad(images.flip(3).where(flip, images), (pad_x, pad_x, pad_y, pad_y), "reflect")
    upsampled = _filter_up(_filter_up(padded, 2), 3)
    grid = _sampling_grid(source, images, pad_x, pad_y)
    moved = F.grid_sample(upsampled, grid, align_corners=True)
    return _filter_down(_filter_down(moved, 2), 3)


def _source_map(parameters: AugmentationParameters, H: int, W: int) -> Tensor:
    """M, [N, 2, 3] float64: what arrives at pixel (x', y') comes from (x, y) = M (x', y', 1).

    Content moves as p' = c + T + A S (p - c) about the centre c; M is the way back.
    """
    angle = parameters.aniso_angle.double()
    u = torch.stack([angle.cos(), -angle.sin()], dim=1)
    along_u = u[:, :, None] * u[:, None, :]
    k = (SCALE_OCTAVES * parameters.aniso.double()).exp2()[:, None, None]
    scale = (SCALE_OCTAVES * parameters.scale.double()).exp2()[:, None, None]
    inverse = (along_u / k + (torch.eye(2) - along_u) * k) / scale
    sides = torch.tensor([W, H])
    centre = (sides.double() - 1) / 2
    centre_arrives = centre + TRANSLATION_SIDES * sides * parameters.translate.double().T
    offset = centre[:, None] - inverse @ centre_arrives[:, :, None]
    return torch.cat([inverse, offset], dim=2)


def _padding(source: Tensor, H: int, W: int) -> tuple[int, int]:
    """Pixels to add on either side in x, and in y, so that every sample finds its content."""
    # An affine map keeps the outermost samples outermost.
    x, y = _lattice(W, source)[[0, -1]], _lattice(H, source)[[0, -1]]
    corners = torch.cartesian_prod(x, y, source.new_ones(1))
    reached = source @ corners.T
    last_pixel = torch.tensor([W - 1, H - 1])
    outside = torch.maximum(-reached.amin((0, 2)), reached.amax((0, 2)) - last_pixel)
    # A sample lies between two upsampled ones, which mix pixels up to 3.5 away from it.
    pad_x, pad_y = (outside + 3.5).floor().clamp(torch.zeros(2), last_pixel).int().tolist()
    return pad_x, pad_y


def _sampling_grid(source: Tensor, images: Tensor, pad_x: int, pad_y: int) -> Tensor:
    """Where each sample reads the upsampled padded images: [N, samples in y, samples in x, 2].

    In units of grid_sample with aligned corners: -1 is the first upsampled sample, 1 the last.
    """
    H, W = images.shape[2:]
    x, y = _lattice(W, source), _lattice(H, source)
    first = torch.stack([x[0] - pad_x, y[0] - pad_y])
    last = torch.stack([x[-1] + pad_x, y[-1] + pad_y])
    middle, reach = (first + last) / 2, (last - first) / 2
    to_grid = torch.cat([source[:, :, :2], source[:, :, 2:] - middle[:, None]], 2) / reach[:, None]
    to_grid = to_grid.to(images.dtype).to(images.device, non_blocking=True)
    # Not a matrix product: TF32 would misplace the samples by hundredths of a pixel.
    per_x, per_y, offset = to_grid[:, None, None].unbind(-1)
    x, y = _lattice(W, images), _lattice(H, images)
    return per_x * x[:, None] + per_y * y[:, None, None] + offset


def _lattice(side: int, like: Tensor) -> Tensor:
    """Where the samples stand, in pixels, that the filters connect to `side` pixels.

    Of the type and on the device of `like`. The middle of the samples lies a quarter pixel right
    of the middle of the pixels.
    """
    return (torch.arange(_samples(side), device=like.device, dtype=like.dtype) - PEAK) / 2


def _samples(side: int) -> int:
    return 2 * side + len(SYM6) - 2


# Both filters add up shifted tensors. A convolution would run in TF32 on CUDA, which leaves three
# digits of the image.


def _filter_up(images: Tensor, dim: int) -> Tensor:
    """u[j] = sum_i x[i] h[j - 2 i + PEAK] along `dim`, for every j where that has a term."""
    shape = list(images.shape)
    shape[dim] = _samples(shape[dim])
    samples = images.new_zeros(shape)
    for tap, weight in enumerate(SYM6):
        _under_tap(samples, tap, dim).add_(images, alpha=weight)
    return samples


def _filter_down(samples: Tensor, dim: int) -> Tensor:
    """y[i] = sum_j u[j] h[j - 2 i + PEAK] along `dim`: the adjoint of `_filter_up`."""
    images = torch.zeros_like(_under_tap(samples, 0, dim))
    for tap, weight in enumerate(SYM6):
        images.add_(_under_tap(samples, tap, dim), alpha=weight)
    return images


def _under_tap(samples: Tensor, tap: int, dim: int) -> Tensor:
    """View of the samples, one for each pixel, that a tap of the filter connects to the pixels."""
    side = (samples.shape[dim] - _samples(0)) // 2
    every_other = slice(tap, tap + 2 * side, 2)
    return samples[(slice(None),) * dim + (every_other,)]
