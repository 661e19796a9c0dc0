"""A fresh run that starts from another model's weights: what fits is copied, the rest is new."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from support.runs import hub
from support.runs.checkpoint import REFERENCE_KEYS, read_checkpoint
from support.runs.stored import CONFIG_FILE, StoredModel, find_file, read_file, read_weights
from support.system.files import UserError, sha256_of

# Where other code keeps a model's weights in a checkpoint, the averaged ones first.
PLACES = ("ema_model", "ema", "model", "state_dict")
PREFIXES = ("module.", "network.")  # before a network's own names
# Of the numbers of a network, copied, below which nothing is said to fit: layers as small as a
# bias have the same shape in networks that have nothing else in common.
LEAST_SHARE = 0.01


@dataclass
class Transfer:
    """What became of the weights, by name."""

    copied: dict[str, Tensor] = field(default_factory=dict)
    new: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def start_from(
    source: str,
    network: nn.Module,
    label_table: str,
    null_label: int | None,
    class_names: Sequence[str],
) -> tuple[dict[str, Any], list[str]]:
    """Copy into a fresh network what fits of the averaged weights at `source`.

    The source is a run's folder, a checkpoint, an exported folder, a name on the Hugging Face Hub,
    OWNER/NAME or OWNER/NAME/FOLDER, or a file of weights that are named as ours. Gives a record of
    it and lines that say what was copied. UserError where nothing fits.
    """
    stored = read_source(source)
    transfer = match(stored, network, label_table, null_label, class_names)
    numbers = sum(tensor.numel() for tensor in network.state_dict().values())
    copied = sum(tensor.numel() for tensor in transfer.copied.values())
    if copied < LEAST_SHARE * numbers:
        raise UserError(
            f"init_from: {source}: nothing fits: {copied:,} of {numbers:,} numbers have the names "
            "and shapes of this network's; give a model of the same kind and width"
        )
    network.load_state_dict(transfer.copied, strict=False)
    record = {
        "source": source,
        "file_sha256": sha256_of(stored.path),
        "finished_steps": stored.finished_steps,
        "copied": len(transfer.copied),
        "new": transfer.new,
        "left": transfer.left,
    }
    said = [
        f"starts from {stored.path} (SHA-256 {record['file_sha256']}): {len(transfer.copied)} "
        f"tensors copied, {copied:,} of {numbers:,} numbers",
        *transfer.notes,
        *(f"new: {name}" for name in transfer.new),
        *(f"left, has no place here: {name}" for name in transfer.left),
    ]
    return record, said


def read_source(source: str) -> StoredModel:
    """The weights at a source; those of other code have no config and no data's record."""
    try:
        path = find_file(*place_of(source))
    except UserError as error:
        raise UserError(f"init_from: {error}") from None
    if path.suffix == ".safetensors":
        is_ours = path.with_name(CONFIG_FILE).exists()
        return read_file(path) if is_ours else StoredModel(path, read_weights(path), {})
    content = read_checkpoint(path, needed=())
    if all(key in content for key in REFERENCE_KEYS):
        return read_file(path, is_verified=True)
    weights = next((content[place] for place in PLACES if place in content), content)
    found = weights.items() if isinstance(weights, Mapping) else ()
    # Beside the weights other code keeps numbers of its own.
    named = {name: one for name, one in found if isinstance(name, str) and torch.is_tensor(one)}
    if not named:
        raise UserError(f"init_from: {path}: holds no weights by name")
    return StoredModel(path, named, {})


def place_of(source: str) -> tuple[str, str]:
    """A place of models, and the folder there: of OWNER/NAME/FOLDER on the hub."""
    owner, _, rest = source.partition("/")
    name, _, subfolder = rest.partition("/")
    is_here = Path(owner or "/").expanduser().exists()
    if subfolder and not is_here and hub.NAME.fullmatch(f"{owner}/{name}"):
        return f"{owner}/{name}", subfolder
    return source, ""


def match(
    stored: StoredModel,
    network: nn.Module,
    label_table: str,
    null_label: int | None,
    class_names: Sequence[str],
) -> Transfer:
    """Which of the stored weights go where; tables that are not trained stay as they are."""
    weights = {bare(name): tensor for name, tensor in stored.weights.items()}
    trained = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    found = Transfer()
    for name, target in network.state_dict().items():
        has_rows = name == label_table and _width(weights.get(name)) == _width(target)
        if name in trained and has_rows:
            rows, note = match_rows(stored, weights.pop(name), null_label, class_names)
            found.notes.append(note)
            if rows:
                table = target.clone()
                for row, values in rows.items():
                    table[row] = values
                found.copied[name] = table
            else:
                found.new.append(name)
            continue
        given = weights.pop(name, None)
        if name not in trained:
            continue
        if given is not None and given.shape == target.shape:
            found.copied[name] = given
        else:
            there = f" {list(target.shape)}, there {list(given.shape)}" if given is not None else ""
            found.new.append(name + there)
    found.left = list(weights)
    return found


def _width(table: Tensor | None) -> torch.Size | None:
    """What the rows of a table have in common; None where there is none."""
    return None if table is None else table.shape[1:]


def bare(name: str) -> str:
    """A network's own name of a weight."""
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    return name


def match_rows(
    stored: StoredModel, table: Tensor, null_label: int | None, class_names: Sequence[str]
) -> tuple[dict[int, Tensor], str]:
    """Row -> values of a label table, and a line on them.

    By the names of classes where both sides have some; else by number, where there are as many.
    """
    there = list(stored.data.get("class_names", ()))
    if len(table) - len(there) not in (0, 1):
        there = []  # names of other rows than these
    if there and class_names:
        rows = {
            label: table[there.index(name)]
            for label, name in enumerate(class_names)
            if name in there
        }
        said = f"label table: {len(rows)} of {len(class_names)} classes by name"
    elif len(table) == len(class_names) + (null_label is not None):
        rows = {label: table[label] for label in range(len(class_names))}
        said = f"label table: {len(rows)} classes by number, as their names are not known there"
    else:
        return {}, f"label table: new; there are {len(table)} rows of unknown classes"
    # The null class is the last row of a table that has one more than classes.
    if null_label is not None and len(table) == (len(there) or len(class_names)) + 1:
        rows[null_label] = table[-1]
        said += " and the null class"
    return rows, said
