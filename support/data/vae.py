"""The VAE between images and latents: find it, load it, encode and decode.

diffusers takes seconds to import, so it is imported only where a VAE is loaded.
"""

import contextlib
import functools
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from support.system import hub
from support.system.digests import weights_digest
from support.system.files import UserError, identify, shorten

VAE_NAME = "stabilityai/sd-vae-ft-mse"
LATENT_SCALE = 0.18215  # x_0 = LATENT_SCALE times the VAE's own latent
LATENT_CHANNELS = 4
PIXELS_PER_LATENT = 8  # along a side
ENCODED_PIXELS = 32 * 256**2  # at a time
MOST_NAMED = 5

CONFIG_FILE = "config.json"
WEIGHT_FILES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")

# B images, C = 4 latent channels, h = w latent side, H = W = 8 h pixel side


@dataclass(frozen=True)
class FoundVae:
    """A VAE whose files are on this machine."""

    name: str  # as the user named it
    folder: Path
    revision: str  # the hub's commit; empty for a local folder
    scaling_factor: float  # in its config.json; LATENT_SCALE is used all the same


def find_vae(name: str) -> FoundVae:
    """The VAE `name`: a folder, or a name on the Hugging Face Hub, fetched if it is not cached.

    UserError if it cannot be found or fetched, has no weights, or is not a VAE with 4 channels and
    8 pixels per latent.
    """
    folder, revision = Path(os.path.expanduser(name)), ""
    if not folder.is_dir():
        folder = _fetch(name)
        revision = folder.name  # the hub's cache has a folder per commit
    if not any((folder / file).is_file() for file in WEIGHT_FILES):
        if (folder / "vae" / CONFIG_FILE).is_file():
            raise UserError(f"vae: {folder}: is a whole pipeline; name its VAE, {folder / 'vae'}")
        raise UserError(f"vae: {folder}: has no weights ({' or '.join(WEIGHT_FILES)})")
    return FoundVae(name, folder, revision, _read_scaling_factor(folder / CONFIG_FILE))


@functools.cache  # one commit for the whole process, even if the hub gets a new one meanwhile
def _fetch(name: str) -> Path:
    """The VAE's folder in the hub's cache."""

    def choose(files: list[str]) -> list[str]:
        if CONFIG_FILE not in files and f"vae/{CONFIG_FILE}" in files:
            raise UserError(
                f"{name}: is a whole pipeline; run `hf download {name} --include 'vae/*' "
                "--local-dir FOLDER` and name its VAE, FOLDER/vae"
            )
        # The two files that diffusers needs; a pickle from the hub is never opened.
        return [CONFIG_FILE, WEIGHT_FILES[0]]

    try:
        return hub.fetch(name, choose)
    except UserError as error:
        raise UserError(f"vae: {error}") from error


def _read_scaling_factor(path: Path) -> float:
    """The scaling factor in a VAE's config; UserError if the VAE is not of the supported kind."""
    try:
        described = json.loads(path.read_bytes())
        levels, channels = len(described["block_out_channels"]), described["latent_channels"]
        scaling_factor = float(described.get("scaling_factor") or LATENT_SCALE)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"vae: {path}: does not describe a VAE ({type(error).__name__}: {shorten(error)}); "
            f"a VAE's folder has {CONFIG_FILE} beside its weights"
        ) from error
    pixels = 2 ** (levels - 1)
    if (channels, pixels) != (LATENT_CHANNELS, PIXELS_PER_LATENT):
        raise UserError(
            f"vae: {path}: latents have {channels} channels and {pixels} pixels a side; supported "
            f"are {LATENT_CHANNELS} channels and {PIXELS_PER_LATENT} pixels"
        )
    return scaling_factor


