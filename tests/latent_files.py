"""Latent files, small, in the published code's form and in ours."""

from pathlib import Path

import h5py
import numpy as np

from support.data.latents import LATENT_FILE, LatentInfo, locate_latents, write_frame
from support.data.vae import VAE_NAME

INFO = LatentInfo(
    vae=VAE_NAME, vae_revision="c" * 40, vae_sha256="0" * 64, latent_scale=0.18215, image_size=32,
    dtype="float32", seed=42, images_sha256="1" * 64, class_names=("cat", "dog", "fish"),
    class_counts=(4, 4, 4), code_version="test",
)  # fmt: skip


def some_moments(count: int = 12, size: int = 4) -> np.ndarray:
    """float32 [count, 8, size, size], with the deviation of unscaled latents."""
    mean = 5 * np.random.default_rng(0).standard_normal((count, 4, size, size))
    return np.concatenate([mean, np.abs(mean) + 0.1], axis=1).astype(np.float32)


def write_reference_form(
    folder: Path, moments: np.ndarray | None = None, labels: object = None, **options: object
) -> Path:
    """The file as the published code writes it: contiguous, no attributes."""
    moments = some_moments() if moments is None else moments
    labels = np.arange(len(moments)) % 3 if labels is None else labels
    folder.mkdir(exist_ok=True)
    with h5py.File(folder / LATENT_FILE, "w") as file:
        file.create_dataset("latents", data=moments, **options)
        file.create_dataset("labels", data=np.asarray(labels, np.int64))
        file.create_dataset("amount", data=np.int64(len(moments)))
        file.create_dataset("latent_size", data=np.int64(moments.shape[-1]))
    return folder / LATENT_FILE


def write_ours(folder: Path, moments: np.ndarray | None = None, **info: object) -> Path:
    """The file as latent_dataset.py writes it."""
    moments = some_moments() if moments is None else moments
    folder.mkdir(exist_ok=True)
    path = folder / LATENT_FILE
    values = {**vars(INFO), **info}
    with open(path, "wb") as file:
        write_frame(file, np.arange(len(moments)) % 3, LatentInfo(**values))
    with open(path, "r+b") as file:
        file.seek(locate_latents(path)[0])
        file.write(moments.astype(values["dtype"]).tobytes())
    return path
