"""A trained model as it is stored: in a run's folder, a checkpoint, an exported folder, on the hub.

An exported folder has averaged weights as model.safetensors and config.json beside them: `config`
and `data` as in a checkpoint, `finished_steps`, `average`, which says of several averages the one
it is, `started_from`, of a run that began with another model's weights, and `file_sha256`, of the
weights' file.
"""

import json
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from support.runs import hub
from support.runs.averages import find_average
from support.runs.checkpoint import find_checkpoints, read_checkpoint, run_of_checkpoint
from support.system.files import UserError, sha256_of, shorten
from support.system.settings import read_yaml

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"


@dataclass(frozen=True)
class StoredModel:
    """Averaged weights, and what says which model they are of."""

    path: Path  # the file that they are in
    weights: Mapping[str, Tensor]
    config: Mapping[str, Any]  # recorded values of the config's keys; none where nothing says them
    data: Mapping[str, Any] = field(default_factory=dict)  # the data set's record
    finished_steps: int = 0
    average: str = ""  # its name, where it is not the one that the reference keeps
    started_from: Mapping[str, Any] = field(default_factory=dict)  # the model it began as, if any


def read_stored(source: str | Path, subfolder: str = "", ema: str = "") -> StoredModel:
    """The model at `source`: a run's folder, of which it is the newest, or any other place of one.

    `ema` names one of several averages, such as 0.999. A name on the Hugging Face Hub is fetched
    into the hub's cache, its weights and config alone. UserError where there is no model, or it is
    damaged.
    """
    path = find_file(source, subfolder)
    stored = read_file(path, ema)
    if stored.config:
        return stored
    # As released models have it.
    run = run_of_checkpoint(path)
    if run is None or not (run / "config.yaml").exists():
        raise UserError(f"{path}: holds no config, and no config.yaml lies beside its folder")
    return replace(stored, config=read_yaml(run / "config.yaml"))


def find_file(source: str | Path, subfolder: str = "") -> Path:
    """The file with the weights of the model at `source`; as `read_stored`."""
    place = Path(os.path.expanduser(source))
    if not place.exists():
        if not hub.NAME.fullmatch(str(source)):
            raise UserError(
                f"{source}: no such file or folder, and not a name on the Hugging Face Hub"
            )
        place = hub.fetch(str(source), partial(_wanted, str(source), subfolder))
    place = place / subfolder
    if place.is_file():
        return place
    if (place / WEIGHTS_FILE).is_file():
        return place / WEIGHTS_FILE
    for folder in (place / "ckpts", place):
        if found := find_checkpoints(folder):
            return found[max(found)]
    raise UserError(
        f"{place}: has no model: neither {WEIGHTS_FILE} with {CONFIG_FILE}, nor ckpts/STEP.pt"
        f"{_models_below(place)}"
    )


def _models_below(place: Path) -> str:
    """Where below a folder there are models, to be said; nothing where there are none."""
    if not place.is_dir():
        return ""
    kinds = (WEIGHTS_FILE, "ckpts")
    names = sorted(p.name for p in place.iterdir() if any((p / kind).exists() for kind in kinds))
    return f"; there are some in {', '.join(names[:10])}" if names else ""


def read_file(path: Path, ema: str = "", is_verified: bool = False) -> StoredModel:
    """The model in one file: a checkpoint, or the weights of an exported folder.

    All of the file is read to compare its checksums, unless somebody has just verified it.
    """
    read = _of_export if path.name == WEIGHTS_FILE else _of_checkpoint
    return read(path, ema, is_verified)


def _of_checkpoint(path: Path, ema: str, is_verified: bool) -> StoredModel:
    content = read_checkpoint(path, is_verified)
    config, further = content.get("config", {}), content.get("averages", {})
    name = _choose_average(path, ema, str(config.get("ema_decay_rate", "unnamed")), further)
    weights = further[name] if name else content["ema_model"]
    data, started_from = content.get("data", {}), content.get("started_from", {})
    return StoredModel(path, weights, config, data, content["finished_steps"], name, started_from)


