"""Compare sampled digits or clothes with training images: are they the right class, or copies?

    python quickstart/check_samples.py runs/digits/evals/1000_1NFE_42.npz [MORE.npz ...]
    python quickstart/check_samples.py SAMPLES.npz --data data/fashion

For each archive it prints the share of samples whose 3 nearest training images vote for the class
that was requested (the labels in the archive), and the median distance to the nearest training
image; and both numbers for images that training never saw.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy.stats import mode
from sklearn.neighbors import NearestNeighbors

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from quickstart.small_sets import DEFAULT_FOLDER, read_samples, set_of
from support.data.images import LabelledImages
from support.system.command import run_command

NUM_NEIGHBOURS = 3


def flatten(pixels: np.ndarray) -> np.ndarray:
    """uint8 [N, H, W, 1] -> float32 [N, H W] in 0..1."""
    return pixels.reshape(len(pixels), -1) / np.float32(255)


def judge(
    neighbours: NearestNeighbors, known: LabelledImages, images: LabelledImages
) -> tuple[float, float]:
    """The share classified as labelled, and the median distance to the nearest known image."""
    distances, nearest = neighbours.kneighbors(flatten(images.pixels))
    voted = mode(known.labels[nearest], axis=1).mode
    return float(np.mean(voted == images.labels)), float(np.median(distances[:, 0]))


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("samples", nargs="+", metavar="SAMPLES.npz", type=Path)
    parser.add_argument("--data", type=Path, default=DEFAULT_FOLDER, help="folder of the clothes")
    arguments = parser.parse_args(argv)
    small = set_of(arguments.samples)
    samples = {path: read_samples(path) for path in arguments.samples}
    split = small.load(arguments.data)
    neighbours = NearestNeighbors(n_neighbors=NUM_NEIGHBOURS).fit(flatten(split.training.pixels))
    held_out = split.held_out.part(slice(small.scored_count))
    rows = {f"{len(held_out.labels)} held-out {small.noun}": held_out}
    rows |= {f"{len(images.labels)} in {path}": images for path, images in samples.items()}
    width = max(map(len, rows))
    print(f"{'':{width}}  right class  median distance to the nearest of the training {small.noun}")
    for name, images in rows.items():
        share, distance = judge(neighbours, split.training, images)
        print(f"{name:{width}}  {share:11.3f}  {distance:.3f}")


if __name__ == "__main__":
    run_command(main)
