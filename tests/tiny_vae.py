"""Autoencoders of each class, small enough to make and run in a test."""

import importlib.util
from pathlib import Path
from unittest import mock

import torch
from torch import nn

KL = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (8,) * 4,
    "norm_num_groups": 4,
    "latent_channels": 4,
}
DC = {
    **{f"{half}_block_types": ("ResBlock", "EfficientViTBlock") for half in ("encoder", "decoder")},
    **{f"{half}_block_out_channels": (8, 16) for half in ("encoder", "decoder")},
    **{f"{half}_layers_per_block": (1, 1) for half in ("encoder", "decoder")},
    **{f"{half}_qkv_multiscales": ((), (5,)) for half in ("encoder", "decoder")},
    "latent_channels": 8,
    "attention_head_dim": 4,
}
TINY = {
    **{f"{half}_block_out_channels": (8,) * 4 for half in ("encoder", "decoder")},
    **{f"num_{half}_blocks": (1,) * 4 for half in ("encoder", "decoder")},
}
RAE = {
    "encoder_hidden_size": 64,
    "encoder_patch_size": 8,
    "encoder_num_hidden_layers": 1,
    "decoder_hidden_size": 32,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 32,
    "patch_size": 8,
    "encoder_input_size": 32,
}
HALVED = {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
}
ASYMMETRIC = {**HALVED, "down_block_out_channels": (8, 8), "up_block_out_channels": (8, 8)}
HUNYUAN = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": (32, 32),
    "layers_per_block": 1,
    "spatial_compression_ratio": 2,
    "sample_size": 32,
}
SETTINGS = {
    "AsymmetricAutoencoderKL": ASYMMETRIC,
    "AutoencoderKLHunyuanImage": HUNYUAN,
    "AutoencoderKLKVAE": {"channels": 32, "ch_mult": (1, 1), "z_channels": 4},
    "VQModel": {**HALVED, "block_out_channels": (8, 8), "latent_channels": 3},
    "AutoencoderKL": KL,
    "AutoencoderKLFlux2": {**KL, "latent_channels": 6},
    "AutoencoderDC": DC,
    "AutoencoderTiny": TINY,
    "AutoencoderRAE": RAE,
}


def make_tiny_vae(
    folder: Path, seed: int = 0, vae_class: str = "AutoencoderKL", **settings: object
) -> Path:
    """Save an autoencoder of random weights to `folder`, and return it."""
    import diffusers

    torch.manual_seed(seed)
    getattr(diffusers, vae_class)(**{**SETTINGS[vae_class], **settings}).save_pretrained(folder)
    return folder


def with_an_encoder_of_rae():
    """A block with a stand-in for AutoencoderRAE's encoder, if `transformers` is not there."""
    if importlib.util.find_spec("transformers"):
        return mock.patch.dict({}, {})
    from diffusers.models.autoencoders import autoencoder_rae

    return mock.patch.multiple(
        autoencoder_rae,
        _build_encoder=lambda hidden_size, patch_size, **_: nn.Conv2d(
            3, hidden_size, patch_size, patch_size
        ),
        _ENCODER_FORWARD_FNS={
            "dinov2": lambda encoder, images: encoder(images).flatten(2).transpose(1, 2)
        },
    )
