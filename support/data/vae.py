"""The autoencoder, or VAE, between images and latents: find it, load it, compare it.

diffusers takes seconds to import, so it is imported only where an autoencoder is loaded.
"""

import contextlib
import copy
import functools
import importlib.util
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from support.data.autoencoders import KINDS, LatentForm, kind_of
from support.system import hub
from support.system.digests import weights_digest
from support.system.files import UserError, identify, shorten

VAE_NAME = "stabilityai/sd-vae-ft-mse"
MOST_NAMED = 5

CONFIG_FILE = "config.json"
WEIGHT_FILES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")


@dataclass(frozen=True)
class FoundVae:
    """A VAE whose files are on this machine."""

    name: str  # as the user named it
    folder: Path
    revision: str  # the hub's commit; empty for a local folder
    vae_class: str  # of KINDS


def find_vae(name: str) -> FoundVae:
    """The VAE `name`: a folder, or a name on the Hugging Face Hub, fetched if it is not cached.

    UserError if it cannot be found or fetched, has no weights, or is of a class not in KINDS.
    """
    folder, revision = Path(os.path.expanduser(name)), ""
    if not folder.is_dir():
        folder = _fetch(name)
        revision = folder.name  # the hub's cache has a folder per commit
    if not any((folder / file).is_file() for file in WEIGHT_FILES):
        if (folder / "vae" / CONFIG_FILE).is_file():
            raise UserError(f"vae: {folder}: is a whole pipeline; name its VAE, {folder / 'vae'}")
        raise UserError(f"vae: {folder}: has no weights ({' or '.join(WEIGHT_FILES)})")
    return FoundVae(name, folder, revision, _read_class(folder / CONFIG_FILE))


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


def _read_class(path: Path) -> str:
    """The class in an autoencoder's config; UserError if it is none of KINDS."""
    try:
        vae_class = json.loads(path.read_bytes()).get("_class_name", "AutoencoderKL")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(
            f"vae: {path}: does not describe a VAE ({type(error).__name__}: {shorten(error)}); "
            f"a VAE's folder has {CONFIG_FILE} beside its weights"
        ) from error
    if vae_class not in [*KINDS]:
        raise UserError(
            f"vae: {path}: {shorten(vae_class)} is not an autoencoder of images that is known "
            f"here; these are {', '.join(KINDS)}"
        )
    return vae_class


def load_vae(found: FoundVae, device: torch.device) -> nn.Module:
    """The VAE in float32 on `device`, in evaluation mode; UserError if its weights do not fit."""
    from diffusers.utils import logging

    kind = KINDS[found.vae_class]
    if kind.needs and importlib.util.find_spec(kind.needs) is None:
        raise UserError(
            f"vae: {found.folder}: {found.vae_class} needs the package {kind.needs}: "
            f"`pip install {kind.needs}`"
        )
    logging.set_verbosity_error()  # weights that do not fit are refused below
    weights = next(path for name in WEIGHT_FILES if (path := found.folder / name).is_file())
    content = "not readable"
    try:
        content = f"it is {identify(weights)}"
        model_class = getattr(importlib.import_module(kind.module), found.vae_class)
        vae, fit = model_class.from_pretrained(
            found.folder,
            local_files_only=True,
            low_cpu_mem_usage=False,
            torch_dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported by name in `fit`
        )
    except Exception as error:  # diffusers and safetensors raise many kinds on damaged files
        raise UserError(
            f"vae: {weights}: cannot be loaded ({shorten(error)}; {content})"
        ) from error
    # diffusers would fill in random weights.
    misfits = {
        "missing": fit["missing_keys"],
        "unexpected": fit["unexpected_keys"],
        "of another shape": [name for name, *_ in fit["mismatched_keys"]],
    }
    listed = [
        f"{len(names)} {misfit} ({', '.join(sorted(names)[:MOST_NAMED])})"
        for misfit, names in misfits.items()
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


def decoder_notes(found: FoundVae, data: Mapping[str, Any], shape: Sequence[int]) -> list[str]:
    """What to say before this VAE decodes x_0, [C, h, w] of `shape`, of a model trained on `data`.

    `data` is the data set's record. UserError if the VAE does not take such latents.
    """
    refuse_misfit(found, LatentForm.of_record(data), shape)
    if data.get("vae_sha256", "") in ("", vae_digest(found)):
        return []
    return [
        f"vae: {found.name} has other weights than {data.get('vae')}, which made the latents that "
        "the model was trained on"
    ]


def refuse_misfit(found: FoundVae, form: LatentForm, shape: Sequence[int]) -> None:
    """UserError if this VAE makes no pictures, or pictures of another size, of these latents."""
    wrong = f"vae: {found.name}, {found.vae_class}, does not fit latents {[*shape]} of "
    wrong += form.vae_class
    if found.vae_class != form.vae_class:
        raise UserError(wrong)
    vae = load_on_host(found)
    # A copy without numbers, which computes shapes alone and in no time.
    tensors = [*vae.parameters(), *vae.buffers()]
    hollow = copy.deepcopy(vae, {id(one): one.to("meta") for one in tensors})
    try:
        with torch.inference_mode():
            images = kind_of(hollow).decode(hollow, torch.zeros(1, *shape, device="meta"))
    except Exception as error:  # each class has its own ways to fail
        raise UserError(f"{wrong} ({shorten(error)})") from error
    side = form.pixels_per_latent * shape[-1]
    if images.shape[1:] != (3, side, side):
        raise UserError(f"{wrong}: it makes {list(images.shape[1:])} of them, not {side} x {side}")


@contextlib.contextmanager
def on_device(vae: nn.Module, device: torch.device) -> Iterator[nn.Module]:
    """A block with the VAE on `device`; afterwards it is on the host again."""
    try:
        yield vae.to(device)
    finally:
        vae.to("cpu")
        if device.type == "cuda":
            torch.cuda.empty_cache()
