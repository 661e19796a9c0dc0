"""Score image files against a reference: FID, sFID, Inception Score, precision and recall.

    python evaluator.py --ref_batch R.npz --sample_batch_dir runs/a/evals
    python evaluator.py --ref_batch R.npz --sample_batch_dir runs/a/evals --watch
    python evaluator.py --write_ref R.npz --images folder-of-pictures --image_size 256
    python evaluator.py --write_ref R.npz --images cifar-10-batches-py

Every .npz in the folder (uint8 `arr_0` [N, H, W, C]) gets a line in its eval_results.txt and a
record in its eval_results.jsonl; what has them is passed over. Needs TensorFlow, with or without a
GPU, and no torch. Distances are called FID only with the Inception graph, else FD.
"""

from support.system.command import run_command  # isort: skip - first: it attends to the start

import argparse
import contextlib
import functools
import platform
import sys
import time
from os.path import expanduser
from pathlib import Path

import numpy as np

from support import __version__
from support.scores.graph import DEFAULT_NAME, FeatureGraph, find_graph
from support.scores.measures import (
    DISTANCES,
    Manifold,
    frechet_distance,
    inception_score,
    precision_recall,
)
from support.scores.references import (
    Measured,
    Reference,
    archive_images,
    find_images,
    load_reference,
    measure,
    refuse_to_replace,
    write_reference,
)
from support.scores.table import (
    FEW_IMAGES,
    Results,
    Stamp,
    Yardstick,
    format_scores,
    origin_of,
    printable,
)
from support.system.files import UserError, make_folder, natural_key, sha256_of

COMMON_IMAGES = 50_000  # behind published scores


# One file.


