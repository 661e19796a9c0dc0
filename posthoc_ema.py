"""Make an average of a length that was not kept, from the snapshots of a run that kept others.

    python posthoc_ema.py runs/averages exported/digits-0.15 --std 0.15
    python inference.py --ckpt exported/digits-0.15 --num-samples 1000

A run with `ema_power: [0.05, 0.1]` and `ema_snapshot_steps: N` keeps two power function averages,
and puts them into averages/STEP.pt every N steps. Any average of that kind is a linear combination
of these snapshots, near enough (Karras et al. 2024, arXiv 2312.02696, section 3); --std is its
standard deviation relative to the time so far. What comes out is an exported folder, as export.py
makes it. How near it is, is printed: snapshots that are too few, or lengths far from those that
were kept, give another average than the one that is asked for.
"""

from support.system.command import run_command  # isort: skip - first: it attends to the start

import argparse
from collections.abc import Mapping, Sequence
from os.path import expanduser
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from export import fit_to_travel, refuse_to_replace, write_folder
from support.runs.averages import (
    LARGEST_STD,
    PREFIX,
    Combination,
    PowerFunction,
    Profile,
    combine,
    gamma_of,
    last_move,
)
from support.runs.checkpoint import read_checkpoint
from support.runs.stored import StoredModel
from support.system.files import UserError, numbered_files, shorten

LARGEST_ERROR = 0.05  # of the profile: beyond, the result is another average than asked for


def find_snapshots(run: Path, last_step: int | None) -> dict[int, Path]:
    """Step -> file, up to the last step; UserError where there are none."""
    found = numbered_files(run / "averages", ".pt")
    if not found:
        raise UserError(
            f"{run / 'averages'}: no snapshots; a run keeps them with ema_power and "
            "ema_snapshot_steps in its config"
        )
    if last_step is not None and last_step not in found:
        steps = ", ".join(map(str, found))
        raise UserError(f"--step {last_step}: no snapshot in {run / 'averages'}, which has {steps}")
    return {step: path for step, path in found.items() if step <= (last_step or step)}


def reconstruct(snapshots: Mapping[int, Path], std: float) -> tuple[StoredModel, Combination]:
    """The average with this relative standard deviation at the last of the snapshots."""
    profiles, sources = [], []
    for step, path in snapshots.items():
        content = read_checkpoint(path, needed=("averages", "finished_steps", "config", "data"))
        end = last_move(step, content["config"].get("ema_every_steps") or 1)
        for name, weights in content["averages"].items():
            profiles.append(Profile(gamma_of(std_of(name, path)), end))
            sources.append(weights)
            check_alike(weights, sources[0], path)
    combination = combine(profiles, Profile(gamma_of(std), end))
    weights = weighted_sum(combination.shares, sources)
    record = (content["config"], content["data"], content["finished_steps"])
    return StoredModel(path, weights, *record, PowerFunction(std).name), combination


def std_of(name: str, path: Path) -> float:
    """The relative standard deviation of an average by this name; UserError where it has none."""
    start, prefix, number = name.partition(PREFIX)
    try:
        if start or not prefix:
            raise ValueError(name)
        return float(number)
    except ValueError:
        raise UserError(f"{path}: its average {shorten(name)} is not by a power of time") from None


def check_alike(weights: Any, others: Mapping[str, Tensor], path: Path) -> None:
    """UserError where weights are not of the network that the others are of."""
    is_alike = isinstance(weights, Mapping) and weights.keys() == others.keys()
    if not is_alike or any(weights[name].shape != others[name].shape for name in others):
        raise UserError(f"{path}: its averages are of another network than the snapshots before")


def weighted_sum(shares: np.ndarray, sources: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The weights, added up in float64; what is no number with a fraction is the last one's."""
    weights = {}
    for name, last in sources[-1].items():
        if not last.is_floating_point():
            weights[name] = last
            continue
        total = torch.zeros_like(last, dtype=torch.float64)
        for share, source in zip(shares, sources, strict=True):
            total.add_(source[name], alpha=float(share))
        weights[name] = total.to(last.dtype)
    return weights


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("run", type=expanduser, metavar="RUN", help="folder of a run, with averages/")
    add("folder", type=expanduser, metavar="FOLDER", help="what to make")
    std_help = "relative standard deviation of the average, above 0 and at most 0.28"
    add("--std", type=float, required=True, metavar="STD", help=std_help)
    add("--step", type=int, metavar="K", help="after so many steps (default: the last snapshot)")
    add("--vae", metavar="NAME", help="as in export.py: what to record as the decoder of latents")
    add("--overwrite", action="store_true", help="replace an export that is there")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    arguments = parse_arguments(argv)
    if not 0 < arguments.std <= LARGEST_STD:
        raise UserError(f"--std {arguments.std}: must be above 0 and at most {LARGEST_STD}")
    folder = Path(arguments.folder)
    refuse_to_replace(folder, arguments.overwrite)
    snapshots = find_snapshots(Path(arguments.run), arguments.step)
    stored, (shares, error) = reconstruct(snapshots, arguments.std)
    if error > LARGEST_ERROR:
        print(
            f"warning: the profile is off by {error:.1%} of its norm: an average of another "
            "length; take more snapshots, or a length between those that the run kept"
        )
    write_folder(folder, *fit_to_travel(stored, arguments.vae))
    print(
        f"average {stored.average} after {stored.finished_steps} steps, of {len(shares)} kept ones "
        f"in {len(snapshots)} snapshots (profile off by {error:.2%}), in {folder}"
    )


if __name__ == "__main__":
    run_command(main)
