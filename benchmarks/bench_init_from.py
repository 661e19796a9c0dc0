"""What a start from another model is worth: digits 5 to 9, fresh and from a model of 0 to 4.

    python benchmarks/bench_init_from.py [--folder FOLDER]

Trains a model on the training digits 0 to 4, as pictures in class folders, for 600 steps of
configs/digits.yaml. Then runs on 5 to 9, from fresh weights and with `init_from` that model, with
three seeds each; FD of 400 samples made in one step, after equal steps, against the held-out
digits 5 to 9. About 6 minutes on two cores; runs that FOLDER has already are not made again.
"""

import argparse
import contextlib
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from quickstart.score import score  # noqa: E402
from quickstart.small_sets import SMALL_SETS, Images  # noqa: E402
from support.data.datasets import digits_split  # noqa: E402
from support.scores.npz import read_archive  # noqa: E402

FIRST_STEPS = 600
EVERY, LAST = 50, 300
SAMPLES = 400
SEEDS = (1, 2, 3)
STARTS = ("fresh", "init_from")


def write_pictures(folder: Path, digits: range) -> None:
    """The training digits of these classes, a folder for each."""
    split = digits_split()
    for number, (pixels, label) in enumerate(
        zip(split.training_pixels, split.training_labels, strict=True)
    ):
        if label in digits:
            place = folder / str(label)
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels[..., 0]).save(place / f"{number}.png")


def train(folder: Path, pictures: Path, **settings: object) -> None:
    """A run of configs/digits.yaml on these pictures."""
    values = {
        "working_dir": folder,
        "dataset_type": "ImageFolder",
        "dataset_path": pictures,
        "eval_demo_steps": 0,
        "ckpt_saving_steps": 0,
        "eval_num_samples": SAMPLES,
        "eval_batch_size": 200,
        **settings,
    }
    words = [f"--set={key}={value}" for key, value in values.items()]
    command = [sys.executable, "train.py", "--config", "configs/digits.yaml", *words]
    subprocess.run(command, cwd=ROOT, check=True, stdout=sys.stderr)


def grey(path: Path) -> Images:
    """The samples of an archive in one channel; the network makes them in three."""
    with read_archive(str(path)) as archive:
        pixels, labels = next(archive.batches(SAMPLES)), archive.labels(SAMPLES)
    return Images(pixels.mean(axis=3, keepdims=True).round().astype(np.uint8), labels)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args()
    with contextlib.ExitStack() as stack:
        place = arguments.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        place = place.resolve()
        write_pictures(place / "low", range(5))
        write_pictures(place / "high", range(5, 10))
        train(place / "origin", place / "low", total_steps=FIRST_STEPS, eval_steps=0)
        for seed in SEEDS:
            for start in STARTS:
                origin = place / "origin" if start == "init_from" else "null"
                settings = {"total_steps": LAST, "eval_steps": EVERY, "seed": seed}
                train(place / f"{start}-{seed}", place / "high", init_from=origin, **settings)
        report(place)


def report(place: Path) -> None:
    """Print FD by start and step: the mean over the seeds, the least and the most."""
    split = digits_split()
    reference = split.held_out_pixels[split.held_out_labels >= 5]
    steps = range(EVERY, LAST + 1, EVERY)
    rows = {
        f"{start}-{seed} {step}": grey(place / f"{start}-{seed}" / "evals" / f"{step}.npz")
        for start in STARTS
        for seed in SEEDS
        for step in steps
    }
    scores = score(rows, reference, SMALL_SETS["Digits"].graph)
    print(f"FD of {SAMPLES} samples against {len(reference)} held-out digits, 3 seeds")
    for start in STARTS:
        for step in steps:
            found = [scores[f"{start}-{seed} {step}"]["FD"] for seed in SEEDS]
            mean = statistics.mean(found)
            print(f"{start:10} {step:5} {mean:8.2f} ({min(found):.2f} to {max(found):.2f})")


if __name__ == "__main__":
    main()
