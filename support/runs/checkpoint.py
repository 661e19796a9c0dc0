"""Training state on disk: whole files only, found by name, refused with a reason."""

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
from support.system.files import UserError, atomic_write, numbered_files, shorten

REFERENCE_KEYS = ("model", "ema_model", "optimizer", "finished_steps", "finished_epochs")
RECORDS = ("config", "data", "parts", "interval", "averages", "started_from")  # what we add

Model = TypeVar("Model", bound=nn.Module)


@dataclass
class TrainState(Generic[Model]):
    """All that training changes: the model, its averages, the optimizer and the steps done."""

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
        """The state before the first step: the averages, further ones by name, copy the model."""

        def copied() -> Model:
            return copy.deepcopy(model).eval().requires_grad_(False)

        return cls(model, copied(), optimizer, averages={name: copied() for name in names})

    def restart_averages(self) -> None:
        """Make the averages copies of the model, as they are before the first step."""
        for averaged in (self.ema_model, *self.averages.values()):
            averaged.load_state_dict(self.model.state_dict())

    def state_dict(self, steps_per_epoch: int) -> dict[str, Any]:
        """The five entries of the reference's checkpoints, and what there is besides."""
        further = {name: averaged.state_dict() for name, averaged in self.averages.items()}
        return {
            "model": self.model.state_dict(),
            "ema_model": self.ema_model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "finished_steps": self.finished_steps,
            "finished_epochs": self.finished_steps // steps_per_epoch,
            **({"averages": further} if further else {}),
            **({"started_from": self.started_from} if self.started_from else {}),
        }

    def load_state_dict(self, state: Mapping[str, Any], source: str) -> list[str]:
        """Take over a checkpoint's state; returns a line for each optimizer setting that differs.

        An average that the file lacks starts as its ema_model. Settings (learning rate, betas,
        weight decay, implementation flags) stay as they are here; only what the optimizer has
        accumulated comes from the file. UserError where it does not fit; then nothing has been
        changed.
        """
        self.check(state, source)
        settings = self.optimizer.state_dict()["param_groups"]
        saved = state["optimizer"]
        self.model.load_state_dict(state["model"])
        self.ema_model.load_state_dict(state["ema_model"])
        self.optimizer.load_state_dict({"state": saved["state"], "param_groups": settings})
        self.finished_steps = state["finished_steps"]
        self.started_from = state.get("started_from", {})
        before, now = saved["param_groups"][0], settings[0]
        for name, averaged in self.averages.items():
            averaged.load_state_dict(state.get("averages", {}).get(name, state["ema_model"]))
        return [
            f"{key} is {_in_yaml(now[key])} now; it was {_in_yaml(before[key])} in {source}"
            for key in ("lr", "betas", "weight_decay")
            if key in before and _in_yaml(before[key]) != _in_yaml(now[key])
        ]

    def check(self, state: Mapping[str, Any], source: str) -> None:
        """UserError where a checkpoint's state is not one of this model and optimizer."""
        check_weights(self.model, state["model"], source)
        check_weights(self.ema_model, state["ema_model"], source)
        for name in self.averages.keys() & state.get("averages", {}).keys():
            check_weights(self.ema_model, state["averages"][name], f"{source}: average {name}")
        self._check_optimizer(state["optimizer"], source)

    def _check_optimizer(self, saved: Any, source: str) -> None:
        settings = self.optimizer.state_dict()["param_groups"]
        try:
            groups = [list(group["params"]) for group in saved["param_groups"]]
            shapes = {
                (index, name): list(entry[name].shape)
                for index, entry in saved["state"].items()
                for name in ("exp_avg", "exp_avg_sq")
            }
        except (KeyError, TypeError, AttributeError):
            raise UserError(f"{source}: the optimizer state is not an optimizer's") from None
        if groups != [group["params"] for group in settings]:
            raise UserError(
                f"{source}: the optimizer state is of {sum(map(len, groups))} parameters, "
                f"this model has {len(settings[0]['params'])}"
            )
        parameters = enumerate(self.optimizer.param_groups[0]["params"])
        wanted = {index: list(parameter.shape) for index, parameter in parameters}
        for (index, name), shape in shapes.items():
            if shape != wanted.get(index):
                raise UserError(
                    f"{source}: {name} of the optimizer state of parameter {index} has shape "
                    f"{shape}, the parameter {wanted.get(index)}"
                )


