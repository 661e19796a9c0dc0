"""The golden numbers beside this file, and the rule that fills a network's weights for them."""

import json
import zlib
from pathlib import Path

import numpy as np
import torch

FOLDER = Path(__file__).parent / "golden"


def manifest() -> dict[str, list]:
    """Model type -> [name, shape, dtype, kind] of each state-dict entry, in order."""
    return json.loads((FOLDER / "state_dict_manifest.json").read_text())


def initial_std() -> dict[str, dict[str, list[float]]]:
    """Model type -> name -> [mean, standard deviation, elements] at initialisation."""
    return json.loads((FOLDER / "initial_std.json").read_text())


def load(name: str) -> tuple[dict[str, torch.Tensor], dict]:
    """The arrays of `golden/{name}.npz` as tensors, and its settings."""
    with np.load(FOLDER / f"{name}.npz") as archive:
        meta = json.loads(str(archive["meta"])) if "meta" in archive else {}
        arrays = {k: torch.from_numpy(archive[k]) for k in archive.files if k != "meta"}
    return arrays, meta


def fill_weights(network: torch.nn.Module) -> None:
    """Give every tensor of `network` the value that golden/README.md derives from its name."""
    for name, tensor in network.state_dict().items():
        if name.endswith(("pos_embed", "resample_filter")):
            continue
        source = np.random.RandomState(zlib.crc32(name.encode()))
        draw = torch.from_numpy(source.standard_normal(tuple(tensor.shape)).astype(np.float32))
        if tensor.dim() >= 2:
            value = 0.02 * draw
        else:
            value = 0.05 * draw + float("norm" in name and name.endswith("weight"))
        tensor.copy_(value)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """||actual - expected|| / ||expected|| over the whole array."""
    return ((actual - expected).norm() / expected.norm()).item()
