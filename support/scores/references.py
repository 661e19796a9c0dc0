"""What samples are held against: image sets, their features, reference files and the cache.

A reference file is an .npz with uint8 `arr_0` [N, H, W, C] and, if it likes, the statistics `mu`,
`sigma` (pool features) and `mu_s`, `sigma_s` (spatial features). Ours also say which graph made
these (`graph`, `graph_sha256`) and of how many images (`count`, `image_shape`); where these were
pictures in a folder, also what was done about their EXIF rotation (`exif`, apply or ignore).
"""

# N images, D width of the features.

import functools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from support.data import cifar10, fashion
from support.data.folders import find_pictures
from support.data.images import EXTENSIONS, read_image
from support.scores.graph import FeatureGraph
from support.scores.measures import DISTANCES, NEIGHBOUR, Manifold, Moments, Statistics
from support.scores.npz import ArchiveReader, read_archive, write_images
from support.system.files import UserError, atomic_write, check_writable

READ_IMAGES = 256
CACHE_VERSION = 2
STATISTICS = (("mu", "sigma"), ("mu_s", "sigma_s"))  # of pool and of spatial features


@dataclass(frozen=True)
class ImageSet:
    """Images of one shape [H, W, 1 or 3] from somewhere; `batches()` streams them as uint8."""

    name: str
    num_images: int
    image_shape: tuple[int, ...]
    batches: Callable[[], Iterator[np.ndarray]]
    exif: str = ""  # of pictures: whether EXIF rotation was applied or ignored
    left_out_note: str = ""  # of a folder: a line on the files in it that are not read

    def __post_init__(self):
        if self.image_shape[2] not in (1, 3):
            raise UserError(
                f"{self.name}: images must be [H, W, 1 or 3], not {list(self.image_shape)}"
            )
        if self.num_images <= NEIGHBOUR:
            raise UserError(
                f"{self.name}: too few images, {self.num_images} of at least {NEIGHBOUR + 1}"
            )

    @property
    def size(self) -> str:
        """Sides and colours, as errors name them; grey counts as RGB."""
        return f"{self.image_shape[1]} x {self.image_shape[0]} RGB"


def archive_images(path: str | Path) -> ImageSet:
    """The images of an .npz."""
    with read_archive(path) as archive:
        num_images, *image_shape = archive.images_header().shape

    def batches() -> Iterator[np.ndarray]:
        with read_archive(path) as archive:
            yield from archive.batches(READ_IMAGES)

    return ImageSet(str(path), num_images, tuple(image_shape), batches)


def folder_images(
    folder: str | Path, image_size: int | None = None, exif: str = "apply"
) -> ImageSet:
    """The pictures in `folder` and below, RGB; with `image_size`, their centre crops.

    Turned upright as their EXIF data say, unless `exif` is "ignore".
    """
    found = find_pictures(folder)
    paths = found.paths
    read = functools.partial(read_image, crop_size=image_size, apply_exif=exif == "apply")
    image_shape = read(paths[0]).shape

    def picture(path: str) -> np.ndarray:
        pixels = read(path)
        if pixels.shape != image_shape:
            raise UserError(
                f"{path}: is {list(pixels.shape)}, {Path(paths[0]).name} is {list(image_shape)}; "
                "--image_size crops all to one size"
            )
        return pixels

    def batches() -> Iterator[np.ndarray]:
        for start in range(0, len(paths), READ_IMAGES):
            yield np.stack([picture(path) for path in paths[start : start + READ_IMAGES]])

    note = found.left_out_note()
    return ImageSet(str(folder), len(paths), image_shape, batches, exif, note)


# Data sets of files: where a copy lies, and what samples are held against. CIFAR-10's training
# images are customary; on Fashion-MNIST's test images neither a run nor our classifier trains.
DATA_SETS = (
    (cifar10.find_copy, cifar10.load_training_set),
    (fashion.find_copy, fashion.load_test_set),
)