def load_vae(found: FoundVae, device: torch.device) -> nn.Module:
    """The VAE in float32 on `device`, in evaluation mode; UserError if its weights do not fit."""
    from diffusers import AutoencoderKL
    from diffusers.utils import logging

    logging.set_verbosity_error()  # weights that do not fit are refused below
    weights = next(path for name in WEIGHT_FILES if (path := found.folder / name).is_file())
    kind = "not readable"
    try:
        kind = f"it is {identify(weights)}"
        vae, fit = AutoencoderKL.from_pretrained(
            found.folder,
            local_files_only=True,
            low_cpu_mem_usage=False,
            torch_dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported by name in `fit`
        )
    except Exception as error:  # diffusers and safetensors raise many kinds on damaged files
        raise UserError(f"vae: {weights}: cannot be loaded ({shorten(error)}; {kind})") from error
    # diffusers would fill in random weights.
    misfits = {
        "missing": fit["missing_keys"],
        "unexpected": fit["unexpected_keys"],
        "of another shape": [name for name, *_ in fit["mismatched_keys"]],
    }
    listed = [
        f"{len(names)} {kind} ({', '.join(sorted(names)[:MOST_NAMED])})"
        for kind, names in misfits.items()
        if names
    ]
    if listed:
        raise UserError(f"vae: {weights}: does not fit {CONFIG_FILE}: {'; '.join(listed)}")
    return vae.to(device).eval().requires_grad_(False)


@functools.lru_cache(maxsize=1)
def load_on_host(found: FoundVae) -> nn.Module:
    """The VAE in host memory, where it stays between one batch of samples and the next."""
    return load_vae(found, torch.device("cpu"))


@functools.lru_cache(maxsize=1)
def vae_digest(found: FoundVae) -> str:
    """SHA-256 of the VAE's weights, in whichever file format they are stored."""
    return weights_digest(load_on_host(found).state_dict())


def decoder_notes(found: FoundVae, data: Mapping[str, Any]) -> list[str]:
    """What to say before this VAE decodes the latents of a model trained on `data`.

    `data` is the data set's record; one without a VAE says nothing of it.
    """
    notes = scale_notes(found)
    if data.get("vae_sha256", "") not in ("", vae_digest(found)):
        notes.append(
            f"vae: {found.name} has other weights than {data.get('vae')}, which made the latents "
            "that the model was trained on"
        )
    return notes


def scale_notes(found: FoundVae) -> list[str]:
    """A line if the VAE's config names another scale than the one that is used."""
    if found.scaling_factor == LATENT_SCALE:
        return []
    return [
        f"vae: {found.name} has scaling_factor {found.scaling_factor:g} in its {CONFIG_FILE}; its "
        f"latents are scaled by {LATENT_SCALE} all the same"
    ]


@contextlib.contextmanager
def on_device(vae: nn.Module, device: torch.device) -> Iterator[nn.Module]:
    """A block with the VAE on `device`; afterwards it is on the host again."""
    try:
        yield vae.to(device)
    finally:
        vae.to("cpu")
        if device.type == "cuda":
            torch.cuda.empty_cache()


def default_encode_batch(image_size: int) -> int:
    """Images encoded at a time by default: 32 with 256 pixels a side.

    In float32 the activations of one image take 168 MB at 256 pixels, four times that at 512.
    """
    return max(1, ENCODED_PIXELS // image_size**2)


@torch.inference_mode()
def encode(vae: Any, images: Tensor, batch_size: int, is_bf16: bool = False) -> Tensor:
    """Moments [B, 2C, h, w] of images [B, 3, H, W] in -1..1, `batch_size` at a time.

    The posterior's mean comes first, then its standard deviation, both in the VAE's own scale.
    """
    moments = []
    for part in images.split(batch_size):
        with torch.autocast(images.device.type, torch.bfloat16, enabled=is_bf16):
            posterior = vae.encode(part).latent_dist
        # Not the posterior's own std, which autocast may have rounded.
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
    """Images [B, 3, H, W], about -1..1, of x_0 [B, C, h, w], `batch_size` at a time."""
    return torch.cat([vae.decode(part / LATENT_SCALE).sample for part in x_0.split(batch_size)])
