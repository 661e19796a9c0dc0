"""Start a fresh run from another model's weights: copy what fits, keep the rest fresh."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from support.runs.checkpoint import REFERENCE_KEYS, read_checkpoint
from support.runs.stored import (
    CONFIG_FILE,
    StoredModel,
    check_sums,
    find_file,
    read_file,
    read_weights,
)
from support.system.files import UserError, sha256_of

# Entries under which other code stores a model's weights, the averaged ones first.
PLACES = ("ema_model", "ema", "model", "state_dict")
PREFIXES = re.compile(r"(module\.)?(network\.)?")  # before a network's own names
# Refuse to copy less than this share of a network's numbers: small layers such as biases have the
# same shape in networks that have nothing else in common.
LEAST_SHARE = 0.01


@dataclass
class Transfer:
    """Which weights are copied, by name, and which are not."""

    copied: dict[str, Tensor] = field(default_factory=dict)
    new: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def start_from(
    source: str, stored: StoredModel, network: nn.Module, class_names: Sequence[str]
) -> tuple[dict[str, Any], list[str]]:
    """Copy the weights read from `source` into a fresh network, as far as they fit.

    A network may declare its `label_table` and `null_label`. Returns a record and lines for the
    log. UserError if nothing fits.
    """
    transfer = match(stored, network, class_names)
    numbers = sum(tensor.numel() for tensor in network.state_dict().values())
    copied = sum(tensor.numel() for tensor in transfer.copied.values())
    if copied < LEAST_SHARE * numbers:
        raise UserError(
            f"init_from: {source}: nothing fits: {copied:,} of {numbers:,} numbers have the names "
            "and shapes of this network; use a model of the same kind and width"
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
    lines = [
        f"starts from {stored.path} (SHA-256 {record['file_sha256']}): {len(transfer.copied)} "
        f"tensors copied, {copied:,} of {numbers:,} numbers",
        *transfer.notes,
        *(f"new: {name}" for name in transfer.new),
        *(f"not copied, unknown here: {name}" for name in transfer.left),
    ]
    return record, lines


def read_source(source: str) -> StoredModel:
    """The averaged weights at `source`, under a network's own names.

    The source is any model that MODEL_HELP describes, or a file of weights under our names. Those
    of other code come without config and data record.
    """
    try:
        stored = _read(source)
    except UserError as error:
        raise UserError(f"init_from: {error}") from None
    weights = {PREFIXES.sub("", name, count=1): tensor for name, tensor in stored.weights.items()}
    return replace(stored, weights=weights)


def _read(source: str) -> StoredModel:
    path = find_file(source)
    if path.suffix == ".safetensors":
        is_ours = path.with_name(CONFIG_FILE).exists()
        return read_file(path) if is_ours else StoredModel(path, read_weights(path), {})
    content = read_checkpoint(path, is_verified=True, needed=())
    if all(key in content for key in REFERENCE_KEYS):
        return read_file(path)
    weights = next((content[place] for place in PLACES if place in content), content)
    found = weights.items() if isinstance(weights, Mapping) else ()
    # Other code stores numbers such as the epoch beside the weights.
    named = {name: one for name, one in found if isinstance(name, str) and torch.is_tensor(one)}
    if not named:
        raise UserError(f"{path}: holds no weights by name")
    check_sums(path, named)
    return StoredModel(path, named, {})


def match(stored: StoredModel, network: nn.Module, class_names: Sequence[str]) -> Transfer:
    """Which stored weights fit where; tables that are not trained stay as they are."""
    weights = dict(stored.weights)
    label_table, found = getattr(network, "label_table", ""), Transfer()
    trained = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    for name, target in network.state_dict().items():
        given = weights.pop(name, None)
        if name not in trained:
            continue
        if name == label_table and given is not None and given.shape[1:] == target.shape[1:]:
            rows, note = match_rows(stored, given, network, class_names)
            found.notes.append(note)
            given = None
            if rows:
                given = target.clone()
                for row, values in rows.items():
                    given[row] = values
        if given is not None and given.shape == target.shape:
            found.copied[name] = given
        else:
            there = f" {list(target.shape)}, there {list(given.shape)}" if given is not None else ""
            found.new.append(name + there)
    found.left = list(weights)
    return found


def match_rows(
    stored: StoredModel, table: Tensor, network: nn.Module, class_names: Sequence[str]
) -> tuple[dict[int, Tensor], str]:
    """Row -> values of the label table, and a line on them.

    By class name if both sides have names, else by number if both have as many classes.
    """
    null_label = getattr(network, "null_label", None)
    there = list(stored.data.get("class_names", ()))
    if len(table) - len(there) not in (0, 1):
        there = []  # the names are not those of these rows
    if there and class_names:
        rows = {
            label: table[there.index(name)]
            for label, name in enumerate(class_names)
            if name in there
        }
        said = f"label table: {len(rows)} of {len(class_names)} classes by name"
    elif len(table) == len(class_names) + (null_label is not None):
        rows = {label: table[label] for label in range(len(class_names))}
        said = f"label table: {len(rows)} classes by number, as their names are unknown"
    else:
        return {}, f"label table: new; the {len(table)} classes there are unknown"
    # A table with one row more than classes ends with the null label.
    if null_label is not None and len(table) == (len(there) or len(class_names)) + 1:
        rows[null_label] = table[-1]
        said += " and the null class"
    return rows, said