def array_images(name: str, pixels: np.ndarray) -> ImageSet:
    """Images in memory, uint8 [N, H, W, C]."""

    def batches() -> Iterator[np.ndarray]:
        for start in range(0, len(pixels), READ_IMAGES):
            yield pixels[start : start + READ_IMAGES]

    return ImageSet(name, len(pixels), pixels.shape[1:], batches)


def find_images(
    source: str | Path, image_size: int | None = None, exif: str | None = None
) -> ImageSet:
    """The images of `source`: an .npz, a folder with a data set of files, or one of pictures."""
    source = Path(source)
    if not source.exists():
        raise UserError(f"{source}: no such file or folder (--images)")
    load = next((load for find, load in DATA_SETS if source.is_dir() and find(source)), None)
    if source.is_dir() and load is None:
        return folder_images(source, image_size, exif or "apply")
    if source.is_file() and source.name.lower().endswith(EXTENSIONS):
        raise UserError(f"{source}: --images takes a folder of pictures, not a single one")
    for flag, value in (("image_size", image_size), ("exif", exif)):
        if value is not None:
            raise UserError(f"{source}: --{flag} is for folders of pictures")
    return array_images(str(source), load(source).pixels) if load else archive_images(source)


@dataclass(frozen=True)
class Measured:
    """What a graph sees in an image set: pool features [N, D] float32, and both statistics."""

    features: np.ndarray
    pool: Statistics
    spatial: Statistics


def measure(
    images: ImageSet,
    graph: FeatureGraph,
    each_batch: Callable[[np.ndarray], object] = lambda pixels: None,
) -> Measured:
    """Run `graph` over all images; `each_batch` sees every batch of pixels on its way.

    Only the pool features are kept, N D float32.
    """
    features = np.empty((images.num_images, graph.widths[0]), np.float32)
    pool, spatial = Moments(), Moments()
    done = 0
    # disable=None: a progress bar on terminals only
    with tqdm(total=images.num_images, desc=images.name, unit="img", disable=None) as progress:
        for pixels in images.batches():
            each_batch(pixels)
            for batch in graph.features(pixels):
                features[done : done + len(batch.pool)] = batch.pool
                pool.add(batch.pool)
                spatial.add(batch.spatial)
                done += len(batch.pool)
                progress.update(len(batch.pool))
    return Measured(features, pool.statistics(), spatial.statistics())


# Reference files.


@dataclass(frozen=True)
class Reference:
    """A reference file, ready to be compared with."""

    images: ImageSet
    sha256: str
    count: int | None  # images behind the statistics, None where the file does not say
    origin: str  # of the statistics: "file" or "images"
    names_graph: bool  # whether the file says which graph made its statistics
    manifold: Manifold
    pool: Statistics
    spatial: Statistics


def refuse_to_replace(path: str | Path) -> None:
    """UserError where a reference could not be written, or would replace what is none of ours."""
    check_writable(path)
    if not Path(path).exists():
        return
    try:
        with read_archive(path) as archive:
            is_ours = "graph_sha256" in archive
    except UserError:
        is_ours = False
    if not is_ours:
        raise UserError(f"{path}: exists and was not made by --write_ref; name another file")


