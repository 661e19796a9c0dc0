"""References: what a graph sees in the images that samples are compared with.

A reference file is an .npz with images (uint8 `arr_0` [N, H, W, C]), with statistics, or with both.
The statistics are `mu`, `sigma` of the pool features and `mu_s`, `sigma_s` of the spatial features.
Statistics that a file with images lacks are computed from them; a file without images gives no
precision and recall. Files made by `write_reference` also record the graph (`graph`,
`graph_sha256`), the number of images (`count`), `image_shape` and, for pictures, `exif`.
"""

# N images, D width of the features.

import contextlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from support.scores.graph import FeatureGraph
from support.scores.image_sets import ImageSet, archive_images, evenly
from support.scores.measures import DISTANCES, NEIGHBOUR, Manifold, Moments, Statistics
from support.scores.npz import IMAGES, LABELS, ArchiveReader, read_archive, write_images
from support.system.files import UserError, atomic_write, check_writable

CACHE_VERSION = 3
POOL, SPATIAL = "pool", "spatial"
KEYS = {POOL: ("mu", "sigma"), SPATIAL: ("mu_s", "sigma_s")}
KNOWN_KEYS = {IMAGES, LABELS, *KEYS[POOL], *KEYS[SPATIAL]}
KNOWN_KEYS |= {"graph", "graph_sha256", "count", "image_shape", "exif"}


class Measured(NamedTuple):
    """What a graph sees in an image set: pool features [N, D] float32, and statistics by kind."""

    features: np.ndarray
    statistics: dict[str, Statistics]


def measure(
    images: ImageSet,
    graph: FeatureGraph,
    each_batch: Callable[[np.ndarray], object] = lambda pixels: None,
) -> Measured:
    """Run `graph` over all images; `each_batch` is called with every batch of pixels."""
    features = np.empty((images.num_images, graph.widths[0]), np.float32)
    moments = {POOL: Moments(), SPATIAL: Moments()}
    done = 0
    # disable=None: a progress bar on terminals only
    with tqdm(total=images.num_images, desc=images.name, unit="img", disable=None) as progress:
        for pixels in images.batches():
            each_batch(pixels)
            for batch in graph.features(pixels):
                features[done : done + len(batch.pool)] = batch.pool
                moments[POOL].add(batch.pool)
                moments[SPATIAL].add(batch.spatial)
                done += len(batch.pool)
                progress.update(len(batch.pool))
    return Measured(features, {kind: found.statistics() for kind, found in moments.items()})


# Writing a reference file.


def refuse_to_replace(path: str | Path) -> None:
    """UserError if a reference cannot be written to `path`, or would replace a foreign file."""
    check_writable(path)
    is_ours = not Path(path).exists()
    with contextlib.suppress(UserError), read_archive(path) as archive:
        is_ours = "image_shape" in archive
    if not is_ours:
        raise UserError(f"{path}: exists and was not made by --write_ref; name another file")


def write_reference(
    path: str | Path, images: ImageSet, graph: FeatureGraph | None, keep_images: int | None = None
) -> None:
    """Write a reference file: statistics of all `images`, and `keep_images` of them (or all).

    Without a graph it gets no statistics: they are made of the kept images at the first score.
    """
    num_images = images.num_images
    kept = keep_images or num_images
    if not NEIGHBOUR < kept <= num_images:
        raise UserError(f"--ref_images {kept}: must be in {NEIGHBOUR + 1}..{num_images}")
    is_kept = evenly(num_images, kept)
    with write_images(path, kept) as writer:
        seen = 0

        def keep(pixels: np.ndarray) -> None:
            nonlocal seen
            writer.append(pixels[is_kept[seen : seen + len(pixels)]])
            seen += len(pixels)

        if graph:
            writer.further_arrays.update(
                _by_key(measure(images, graph, keep)),
                graph=np.array(graph.name),
                graph_sha256=np.array(graph.sha256),
                count=np.array(num_images),
            )
        else:
            for pixels in images.batches():
                keep(pixels)
        writer.further_arrays["image_shape"] = np.array(images.image_shape)
        if images.exif:
            writer.further_arrays["exif"] = np.array(images.exif)


def _by_key(measured: Measured) -> dict[str, np.ndarray]:
    """The statistics under the keys that files have for them."""
    arrays = {}
    for kind, (mean, covariance) in KEYS.items():
        arrays[mean] = measured.statistics[kind].mean
        arrays[covariance] = measured.statistics[kind].covariance
    return arrays


# Reading a reference file.


class Source(NamedTuple):
    """Where statistics come from."""

    origin: str  # "file", or "images" if they were computed from the file's images
    num_images: int | None  # behind them; None if the file does not say


@dataclass(frozen=True)
class Reference:
    """A reference file, ready to be compared with."""

    path: Path
    sha256: str
    distances: str  # a key of DISTANCES
    images: ImageSet | None
    statistics: dict[str, Statistics]  # by kind; pool at least
    sources: dict[str, Source]  # of the statistics
    features: np.ndarray | None  # [N, D] float32, of the images
    manifold: Manifold | None  # of the images
    names_graph: bool  # whether the file says which graph made its statistics

    def record(self) -> dict[str, Any]:
        """What the record of scores tells about it."""
        return {
            "name": str(self.path),
            "sha256": self.sha256,
            "num_images": self.images.num_images if self.images else None,
            "statistics": {kind: source._asdict() for kind, source in self.sources.items()},
        }


