"""Training state on disk: whole files only, found by name, refused with a reason."""

import copy
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from soflow.files import UserError, atomic_write

REFERENCE_KEYS = ("model", "ema_model", "optimizer", "finished_steps", "finished_epochs")


@dataclass
class TrainState:
    """All that training changes: the model, its average, the optimizer and the steps done."""

    model: nn.Module
    ema_model: nn.Module
    optimizer: torch.optim.Optimizer
    finished_steps: int = 0

    @classmethod
    def fresh(cls, model: nn.Module, optimizer: torch.optim.Optimizer) -> "TrainState":
        """The state before the first step: the average is a copy of the model."""
        ema_model = copy.deepcopy(model).eval().requires_grad_(False)
        return cls(model, ema_model, optimizer)

    def state_dict(self, steps_per_epoch: int) -> dict[str, Any]:
        """The five entries of the reference's checkpoints."""
        return {
            "model": self.model.state_dict(),
            "ema_model": self.ema_model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "finished_steps": self.finished_steps,
            "finished_epochs": self.finished_steps // steps_per_epoch,
        }

    def load_state_dict(self, state: Mapping[str, Any], source: str) -> list[str]:
        """Take over a checkpoint's state; returns a line for each optimizer setting that differs.

        Settings (learning rate, betas, weight decay, implementation flags) stay as they are here;
        only what the optimizer has accumulated comes from the file. UserError where it does not
        fit; then nothing has been changed.
        """
        check_weights(self.model, state["model"], source)
        check_weights(self.ema_model, state["ema_model"], source)
        settings = self.optimizer.state_dict()["param_groups"]
        saved = state["optimizer"]
        self._check_optimizer(saved, settings, source)
        self.model.load_state_dict(state["model"])
        self.ema_model.load_state_dict(state["ema_model"])
        self.optimizer.load_state_dict({"state": saved["state"], "param_groups": settings})
        self.finished_steps = state["finished_steps"]
        return [
            f"{key} is {settings[0][key]} now; it was {before} in {source}"
            for key in ("lr", "betas", "weight_decay")
            if (before := saved["param_groups"][0].get(key)) != settings[0][key]
            and before is not None
        ]

    def _check_optimizer(self, saved: Any, settings: list[dict], source: str) -> None:
        try:
            groups = [group["params"] for group in saved["param_groups"]]
            state = saved["state"]
        except (KeyError, TypeError):
            raise UserError(f"{source}: the optimizer state is not an optimizer's") from None
        if groups != [group["params"] for group in settings]:
            raise UserError(
                f"{source}: the optimizer state is of {sum(map(len, groups))} parameters, "
                f"this model has {len(settings[0]['params'])}"
            )
        parameters = self.optimizer.param_groups[0]["params"]
        for index, entry in state.items():
            for name in ("exp_avg", "exp_avg_sq"):
                moment = entry.get(name) if isinstance(entry, dict) else None
                shape = list(moment.shape) if isinstance(moment, torch.Tensor) else "no tensor"
                wanted = list(parameters[index].shape) if index in range(len(parameters)) else None
                if shape != wanted or "step" not in entry:
                    raise UserError(
                        f"{source}: {name} of the optimizer state of parameter {index} "
                        f"has shape {shape}, the parameter {wanted}"
                    )


def checkpoint_path(folder: Path, finished_steps: int) -> Path:
    """Where the checkpoint after `finished_steps` steps is, or would be."""
    return folder / f"{finished_steps}.pt"


def find_checkpoints(folder: Path) -> dict[int, Path]:
    """Finished steps -> file, in ascending order, of all that is named like a checkpoint."""
    if not folder.is_dir():
        return {}
    found = {int(match[1]): path for path in folder.iterdir() if (match := _name(path))}
    return dict(sorted(found.items()))


def _name(path: Path) -> re.Match | None:
    return re.fullmatch(r"(0|[1-9][0-9]*)\.pt", path.name, re.ASCII)


def save_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """Write a checkpoint: tensors, plain types, and dicts and lists of them."""
    with atomic_write(path) as file:
        torch.save(dict(content), file)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint's entries, on the CPU, unpickling nothing but tensors and plain types.

    UserError where the file is absent, damaged, or not a checkpoint of training.
    """
    if not path.is_file():
        raise UserError(f"{path}: {_absence(path)}")
    try:
        # Mapped, not read: inference touches the averaged weights alone.
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises many kinds for damaged files
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else ""
        raise UserError(
            f"{path}: not a readable checkpoint ({type(error).__name__}: {reason})"
        ) from error
    missing = [key for key in REFERENCE_KEYS if not isinstance(state, dict) or key not in state]
    if missing:
        raise UserError(f"{path}: not a training checkpoint, it lacks {', '.join(missing)}")
    for key in ("finished_steps", "finished_epochs"):
        if not isinstance(state[key], int):
            raise UserError(f"{path}: {key} is {type(state[key]).__name__}, not a whole number")
    return state


def newest_checkpoint(
    folder: Path, report: Callable[[str], None]
) -> tuple[Path, dict[str, Any]] | None:
    """The newest readable checkpoint of a run, or None where there are no files named like one.

    Unreadable ones are reported and passed over. UserError where all are unreadable: starting
    afresh over somebody's run must be their decision.
    """
    found = find_checkpoints(folder)
    for path in reversed(found.values()):
        try:
            return path, read_checkpoint(path)
        except UserError as error:
            report(f"passed over: {error}")
    if found:
        raise UserError(f"{folder}: none of its {len(found)} checkpoints can be read")
    return None


def _absence(path: Path) -> str:
    """Why there is no checkpoint at `path`, and what there is instead."""
    if not path.parent.is_dir():
        return f"the folder {path.parent} does not exist"
    steps = ", ".join(map(str, find_checkpoints(path.parent)))
    return f"does not exist; {path.parent} has the steps {steps}" if steps else "does not exist"


def check_weights(model: nn.Module, weights: Any, source: str) -> None:
    """UserError with a readable difference where `weights` are not exactly those of `model`."""
    if not isinstance(weights, Mapping):
        raise UserError(f"{source}: the weights are not a mapping of names to tensors")
    if not all(isinstance(tensor, torch.Tensor) for tensor in weights.values()):
        raise UserError(f"{source}: some of the weights are no tensors")
    expected = model.state_dict()
    missing = [name for name in expected if name not in weights]
    surplus = [name for name in weights if name not in expected]
    reshaped = [
        f"{name} {list(weights[name].shape)} in the file, {list(tensor.shape)} in the model"
        for name, tensor in expected.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    differences = [
        f"{len(names)} {kind} ({names[0]}{', ...' if len(names) > 1 else ''})"
        for kind, names in (
            ("missing", missing),
            ("not in the model", surplus),
            ("of another shape", reshaped),
        )
        if names
    ]
    if differences:
        raise UserError(f"{source}: weights of another model: {'; '.join(differences)}")