def write_reference(
    path: str | Path, images: ImageSet, graph: FeatureGraph, keep_images: int | None = None
) -> None:
    """Write a reference file: statistics of all `images`, and `keep_images` of them (or all).

    The kept ones are spread evenly, so that a folder sorted by class keeps some of every class.
    """
    num_images = images.num_images
    kept = keep_images or num_images
    if not NEIGHBOUR < kept <= num_images:
        raise UserError(f"--ref_images {kept}: must be in {NEIGHBOUR + 1}..{num_images}")
    wanted = np.zeros(num_images, bool)
    wanted[np.arange(kept) * num_images // kept] = True
    with write_images(path, kept) as writer:
        seen = 0

        def keep(pixels: np.ndarray) -> None:
            nonlocal seen
            writer.append(pixels[wanted[seen : seen + len(pixels)]])
            seen += len(pixels)

        measured = measure(images, graph, keep)
        writer.further_arrays.update(
            _named_statistics(measured),
            graph=np.array(graph.name),
            graph_sha256=np.array(graph.sha256),
            count=np.array(num_images),
            image_shape=np.array(images.image_shape),
        )
        if images.exif:
            writer.further_arrays["exif"] = np.array(images.exif)


def load_reference(
    path: str | Path,
    sha256: str,
    graph: FeatureGraph,
    distances: str = "exact",
    use_cache: bool = True,
) -> Reference:
    """The reference at `path` as `graph` sees it, from the cache beside it where that fits.

    `sha256` is the file's digest, the key of the cache. Raises UserError where the file is damaged,
    or its statistics are another graph's.
    """
    path = Path(path)
    images = archive_images(path)
    with read_archive(path) as archive:
        _refuse_other_graph(archive, graph)
        own_pool, own_spatial = _read_statistics(archive, graph)
        count = archive.integer("count") if "count" in archive else None
        names_graph = "graph_sha256" in archive
    origin = "file" if own_pool and own_spatial else "images"
    if origin == "images":
        count = images.num_images
    # Not an .npz, lest it be scored.
    cache = path.with_name(f"{path.name}.{graph.sha256[:12]}.cache")
    key = f"{CACHE_VERSION} {sha256} {graph.sha256}"
    cached = _read_cache(cache, key, images.num_images, graph) if use_cache else None
    if cached is None:
        measured = measure(images, graph)
        pool, spatial = own_pool or measured.pool, own_spatial or measured.spatial
        cached = Cached(Measured(measured.features, pool, spatial), {})
    measured, radii = cached
    manifold = Manifold.of(measured.features, distances, radii.get(distances))
    # What float16 could not hold is not kept: all that is read back has to be finite.
    if use_cache and distances not in radii and np.isfinite(manifold.squared_radii).all():
        radii[distances] = manifold.squared_radii
        _write_cache(cache, key, cached)
    return Reference(
        images, sha256, count, origin, names_graph, manifold, measured.pool, measured.spatial
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


def _read_statistics(archive: ArchiveReader, graph: FeatureGraph) -> list[Statistics | None]:
    """Those of pool and of spatial features, None where neither mean nor covariance is there."""
    return [
        Statistics(archive.floats(mean, (width,)), archive.floats(covariance, (width, width)))
        if mean in archive or covariance in archive
        else None
        for (mean, covariance), width in zip(STATISTICS, graph.widths, strict=False)
    ]


def _named_statistics(measured: Measured) -> dict[str, np.ndarray]:
    """Both statistics under the names that files have for them."""
    both = zip(STATISTICS, (measured.pool, measured.spatial), strict=True)
    return {
        name: array
        for names, statistics in both
        for name, array in zip(names, (statistics.mean, statistics.covariance), strict=True)
    }


# The cache: features and radii are most of the time of a run with few files.


class Cached(NamedTuple):
    """What the graph sees in a reference, and the squared radii [N] by kind of distances."""

    measured: Measured
    squared_radii: dict[str, np.ndarray]


def _read_cache(path: Path, key: str, num_images: int, graph: FeatureGraph) -> Cached | None:
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
            pool, spatial = _read_statistics(archive, graph)
    except UserError as error:
        print(f"cache computed again: {error}", file=sys.stderr)
        return None
    return Cached(Measured(features, pool, spatial), radii) if pool and spatial else None


def _write_cache(path: Path, key: str, cached: Cached) -> None:
    measured, radii = cached
    arrays: dict[str, Any] = {
        "key": np.array(key),
        "features": measured.features,
        **_named_statistics(measured),
        **{f"squared_radii_{kind}": values for kind, values in radii.items()},
    }
    try:
        with atomic_write(path) as file:
            np.savez(file, **arrays)
    except UserError as error:
        print(f"no cache: {error}", file=sys.stderr)
