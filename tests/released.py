"""Folders laid out like the released ones."""

from pathlib import Path

import torch

LATENT_KEYS = """
noising_type: Linear
coefficient_type: Euler
model_type: DiT-Nano-4
dataset_type: Imagenet
data_size: 32
cfg_scale: 3.0
mix_ratio: 0.25
cfg_drop_rate: 0.1
cfg_decay_time: 0.8
total_steps: 1200000
ema_decay_rate: 0.9999
learning_rate: 1e-4
num_workers: 8
prefetch_factor: 4
"""
UNET_KEYS = """
noising_type: Linear
coefficient_type: Euler
model_type: UNet
dataset_type: CIFAR10
dataset_path: ./data
data_size: 32
velocity_loss_ratio: 0.0
p: 0.75
eps: 0.001
time_mean: [-0.9, -4.0, -0.9]
time_std: [1.6, 1.6, 1.6]
cfg_scale: 1.0
cfg_drop_rate: 0
l_init_ratio: 1.0
l_end_ratio: 0.0003125
total_steps: 800000
learning_rate: 1e-4
betas: [0.9, 0.999]
batch_size: 1024
"""


def release(folder: Path, name: str, keys: str, steps: int, model, optimizer) -> None:
    """`SoFlow/{name}` as published: a config and a checkpoint of the reference's five keys."""
    place = folder / "SoFlow" / name
    (place / "ckpts").mkdir(parents=True)
    (place / "config.yaml").write_text(f"working_dir: SoFlow/{name}{keys}")
    torch.save(
        {
            "model": model.state_dict(),
            "ema_model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "finished_steps": steps,
            "finished_epochs": steps // 5004,
        },
        place / "ckpts" / f"{steps}.pt",
    )
