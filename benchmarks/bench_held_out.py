"""How well the held-out loss ranks checkpoints, against FD: Spearman's rho on digits.

    python benchmarks/bench_held_out.py [--steps 1500] [--folder FOLDER]

Four runs of configs/digits.yaml: two seeds, one with ten times the learning rate, and one that
trains on 200 images alone, which it comes to know by heart. Each has 12 checkpoints with 600 images
made in one step, scored against the 600 held-out digits, on which the losses are measured, too. Rho
is 1 where a loss puts checkpoints in the order that FD puts them in. About 20 minutes on two cores;
runs that FOLDER has already are not made again.
"""

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import train  # noqa: E402
from config import load_config  # noqa: E402
from quickstart.score import score  # noqa: E402
from quickstart.small_sets import SMALL_SETS, read_samples  # noqa: E402
from support.data.batches import DataOrder  # noqa: E402
from support.data.datasets import Selection, digits_split  # noqa: E402
from support.system.processes import connected  # noqa: E402
from support.system.signals import listening  # noqa: E402
from training.run import build_run, continue_run, open_folder  # noqa: E402

CHECKPOINTS = 12
FEW_IMAGES = 200
RUNS = {
    "seed 1": {"seed": 1},
    "seed 2": {"seed": 2},
    "learning rate x 10": {"seed": 3, "learning_rate": 0.02},
    f"{FEW_IMAGES} images": {"seed": 4},
}


def train_one(name: str, folder: Path, steps: int) -> None:
    """Train the run of this name in `folder`."""
    every = steps // CHECKPOINTS
    settings = {
        **RUNS[name],
        "working_dir": folder,
        "total_steps": every * CHECKPOINTS,
        "held_out": 600,
        "held_out_steps": every,
        "eval_steps": every,
        "eval_num_samples": 600,
        "eval_batch_size": 200,
        "eval_demo_steps": 0,
        "ckpt_saving_steps": 0,
    }
    flags = [f"{key}={value}" for key, value in settings.items()]
    config = load_config(ROOT / "configs" / "digits.yaml", flags)
    with connected("cpu", config.timeout_minutes) as processes:
        run = build_run(config, processes)
        if "images" in name:
            run.data = Selection(run.data, torch.arange(FEW_IMAGES))
            assert DataOrder(len(run.data), config.batch_size, config.seed).steps_per_epoch == 1
        with run.results.claimed(), listening() as run.listener:
            continue_run(run, ["data"])
            open_folder(run)
            train.train(run)


def losses_of(folder: Path) -> dict[int, dict[str, float]]:
    """The held-out losses by step: of both sets of weights, as a mean and for each stretch of t."""
    found = {}
    for line in (folder / "held_out.jsonl").read_text().splitlines():
        record = json.loads(line)
        step = record.pop("step")
        found[step] = {
            f"{loss} of the {whose}, {place}": value
            for whose, losses in record.items()
            for loss, bins in losses.items()
            for place, value in [("mean", np.mean(bins)), *zip(STRETCHES, bins, strict=True)]
        }
    return found


STRETCHES = ("t below 1/4", "t to 1/2", "t to 3/4", "t to 1")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--train", choices=RUNS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.train:
        train_one(arguments.train, arguments.folder, arguments.steps)
        return
    with contextlib.ExitStack() as stack:
        place = arguments.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folders = {name: place / name.replace(" ", "_") for name in RUNS}
        for name, folder in folders.items():
            # In a process of its own: each starts from the same random state.
            flags = ["--train", name, "--folder", str(folder), "--steps", str(arguments.steps)]
            command = [sys.executable, __file__, *flags]
            subprocess.run(command, check=True, stdout=sys.stderr)
        compare({name: losses_of(folder) for name, folder in folders.items()}, folders)


def compare(losses: dict[str, dict[int, dict[str, float]]], folders: dict[str, Path]) -> None:
    """Print FD and losses of each run, and rho within each and over all checkpoints."""
    archives = {
        (name, step): str(folders[name] / "evals" / f"{step}.npz")
        for name, steps in losses.items()
        for step in steps
    }
    digits = SMALL_SETS["Digits"]
    rows = {path: read_samples(Path(path), digits.scored_count) for path in archives.values()}
    scores = score(rows, digits_split().held_out_pixels, digits.graph)
    fd = {key: scores[path]["FD"] for key, path in archives.items()}
    for name, steps in losses.items():
        print(f"{name}: FD " + ", ".join(f"{step}: {fd[name, step]:.1f}" for step in steps))
    print(f"\n{'rho with FD':<44}" + "".join(f"{name:>20}" for name in (*losses, "all")))
    for kind in next(iter(losses["seed 1"].values())):
        pairs = {
            name: [(fd[name, step], values[kind]) for step, values in steps.items()]
            for name, steps in losses.items()
        }
        pairs["all"] = [pair for of_run in pairs.values() for pair in of_run]
        rhos = [spearmanr(*zip(*of_run, strict=True)).statistic for of_run in pairs.values()]
        print(f"{kind:<44}" + "".join(f"{rho:20.2f}" for rho in rhos))


if __name__ == "__main__":
    main()
