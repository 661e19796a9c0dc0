"""A VAE of the right kind, small enough to make and run in a test."""

from pathlib import Path

import torch


def make_tiny_vae(folder: Path, seed: int = 0, **settings: object) -> Path:
    """Save an AutoencoderKL of random weights to `folder`, and return it."""
    from diffusers import AutoencoderKL

    kinds = {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (8,) * 4,
        "norm_num_groups": 4,
        "latent_channels": 4,
    }
    torch.manual_seed(seed)
    AutoencoderKL(**{**kinds, **settings}).save_pretrained(folder)
    return folder
