"""The VAE between images and latents: its name and scale, where it is found, encode and decode.

diffusers takes seconds to import and is imported only where a VAE is loaded.
"""

import contextlib
import functools
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from support.system import hub
from support.system.files import UserError, shorten

VAE_NAME = "stabilityai/sd-vae-ft-mse"
LATENT_SCALE = 0.18215  # x_0 = LATENT_SCALE times the VAE's own latent
LATENT_CHANNELS = 4
PIXELS_PER_LATENT = 8  # along a side
ENCODED_PIXELS = 32 * 256**2  # at a time

CONFIG_FILE = "config.json"
WEIGHT_FILES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")

# B images, C = 4 latent channels, h = w latent side, H = W = 8 h pixel side


@dataclass(frozen=True)
class FoundVae:
    """A VAE whose files are on this machine."""

    name: str  # as the user named it
    folder: Path
    revision: str  # the hub's commit, or nothing for a folder of the user's own


def find_vae(name: str) -> FoundVae:
    """The VAE called `name`, a folder or a name on the Hugging Face Hub, fetched if need be.

    The hub's own settings hold (HF_HOME, HF_HUB_OFFLINE, HF_ENDPOINT, ...). UserError where it is
    absent and cannot be fetched, has no weights, or is no VAE of 4 channels and 8 pixels a latent.
    """
    folder, revision = Path(os.path.expanduser(name)), ""
    if not folder.is_dir():
        folder = _fetch(name)
        revision = folder.name  # the hub's cache has a folder per commit
    if not any((folder / file).is_file() for file in WEIGHT_FILES):
        raise UserError(f"vae: {folder}: has no weights ({' or '.join(WEIGHT_FILES)})")
    _check_kind(folder / CONFIG_FILE)
    return FoundVae(name, folder, revision)


@functools.cache  # one commit for the whole process, though the hub may get another meanwhile
def _fetch(name: str) -> Path:
    """The folder of a VAE of the hub in the hub's cache."""
    # The two files that diffusers needs; a pickle from the hub is never opened.
    try:
        return hub.fetch(name, lambda files: [CONFIG_FILE, WEIGHT_FILES[0]])
    except UserError as error:
        raise UserError(f"vae: {error}") from error


def _cannot_import(error: ImportError) -> str:
    return f"{shorten(error)}; pip install -r requirements_soflow.txt"


def _check_kind(path: Path) -> None:
    """UserError where the config of a VAE at `path` is not of the kind that latents are made by."""
    try:
        described = json.loads(path.read_bytes())
        levels, channels = len(described["block_out_channels"]), described["latent_channels"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"vae: {path}: not the description of a VAE ({type(error).__name__}: "
            f"{shorten(error)}); a VAE's folder has {CONFIG_FILE} beside its weights"
        ) from error
    pixels = 2 ** (levels - 1)
    if (channels, pixels) != (LATENT_CHANNELS, PIXELS_PER_LATENT):
        raise UserError(
            f"vae: {path}: latents of {channels} channels, {pixels} pixels each; needed are "
            f"{LATENT_CHANNELS} channels, {PIXELS_PER_LATENT} pixels each"
        )


def load_vae(found: FoundVae, device: torch.device) -> nn.Module:
    """The VAE in float32 on `device`, for use and not for training; nothing is fetched."""
    # From a folder there is nothing to ask the hub for.
    try:
        from diffusers import AutoencoderKL

        vae = AutoencoderKL.from_pretrained(
            found.folder, local_files_only=True, low_cpu_mem_usage=False, torch_dtype=torch.float32
        )
    except ImportError as error:
        raise UserError(f"vae: {found.name}: {_cannot_import(error)}") from error
    except Exception as error:  # diffusers and safetensors raise many kinds on damaged files
        raise UserError(f"vae: {found.folder}: cannot be loaded ({shorten(error)})") from error
    return vae.to(device).eval().requires_grad_(False)


@functools.lru_cache(maxsize=1)
def load_on_host(found: FoundVae) -> nn.Module:
    """The VAE in host memory, where it stays: it is needed anew for every picture of samples."""
    return load_vae(found, torch.device("cpu"))


@contextlib.contextmanager
def on_device(vae: nn.Module, device: torch.device) -> Iterator[nn.Module]:
    """A block in which the VAE is on `device`; the device's memory is free again afterwards."""
    try:
        yield vae.to(device)
    finally:
        vae.to("cpu")
        if device.type == "cuda":
            torch.cuda.empty_cache()


def release(vae: nn.Module) -> None:
    """Let the memory of the VAE's weights go, whoever still holds the VAE."""
    vae.to("meta")
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def encoded_at_a_time(image_size: int) -> int:
    """Images of this side that are encoded at a time where nobody says: 32 of 256 pixels.

    Of each, the activations take 168 MB at 256 pixels in float32, and four times that at 512.
    """
    return max(1, ENCODED_PIXELS // image_size**2)


@torch.inference_mode()
def encode(vae: Any, images: Tensor, batch_size: int, is_bf16: bool = False) -> Tensor:
    """[B, 2C, h, w], the posterior's mean and then its standard deviation, of images [B, 3, H, W].

    Images are -1..1, `batch_size` of them at a time; the moments are in the VAE's own scale.
    """
    moments = []
    for some in images.split(batch_size):
        with torch.autocast(images.device.type, torch.bfloat16, enabled=is_bf16):
            posterior = vae.encode(some).latent_dist
        # Not the posterior's own std: autocast may have rounded that.
        std = torch.exp(0.5 * posterior.logvar.float())
        moments.append(torch.cat([posterior.mean.float(), std], dim=1))
    return torch.cat(moments)


def draw_latents(moments: Tensor, source: torch.Generator) -> Tensor:
    """x_0 = (mean + std N) 0.18215, [B, C, h, w], of moments as `encode` gives them."""
    mean, std = moments.float().chunk(2, dim=1)
    noise = torch.randn(mean.shape, generator=source, device=mean.device)
    return (mean + std * noise) * LATENT_SCALE


@torch.inference_mode()
def decode(vae: Any, x_0: Tensor, batch_size: int) -> Tensor:
    """Images [B, 3, H, W], about -1..1, of x_0 [B, C, h, w]; `batch_size` of them at a time."""
    return torch.cat([vae.decode(part / LATENT_SCALE).sample for part in x_0.split(batch_size)])
