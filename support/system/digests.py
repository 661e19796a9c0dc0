"""SHA-256 digests of weights and settings, by which records name them."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch


def weights_digest(weights: Mapping[str, torch.Tensor]) -> str:
    """Digest of a state dict's names and values, however they are stored."""
    digest = hashlib.sha256()
    for name, tensor in weights.items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def settings_digest(settings: Mapping[str, Any]) -> str:
    """Digest of a config's plain values."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
