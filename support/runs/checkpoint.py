"""Checkpoints: training state in one file, found by name, checked, refused with a reason."""

import copy
import pickle
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from support.runs.metrics import Interval
from support.system.files import UserError, atomic_write, identify, numbered_files, shorten

REFERENCE_KEYS = ("model", "ema_model", "optimizer", "finished_steps", "finished_epochs")

Model = TypeVar("Model", bound=nn.Module)


@dataclass
class TrainState(Generic[Model]):
    """Everything that training changes: the model, its averages, the optimizer, the step."""

    model: Model
    ema_model: Model
    optimizer: torch.optim.Optimizer
    finished_steps: int = 0
    interval: Interval = field(default_factory=Interval)  # metrics since the last log line
    averages: dict[str, Model] = field(default_factory=dict)  # besides ema_model, by name
    started_from: dict[str, Any] = field(default_factory=dict)  # another model, if any

    @classmethod
    def fresh(
        cls, model: Model, optimizer: torch.optim.Optimizer, names: Iterable[str] = ()
    ) -> "TrainState[Model]":
        """The state before the first step: each average, those in `names` too, copies the model."""

        def copied() -> Model:
            return copy.deepcopy(model).eval().requires_grad_(False)

        return cls(model, copied(), optimizer, averages={name: copied() for name in names})

    def restart_averages(self) -> None:
        """Make the averages copies of the model, as before the first step."""
        for averaged in (self.ema_model, *self.averages.values()):
            averaged.load_state_dict(self.model.state_dict())

    def state_dict(self, steps_per_epoch: int) -> dict[str, Any]:
        """The five entries of the reference's checkpoints, and our own where they say something."""
        further = {name: averaged.state_dict() for name, averaged in self.averages.items()}
        return {
            "model": self.model.state_dict(),
            "ema_model": self.ema_model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "finished_steps": self.finished_steps,
            "finished_epochs": self.finished_steps // steps_per_epoch,
            **({"averages": further} if further else {}),
        }

    def load_state_dict(self, state: Mapping[str, Any], source: str) -> list[str]:
        """Load a checkpoint's entries; returns a line for each optimizer setting that differs.

        An average that is missing there starts as its ema_model. The optimizer keeps its settings
        (learning rate, betas, weight decay); the checkpoint gives its moments and step counts.
        UserError, before anything has changed, where the entries do not fit.
        """
        self.check(state, source)
        settings = self.optimizer.state_dict()["param_groups"]
        saved = state["optimizer"]
        self.model.load_state_dict(state["model"])
        self.ema_model.load_state_dict(state["ema_model"])
        self.optimizer.load_state_dict({"state": saved["state"], "param_groups": settings})
        self.finished_steps = state["finished_steps"]
        self.started_from = state.get("started_from", {})
        for name, averaged in self.averages.items():
            averaged.load_state_dict(state.get("averages", {}).get(name, state["ema_model"]))
        before, now = map(_as_yaml, (saved["param_groups"][0], settings[0]))
        return [
            f"{key} is {now[key]} now; it was {before[key]} in {source}"
            for key in ("lr", "betas", "weight_decay")
            if key in before and before[key] != now[key]
        ]

    def check(self, state: Mapping[str, Any], source: str) -> None:
        """UserError where a checkpoint's entries do not fit this model and optimizer."""
        check_weights(self.model, state["model"], source)
        check_weights(self.ema_model, state["ema_model"], source)
        for name in self.averages.keys() & state.get("averages", {}).keys():
            check_weights(self.ema_model, state["averages"][name], f"{source}: average {name}")
        self._check_optimizer(state["optimizer"], source)

    def _check_optimizer(self, saved: Any, source: str) -> None:
        parameters = self.optimizer.param_groups[0]["params"]
        expected = {index: list(p.shape) for index, p in enumerate(parameters)}
        try:
            indices = [list(group["params"]) for group in saved["param_groups"]]
            misfits = [
                f"{name} of parameter {index} has shape {list(entry[name].shape)}, "
                f"the parameter {expected.get(index)}"
                for index, entry in saved["state"].items()
                for name in ("exp_avg", "exp_avg_sq")
                if list(entry[name].shape) != expected.get(index)
            ]
        except (KeyError, TypeError, AttributeError):
            raise UserError(f"{source}: its entry `optimizer` is no optimizer's state") from None
        if indices != [list(expected)]:
            misfits = [f"it is of {sum(map(len, indices))} parameters, not {len(expected)}"]
        if misfits:
            raise UserError(f"{source}: the optimizer state does not fit the model: {misfits[0]}")


def _as_yaml(settings: Mapping[str, Any]) -> dict[str, Any]:
    """An optimizer's settings with pairs as lists, as in published checkpoints."""
    return {key: list(v) if isinstance(v, tuple) else v for key, v in settings.items()}


# Names and places


def find_checkpoints(folder: Path) -> dict[int, Path]:
    """Finished steps -> file, in ascending order, of everything with a checkpoint's name."""
    return numbered_files(folder, ".pt")


