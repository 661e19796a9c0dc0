"""Judge sampled digits against the real ones: are they the class asked for, and are they copies?

    python quickstart/check_digits.py SAMPLES.npz [SAMPLES.npz ...]

Prints, per archive, the share whose class by a vote of the 3 nearest training digits is the one
asked for (the labels in the archive), and the median distance to the nearest training digit, beside
both figures of the 600 digits that training never saw.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from sklearn.neighbors import KNeighborsClassifier

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from support.data.datasets import digits_split
from support.scores.npz import read_archive
from support.system.command import run_command
from support.system.files import UserError

NUM_NEIGHBOURS = 3


def flatten(pixels: np.ndarray) -> np.ndarray:
    """uint8 [N, 8, 8, 1] -> [N, 64] in 0..1."""
    return pixels.reshape(len(pixels), -1) / 255


def read_samples(path: str) -> tuple[np.ndarray, np.ndarray]:
    """The digits of an archive, uint8 [N, 8, 8, 1], and the labels [N] they were sampled for."""
    with read_archive(path) as archive:
        shape = archive.images_header().shape
        if shape[1:] != (8, 8, 1):
            raise UserError(f"{path}: holds images of {list(shape[1:])}, not digits [8, 8, 1]")
        if "arr_1" not in archive:
            raise UserError(f"{path}: holds no labels (arr_1), as samples do now; sample it again")
        return np.concatenate(list(archive.batches(1_000))), archive.labels(shape[0])


def judge(
    neighbours: KNeighborsClassifier, pixels: np.ndarray, labels: np.ndarray
) -> tuple[float, float]:
    """The share classified as labelled, and the median distance to the nearest training digit."""
    distances, _ = neighbours.kneighbors(flatten(pixels), n_neighbors=1)
    return share_right(neighbours, pixels, labels), float(np.median(distances))


def neighbours_of_digits() -> KNeighborsClassifier:
    """What knows the training digits."""
    split = digits_split()
    neighbours = KNeighborsClassifier(NUM_NEIGHBOURS)
    return neighbours.fit(flatten(split.training_pixels), split.training_labels)


def share_right(neighbours: KNeighborsClassifier, pixels: np.ndarray, labels: np.ndarray) -> float:
    """The share of digits that are classified as labelled."""
    return float(np.mean(neighbours.predict(flatten(pixels)) == labels))


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("samples", nargs="+", metavar="SAMPLES.npz")
    paths = parser.parse_args(argv).samples
    split, neighbours = digits_split(), neighbours_of_digits()
    rows = {"600 held-out digits": (split.held_out_pixels, split.held_out_labels)}
    for path in paths:
        pixels, labels = read_samples(path)
        rows[f"{len(pixels)} in {path}"] = (pixels, labels)
    width = max(map(len, rows))
    print(f"{'':{width}}  right class  median distance to the nearest training digit")
    for name, (pixels, labels) in rows.items():
        share, distance = judge(neighbours, pixels, labels)
        print(f"{name:{width}}  {share:11.3f}  {distance:.3f}")


if __name__ == "__main__":
    run_command(main)
