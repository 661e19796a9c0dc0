"""A trained model on disk or on the hub: a run, a checkpoint or an exported folder.

An exported folder holds the averaged weights as model.safetensors. Its config.json holds the other
fields of `StoredModel` and `file_sha256`, the digest of the weights file.
"""

import argparse
import contextlib
import json
import os
import re
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from support.runs.checkpoint import read_checkpoint, run_of_checkpoint
from support.system import hub
from support.system.files import UserError, identify, reporting_os_errors, sha256_of, shorten
from support.system.settings import read_yaml

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
CARD_FILE = "README.md"
MODEL_HELP = (
    "a run (its newest checkpoint), a checkpoint, an exported folder, or a name on the Hugging "
    "Face Hub, OWNER/NAME or OWNER/NAME/FOLDER"
)


@dataclass(frozen=True)
class StoredModel:
    """Averaged weights, and all that is recorded of how they were made."""

    path: Path  # of the weights
    weights: Mapping[str, Tensor]
    config: Mapping[str, Any]  # the config's values; empty if unknown
    data: Mapping[str, Any] = field(default_factory=dict)  # the data set's record
    finished_steps: int = 0
    average: str = ""  # the name of the average, if it is not the one of ema_decay_rate
    started_from: Mapping[str, Any] = field(default_factory=dict)  # the model of init_from, if any
    made: Mapping[str, Any] = field(default_factory=dict)  # code version, torch, device, ...
    scores: Sequence[Mapping[str, Any]] = ()  # of images of these weights
    card: Mapping[str, str] = field(default_factory=dict)  # digest of each part of the model card

    @property
    def record(self) -> dict[str, Any]:
        """All fields but the weights and their place."""
        kept = [one.name for one in fields(self) if one.name not in ("path", "weights")]
        return {name: getattr(self, name) for name in kept}


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Give a command the options that name a model, as `load` takes it: source, subfolder, ema."""
    add = parser.add_argument
    add("source", type=os.path.expanduser, metavar="MODEL", help=MODEL_HELP)
    add("--subfolder", default="", metavar="DIR", help="the folder of the model within MODEL")
    add("--ema", default="", metavar="NAME", help="use this one of several averages, such as 0.999")


# Finding


def find_file(source: str | Path, subfolder: str = "") -> Path:
    """The weights file of the model that MODEL_HELP describes; fetched if it is on the hub."""
    if not isinstance(source, str | Path) or source == "":
        raise UserError(f"{shorten(source)}: not the name of a model; give {MODEL_HELP}")
    if not isinstance(subfolder, str):
        raise UserError(f"subfolder: {shorten(subfolder)} is not the name of a folder")
    place = Path(os.path.expanduser(source))
    if os.path.isfile(place / subfolder):
        return place / subfolder
    if not os.path.exists(place):
        name = str(source)
        owner, *further = name.split("/")
        if len(further) > 1 and not Path(owner or "/").expanduser().exists():
            name, subfolder = f"{owner}/{further[0]}", "/".join([*further[1:], subfolder])
        subfolder = subfolder.strip("/")
        place = hub.fetch(name, partial(_files_of_model, name, subfolder))
    folder = place / subfolder
    kinds = (WEIGHTS_FILE, "*.pt", "ckpts/*.pt", f"*/{WEIGHTS_FILE}", "*/ckpts/*.pt")
    with reporting_os_errors(f"{source}: cannot be read"):
        files = [str(one.relative_to(folder)) for kind in kinds for one in folder.glob(kind)]
    return folder / _choose_weights(str(folder), "", files)


def _choose_weights(name: str, start: str, files: list[str]) -> str:
    """The weights file among the files of a folder or repository, in the folder `start`.

    That is an export's, or else the newest checkpoint.
    """
    if start + WEIGHTS_FILE in files:
        return start + WEIGHTS_FILE
    for place in (f"{start}ckpts/", start):
        pattern = re.compile(rf"{re.escape(place)}(0|[1-9][0-9]*)\.pt", re.ASCII)
        if steps := {int(found[1]): file for file in files if (found := pattern.fullmatch(file))}:
            return steps[max(steps)]
    below = {re.split(r"/(?:ckpts/)?[^/]*$", file)[0] for file in files if "/" in file}
    hint = f"; there are models in {', '.join(sorted(below)[:10])}" if below else ""
    raise UserError(f"{name}: has no {start}{WEIGHTS_FILE} and no {start}ckpts/STEP.pt{hint}")


def _files_of_model(name: str, subfolder: str, files: list[str]) -> list[str]:
    """Those files of a repository that make up one model: weights, description and card."""
    start = f"{subfolder}/" if subfolder else ""
    kept = [file for file in files if file.endswith((".pt", WEIGHTS_FILE))]
    weights = _choose_weights(name, start, kept)
    beside = start + (CONFIG_FILE if weights == start + WEIGHTS_FILE else "config.yaml")
    if beside not in files:
        raise UserError(f"{name}: has {weights}, but lacks {beside}, which describes it")
    return [weights, beside, *({start + CARD_FILE} & set(files))]


# Reading


def read_stored(
    source: str | Path, subfolder: str = "", ema: str = "", is_verified: bool = False
) -> StoredModel:
    """The model that MODEL_HELP describes, with its config; `ema` and `is_verified` as `read_file`.

    UserError if there is no model, it is damaged, or nothing says which network it is.
    """
    path = find_file(source, subfolder)
    stored = read_file(path, ema, is_verified)
    if stored.config:
        return stored
    # Released checkpoints have their config beside ckpts/.
    run = run_of_checkpoint(path)
    if run is None or not (run / "config.yaml").exists():
        raise UserError(
            f"{path}: holds no config, as released checkpoints do not, and there is no config.yaml "
            "beside ckpts/ (inference.py takes one by --config FILE)"
        )
    return replace(stored, config=read_yaml(run / "config.yaml"))


def read_file(path: Path, ema: str = "", is_verified: bool = False) -> StoredModel:
    """The model in one file; `ema` names one of several averages, such as 0.999.

    Compares checksums of the weights it returns unless another process does (`is_verified`).
    """
    read = _read_export if path.name == WEIGHTS_FILE else _read_checkpoint
    return read(path, ema, is_verified)


def _read_checkpoint(path: Path, ema: str, is_verified: bool) -> StoredModel:
    content = read_checkpoint(path, is_verified=True)
    main, further = content.get("config", {}).get("ema_decay_rate"), content.get("averages", {})
    name = _choose_average(path, ema, [str(main or "unnamed"), *further])
    weights = further.get(name, content["ema_model"])
    if not is_verified:
        check_sums(path, weights)
    return of_checkpoint(path, content, weights, name if name in further else "")


def of_checkpoint(
    path: Path, content: Mapping[str, Any], weights: Mapping[str, Tensor], average: str = ""
) -> StoredModel:
    """The model with these weights and the records that a checkpoint or snapshot holds."""
    records = {name: content.get(name, {}) for name in ("config", "data", "started_from")}
    return StoredModel(
        path, weights, finished_steps=content["finished_steps"], average=average, **records
    )


def _choose_average(path: Path, ema: str, names: Sequence[str]) -> str:
    """The name of the wanted average, as 0.9990 means 0.999; the first one without a wish."""
    for name in names:
        with contextlib.suppress(ValueError):
            if ema in ("", name) or float(ema) == float(name):
                return name
    raise UserError(f"{path}: has no average {shorten(ema)}; it has {', '.join(names)}")


def check_sums(path: Path, weights: Mapping[str, Any]) -> None:
    """UserError if these weights of a checkpoint, or its records, are not as they were written.

    Reads nothing else: the optimizer's state alone is twice the model.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            written = {(member.file_size, member.CRC) for member in archive.infolist()}
            for member in archive.infolist():
                if "/data/" not in member.filename:
                    archive.read(member)  # compares its checksum
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: damaged ({shorten(error)})") from error
    for name, tensor in weights.items() if isinstance(weights, Mapping) else ():
        if isinstance(tensor, Tensor):
            storage = tensor.untyped_storage()
            content = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
            if storage.nbytes() and (storage.nbytes(), zlib.crc32(content)) not in written:
                raise UserError(f"{path}: damaged (the checksum of {shorten(name)} is wrong)")


