"""Score one set of samples: all scores that its reference allows, in a record that says of what."""

import hashlib
import platform
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from support import __version__
from support.data.folders import find_pictures
from support.scores import bootstrap, measures, table
from support.scores.graph import FeatureGraph
from support.scores.image_sets import ImageSet
from support.scores.measures import Manifold
from support.scores.references import (
    POOL,
    SPATIAL,
    Measured,
    Reference,
    measure,
    measure_once,
)
from support.scores.table import FEW_IMAGES, Stamp
from support.system.files import UserError, sha256_of

COMMON_IMAGES = 50_000  # behind published scores


def stamp_of(path: Path) -> Stamp:
    """Size and time of an .npz, or of all pictures in a folder."""
    return Stamp.of(*(find_pictures(path).paths if path.is_dir() else [path]))


def no_file(num_images: int) -> Stamp:
    """The stamp of images that are in no file."""
    return Stamp(num_images, 0)


def score_samples(
    path: Path | None,
    samples: ImageSet,
    reference: Reference,
    graph: FeatureGraph,
    replicates: int = 0,
) -> dict:
    """The record of the samples at `path`: scores by column, and everything they came from.

    Without a path, the samples are in no file, and the record has their name. With `replicates`,
    distances get intervals by the bootstrap, and the features of an .npz are kept beside it.
    Raises UserError if the samples are damaged, change meanwhile, or are of another size.
    """
    start_seconds = time.monotonic()
    if samples.image_shape[:2] != graph.image_shape[:2]:  # grey counts as RGB
        of = reference.path if reference.images else "the samples scored first"
        shapes = f"{list(samples.image_shape)}, those of {of} are {list(graph.image_shape)}"
        raise UserError(f"{samples.name}: images are {shapes}")
    stamp = stamp_of(path) if path else no_file(samples.num_images)
    origin = table.origin_of(path, samples.num_images) if path else {}
    digest = hashlib.sha256()  # of the pixels, where there is no file
    sha256 = sha256_of(path) if path and not samples.exif else None
    balls = None
    if path and sha256 and replicates:
        measured, balls = measure_once(samples, graph, sha256, reference.distances, path)
    else:
        measured = measure(samples, graph, (lambda pixels: None) if sha256 else digest.update)
    if reference.manifold and balls is None:
        balls = Manifold.of(measured.features, reference.distances)
    if path and stamp_of(path) != stamp:
        raise UserError(f"{path}: changed while it was being scored")
    scores, deviations = compare(measured, balls, reference, graph)
    return {
        "file": path.name if path else samples.name,
        "scores": scores,
        "deviations": deviations,
        **intervals(measured, reference, graph, replicates),
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


class DistanceNames(NamedTuple):
    """The columns of the distances."""

    pool: str
    spatial: str
    kernel: str

    @classmethod
    def of(cls, graph: FeatureGraph) -> "DistanceNames":
        """Inception's have names of their own."""
        return cls("FID", "sFID", "KID") if graph.is_inception else cls("FD", "sFD", "KD")


def compare(
    samples: Measured, balls: Manifold | None, reference: Reference, graph: FeatureGraph
) -> tuple[dict[str, float], dict[str, float]]:
    """The scores by column, as far as the reference allows, and deviations over subsets."""
    names, deviations = DistanceNames.of(graph), {}
    scores = {"IS": measures.inception_score(samples.features, graph.class_weights)}
    for column, kind in ((names.pool, POOL), (names.spatial, SPATIAL)):
        if kind in reference.statistics:
            pair = (samples.statistics[kind], reference.statistics[kind])
            scores[column] = measures.frechet_distance(*pair)
    if reference.features is not None:
        found = measures.kernel_distance(samples.features, reference.features)
        scores[names.kernel], deviations[names.kernel] = found
    if balls and reference.manifold:
        scores["prec"], scores["recall"] = measures.precision_recall(balls, reference.manifold)
    return scores, deviations


def intervals(
    samples: Measured, reference: Reference, graph: FeatureGraph, replicates: int
) -> dict[str, Any]:
    """Half widths of the distances' intervals, and how they were made; empty without replicates."""
    if not replicates:
        return {}
    start_seconds, names, halves = time.monotonic(), DistanceNames.of(graph), {}
    features = samples.features
    if POOL in reference.statistics:
        statistics = reference.statistics[POOL]
        halves[names.pool] = bootstrap.frechet_half_width(features, statistics, replicates)
    if reference.features is not None:
        theirs = reference.features
        halves[names.kernel] = bootstrap.kernel_half_width(features, theirs, replicates)
    seconds = round(time.monotonic() - start_seconds, 3)
    return {"bootstrap": replicates, "intervals": halves, "bootstrap_seconds": seconds}


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
