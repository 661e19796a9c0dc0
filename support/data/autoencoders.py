"""The image autoencoders of diffusers: how each class is called, and what its latents are like.

x_0 = (z - shift) scale, where z is the autoencoder's own latent. A class of one's own takes one
entry in KINDS.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from support.system.files import UserError, shorten

LATENT_SCALE = 0.18215  # of sd-vae-ft-mse
ENCODED_PIXELS = 32 * 256**2  # at a time
SMALLEST_DEVIATION = 1e-6  # of a channel, so that its scale is finite

Numbers = float | list[float]  # one for all channels, or one for each

# B images, C latent channels, h = w latent side, H = W pixel side


@dataclass(frozen=True, kw_only=True)
class LatentForm:
    """What an autoencoder's latents are like; by default, those of sd-vae-ft-mse.

    Latents are stored as a point [C, h, w], or as the mean and then the standard deviation of a
    posterior, [2C, h, w]; both in the autoencoder's own scale.
    """

    vae_class: str = "AutoencoderKL"
    latent_channels: int = 4
    pixels_per_latent: int = 8  # along a side
    is_point: bool = False
    latent_scale: Numbers = LATENT_SCALE  # an empty list if it is yet to be measured
    latent_shift: Numbers = 0.0

    def __post_init__(self) -> None:
        for values in (self.latent_scale, self.latent_shift):
            if isinstance(values, list) and len(values) not in (0, self.latent_channels):
                raise ValueError(f"{len(values)} numbers for {self.latent_channels} channels")

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> "LatentForm":
        """The form that a data record describes; one without its entries is of sd-vae-ft-mse."""
        return cls(**{one.name: record[one.name] for one in fields(cls) if one.name in record})

    @property
    def stored_channels(self) -> int:
        return self.latent_channels * (1 if self.is_point else 2)

    def normalise(self, z: Tensor) -> Tensor:
        """x_0, [B, C, h, w], of the autoencoder's own latents."""
        return (z - _by_channel(self.latent_shift, z)) * _by_channel(self.latent_scale, z)

    def denormalise(self, x_0: Tensor) -> Tensor:
        """The autoencoder's own latents, [B, C, h, w], of x_0."""
        return x_0 / _by_channel(self.latent_scale, x_0) + _by_channel(self.latent_shift, x_0)


def _by_channel(values: Numbers, like: Tensor) -> float | Tensor:
    return like.new_tensor(values)[:, None, None] if isinstance(values, list) else values


# Classes


class Kind(NamedTuple):
    """How a class of autoencoders is called. Images are -1..1."""

    # Of images: the mean and standard deviation of z, or z alone; in float32.
    encode: Callable[[Any, Tensor], tuple[Tensor, ...]]
    # The images of z.
    decode: Callable[[Any, Tensor], Tensor]
    # latent_scale and latent_shift; nothing if they are to be measured on the latents.
    statistics: Callable[[Any], dict[str, Numbers]]
    module: str = "diffusers"  # that has the class
    needs: str = ""  # a package that the class needs beside


def encode_posterior(vae: Any, images: Tensor) -> tuple[Tensor, ...]:
    posterior = vae.encode(images).latent_dist
    # Not the posterior's own std, which autocast may have rounded.
    return posterior.mean.float(), torch.exp(0.5 * posterior.logvar.float())


def encode_point(vae: Any, images: Tensor) -> tuple[Tensor, ...]:
    return (vae.encode(images, return_dict=False)[0].float(),)


def decode_image(vae: Any, z: Tensor) -> Tensor:
    return vae.decode(z).sample


def read_statistics(vae: Any) -> dict[str, Numbers]:
    """Those in the config: mean and deviation by channel, else one scale and shift."""
    config = vae.config
    if config.get("latents_mean") and config.get("latents_std"):
        scale = [1 / deviation for deviation in config["latents_std"]]
        return {"latent_scale": scale, "latent_shift": [*config["latents_mean"]]}
    if not config.get("scaling_factor"):
        return {}
    shift = float(config.get("shift_factor") or 0)
    return {"latent_scale": float(config["scaling_factor"]), "latent_shift": shift}


def encode_patches(vae: Any, images: Tensor) -> tuple[Tensor, ...]:
    """The posterior with each patch of 2 x 2 latents as one latent."""
    patch = vae.config.patch_size[0]
    return tuple(F.pixel_unshuffle(one, patch) for one in encode_posterior(vae, images))


