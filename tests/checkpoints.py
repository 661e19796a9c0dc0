"""Checkpoints to make, to read and to compare."""

import json
from pathlib import Path

import torch
from torch import nn

from support.runs.checkpoint import TrainState, save_checkpoint


def load(folder: Path, step: int) -> dict:
    """The entries of a run's checkpoint."""
    return torch.load(folder / "ckpts" / f"{step}.pt", weights_only=True)


def state_of(checkpoint: dict) -> dict:
    """The entries that must be equal in equal runs: not the config, whose working_dir differs."""
    return {key: value for key, value in checkpoint.items() if key != "config"}


def assert_equal(one, other, at: str = "checkpoint") -> None:
    """Equal bit for bit, through all containers."""
    assert type(one) is type(other), at
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), at
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), at
        for key in one:
            assert_equal(one[key], other[key], f"{at}/{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), at
        for index, pair in enumerate(zip(one, other, strict=True)):
            assert_equal(*pair, f"{at}/{index}")
    else:
        assert one == other, at


def numbers_of(folder: Path) -> list[dict]:
    """The lines of metrics.jsonl without the numbers that differ between equal runs."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    varying = {"Memory_GB", "Seconds", "Images_Per_Second", "Time"}
    assert all(varying < line.keys() for line in lines)
    return [{k: v for k, v in line.items() if k not in varying} for line in lines]


# A training state that is small and quick


def fresh_state(width: int = 3, **options) -> TrainState:
    torch.manual_seed(width)
    model = nn.Sequential(nn.Linear(2, width), nn.Linear(width, 1))
    return TrainState.fresh(model, torch.optim.AdamW(model.parameters(), **options))


def step(state: TrainState) -> None:
    state.model(torch.ones(4, 2)).square().sum().backward()
    state.optimizer.step()
    state.optimizer.zero_grad()
    state.finished_steps += 1


def save(state: TrainState, path: Path) -> None:
    save_checkpoint(path, {**state.state_dict(steps_per_epoch=2), "data": {"names": ["a", "b"]}})
