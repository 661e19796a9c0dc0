"""Score sampled digits or clothes: are they the right class, or copies, and how good are they?

    python quickstart/score.py runs/digits/evals/1000_1NFE_42.npz [MORE.npz ...]
    python quickstart/score.py runs/digits/evals
    python quickstart/score.py runs/fashion/evals --data data/fashion

The first table has a row for the held-out images, which training never saw, and one for each
archive: the share of images whose 3 nearest training images vote for the requested class, and the
median distance to the nearest training image.

Each row of the second compares 600 digits with the 600 held-out ones, or 5,000 clothes with
Fashion-MNIST's 10,000 test images: the first images of each archive, then training images (how
good it can get) and Gaussian noise (how bad). evaluator.py computes the scores from the features of
the classifier beside this script; `class` is the share of images that it assigns to the requested
class. In a folder, all archives are scored on all their images, and the scores stay there for
report.py.
"""

import contextlib
import io
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from sklearn.neighbors import NearestNeighbors

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import evaluator
from quickstart.small_sets import DEFAULT_FOLDER, SmallSet, Split, read_samples, set_of
from support.data.images import LabelledImages, to_pixels
from support.scores.graph import FeatureGraph
from support.scores.npz import write_images
from support.scores.table import read_records
from support.system.command import command_parser, run_command
from support.system.files import UserError

COLUMNS = ("FD", "sFD", "prec", "recall", "class")
NUM_NEIGHBOURS = 3

Samples = Mapping[Path, LabelledImages]  # by archive


def print_neighbours(samples: Samples, small: SmallSet, split: Split) -> None:
    """Print a row for held-out images and one for each archive: right class, or copies?"""
    held_out = split.held_out.part(slice(small.scored_count))
    rows = {f"{len(held_out.labels)} held-out {small.noun}": held_out}
    rows |= {f"{len(images.labels)} in {path}": images for path, images in samples.items()}
    neighbours = NearestNeighbors(n_neighbors=NUM_NEIGHBOURS).fit(flatten(split.training.pixels))
    width = max(map(len, rows))
    print(f"{'':{width}}  right class  median distance to the nearest of the training {small.noun}")
    for name, images in rows.items():
        distances, nearest = neighbours.kneighbors(flatten(images.pixels))
        votes = split.training.labels[nearest]
        voted = np.array([np.bincount(of_image).argmax() for of_image in votes])
        share = np.mean(voted == images.labels)
        print(f"{name:{width}}  {share:11.3f}  {np.median(distances[:, 0]):.3f}")


def flatten(pixels: np.ndarray) -> np.ndarray:
    """uint8 [N, H, W, 1] -> float32 [N, H W] in 0..1."""
    return pixels.reshape(len(pixels), -1) / np.float32(255)


def score(
    rows: Mapping[str, LabelledImages], reference: np.ndarray, graph: Path
) -> dict[str, dict[str, float]]:
    """Scores by row and column, from one run of the evaluator over all rows."""
    with tempfile.TemporaryDirectory() as place:
        for number, images in enumerate(rows.values()):
            write(Path(place, f"{number}.npz"), images.pixels)
        with contextlib.redirect_stdout(io.StringIO()):
            score_folder(Path(place), reference, graph)
        records = read_records(Path(place))
    classifier = FeatureGraph(graph, reference.shape[1:])
    return {
        name: {**records[f"{number}.npz"]["scores"], "class": right_class(images, classifier)}
        for number, (name, images) in enumerate(rows.items())
    }


def right_class(images: LabelledImages, classifier: FeatureGraph) -> float:
    """The share of images that the classifier assigns to the class of their label."""
    features = np.concatenate([batch.pool for batch in classifier.features(images.pixels)])
    found = (features @ classifier.class_weights).argmax(axis=1)
    return float((found == images.labels).mean())


def score_folder(folder: Path, reference: np.ndarray, graph: Path) -> None:
    """Let evaluator.py score the archives of a folder; the scores stay there."""
    with tempfile.TemporaryDirectory() as place:
        path = Path(place, "held_out.npz")
        write(path, reference)
        flags = {"--ref_batch": path, "--sample_batch_dir": folder, "--inception": graph}
        if evaluator.main([str(word) for pair in flags.items() for word in pair]):
            raise UserError(f"{folder}: not all archives could be scored")


def write(path: Path, pixels: np.ndarray) -> None:
    with write_images(path, len(pixels)) as writer:
        writer.append(pixels)


def print_scores(samples: Samples, small: SmallSet, split: Split) -> None:
    """Print a row for each archive, and two rows to compare them with."""
    count = small.scored_count
    rows = {str(path): images.part(slice(count)) for path, images in samples.items()}
    rows[f"training {small.noun}"] = split.training.part(slice(count))
    held_out = split.held_out.part(slice(count))
    noise = np.random.RandomState(0).standard_normal(held_out.pixels.shape)
    rows["Gaussian noise"] = LabelledImages(to_pixels(noise), held_out.labels)
    scores = score(rows, split.held_out.pixels, small.graph)
    lines: dict[str, tuple[str, ...]] = {f"{count} images a row": COLUMNS}
    lines |= {name: tuple(f"{scores[name][column]:.3f}" for column in COLUMNS) for name in rows}
    width = max(map(len, lines))
    cell_width = 2 + max(len(cell) for cells in lines.values() for cell in cells)
    for name, cells in lines.items():
        print(f"{name:{width}}" + "".join(f"{cell:>{cell_width}}" for cell in cells))
    print(f"({count} images bias FD and sFD upwards; prec and recall by exact distances)")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = command_parser(__doc__)
    parser.add_argument("samples", nargs="+", metavar="SAMPLES.npz", type=Path)
    parser.add_argument("--data", type=Path, default=DEFAULT_FOLDER, help="folder of the clothes")
    arguments = parser.parse_args(argv)
    paths, folder = arguments.samples, None
    if len(paths) == 1 and paths[0].is_dir():
        folder = paths[0]
        paths = sorted(folder.glob("*.npz"))
        if not paths:
            raise UserError(f"{folder}: holds no archives (.npz)")
    small = set_of(paths)
    split = small.load(arguments.data)
    if folder:
        score_folder(folder, split.held_out.pixels, small.graph)
    else:
        samples = {path: read_samples(path, small.scored_count) for path in paths}
        print_neighbours(samples, small, split)
        print()
        print_scores(samples, small, split)


if __name__ == "__main__":
    run_command(main)
