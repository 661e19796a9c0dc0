"""Make an average of a length that the run did not keep, from its snapshots of other averages.

    python posthoc_ema.py runs/averages exported/digits-0.15 --std 0.15
    python inference.py --ckpt exported/digits-0.15 --num-samples 1000

A run with `ema_power: [0.05, 0.1]` and `ema_snapshot_steps: N` keeps two power function averages
and saves them to averages/STEP.pt every N steps. Any average of that kind is nearly a linear
combination of these snapshots (Karras et al. 2024, arXiv 2312.02696, section 3). --std is its
standard deviation relative to the time so far. The result is an exported folder, as export.py makes
it. The command prints how close the combination is: with few snapshots, or a length far from the
kept ones, it is another average than the requested one.
"""

from support.system.command import command_parser, run_command  # isort: skip - must be first

import argparse
from collections.abc import Mapping, Sequence
from os.path import expanduser
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from export import check_target, prepare_export, write_folder
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
from support.runs.stored import StoredModel, of_checkpoint
from support.system.files import UserError, numbered_files

LARGEST_ERROR = 0.05  # of the profile; above it, the result is not the requested average


def find_snapshots(run: Path, last_step: int | None) -> dict[int, Path]:
    """Step -> file, up to the last step; UserError if there is none."""
    found = numbered_files(run / "averages", ".pt")
    if not found:
        raise UserError(
            f"{run / 'averages'}: no snapshots; ema_power and ema_snapshot_steps in a run's config "
            "make some"
        )
    if last_step is not None and last_step not in found:
        steps = ", ".join(map(str, found))
        raise UserError(f"--step {last_step}: {run / 'averages'} has the steps {steps}")
    return {step: path for step, path in found.items() if step <= (last_step or step)}


def reconstruct(snapshots: Mapping[int, Path], std: float) -> tuple[StoredModel, Combination]:
    """The average with this relative standard deviation at the last of the snapshots."""
    profiles, sources = [], []
    for step, path in snapshots.items():
        content = read_checkpoint(path, needed=("averages", "finished_steps", "config", "data"))
        end = last_move(step, content["config"].get("ema_every_steps") or 1)
        for name, weights in content["averages"].items():
            profiles.append(Profile(gamma_of(float(name.removeprefix(PREFIX))), end))
            sources.append(weights)
    combination = combine(profiles, Profile(gamma_of(std), end))
    weights = weighted_sum(combination.shares, sources)
    return of_checkpoint(path, content, weights, PowerFunction(std).name), combination


def weighted_sum(shares: np.ndarray, sources: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The weighted sum, in float64; integer tensors are those of the last source."""
    weights = dict(sources[-1])
    for name, last in weights.items():
        if last.is_floating_point():
            total = torch.zeros_like(last, dtype=torch.float64)
            for share, source in zip(shares, sources, strict=True):
                total.add_(source[name], alpha=float(share))
            weights[name] = total.to(last.dtype)
    return weights


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line's options."""
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("run", type=expanduser, metavar="RUN", help="the folder of a run, with averages/")
    add("folder", type=expanduser, metavar="FOLDER", help="the folder to make")
    std_help = "relative standard deviation of the average, above 0 and at most 0.28"
    add("--std", type=float, required=True, metavar="STD", help=std_help)
    step_help = "the average after step K (default: the last snapshot)"
    add("--step", type=int, metavar="K", help=step_help)
    add("--vae", metavar="NAME", help="record this decoder of latents, as in export.py")
    add("--overwrite", action="store_true", help="replace an existing export")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    arguments = parse_arguments(argv)
    if not 0 < arguments.std <= LARGEST_STD:
        raise UserError(f"--std {arguments.std}: must be above 0 and at most {LARGEST_STD}")
    folder = Path(arguments.folder)
    check_target(folder, arguments.overwrite)
    snapshots = find_snapshots(Path(arguments.run), arguments.step)
    stored, (shares, error) = reconstruct(snapshots, arguments.std)
    if error > LARGEST_ERROR:
        print(
            f"warning: the profile is off by {error:.1%} of its norm, so this is an average of "
            "another length; use more snapshots, or a length between the kept ones"
        )
    write_folder(folder, *prepare_export(stored, arguments.vae))
    print(
        f"{stored.average} after {stored.finished_steps} steps, of {len(shares)} averages "
        f"in {len(snapshots)} snapshots (profile off by {error:.2%}), in {folder}"
    )


if __name__ == "__main__":
    run_command(main)
