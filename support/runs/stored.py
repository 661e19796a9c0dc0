"""A trained model as it is stored: in a run's folder, a checkpoint, an exported folder, on the hub.

An exported folder has the averaged weights as model.safetensors and config.json beside them:
`config` and `data` as in a checkpoint, `finished_steps`, and `weights_sha256`.
"""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from support.runs.checkpoint import find_checkpoints, read_checkpoint, run_of_checkpoint
from support.system.files import UserError, one_line, sha256_of

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class StoredModel:
    """Averaged weights, and what says which model they are of."""

    path: Path  # the file that they are in
    weights: Mapping[str, Tensor]
    config: Mapping[str, Any]  # recorded values of the config's keys
    data: Mapping[str, Any] = field(default_factory=dict)  # the data set's record
    finished_steps: int = 0


def read_stored(source: str | Path, subfolder: str = "") -> StoredModel:
    """The model at `source`: a run's folder, of which it is the newest, or any other place of one.

    A name on the Hugging Face Hub is fetched into the hub's cache, its weights and config alone.
    UserError where there is no model, or it is damaged.
    """
    place = Path(os.path.expanduser(source))
    if not place.exists():
        if not HUB_NAME.fullmatch(str(source)):
            raise UserError(
                f"{source}: no such file or folder, and not a name on the Hugging Face Hub"
            )
        place = fetch(str(source), subfolder)
    place = place / subfolder
    if place.is_file():
        return _of_export(place.parent) if place.name == WEIGHTS_FILE else _of_checkpoint(place)
    if (place / WEIGHTS_FILE).is_file():
        return _of_export(place)
    for folder in (place / "ckpts", place):
        if found := find_checkpoints(folder):
            return _of_checkpoint(found[max(found)])
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


def _of_checkpoint(path: Path) -> StoredModel:
    content = read_checkpoint(path)
    config = content.get("config") or _recorded_beside(path)
    if config is None:
        raise UserError(f"{path}: holds no config, and no config.yaml lies beside its folder")
    data, steps = content.get("data", {}), content["finished_steps"]
    return StoredModel(path, content["ema_model"], config, data, steps)


def _recorded_beside(path: Path) -> dict[str, Any] | None:
    """The config.yaml of a checkpoint's run, as released models have one."""
    folder = run_of_checkpoint(path)
    if folder is None or not (folder / "config.yaml").exists():
        return None
    try:
        values = yaml.safe_load((folder / "config.yaml").read_bytes())
    except (OSError, yaml.YAMLError, ValueError) as error:
        raise UserError(f"{folder / 'config.yaml'}: not readable ({one_line(error)})") from error
    return values if isinstance(values, dict) else None


def _of_export(folder: Path) -> StoredModel:
    path, described = folder / WEIGHTS_FILE, folder / CONFIG_FILE
    try:
        record = json.loads(described.read_bytes())
        config, data = record["config"], record["data"]
        steps, digest = int(record["finished_steps"]), record["weights_sha256"]
        if not (isinstance(config, dict) and isinstance(data, dict)):
            raise TypeError("config and data are mappings")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{described}: not the description of an exported model ({one_line(error)})"
        ) from error
    if sha256_of(path) != digest:
        raise UserError(f"{path}: damaged: its SHA-256 is not the one in {described}")
    return StoredModel(path, read_weights(path), config, data, steps)


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; UserError where it is none."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({one_line(error)})") from error


# The hub


def fetch(name: str, subfolder: str = "") -> Path:
    """The folder of a repository of the hub in the hub's cache, the model in `subfolder` in it.

    The hub's own settings hold (HF_HOME, HF_HUB_OFFLINE, HF_ENDPOINT, HF_TOKEN, ...); off-line, it
    is what the cache has.
    """
    try:
        from huggingface_hub import constants, list_repo_files, snapshot_download
        from huggingface_hub.utils import RepositoryNotFoundError
    except ImportError as error:
        raise UserError(f"{name}: {one_line(error)}; pip install huggingface_hub") from error
    try:
        if constants.HF_HUB_OFFLINE:
            # What was fetched is a part of the repository: ask for no file that was not.
            return Path(snapshot_download(name, local_files_only=True, allow_patterns=["*/"]))
        files = list_repo_files(name)
        return Path(snapshot_download(name, allow_patterns=_wanted(name, files, subfolder)))
    except UserError:
        raise
    except RepositoryNotFoundError as error:
        raise UserError(
            f"{name}: no such repository on the hub, or a private one, which needs `hf auth login`"
        ) from error
    except Exception as error:  # the hub's client raises many kinds
        raise UserError(
            f"{name}: not on this machine, and not fetched ({one_line(error)}); where there is a "
            f"network, run `hf download {name} --local-dir FOLDER`, and name that folder"
        ) from error


def _wanted(name: str, files: list[str], subfolder: str) -> list[str]:
    """The files of a repository that make up one model."""
    start = f"{subfolder}/" if subfolder else ""
    if start + WEIGHTS_FILE in files:
        return [start + WEIGHTS_FILE, start + CONFIG_FILE]
    steps = [re.fullmatch(re.escape(start) + r"ckpts/(\d+)\.pt", file) for file in files]
    newest = max((int(match[1]) for match in steps if match), default=None)
    if newest is not None:
        return [f"{start}config.yaml", f"{start}ckpts/{newest}.pt"]
    folders = {file.rsplit("/", 1)[0] for file in files if file.endswith(f"/{WEIGHTS_FILE}")}
    folders |= {file.rsplit("/ckpts/", 1)[0] for file in files if "/ckpts/" in file}
    hint = f"; there are models in {', '.join(sorted(folders)[:10])}" if folders else ""
    raise UserError(f"{name}: has no model{f' in {subfolder}' if subfolder else ''}{hint}")


def push(folder: Path, name: str, is_private: bool) -> str:
    """Upload an exported folder to a repository of the hub, made if need be; gives its address."""
    if not HUB_NAME.fullmatch(name):
        raise UserError(f"--push {name}: not a name on the hub, such as owner/digits")
    try:
        from huggingface_hub import create_repo, upload_folder

        url = create_repo(name, private=is_private, exist_ok=True)
        upload_folder(repo_id=name, folder_path=folder)
    except Exception as error:  # the hub's client raises many kinds
        raise UserError(
            f"--push {name}: not uploaded ({one_line(error)}); `hf auth login` may help, or "
            f"`hf upload {name} {folder}`"
        ) from error
    return str(url)