def _choose_average(path: Path, ema: str, main: str, further: Collection[str]) -> str:
    """The one of the further averages that is meant, or nothing for the reference's."""
    name = find_average(ema, [main, *further]) if ema else main
    if name is None:
        there = ", ".join([main, *further])
        raise UserError(f"{path}: has no average {shorten(ema)}; there is {there}")
    return "" if name == main else name


def _of_export(path: Path, ema: str, is_verified: bool) -> StoredModel:
    described = path.with_name(CONFIG_FILE)
    try:
        record = json.loads(described.read_bytes())
        config, data = record["config"], record["data"]
        steps, digest = int(record["finished_steps"]), record["file_sha256"]
        average, started_from = str(record.get("average", "")), record.get("started_from", {})
        if not all(isinstance(entry, dict) for entry in (config, data, started_from)):
            raise TypeError("config, data and started_from are mappings")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{described}: not the description of an exported model ({shorten(error)})"
        ) from error
    if ema and not find_average(ema, [average or str(config.get("ema_decay_rate"))]):
        raise UserError(f"{path}: is the average {average or config.get('ema_decay_rate')} alone")
    if not is_verified and sha256_of(path) != digest:
        raise UserError(
            f"{path}: damaged: its SHA-256 is not the one in {described}; export it again, or, if "
            "it came from the hub, fetch it again after `hf cache rm model/OWNER/NAME`"
        )
    return StoredModel(path, read_weights(path), config, data, steps, average, started_from)


def write_stored(stored: StoredModel, folder: Path) -> None:
    """Write an exported folder's weights, bit for bit, and the description beside them."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path = folder / WEIGHTS_FILE
    try:
        # Each tensor by itself: the library takes none that share memory.
        save_file({name: one.clone().contiguous() for name, one in stored.weights.items()}, path)
        path.chmod(0o644)  # the library's are their owner's alone
    except SafetensorError as error:
        raise UserError(f"{path}: not written ({shorten(error)})") from error
    record = {
        "config": dict(stored.config),
        "data": dict(stored.data),
        "finished_steps": stored.finished_steps,
        "average": stored.average,
        "started_from": dict(stored.started_from),
        "file_sha256": sha256_of(path),
    }
    (folder / CONFIG_FILE).write_text(json.dumps(record, indent=2) + "\n")


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; UserError where it is none."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({shorten(error)})") from error


# Of a repository of the hub


def _wanted(name: str, subfolder: str, files: list[str]) -> list[str]:
    """Of a repository's files those that make up one model, its weights in one file only."""
    start = f"{subfolder}/" if subfolder else ""
    if start + WEIGHTS_FILE in files:
        needed = [start + WEIGHTS_FILE, start + CONFIG_FILE]
    else:
        steps = [re.fullmatch(re.escape(start) + r"ckpts/([0-9]+)\.pt", file) for file in files]
        newest = max((match for match in steps if match), key=lambda m: int(m[1]), default=None)
        if newest is None:
            raise UserError(f"{name}: has no model{_where(subfolder)}{_elsewhere(files)}")
        needed = [newest[0], start + "config.yaml"]
    if missing := [file for file in needed if file not in files]:
        raise UserError(f"{name}: has {needed[0]}, but no {missing[0]}, which says what it is of")
    return needed


def _where(subfolder: str) -> str:
    return f" in {subfolder}" if subfolder else ""


def _elsewhere(files: list[str]) -> str:
    """In which folders of a repository there are models, to be said; nothing where in none."""
    folders = {file.rsplit("/", 1)[0] for file in files if file.endswith(f"/{WEIGHTS_FILE}")}
    folders |= {file.rsplit("/ckpts/", 1)[0] for file in files if "/ckpts/" in file}
    return f"; there are models in {', '.join(sorted(folders)[:10])}" if folders else ""