def _in_yaml(value: Any) -> Any:
    """An optimizer's setting, a pair as a list: that is how published checkpoints have it."""
    return list(value) if isinstance(value, tuple) else value


def checkpoint_path(folder: Path, finished_steps: int) -> Path:
    """Where the checkpoint after `finished_steps` steps is, or would be."""
    return folder / f"{finished_steps}.pt"


def find_checkpoints(folder: Path) -> dict[int, Path]:
    """Finished steps -> file, in ascending order, of all that is named like a checkpoint."""
    return numbered_files(folder, ".pt")


def run_of_config(path: Path) -> Path | None:
    """The folder of the run that a config lies in, beside ckpts/; None where it lies elsewhere."""
    return path.parent if (path.parent / "ckpts").is_dir() else None


def run_of_checkpoint(path: Path) -> Path | None:
    """The folder of the run in whose ckpts/ a checkpoint lies; None where it lies elsewhere."""
    folder = path.parent if path.parent.name else path.absolute().parent
    return folder.parent if folder.name == "ckpts" else None


def host_copy(content: Any) -> Any:
    """`content` with tensors of its own in host memory, which training does not change any more."""
    if isinstance(content, torch.Tensor):
        return content.detach().to("cpu", copy=True)
    if isinstance(content, Mapping):
        return {key: host_copy(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return type(content)(map(host_copy, content))
    return content


def refuse_non_finite(content: Mapping[str, Any]) -> None:
    """UserError where weights that are to be saved are not finite, whatever the gradients were."""
    parts = {name: content[name] for name in ("model", "ema_model") if name in content}
    for part, weights in (parts | content.get("averages", {})).items():
        broken = [name for name, value in weights.items() if not value.isfinite().all()]
        if broken:
            raise UserError(
                f"step {content['finished_steps']}: {len(broken)} of the weights in {part} not "
                f"finite ({shorten(broken[0])}); nothing of it is saved; what the run went on from "
                f"may be broken, or the learning_rate too high"
            )


def save_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """Write a checkpoint: tensors, plain types, and dicts and lists of them."""
    with atomic_write(path) as file:
        try:
            torch.save(dict(content), file)
        except RuntimeError as error:
            # Closing its archive, torch raises another error over that of a write.
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def read_checkpoint(
    path: Path, is_verified: bool = False, needed: Sequence[str] = REFERENCE_KEYS
) -> dict[str, Any]:
    """A checkpoint's entries, on the CPU, unpickling nothing but tensors and plain types.

    Reads all of the file to compare its checksums, unless somebody has just verified it. UserError
    where the file is absent, damaged, or lacks an entry that is needed.
    """
    if not path.is_file():
        raise UserError(f"{path}: {_absence(path)}")
    try:
        if not zipfile.is_zipfile(path):
            raise UserError(f"{path}: not a readable checkpoint (torch.save writes other files)")
        if not is_verified:
            _check_sums(path)
        # Mapped, not held: inference keeps the averaged weights alone.
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except UserError:
        raise
    except pickle.UnpicklingError as error:  # which says how to run what is in the file
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
    for key in ("finished_steps", "finished_epochs"):
        if not isinstance(state.get(key, 0), int):
            raise UserError(f"{path}: {key} is {type(state[key]).__name__}, not a whole number")
    for key in RECORDS:
        if not isinstance(state.get(key, {}), dict):
            raise UserError(f"{path}: its entry `{key}` is damaged")
    return state


def _check_sums(path: Path) -> None:
    """UserError where the bytes are not those that were written, by the archive's own CRC-32s."""
    with zipfile.ZipFile(path) as archive:
        # Before any of them is read: what is packed can be of any size.
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
    if not isinstance(weights, Mapping):
        raise UserError(f"{source}: the weights are not a mapping of names to tensors")
    if not all(isinstance(tensor, torch.Tensor) for tensor in weights.values()):
        raise UserError(f"{source}: some of the weights are no tensors")
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