def score_file(path: Path, reference: Reference, graph: FeatureGraph) -> dict:
    """The record of one sample file: scores by column, and everything they came from.

    Raises UserError where the file is damaged, changes meanwhile, or is of another size.
    """
    start_seconds = time.monotonic()
    images = archive_images(path)
    if images.size != reference.images.size:
        raise UserError(
            f"{path}: images are {images.size}, those of {reference.images.name} are "
            f"{reference.images.size}"
        )
    stamp = Stamp.of(path)
    sha256, origin = sha256_of(path), origin_of(path, images.num_images)
    measured = measure(images, graph)
    manifold = Manifold.of(measured.features, reference.manifold.distances)
    if Stamp.of(path) != stamp:
        raise UserError(f"{path}: changed while it was being scored")
    return {
        "file": path.name,
        "scores": compare(measured, manifold, reference, graph),
        "distances": manifold.distances,
        "num_images": images.num_images,
        "image_shape": images.image_shape,
        "step": origin.get("step"),
        "NFE": origin.get("NFE"),
        "notes": notes(manifold, reference, graph),
        "size_bytes": stamp.size_bytes,
        "modified_ns": stamp.modified_ns,
        "sha256": sha256,
        "reference": {
            "name": reference.images.name,
            "sha256": reference.sha256,
            "num_images": reference.images.num_images,
            "statistics_from": reference.origin,
            "statistics_images": reference.count,
        },
        "graph": {"name": graph.name, "sha256": graph.sha256, "widths": graph.widths},
        "versions": {
            "soflow": __version__,
            "tensorflow": graph.tensorflow_version,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        "device": graph.device,
        "seconds": round(time.monotonic() - start_seconds, 3),
        "scored_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def compare(
    samples: Measured, manifold: Manifold, reference: Reference, graph: FeatureGraph
) -> dict[str, float]:
    """The scores by column; distances have the name that the graph gives them."""
    distance = "FID" if graph.is_inception else "FD"
    coverage = precision_recall(manifold, reference.manifold)
    return {
        "IS": inception_score(samples.features, graph.class_weights),
        distance: frechet_distance(samples.pool, reference.pool),
        f"s{distance}": frechet_distance(samples.spatial, reference.spatial),
        "prec": coverage.precision,
        "recall": coverage.recall,
    }


def notes(samples: Manifold, reference: Reference, graph: FeatureGraph) -> list[str]:
    """What a reader of the scores has to know about numbers of images, and of float16."""
    found = []
    width = max(graph.widths[:2])
    frechet = "FID and sFID" if graph.is_inception else "FD and sFD"
    for whose, count, manifold in (
        ("samples", len(samples.features), samples),
        ("reference", reference.count, reference.manifold),
    ):
        if count is not None and count < COMMON_IMAGES:
            bias = "biased upwards" if count < FEW_IMAGES else f"above those of {COMMON_IMAGES:,}"
            found.append(f"{whose}: {count:,} images; {frechet} are {bias}")
        if count is not None and count < width + 1:
            found.append(f"{whose}: fewer images than features + 1 = {width + 1}")
        if overflows := manifold.num_overflows:
            found.append(
                f"{whose}: {overflows:,} images overflow float16; prec and recall mean nothing"
            )
    if reference.origin == "file" and not (reference.names_graph or graph.is_inception):
        found.append("reference: does not say whether this graph made its statistics")
    return found


# The commands.

SCORING_ONLY = (
    *("ref_batch", "sample_batch_dir", "distances"),
    *("watch", "delete_evaluated", "no_cache"),
)
MAKING_ONLY = ("write_ref", "images", "image_size", "exif", "ref_images")


class Session:
    """A folder being scored; the graph and the reference are loaded when the first file asks."""

    def __init__(self, arguments: argparse.Namespace):
        self._arguments = arguments
        self._folder = Path(arguments.sample_batch_dir)
        if not self._folder.is_dir():
            kind = "is a file, not a folder" if self._folder.exists() else "no such folder"
            raise UserError(f"{self._folder}: {kind} (--sample_batch_dir)")
        make_folder(self._folder)  # proves that results can be written before hours are spent
        self._image_shape = archive_images(arguments.ref_batch).image_shape
        self._graph_path = find_graph_of(arguments)
        self._reference_sha256 = sha256_of(arguments.ref_batch)
        self._distances = arguments.distances or "exact"
        self.yardstick = Yardstick(
            self._reference_sha256, sha256_of(self._graph_path), self._distances
        )
        print(f"graph {self._graph_path}, SHA-256 {self.yardstick.graph_sha256}")
        self.results = Results.open(self._folder)
        self.failed: dict[Path, Stamp] = {}

    def files(self) -> dict[Path, Stamp]:
        """All .npz of the folder in natural order; those that cannot be read are left out."""
        found = {}
        try:
            names = [path.name for path in self._folder.iterdir() if path.name.endswith(".npz")]
        except OSError as error:
            raise UserError(f"{self._folder}: cannot be read ({error.strerror})") from error
        for path in (self._folder / name for name in sorted(names, key=natural_key)):
            with contextlib.suppress(UserError):
                if not path.is_dir():
                    found[path] = Stamp.of(path)
        return found

    def score(self, path: Path, stamp: Stamp) -> None:
        """Score `path` unless that was done or has failed on the same content; say what came."""
        if self.failed.get(path) == stamp or self.results.has(path.name, stamp, self.yardstick):
            return
        reference, graph = self._loaded
        try:
            record = score_file(path, reference, graph)
        except UserError as error:
            self.failed[path] = stamp
            print(f"error: {printable(str(error))}", file=sys.stderr, flush=True)
            return
        self.results.add(record)
        self.failed.pop(path, None)
        print(f"{printable(path.name)} # {format_scores(record['scores'])}")
        print(f"  {record['num_images']} images in {record['seconds']:.1f} s")
        print(f"  prec and recall by {record['distances']} distances", flush=True)
        for note in record["notes"]:
            print(f"  {note}", flush=True)
        if self._arguments.delete_evaluated and not path.samefile(self._arguments.ref_batch):
            try:
                path.unlink()
            except OSError as error:
                raise UserError(
                    f"{path}: scored, and cannot be deleted ({error.strerror})"
                ) from error

    @functools.cached_property
    def _loaded(self) -> tuple[Reference, FeatureGraph]:
        graph = FeatureGraph(self._graph_path, self._image_shape, self._arguments.batch_size)
        print(f"TensorFlow {graph.tensorflow_version} on {graph.device}", flush=True)
        reference = load_reference(
            self._arguments.ref_batch,
            self._reference_sha256,
            graph,
            self._distances,
            use_cache=not self._arguments.no_cache,
        )
        return reference, graph


def score_folder(arguments: argparse.Namespace) -> int:
    """Score every file of the folder; 1 where one could not be scored."""
    session = Session(arguments)
    files = session.files()
    if not files and arguments.watch is None:
        raise UserError(f"{arguments.sample_batch_dir}: holds no .npz to score")
    try:
        for path, stamp in files.items():
            session.score(path, stamp)
        while arguments.watch is not None:
            watch_once(session, arguments.watch)
    except KeyboardInterrupt:
        if arguments.watch is None:
            raise
    if session.results.lines:
        print(session.results.table(session.yardstick))
    for path in session.failed:
        print(f"not scored: {printable(path.name)}", file=sys.stderr)
    return 1 if session.failed else 0


def watch_once(session: Session, seconds: float) -> None:
    """Wait, then score what the wait has not changed: others may still be writing the rest."""
    before = session.files()
    time.sleep(seconds)
    for path, stamp in session.files().items():
        if before.get(path) == stamp:
            session.score(path, stamp)


def find_graph_of(arguments: argparse.Namespace) -> Path:
    beside = Path(__file__).resolve().parent
    return find_graph(arguments.inception, beside, arguments.inception_sha256)


def make_reference(arguments: argparse.Namespace) -> int:
    """Write the reference file that was asked for."""
    images = find_images(arguments.images, arguments.image_size, arguments.exif)
    if images.left_out_note:
        print(images.left_out_note, flush=True)
    refuse_to_replace(arguments.write_ref)
    graph = FeatureGraph(find_graph_of(arguments), images.image_shape, arguments.batch_size)
    print(f"graph {graph.path}, SHA-256 {graph.sha256}")
    write_reference(arguments.write_ref, images, graph, arguments.ref_images)
    print(f"{arguments.write_ref}: {images.num_images} images, {images.size}")
    return 0


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    distances_help = "of precision and recall: exact (default), or float16 as in ADM's evaluator"
    exif_help = (
        "turn pictures upright as their EXIF data say (apply, the default), or ignore these, as "
        "ImageNet's published recipe does"
    )
    watch_help = "keep scoring what appears, looking every so many seconds (60)"
    add = parser.add_argument
    add("--ref_batch", type=expanduser, metavar="R.npz", help="reference file to score against")
    folder_help = "folder whose .npz files are scored"
    add("--sample_batch_dir", type=expanduser, metavar="DIR", help=folder_help)
    add("--distances", choices=DISTANCES, help=distances_help)
    add("--watch", type=positive, nargs="?", const=60, metavar="SECONDS", help=watch_help)
    add("--delete_evaluated", action="store_true", help="delete each file once it is scored")
    add("--no_cache", action="store_true", help="neither read nor write the reference's cache")
    source_help = "folder of pictures, of CIFAR-10 or of Fashion-MNIST, or an .npz"
    making_help = "make a reference file from --images"
    add("--write_ref", type=expanduser, metavar="OUT.npz", help=making_help)
    add("--images", type=expanduser, metavar="SOURCE", help=source_help)
    add("--image_size", type=positive, help="centre crop of pictures to this many pixels")
    add("--exif", choices=("apply", "ignore"), help=exif_help)
    add("--ref_images", type=positive, help="images to keep in the reference file (all)")
    graph_help = f"frozen graph (default: {DEFAULT_NAME})"
    add("--inception", type=expanduser, metavar="PATH", help=graph_help)
    add("--inception_sha256", metavar="HEX", help="digest that the graph must have")
    add("--batch_size", type=positive, default=64, help="images per run of the graph (64)")
    arguments = parser.parse_args(list(map(underscored, sys.argv[1:] if argv is None else argv)))
    chosen = vars(arguments)
    scoring = all(chosen[key] for key in ("ref_batch", "sample_batch_dir"))
    making = all(chosen[key] for key in ("write_ref", "images"))
    stray = SCORING_ONLY if making else MAKING_ONLY
    if scoring == making:
        parser.error("give --ref_batch and --sample_batch_dir, or --write_ref and --images")
    if given := [f"--{key}" for key in stray if chosen[key]]:
        parser.error(f"{', '.join(given)}: not used with {'--write_ref' if making else 'scoring'}")
    return arguments


def underscored(word: str) -> str:
    """An option as it is known here; the other commands write theirs with hyphens."""
    option, equals, value = word.partition("=")
    is_option = word.startswith("--")
    return f"--{option[2:].replace('-', '_')}{equals}{value}" if is_option else word


def positive(text: str) -> int:
    """A whole number above zero, for the command line."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, not {text}")
    return int(text)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; the exit status."""
    arguments = parse_arguments(argv)
    return make_reference(arguments) if arguments.write_ref else score_folder(arguments)


if __name__ == "__main__":
    run_command(main)