def decode_patches(vae: Any, z: Tensor) -> Tensor:
    return decode_image(vae, F.pixel_shuffle(z, vae.config.patch_size[0]))


def read_batch_norm(vae: Any) -> dict[str, Numbers]:
    deviations = torch.sqrt(vae.bn.running_var + vae.bn.eps)
    return {"latent_scale": (1 / deviations).tolist(), "latent_shift": vae.bn.running_mean.tolist()}


POSTERIOR = Kind(encode_posterior, decode_image, read_statistics)
POINT = Kind(encode_point, decode_image, read_statistics)
# AutoencoderRAE takes images from 0 to 1 and normalises its latents itself.
KINDS = {
    **dict.fromkeys(("AutoencoderKL", "AsymmetricAutoencoderKL"), POSTERIOR),
    **dict.fromkeys(("AutoencoderKLHunyuanImage", "AutoencoderKLKVAE"), POSTERIOR),
    "AutoencoderKLFlux2": Kind(encode_patches, decode_patches, read_batch_norm),
    **dict.fromkeys(("AutoencoderDC", "AutoencoderTiny", "VQModel"), POINT),
    "AutoencoderRAE": Kind(
        lambda vae, images: encode_point(vae, (images + 1) / 2),
        lambda vae, z: 2 * decode_image(vae, z) - 1,
        lambda vae: {"latent_scale": 1.0} if vae.config.latents_std else {},
        needs="transformers",
    ),
}


def kind_of(vae: Any) -> Kind:
    return KINDS[type(vae).__name__]


# Images and latents


@torch.inference_mode()
def measure_form(vae: Any, image_size: int) -> LatentForm:
    """The form of the latents of pictures with this side, by a blank one that goes there and back.

    UserError if the autoencoder does not take such pictures.
    """
    kind, name = kind_of(vae), type(vae).__name__
    blank = next(vae.parameters()).new_zeros(1, 3, image_size, image_size)
    try:
        z = kind.encode(vae, blank)
        _, channels, side, _ = z[0].shape
        made = kind.decode(vae, z[0]).shape
        if made != blank.shape or image_size % side:
            raise ValueError(f"latents of side {side} are decoded to {list(made[1:])}")
        return LatentForm(
            vae_class=name,
            latent_channels=channels,
            pixels_per_latent=image_size // side,
            is_point=len(z) == 1,
            **{"latent_scale": [], **kind.statistics(vae)},
        )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # each class has its own ways to fail
        raise UserError(
            f"vae: {name} does not fit pictures with {image_size} pixels a side ({shorten(error)})"
        ) from error


def normalised_by(form: LatentForm, z: Tensor) -> LatentForm:
    """The form that gives each channel of these z, [B, C, h, w], mean 0 and deviation 1."""
    deviation, mean = torch.std_mean(z.double(), dim=(0, 2, 3))
    scale = 1 / deviation.clamp_min(SMALLEST_DEVIATION)
    return replace(form, latent_scale=scale.tolist(), latent_shift=mean.tolist())


def default_encode_batch(image_size: int) -> int:
    """Images encoded at a time by default: 32 with 256 pixels a side.

    In float32 the activations of one image take 168 MB at 256 pixels, four times that at 512.
    """
    return max(1, ENCODED_PIXELS // image_size**2)


@torch.inference_mode()
def encode(vae: Any, images: Tensor, batch_size: int, is_bf16: bool = False) -> Tensor:
    """Latents as stored, of images [B, 3, H, W] in -1..1, `batch_size` at a time."""
    kind, moments = kind_of(vae), []
    for part in images.split(batch_size):
        with torch.autocast(images.device.type, torch.bfloat16, enabled=is_bf16):
            moments.append(torch.cat(kind.encode(vae, part), dim=1))
    return torch.cat(moments)


def draw_latents(moments: Tensor, source: torch.Generator, form: LatentForm) -> Tensor:
    """x_0, [B, C, h, w], of latents as stored: a point, or one drawn from the posterior."""
    z = moments.float()
    if not form.is_point:
        mean, std = z.chunk(2, dim=1)
        z = mean + std * torch.randn(mean.shape, generator=source, device=mean.device)
    return form.normalise(z)


@torch.inference_mode()
def decode(vae: Any, x_0: Tensor, batch_size: int, form: LatentForm) -> Tensor:
    """Images [B, 3, H, W], about -1..1, of x_0 [B, C, h, w], `batch_size` at a time."""
    kind = kind_of(vae)
    return torch.cat([kind.decode(vae, form.denormalise(part)) for part in x_0.split(batch_size)])
