"""Score image files against a reference: FID, sFID, Inception Score, precision and recall.

    python evaluator.py --ref_batch R.npz --sample_batch_dir runs/a/evals
    python evaluator.py --ref_batch R.npz --sample_batch_dir runs/a/evals --watch
    python evaluator.py --ref_batch R.npz --sample_batch_dir folder-of-png-samples
    python evaluator.py --write_ref R.npz --images folder-of-pictures --image_size 256
    python evaluator.py --write_ref R.npz --images cifar-10-batches-py

Each .npz in the folder (uint8 `arr_0` [N, H, W, C]) gets a line in the folder's eval_results.txt
and a record in its eval_results.jsonl, unless it has them. If there is no .npz, the pictures in the
folder are scored as one set. Features come from TensorFlow where it is installed, otherwise from
torch; each needs no GPU. Distances are called FID only with the Inception graph, otherwise FD.
"""

from support.system.command import run_command  # isort: skip - first: it attends to the start

import argparse
import contextlib
import functools
import hashlib
import platform
import sys
import time
from os.path import expanduser
from pathlib import Path

import numpy as np

from support import __version__
from support.data.folders import find_pictures
from support.data.images import EXTENSIONS
from support.scores import image_sets, measures, references, table
from support.scores.graph import BACKENDS, DEFAULT_NAME, FeatureGraph, find_graph
from support.scores.image_sets import ImageSet
from support.scores.measures import Manifold
from support.scores.references import POOL, SPATIAL, Measured, Reference, measure
from support.scores.table import FEW_IMAGES, Results, Stamp, Yardstick, printable
from support.system.files import UserError, make_folder, natural_key, reporting_os_errors, sha256_of

COMMON_IMAGES = 50_000  # behind published scores


# One set of samples: an .npz, or a folder of pictures.


def stamp_of(path: Path) -> Stamp:
    return Stamp.of(*(find_pictures(path).paths if path.is_dir() else [path]))