def reference_images(path: str | Path) -> ImageSet | None:
    """The images of a reference file, None if it has only statistics; UserError if neither."""
    with read_archive(path) as archive:
        if unknown := sorted({*archive.names} - KNOWN_KEYS):
            print(f"{path}: not used: {', '.join(unknown)}", flush=True)
        if IMAGES not in archive and not any(key in archive for key in KEYS[POOL]):
            raise UserError(
                f"{path}: has neither images (arr_0) nor statistics (mu, sigma) ({archive.found})"
            )
        return archive_images(path) if IMAGES in archive else None


def load_reference(
    path: str | Path,
    images: ImageSet | None,
    sha256: str,
    graph: FeatureGraph,
    distances: str = "exact",
) -> Reference:
    """The reference at `path` with its `images`, as `graph` sees it.

    What the graph sees in the images is read from a cache beside the file, if it fits. `sha256` is
    the file's digest. Raises UserError if the file is damaged or its statistics do not fit.
    """
    path = Path(path)
    with read_archive(path) as archive:
        _refuse_other_graph(archive, graph)
        statistics = _read_statistics(archive, graph)
        count = archive.integer("count") if "count" in archive else None
        names_graph = "graph_sha256" in archive
    sources = {kind: Source("file", count) for kind in statistics}
    features = manifold = None
    if images is not None:
        measured, manifold = measure_once(images, graph, sha256, distances, path)
        features, statistics = measured.features, measured.statistics | statistics
        computed = Source("images", images.num_images)
        sources = {kind: sources.get(kind, computed) for kind in statistics}
    return Reference(
        *(path, sha256, distances, images, statistics, sources, features, manifold, names_graph)
    )


def _refuse_other_graph(archive: ArchiveReader, graph: FeatureGraph) -> None:
    if "graph_sha256" not in archive:
        return
    made_by = archive.text("graph_sha256")
    if made_by != graph.sha256:
        name = archive.text("graph") if "graph" in archive else "another graph"
        raise UserError(
            f"{archive.path}: its statistics were made by {name} ({made_by[:12]}), not by "
            f"{graph.name} ({graph.sha256[:12]}); make it again with --write_ref"
        )


def _read_statistics(archive: ArchiveReader, graph: FeatureGraph) -> dict[str, Statistics]:
    """The statistics in a file, by kind; UserError where the graph cannot have made them."""
    found = {}
    for (kind, (mean, covariance)), width in zip(KEYS.items(), graph.widths, strict=False):
        if mean in archive or covariance in archive:
            shapes = {mean: (width,), covariance: (width, width)}
            found[kind] = Statistics(*(archive.floats(key, shapes[key]) for key in shapes))
            try:
                _ = found[kind].factor
            except ValueError as error:
                raise UserError(f"{archive.path}: {covariance}: {error}") from error
    return found


# The cache: when few files are scored, most of the time goes into the reference's features and
# radii.


def cache_of(path: Path, graph: FeatureGraph) -> Path:
    """Where a file's features are kept; not an .npz, lest it be scored."""
    return path.with_name(f"{path.name}.{graph.sha256[:12]}.{graph.engine.name}.cache")


def measure_once(
    images: ImageSet, graph: FeatureGraph, sha256: str, distances: str, path: Path
) -> tuple[Measured, Manifold]:
    """What the graph sees in the images of `path`; from a cache beside it, or written to one."""
    cache = cache_of(path, graph)
    key = f"{CACHE_VERSION} {sha256} {graph.sha256} {graph.engine.name}"
    found = _read_cache(cache, key, images.num_images, graph)
    measured, radii = found or (measure(images, graph), {})
    manifold = Manifold.of(measured.features, distances, radii.get(distances))
    # Features too long for float16 have infinite radii, which the cache does not take.
    if distances not in radii and np.isfinite(manifold.squared_radii).all():
        _write_cache(cache, key, measured, radii | {distances: manifold.squared_radii})
    return measured, manifold


def _read_cache(
    path: Path, key: str, num_images: int, graph: FeatureGraph
) -> tuple[Measured, dict[str, np.ndarray]] | None:
    """The measured features and statistics, and squared radii [N] by kind of distances."""
    if not path.exists():
        return None
    try:
        with read_archive(path) as archive:
            if archive.text("key") != key:
                return None
            features = archive.floats("features", (num_images, graph.widths[0]), np.float32)
            radii = {
                kind: archive.floats(f"squared_radii_{kind}", (num_images,), np.float32)
                for kind in DISTANCES
                if f"squared_radii_{kind}" in archive
            }
            statistics = _read_statistics(archive, graph)
    except UserError as error:
        print(f"cache computed again: {error}", file=sys.stderr)
        return None
    return (Measured(features, statistics), radii) if len(statistics) == len(KEYS) else None


def _write_cache(path: Path, key: str, measured: Measured, radii: dict[str, np.ndarray]) -> None:
    arrays: dict[str, Any] = {
        "key": np.array(key),
        "features": measured.features,
        **_by_key(measured),
        **{f"squared_radii_{kind}": values for kind, values in radii.items()},
    }
    try:
        with atomic_write(path) as file:
            np.savez(file, **arrays)
    except UserError as error:
        print(f"no cache: {error}", file=sys.stderr)
