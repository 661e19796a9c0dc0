"""Start from another model: copy what fits, and fold the conventions of SiT and REPA into it.

Both have our linear path and our DiT without the gap embedding, and twice our outputs: the second
half is a deviation, which is dropped. REPA's time is ours. SiT's runs from noise (0) to data (1),
and its output is data - noise. So a network that starts from one of them has

    F(x, t, t) = REPA(x, t)        or        F(x, t, t) = -SiT(x, 1 - t)

A DiT's weights have the same names, but its noise follows a variance-preserving path in 1,000
steps, which does not fold.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from config import CONVENTIONS
from dit import TIME_FEATURES, DiT, time_features
from support.runs.starting import read_source, start_from
from support.system.files import UserError

PROJECTORS = "projectors."  # REPA's, beside the network
GAP = "s_embedder."
TIME_WEIGHT = "t_embedder.mlp.0.weight"
PATCHES = "x_embedder.proj.weight"
OUT_WEIGHT, OUT_BIAS = "final_layer.linear.weight", "final_layer.linear.bias"
UNKNOWN = (
    "these may be SiT's weights or a DiT's, as the names are the same. init_from_as: SiT makes "
    "SiT's a model. A DiT's do not fold: its noise follows another path, in 1,000 steps"
)


def start_network(
    source: str,
    network: nn.Module,
    class_names: Sequence[str],
    named: str | None = None,
    F_is_velocity: bool = True,
) -> tuple[dict[str, Any], list[str]]:
    """Copy the weights at `source` into a fresh network; returns a record and lines for the log.

    `named` is the weights' convention where they do not show it. It folds if our F(x, t, t) is the
    velocity of the linear path (`F_is_velocity`). UserError if nothing fits or the name is wrong.
    """
    stored = read_source(source)
    has_gap = any(name.startswith(GAP) for name in stored.weights)
    if named and has_gap:
        raise UserError(
            f"init_from_as: {named} has no gap embedding, but {stored.path} has ({GAP}*), as "
            "models trained here do; use null"
        )
    if not isinstance(network, DiT) or has_gap:
        return start_from(source, stored, network, class_names)
    found = named
    if any(name.startswith(PROJECTORS) for name in stored.weights):
        found = named or "REPA"
    if not found or not F_is_velocity:
        reason = f"{found} needs noising_type Linear and coefficient_type Euler"
        record, lines = start_from(source, stored, network, class_names)
        return record, [*lines, f"a beginning, not a model: {reason if found else UNKNOWN}"]
    weights, notes = fold(stored.weights, found, str(stored.path))
    table = weights.get(DiT.label_table)
    if table is not None and network.null_label is None and len(table) == len(class_names) + 1:
        weights[DiT.label_table] = table[:-1]
        notes.append("dropped: the null label, the last row of the label table")
    record, lines = start_from(source, replace(stored, weights=weights), network, class_names)
    nn.init.zeros_(network.get_parameter(f"{GAP}mlp.2.weight"))
    nn.init.zeros_(network.get_parameter(f"{GAP}mlp.2.bias"))
    notes.append(f"the gap embedding adds nothing at first: {GAP}mlp.2 is zero")
    unlike = [name for name in record["new"] if not name.startswith(GAP)] + record["left"]
    if not _same_positions(weights.get("pos_embed"), network.pos_embed):
        unlike.append("pos_embed")
    if unlike:
        more = f" and {len(unlike) - 3} more" if len(unlike) > 3 else ""
        verdict = f"a beginning, not the {found} model: it differs in {', '.join(unlike[:3])}{more}"
    else:
        verdict = f"the start is the {found} model: F(x, t, t) = {CONVENTIONS[found]}"
    return {**record, "folded_as": found}, [*lines, *notes, verdict]


def fold(
    weights: Mapping[str, Tensor], name: str, place: str
) -> tuple[dict[str, Tensor], list[str]]:
    """The weights of a SiT or REPA with our time and output, and lines on what was done to them."""
    count, all_outputs = _count_outputs(weights, name, place)
    channels, is_reversed = weights[PATCHES].shape[1], name == "SiT"
    folded = {key: one for key, one in weights.items() if not key.startswith(PROJECTORS)}
    notes = [f"final_layer.linear: kept {count} of {all_outputs} outputs, none of a deviation"]
    for key in (OUT_WEIGHT, OUT_BIAS):  # outputs lie as (patch, patch, channels)
        kept = weights[key].unflatten(0, (count // channels, -1))[:, :channels].flatten(0, 1)
        folded[key] = -kept if is_reversed else kept
    if is_reversed:
        folded[TIME_WEIGHT] = turn_time(weights[TIME_WEIGHT])
        notes.append(f"turned: {TIME_WEIGHT} takes 1 - t, and final_layer.linear is negated")
    if len(folded) < len(weights):
        notes.append(f"dropped: REPA's projectors, {len(weights) - len(folded)} tensors")
    return folded, notes


def turn_time(weight: Tensor) -> Tensor:
    """The weight [D, 256] that makes of the features of t what `weight` makes of those of 1 - t."""
    # cos((1 - t) w) = cos w cos tw + sin w sin tw;  sin((1 - t) w) = sin w cos tw - cos w sin tw
    cos, sin = time_features(torch.ones(1, dtype=torch.float64)).chunk(2, dim=1)
    of_cos, of_sin = weight.double().chunk(2, dim=1)
    return torch.cat([of_cos * cos + of_sin * sin, of_cos * sin - of_sin * cos], dim=1)


def _count_outputs(weights: Mapping[str, Tensor], name: str, place: str) -> tuple[int, int]:
    """The outputs per patch without and with a deviation; UserError for shapes of no such model."""
    width, channels, patch = [*getattr(weights.get(PATCHES), "shape", ()), 0, 0, 0][:3]
    count = patch * patch * channels
    outputs = 2 * count if weights.get(OUT_BIAS, torch.empty(0)).numel() == 2 * count else count
    shapes = {
        PATCHES: [width, channels, patch, patch],
        TIME_WEIGHT: [width, TIME_FEATURES],
        OUT_WEIGHT: [outputs, width],
        OUT_BIAS: [outputs],
    }
    for key, shape in shapes.items():
        given = [*weights[key].shape] if key in weights else None
        if given != shape:
            there = f"has the shape {given}, not {shape}" if given else "is missing"
            raise UserError(f"init_from_as: {place}: not the weights of a {name}: {key} {there}")
    return count, outputs


def _same_positions(given: Tensor | None, ours: Tensor) -> bool:
    """Whether the position tables agree; a file may lack its own."""
    return given is None or (
        given.shape == ours.shape and torch.allclose(given.to(ours), ours, rtol=0, atol=1e-4)
    )