def score_samples(path: Path, samples: ImageSet, reference: Reference, graph: FeatureGraph) -> dict:
    """The record of the samples at `path`: scores by column, and everything they came from.

    Raises UserError if they are damaged, change meanwhile, or are of another size.
    """
    start_seconds = time.monotonic()
    if samples.image_shape[:2] != graph.image_shape[:2]:  # grey counts as RGB
        of = reference.path if reference.images else "the samples scored first"
        shapes = f"{list(samples.image_shape)}, those of {of} are {list(graph.image_shape)}"
        raise UserError(f"{path}: images are {shapes}")
    stamp, origin = stamp_of(path), table.origin_of(path, samples.num_images)
    digest = hashlib.sha256()  # of a folder's pixels
    sha256 = None if samples.exif else sha256_of(path)
    measured = measure(samples, graph, digest.update if samples.exif else lambda pixels: None)
    balls = Manifold.of(measured.features, reference.distances) if reference.manifold else None
    if stamp_of(path) != stamp:
        raise UserError(f"{path}: changed while it was being scored")
    return {
        "file": path.name,
        "scores": compare(measured, balls, reference, graph),
        "distances": reference.distances,
        "num_images": samples.num_images,
        "image_shape": samples.image_shape,
        "step": origin.get("step"),
        "NFE": origin.get("NFE"),
        "notes": notes(samples, balls, reference, graph),
        **stamp._asdict(),
        "sha256": sha256 or digest.hexdigest(),
        "exif": samples.exif or None,
        "reference": reference.record(),
        "graph": {"name": graph.name, "sha256": graph.sha256, "widths": graph.widths},
        "versions": {
            "soflow": __version__,
            graph.engine.name: graph.engine.version,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        "backend": graph.engine.name,
        "device": graph.engine.device,
        "seconds": round(time.monotonic() - start_seconds, 3),
        "scored_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def compare(
    samples: Measured, balls: Manifold | None, reference: Reference, graph: FeatureGraph
) -> dict[str, float]:
    """The scores by column, as far as the reference allows; the graph names the distances."""
    distance = "FID" if graph.is_inception else "FD"
    scores = {"IS": measures.inception_score(samples.features, graph.class_weights)}
    for column, kind in ((distance, POOL), (f"s{distance}", SPATIAL)):
        if kind in reference.statistics:
            pair = (samples.statistics[kind], reference.statistics[kind])
            scores[column] = measures.frechet_distance(*pair)
    if balls and reference.manifold:
        scores["prec"], scores["recall"] = measures.precision_recall(balls, reference.manifold)
    return scores


def notes(
    samples: ImageSet, balls: Manifold | None, reference: Reference, graph: FeatureGraph
) -> list[str]:
    """What a reader of the scores has to know."""
    found = []
    width = max(graph.widths[:2])
    frechet = "FID and sFID" if graph.is_inception else "FD and sFD"
    behind = [source.num_images for source in reference.sources.values() if source.num_images]
    for whose, count, manifold in (
        ("samples", samples.num_images, balls),
        ("reference", min(behind, default=None), reference.manifold),
    ):
        if count is not None and count < COMMON_IMAGES:
            bias = "biased upwards" if count < FEW_IMAGES else f"above those of {COMMON_IMAGES:,}"
            found.append(f"{whose}: {count:,} images; {frechet} are {bias}")
        if count is not None and count < width + 1:
            found.append(f"{whose}: fewer images than features + 1 = {width + 1}")
        if manifold and (overflows := manifold.num_overflows):
            found.append(
                f"{whose}: {overflows:,} images overflow float16; prec and recall mean nothing"
            )
    if reference.images is None:
        found.append("reference: has no images, which prec and recall need")
    if SPATIAL not in reference.statistics:
        found.append(f"reference: has no images and no mu_s, sigma_s for {frechet.split()[-1]}")
    if samples.exif:
        found.append("samples: pictures of a folder; the record's SHA-256 is that of their pixels")
    if samples.is_by_class:
        splits = f"splits of {measures.SPLIT_IMAGES:,} images"
        found.append(f"samples: sorted by class; lowers IS, which is the mean over {splits}")
    from_file = [kind for kind, source in reference.sources.items() if source.origin == "file"]
    if from_file and not (reference.names_graph or graph.is_inception):
        found.append("reference: does not say whether this graph made its statistics")
    return found


# The commands.

SCORING = ("ref_batch", "sample_batch_dir", "distances", "watch", "delete_evaluated")
MAKING = ("write_ref", "images", "image_size", "exif", "ref_images")


def load_graph(
    path: Path, image_shape: tuple[int, ...], arguments: argparse.Namespace
) -> FeatureGraph:
    """The graph, run by the backend that was asked for, which is printed."""
    graph = FeatureGraph(path, image_shape, arguments.batch_size, arguments.backend)
    engine = graph.engine
    print(f"features by {engine.name} {engine.version} on {engine.device}", flush=True)
    return graph


class Session:
    """A folder being scored; graph and reference are loaded when the first samples need them."""

    def __init__(self, arguments: argparse.Namespace):
        self._arguments = arguments
        self._folder = Path(arguments.sample_batch_dir)
        if not self._folder.is_dir():
            kind = "is a file, not a folder" if self._folder.exists() else "no such folder"
            raise UserError(f"{self._folder}: {kind} (--sample_batch_dir)")
        make_folder(self._folder)  # so that hours of work do not end with results unwritten
        self._reference_images = references.reference_images(arguments.ref_batch)
        self._graph_path = find_graph(arguments.inception)
        self._loaded: tuple[Reference, FeatureGraph] | None = None
        self._distances = arguments.distances or "exact"
        self._sha256 = sha256_of(arguments.ref_batch)
        self.yardstick = Yardstick(self._sha256, sha256_of(self._graph_path), self._distances)
        print(f"graph {self._graph_path}, SHA-256 {self.yardstick.graph_sha256}")
        self.results = Results.open(self._folder)
        self.failed: dict[Path, Stamp] = {}

    def files(self) -> dict[Path, Stamp]:
        """All .npz of the folder in natural order, or the folder itself if it has only pictures.

        Files that cannot be read are left out.
        """
        found = {}
        with reporting_os_errors(f"{self._folder}: cannot be read"):
            names = sorted((path.name for path in self._folder.iterdir()), key=natural_key)
        paths = [self._folder / name for name in names if name.endswith(".npz")]
        paths = [path for path in paths if not path.is_dir()]
        if not paths and any(name.lower().endswith(EXTENSIONS) for name in names):
            paths = [self._folder.resolve()]
        for path in paths:
            with contextlib.suppress(UserError):
                found[path] = stamp_of(path)
        return found

    def score(self, path: Path, stamp: Stamp) -> None:
        """Score `path`, unless that was done or has failed on the same content, and print it."""
        if self.failed.get(path) == stamp or self.results.has(path.name, stamp, self.yardstick):
            return
        try:
            read = image_sets.folder_images if path.is_dir() else image_sets.archive_images
            samples = read(path)
        except UserError as error:
            self._fail(path, stamp, error)
            return
        reference, graph = self._load(samples)
        try:
            record = score_samples(path, samples, reference, graph)
        except UserError as error:
            self._fail(path, stamp, error)
            return
        self.results.add(record)
        self.failed.pop(path, None)
        took = f"{record['num_images']} images in {record['seconds']:.1f} s"
        if "prec" in record["scores"]:
            took += f"; prec and recall by {record['distances']} distances"
        print(printable(table.line_of(record)), took, *record["notes"], sep="\n  ", flush=True)
        if self._arguments.delete_evaluated and not samples.exif:
            with reporting_os_errors(f"{path}: scored, but cannot be deleted"):
                if not path.samefile(self._arguments.ref_batch):
                    path.unlink()

    def _load(self, samples: ImageSet) -> tuple[Reference, FeatureGraph]:
        """The reference and the graph; for images like these samples if the reference has none."""
        if self._loaded is None:
            arguments, images = self._arguments, self._reference_images
            shape = (images or samples).image_shape
            graph = load_graph(self._graph_path, shape, arguments)
            source = (arguments.ref_batch, images, self._sha256)
            self._loaded = references.load_reference(*source, graph, self._distances), graph
        return self._loaded

    def _fail(self, path: Path, stamp: Stamp, error: UserError) -> None:
        self.failed[path] = stamp
        print(f"error: {printable(str(error))}", file=sys.stderr, flush=True)


def score_folder(arguments: argparse.Namespace) -> int:
    """Score everything in the folder; 1 if something could not be scored."""
    session = Session(arguments)
    files = session.files()
    if not files and arguments.watch is None:
        raise UserError(f"{arguments.sample_batch_dir}: holds no .npz and no pictures to score")
    try:
        for path, stamp in files.items():
            session.score(path, stamp)
        while arguments.watch is not None:
            watch_once(session, arguments.watch)
    except KeyboardInterrupt:
        if arguments.watch is None:
            raise
    if session.results.records:
        print(session.results.table(session.yardstick))
    for path in session.failed:
        print(f"not scored: {printable(path.name)}", file=sys.stderr)
    return 1 if session.failed else 0


def watch_once(session: Session, seconds: float) -> None:
    """Wait, then score what has not changed meanwhile: the rest may still be being written."""
    before = session.files()
    time.sleep(seconds)
    for path, stamp in session.files().items():
        if before.get(path) == stamp:
            session.score(path, stamp)


def make_reference(arguments: argparse.Namespace) -> int:
    """Write the reference file that was asked for."""
    images = image_sets.find_images(arguments.images, arguments.image_size, arguments.exif)
    if images.left_out_note:
        print(images.left_out_note, flush=True)
    references.refuse_to_replace(arguments.write_ref)
    path = find_graph(arguments.inception)
    graph = load_graph(path, images.image_shape, arguments)
    print(f"graph {graph.path}, SHA-256 {graph.sha256}")
    references.write_reference(arguments.write_ref, images, graph, arguments.ref_images)
    print(f"{arguments.write_ref}: {images.num_images} images {list(images.image_shape)}")
    return 0


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    path, number = functools.partial(add, type=expanduser), functools.partial(add, type=positive)
    path("--ref_batch", metavar="R.npz", help="reference file to score against")
    path("--sample_batch_dir", metavar="DIR", help="folder of .npz files, or of pictures")
    kinds = "for precision and recall: exact (default), or float16 as in ADM's evaluator"
    add("--distances", choices=measures.DISTANCES, help=kinds)
    again = "keep scoring new files, looking every so many seconds (60)"
    number("--watch", nargs="?", const=60, metavar="SECONDS", help=again)
    add("--delete_evaluated", action="store_true", help="delete each .npz once it is scored")
    path("--write_ref", metavar="OUT.npz", help="make a reference file from --images")
    source = "folder of pictures, of CIFAR-10 or of Fashion-MNIST, or an .npz"
    path("--images", metavar="SOURCE", help=source)
    number("--image_size", help="centre crop of pictures to this many pixels")
    exif = "rotation of pictures: apply (default), or ignore as ImageNet's published recipe does"
    add("--exif", choices=("apply", "ignore"), help=exif)
    number("--ref_images", help="images to keep in the reference file (all)")
    path("--inception", metavar="PATH", help=f"frozen graph (default: {DEFAULT_NAME})")
    runs = "what runs the graph: auto takes TensorFlow where it is installed, otherwise torch"
    add("--backend", choices=("auto", *BACKENDS), default="auto", help=runs)
    number("--batch_size", default=64, help="images per run of the graph (64)")
    arguments = parser.parse_args(list(map(underscored, sys.argv[1:] if argv is None else argv)))
    chosen = vars(arguments)
    scoring = chosen["ref_batch"] and chosen["sample_batch_dir"]
    making = chosen["write_ref"] and chosen["images"]
    if bool(scoring) == bool(making):
        parser.error("give --ref_batch and --sample_batch_dir, or --write_ref and --images")
    stray = SCORING if making else MAKING
    if given := [f"--{key}" for key in stray if chosen[key]]:
        parser.error(f"{', '.join(given)}: not used with {'--write_ref' if making else 'scoring'}")
    return arguments


def underscored(word: str) -> str:
    """An option as it is known here; the other commands write theirs with hyphens."""
    option, equals, value = word.partition("=")
    is_option = word.startswith("--")
    return f"--{option[2:].replace('-', '_')}{equals}{value}" if is_option else word


def positive(text: str) -> int:
    """A whole number above zero; argparse words the error."""
    if int(text) < 1:
        raise ValueError
    return int(text)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; the exit status."""
    arguments = parse_arguments(argv)
    return make_reference(arguments) if arguments.write_ref else score_folder(arguments)


if __name__ == "__main__":
    run_command(main)