def _read_export(path: Path, ema: str, is_verified: bool) -> StoredModel:
    described = path.with_name(CONFIG_FILE)
    try:
        record = json.loads(described.read_bytes())
        empty = StoredModel(path, {}, {}).record
        known = {name: record[name] for name in empty if name in record}
        for name, value in known.items():
            if not isinstance(value, list if empty[name] == () else type(empty[name])):
                raise TypeError(f"its entry {name} is {shorten(value)}")
        digest, stored = record["file_sha256"], StoredModel(path, {}, **known)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{described}: does not describe a model ({shorten(error)})") from error
    _choose_average(path, ema, [stored.average or str(stored.config.get("ema_decay_rate"))])
    if not is_verified and sha256_of(path) != digest:
        raise UserError(
            f"{path}: damaged ({identify(path)}): its SHA-256 is not the one in {described}; "
            "export it again, or fetch it again after `hf cache rm model/OWNER/NAME`"
        )
    return replace(stored, weights=read_weights(path))


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({shorten(error)})") from error


# Writing


def write_stored(stored: StoredModel, folder: Path) -> None:
    """Write an exported folder's weights, bit for bit, and config.json."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path, weights = folder / WEIGHTS_FILE, dict[str, Tensor]()
    for name, tensor in stored.weights.items():
        # The library refuses tensors that share memory. It writes the others without a copy.
        is_shared = any(tensor.data_ptr() == other.data_ptr() for other in weights.values())
        weights[name] = tensor.clone() if is_shared else tensor.contiguous()
    try:
        save_file(weights, path)
        path.chmod(0o644)  # the library's files are their owner's alone
    except SafetensorError as error:
        raise UserError(f"{path}: not written ({shorten(error)})") from error
    record = {**stored.record, "file_sha256": sha256_of(path)}
    (folder / CONFIG_FILE).write_text(json.dumps(record, indent=2) + "\n")