def run_of_config(path: Path) -> Path | None:
    """The folder of the run whose config this is: it has ckpts/ beside it; else None."""
    return path.parent if (path.parent / "ckpts").is_dir() else None


def run_of_checkpoint(path: Path) -> Path | None:
    """The folder of the run whose ckpts/ has this checkpoint; else None."""
    folder = path.parent if path.parent.name else path.absolute().parent
    return folder.parent if folder.name == "ckpts" else None


# Writing


def host_copy(content: Any) -> Any:
    """`content` with its tensors copied to host memory, out of the reach of training."""
    if isinstance(content, torch.Tensor):
        return content.detach().to("cpu", copy=True)
    if isinstance(content, Mapping):
        return {key: host_copy(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return type(content)(map(host_copy, content))
    return content


def refuse_non_finite(content: Mapping[str, Any]) -> None:
    """UserError where some of the weights to be saved are not finite."""
    parts = {name: content[name] for name in ("model", "ema_model") if name in content}
    for part, weights in (parts | content.get("averages", {})).items():
        broken = [name for name, value in weights.items() if not value.isfinite().all()]
        if broken:
            raise UserError(
                f"step {content['finished_steps']}: {len(broken)} of the weights in {part} are not "
                f"finite ({shorten(broken[0])}); nothing was saved; the checkpoint that the run "
                "continued from may be broken, or the learning_rate too high"
            )


def save_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """Write a checkpoint: tensors, plain types, and dicts and lists of them."""
    with atomic_write(path) as file:
        try:
            torch.save(dict(content), file)
        except RuntimeError as error:
            # When torch closes its archive, it raises another error over that of the write.
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


# Reading


def read_checkpoint(
    path: Path, is_verified: bool = False, needed: Sequence[str] = REFERENCE_KEYS
) -> dict[str, Any]:
    """A checkpoint's entries, on the CPU; unpickles only tensors and plain types.

    Compares the checksums of the whole file, unless `is_verified`; then tensors are read from the
    file when they are used. UserError where the file is absent or damaged, or lacks an entry.
    """
    if not path.is_file():
        raise UserError(f"{path}: {_absence(path)}")
    try:
        if not zipfile.is_zipfile(path):
            raise UserError(f"{path}: not a readable checkpoint; it is {identify(path)}")
        if not is_verified:
            _check_sums(path)
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except UserError:
        raise
    except pickle.UnpicklingError as error:  # its text tells how to run the code in the file
        raise UserError(
            f"{path}: not a readable checkpoint (it holds more than tensors and plain types)"
        ) from error
    except Exception as error:  # torch raises many kinds for damaged files
        raise UserError(
            f"{path}: not a readable checkpoint ({type(error).__name__}: {shorten(error)})"
        ) from error
    if not isinstance(state, dict):
        raise UserError(f"{path}: not a training checkpoint, but a {type(state).__name__}")
    if missing := [key for key in needed if key not in state]:
        raise UserError(f"{path}: not a training checkpoint, it lacks {', '.join(missing)}")
    return state


def _check_sums(path: Path) -> None:
    """UserError where the file's bytes do not match the CRC-32s of its archive."""
    with zipfile.ZipFile(path) as archive:
        # Before any part is read: compressed, it could be of any size.
        if sum(member.file_size for member in archive.infolist()) > path.stat().st_size:
            raise UserError(f"{path}: not a readable checkpoint (compressed; torch.save does not)")
        damaged = archive.testzip()
    if damaged is not None:
        raise UserError(f"{path}: damaged (the checksum of its part {shorten(damaged)} is wrong)")


def _absence(path: Path) -> str:
    """Why there is no checkpoint at `path`, and what there is instead."""
    if not path.parent.is_dir():
        return f"the folder {path.parent} does not exist"
    if path.is_dir():
        found = find_checkpoints(path) or find_checkpoints(path / "ckpts")
        newest = list(found.values())[-1:]
        return f"is a folder; its newest checkpoint is {newest[0]}" if newest else "is a folder"
    if path.exists():
        return "not a file"
    steps = ", ".join(map(str, find_checkpoints(path.parent)))
    return f"does not exist; {path.parent} has the steps {steps}" if steps else "does not exist"


def check_weights(model: nn.Module, weights: Any, source: str) -> None:
    """UserError with a readable difference where `weights` are not exactly those of `model`."""
    if not isinstance(weights, Mapping) or not all(map(torch.is_tensor, weights.values())):
        raise UserError(f"{source}: the weights are not a mapping of names to tensors")
    expected = model.state_dict()
    differing = {
        "missing": [shorten(name) for name in expected if name not in weights],
        "not in the model": [shorten(name) for name in weights if name not in expected],
        "of another shape": [
            f"{name}: {list(weights[name].shape)} in the file, {list(tensor.shape)} in the model"
            for name, tensor in expected.items()
            if name in weights and weights[name].shape != tensor.shape
        ],
    }
    differences = [
        f"{len(names)} {kind} ({names[0]}{', ...' if len(names) > 1 else ''})"
        for kind, names in differing.items()
        if names
    ]
    if differences:
        raise UserError(f"{source}: weights of another model: {'; '.join(differences)}")
