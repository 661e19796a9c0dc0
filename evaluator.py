"""Score image files against a reference: FID, sFID, Inception Score, precision and recall.

    python evaluator.py --ref_batch R.npz --sample_batch_dir runs/a/evals
    python evaluator.py --ref_batch R.npz --sample_batch_dir runs/a/evals --watch
    python evaluator.py --ref_batch R.npz --sample_batch_dir folder-of-png-samples
    python evaluator.py --write_ref R.npz --images folder-of-pictures --image_size 256
    python evaluator.py --write_ref R.npz --images cifar-10-batches-py
    python evaluator.py --verify

Each .npz in the folder (uint8 `arr_0` [N, H, W, C]) gets a line in the folder's eval_results.txt
and a record in its eval_results.jsonl, unless it has them. If there is no .npz, the pictures in the
folder are scored as one set. Features come from TensorFlow where it is installed, otherwise from
torch; each needs no GPU. Distances are called FID only with the Inception graph, otherwise FD.
"""

from support.system.command import run_command  # isort: skip - first: it attends to the start

import argparse
import contextlib
import functools
import sys
import time
from os.path import expanduser
from pathlib import Path

from support.data.images import EXTENSIONS
from support.scores import image_sets, measures, references, table, verification
from support.scores.graph import BACKENDS, DEFAULT_NAME, FeatureGraph, find_graph
from support.scores.image_sets import ImageSet
from support.scores.references import Reference
from support.scores.scoring import no_file, score_samples, stamp_of
from support.scores.summary import summary
from support.scores.table import Results, Stamp, Yardstick, printable
from support.system.files import UserError, make_folder, natural_key, reporting_os_errors, sha256_of

