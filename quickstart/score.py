"""Score sampled digits against the 600 held-out ones: a table of FD, sFD, precision and recall.

    python quickstart/score.py runs/digits/evals/1000_1NFE_42.npz [MORE.npz ...]
    python quickstart/score.py runs/digits/evals

600 images a row: each archive's first ones, then the training digits (what good looks like) and
Gaussian noise (what bad looks like). Features of quickstart/digit_classifier.pb, by evaluator.py.
Of a folder all archives are scored whole, and the scores stay there, for report.py to draw.
"""

import argparse
import contextlib
import io
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import evaluator
from support.data.datasets import digits_split
from support.data.images import to_pixels
from support.scores.npz import read_archive, write_images
from support.scores.table import Results
from support.system.command import run_command
from support.system.files import UserError

GRAPH = Path(__file__).with_name("digit_classifier.pb")
NUM_IMAGES = 600
COLUMNS = ("FD", "sFD", "prec", "recall")


def first_images(path: str) -> np.ndarray:
    """The first 600 digits of an archive, uint8 [600, 8, 8, 1]."""
    with read_archive(path) as archive:
        shape = archive.images_header().shape
        if shape[0] < NUM_IMAGES or shape[1:] != (8, 8, 1):
            raise UserError(f"{path}: must hold {NUM_IMAGES} digits [8, 8, 1], not {list(shape)}")
        return next(archive.batches(NUM_IMAGES))


def score(rows: dict[str, np.ndarray], reference: np.ndarray) -> dict[str, dict[str, float]]:
    """Scores by row and column, from one run of the evaluator over all rows."""
    with tempfile.TemporaryDirectory() as place:
        files = {f"{number}.npz": name for number, name in enumerate(rows)}
        for file, name in files.items():
            write(Path(place, file), rows[name])
        with contextlib.redirect_stdout(io.StringIO()):
            score_folder(Path(place), reference)
        records = Results.open(Path(place)).records
        return {files[file]: record["scores"] for file, record in records.items()}


def score_folder(folder: Path, reference: np.ndarray) -> None:
    """Have evaluator.py score the archives of a folder, whose scores stay there."""
    with tempfile.TemporaryDirectory() as place:
        path = Path(place, "digits.npz")
        write(path, reference)
        flags = {"--ref_batch": path, "--sample_batch_dir": folder, "--inception": GRAPH}
        if evaluator.main([str(word) for pair in flags.items() for word in pair]):
            raise UserError(f"{folder}: not all archives could be scored")


def write(path: Path, pixels: np.ndarray) -> None:
    with write_images(path, len(pixels)) as writer:
        writer.append(pixels)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("samples", nargs="+", metavar="SAMPLES.npz")
    paths = parser.parse_args(argv).samples
    split = digits_split()
    if len(paths) == 1 and Path(paths[0]).is_dir():
        score_folder(Path(paths[0]), split.held_out_pixels)
        return
    noise = np.random.RandomState(0).standard_normal((NUM_IMAGES, 8, 8, 1))
    rows = {path: first_images(path) for path in paths}
    rows["training digits"] = split.training_pixels[:NUM_IMAGES]
    rows["Gaussian noise"] = to_pixels(noise)
    scores = score(rows, split.held_out_pixels)
    width = max(map(len, rows))
    print(f"{f'{NUM_IMAGES} images a row':{width}}" + "".join(f"{name:>10}" for name in COLUMNS))
    for name in rows:
        print(f"{name:{width}}" + "".join(f"{scores[name][column]:10.3f}" for column in COLUMNS))
    print(f"({NUM_IMAGES} images bias FD and sFD upwards; prec and recall by exact distances)")


if __name__ == "__main__":
    run_command(main)