SCORING = (
    *("ref_batch", "sample_batch_dir", "distances", "bootstrap", "floors"),
    *("watch", "delete_evaluated"),
)
MAKING = ("write_ref", "images", "image_size", "exif", "ref_images", "pixels_only")
VERIFYING = ("verify", "verify_files")


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
        self._replicates = arguments.bootstrap or 0
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
        known = (path.name, stamp, self.yardstick, self._replicates)
        if self.failed.get(path) == stamp or self.results.has(*known):
            return
        try:
            read = image_sets.folder_images if path.is_dir() else image_sets.archive_images
            samples = read(path)
        except UserError as error:
            self._fail(path, stamp, error)
            return
        reference, graph = self._load(samples)
        try:
            record = score_samples(path, samples, reference, graph, self._replicates)
        except UserError as error:
            self._fail(path, stamp, error)
            return
        self.failed.pop(path, None)
        self._keep(record)
        if self._arguments.delete_evaluated and not samples.exif:
            with reporting_os_errors(f"{path}: scored, but cannot be deleted"):
                if not path.samefile(self._arguments.ref_batch):
                    path.unlink()
                    references.cache_of(path, graph).unlink(missing_ok=True)

    def add_floors(self, source: str) -> None:
        """Score what can be reached at best, other images at `source`, and at worst, noise.

        Each has as many images as the smallest sample file, since the distances depend on it.
        """
        records = [record for record in self.results.records.values() if record["modified_ns"]]
        counts = [record["num_images"] for record in records]  # of files, not of floors
        best = image_sets.other_part(source)
        count = min([best.num_images, *counts])
        for images in (
            image_sets.part_of(best, count),
            image_sets.noise_images(count, best.image_shape),
        ):
            known = (images.name, no_file(count), self.yardstick, self._replicates)
            if not self.results.has(*known):
                self._keep(score_samples(None, images, *self._load(images), self._replicates))

    def _keep(self, record: dict) -> None:
        """Add a record to the results, and print it."""
        self.results.add(record)
        took = f"{record['num_images']} images in {record['seconds']:.1f} s"
        if self._replicates:
            took += f", {record['bootstrap_seconds']:.1f} s of them for the bootstrap"
        if "prec" in record["scores"]:
            took += f"; prec and recall by {record['distances']} distances"
        print(printable(table.line_of(record)), took, *record["notes"], sep="\n  ", flush=True)

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
        if arguments.floors:
            session.add_floors(arguments.floors)
        while arguments.watch is not None:
            watch_once(session, arguments.watch)
    except KeyboardInterrupt:
        if arguments.watch is None:
            raise
    if session.results.records:
        print(summary(session.results.folder, session.results.records, session.yardstick))
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
    images = image_sets.find_images(
        arguments.images, arguments.image_size, arguments.exif, Path(arguments.write_ref).parent
    )
    if images.left_out_note:
        print(images.left_out_note, flush=True)
    references.refuse_to_replace(arguments.write_ref)
    graph = None
    if not arguments.pixels_only:
        graph = load_graph(find_graph(arguments.inception), images.image_shape, arguments)
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
    times = "resample the features so many times for intervals of the distances (e.g. 100)"
    number("--bootstrap", metavar="N", help=times)
    scale = "also score other images, by best the data set's other part, and noise, as a scale"
    path("--floors", metavar="SOURCE", help=scale)
    again = "keep scoring new files, looking every so many seconds (60)"
    number("--watch", nargs="?", const=60, metavar="SECONDS", help=again)
    add("--delete_evaluated", action="store_true", help="delete each .npz once it is scored")
    path("--write_ref", metavar="OUT.npz", help="make a reference file from --images")
    source = "folder or tar of pictures, folder of CIFAR-10 or of Fashion-MNIST, or an .npz"
    path("--images", metavar="SOURCE", help=source)
    number("--image_size", help="centre crop of pictures to this many pixels")
    exif = "rotation of pictures: apply (default), or ignore as ImageNet's published recipe does"
    add("--exif", choices=("apply", "ignore"), help=exif)
    number("--ref_images", help="images to keep in the reference file (all)")
    later = "store pictures alone in the reference file; it needs no graph until the first score"
    add("--pixels_only", action="store_true", help=later)
    known = "compare our scores of published images with the published scores (imagenet)"
    checks = verification.CHECKS
    add("--verify", nargs="?", const="imagenet", choices=checks, help=known)
    there = "where the files of --verify are, or else are downloaded to (current folder)"
    path("--verify_files", metavar="FOLDER", help=there)
    path("--inception", metavar="PATH", help=f"frozen graph (default: {DEFAULT_NAME})")
    runs = "what runs the graph: auto takes TensorFlow where it is installed, otherwise torch"
    add("--backend", choices=("auto", *BACKENDS), default="auto", help=runs)
    number("--batch_size", default=64, help="images per run of the graph (64)")
    arguments = parser.parse_args(list(map(underscored, sys.argv[1:] if argv is None else argv)))
    chosen = vars(arguments)
    modes = {
        "--ref_batch": (chosen["ref_batch"] and chosen["sample_batch_dir"], SCORING),
        "--write_ref": (chosen["write_ref"] and chosen["images"], MAKING),
        "--verify": (chosen["verify"], VERIFYING),
    }
    if chosen["bootstrap"] == 1:
        parser.error("--bootstrap 1: a deviation needs at least 2")
    if len(asked := [mode for mode, (is_asked, _) in modes.items() if is_asked]) != 1:
        ways = "--ref_batch and --sample_batch_dir, or --write_ref and --images, or --verify"
        parser.error(f"give {ways}")
    others = [key for mode, (_, keys) in modes.items() if mode not in asked for key in keys]
    if stray := [f"--{key}" for key in others if chosen[key]]:
        parser.error(f"{', '.join(stray)}: not used with {asked[0]}")
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
    if arguments.verify:
        files = Path(arguments.verify_files or ".")
        graph = (arguments.inception, arguments.backend, arguments.batch_size)
        return verification.verify(arguments.verify, files, *graph)
    return make_reference(arguments) if arguments.write_ref else score_folder(arguments)


if __name__ == "__main__":
    run_command(main)
