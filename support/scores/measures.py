"""Measures of generated images, in numpy: Frechet and kernel distance, Inception Score, and others.

They work on the features of any network; Inception's distances are called FID and KID. Definitions:
Heusel et al. 2017 (FID), Binkowski et al. 2018 (KID), Salimans et al. 2016 (Inception Score),
Kynkaanniemi et al. 2019 (precision and recall). Splits, neighbours and names are those of ADM's
evaluator, and so are the float16 distances, which are optional.
"""

# N images, D width of the features, K classes.

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

NEIGHBOUR = 3
SPLIT_IMAGES = 5000
BLOCK_ROWS = 1000
SUBSETS, SUBSET_IMAGES = 100, 1000  # of the kernel distance
ROUNDING = 1e-4  # of a covariance, relative to its largest entry or eigenvalue


@dataclass(frozen=True)
class Statistics:
    """Mean [D] and covariance [D, D] of features, float64 (`numpy.cov` with rowvar=False)."""

    mean: np.ndarray
    covariance: np.ndarray

    @functools.cached_property
    def factor(self) -> np.ndarray:
        """A with A A' = covariance; ValueError if the matrix is not a covariance.

        The Cholesky factor if all eigenvalues are positive, because it is cheap. Otherwise (fewer
        images than features, or dead features) A is [D, R], with R positive eigenvalues.
        """
        asymmetry = np.abs(self.covariance - self.covariance.T).max()
        if asymmetry > ROUNDING * np.abs(self.covariance).max():
            raise ValueError(f"is not symmetric, by up to {asymmetry:.3g}")
        with contextlib.suppress(np.linalg.LinAlgError):
            return np.linalg.cholesky(self.covariance)
        values, vectors = np.linalg.eigh(self.covariance)
        if values[0] < -ROUNDING * values[-1]:
            raise ValueError(f"is not positive semidefinite, an eigenvalue is {values[0]:.3g}")
        positive = values > 0
        return vectors[:, positive] * np.sqrt(values[positive])


class Moments:
    """Collects the `Statistics` of features that come in batches, without keeping the features."""

    def __init__(self):
        self._count = 0
        self._waiting: list[np.ndarray] = []

    def add(self, features: np.ndarray) -> None:
        """Add [B, D]."""
        self._waiting.append(features)
        # A product of few rows would spend its time on reading and writing the D x D sums.
        if sum(map(len, self._waiting)) >= BLOCK_ROWS:
            self._fold()

    def _fold(self) -> None:
        rows = np.concatenate(self._waiting).astype(np.float64)
        self._waiting = []
        if self._count == 0:
            # Sums about a point near the mean stay exact when the mean is subtracted at the end.
            self._origin = rows.mean(axis=0)
            self._sum = np.zeros_like(self._origin)
            self._products = np.zeros((rows.shape[1], rows.shape[1]))
        rows -= self._origin
        self._count += len(rows)
        self._sum += rows.sum(axis=0)
        self._products += rows.T @ rows

    def statistics(self) -> Statistics:
        """Mean and covariance of everything added; needs at least two rows."""
        if self._waiting:
            self._fold()
        offset = self._sum / self._count
        scatter = self._products - self._count * np.outer(offset, offset)
        return Statistics(self._origin + offset, scatter / (self._count - 1))


def frechet_distance(samples: Statistics, reference: Statistics) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 sqrt(S1 S2)), using eigenvalues of symmetric matrices only.

    With S2 = A A', S1 S2 and A' S1 A have the same eigenvalues besides zeros. The latter is
    symmetric and positive semidefinite up to rounding, so nothing becomes complex, and singular
    covariances (fewer images than features) need no special case. A is computed once per reference.
    """
    difference = samples.mean - reference.mean
    product = reference.factor.T @ samples.covariance @ reference.factor
    eigenvalues = np.linalg.eigvalsh((product + product.T) / 2)
    root_trace = np.sqrt(eigenvalues.clip(min=0)).sum()
    traces = np.trace(samples.covariance) + np.trace(reference.covariance)
    return float(difference @ difference + traces - 2 * root_trace)


class KernelDistance(NamedTuple):
    """Mean and deviation over random subsets of the images."""

    mean: float
    deviation: float


def kernel_distance(samples: np.ndarray, reference: np.ndarray) -> KernelDistance:
    """The squared MMD of features [N, D] under the kernel (x.y / D + 1)^3, without bias.

    As usual, over 100 subsets of 1,000 images, or of as many as the smaller set has. The subsets
    are always the same ones.
    """
    generator = np.random.default_rng(0)
    size = min(SUBSET_IMAGES, len(samples), len(reference))
    found = []
    for _ in range(SUBSETS):
        x, y = (
            features[generator.choice(len(features), size, replace=False)]
            for features in (samples, reference)
        )
        within = [kernel(z, z).sum(dtype=float) - kernel_diagonal(z).sum() for z in (x, y)]
        found.append(sum(within) / (size * (size - 1)) - 2 * kernel(x, y).mean(dtype=float))
    return KernelDistance(float(np.mean(found)), float(np.std(found)))


def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(x.y / D + 1)^3 for each pair of rows, float32."""
    return (x @ y.T / np.float32(x.shape[1]) + np.float32(1)) ** 3


def kernel_diagonal(x: np.ndarray) -> np.ndarray:
    """The kernel of each row with itself, [N] float64."""
    return (_norms(x).astype(float) / x.shape[1] + 1) ** 3


def inception_score(
    features: np.ndarray, class_weights: np.ndarray, split_images: int = SPLIT_IMAGES
) -> float:
    """exp of the mean KL(p(class | image) || p(class)), averaged over splits of the images.

    `features` [N, D], `class_weights` [D, K] without a bias. A shorter last split counts like the
    others. The score depends on the order of the images: splits with few classes score low.
    """
    scores = []
    for start in range(0, len(features), split_images):
        p = softmax(features[start : start + split_images] @ class_weights)
        with np.errstate(divide="ignore", invalid="ignore"):
            terms = p * (np.log(p) - np.log(p.mean(axis=0)))
        divergences = np.where(p > 0, terms, 0.0).sum(axis=1)  # 0 log 0 = 0
        scores.append(np.exp(divergences.mean()))
    return float(np.mean(scores))


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities along the last axis, float64."""
    exponentials = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


# Squared distances are |a|^2 - 2 ab + |b|^2, with one large matrix product.


def _norms(features: np.ndarray) -> np.ndarray:
    """|a|^2 of each row, float32."""
    return np.einsum("nd,nd->n", features, features)


def _to_float16(values: np.ndarray) -> np.ndarray:
    """float32 rounded to float16 values; beyond 65504 it becomes infinite."""
    with np.errstate(over="ignore"):
        return values.astype(np.float16).astype(np.float32)


def _float16_norms(features: np.ndarray) -> np.ndarray:
    """|a|^2 of each row as float32, with squares and sum rounded to float16."""
    blocks = np.array_split(features, range(BLOCK_ROWS, len(features), BLOCK_ROWS))
    return _to_float16(np.concatenate([_to_float16(rows**2).sum(axis=1) for rows in blocks]))


class Distances(NamedTuple):
    """How squared distances are computed: rounding after each operation, |a|^2, smallest radii."""

    round: Callable[[np.ndarray], np.ndarray]
    norms: Callable[[np.ndarray], np.ndarray]
    least_radii: Callable[[np.ndarray], np.ndarray]  # squared, from norms


# exact: in float32. Below 1e-5 of |a|^2 everything is rounding, so equal features count as equal.
#
# float16: features, squares, |a|^2, ab and both sums are rounded to float16, as in ADM's evaluator.
# Computing the sum or product of two float16 in float32 and then rounding gives the float16 result.
# Where float16 leaves a choice, we do as GPUs do: |a|^2 and ab accumulate in float32, and the sums
# are (|a|^2 - 2 ab) + |b|^2. A feature is never its own neighbour, wherever its distance to itself
# is rounded to. Negative distances count as 0, which only matters for radii.
DISTANCES = {
    "exact": Distances(lambda values: values, _norms, lambda norms: 1e-5 * norms),
    "float16": Distances(_to_float16, _float16_norms, np.zeros_like),
}
# |a|^2 in float16 above which |a|^2 - 2 ab of two such images is no longer finite.
FLOAT16_LIMIT = float(np.finfo(np.float16).max) / 2


@dataclass(frozen=True)
class Manifold:
    """Features [N, D] float32, each with a ball that reaches to its 3rd nearest neighbour."""

    features: np.ndarray
    squared_radii: np.ndarray
    distances: str = "exact"  # a key of DISTANCES

    @classmethod
    def of(
        cls,
        features: np.ndarray,
        distances: str = "exact",
        squared_radii: np.ndarray | None = None,
    ) -> "Manifold":
        """The balls of at least 4 features; radii that are already known are not recomputed."""
        if len(features) <= NEIGHBOUR:
            raise ValueError(f"{len(features)} features have no neighbour number {NEIGHBOUR}")
        features = DISTANCES[distances].round(features.astype(np.float32, copy=False))
        if squared_radii is None:
            squared_radii = _squared_radii(features, DISTANCES[distances])
        return cls(features, squared_radii, distances)

    @property
    def num_overflows(self) -> int:
        """How many features are too long for float16, which makes their distances meaningless."""
        if self.distances != "float16":
            return 0
        return int((_float16_norms(self.features) > FLOAT16_LIMIT).sum())


class PrecisionRecall(NamedTuple):
    """Share of samples inside a reference ball; share of references inside a sample ball."""

    precision: float
    recall: float


def precision_recall(samples: Manifold, reference: Manifold) -> PrecisionRecall:
    """How far the two sets of balls cover each other's centres."""
    if samples.distances != reference.distances:
        raise ValueError(f"{samples.distances} distances against {reference.distances} ones")
    sample_inside = np.zeros(len(samples.features), bool)
    reference_inside = np.zeros(len(reference.features), bool)
    how = DISTANCES[samples.distances]
    for start, squared in _distance_blocks(samples.features, reference.features, how):
        rows = slice(start, start + len(squared))
        sample_inside[rows] = (squared <= reference.squared_radii).any(axis=1)
        reference_inside |= (squared <= samples.squared_radii[rows, None]).any(axis=0)
    return PrecisionRecall(float(sample_inside.mean()), float(reference_inside.mean()))


def _squared_radii(features: np.ndarray, how: Distances) -> np.ndarray:
    radii = np.empty(len(features), np.float32)
    for start, squared in _distance_blocks(features, features, how):
        rows = np.arange(len(squared))
        squared[rows, start + rows] = np.inf  # itself
        radii[start : start + len(rows)] = _smallest(squared, NEIGHBOUR)
    return np.maximum(radii, how.least_radii(how.norms(features)))


def _distance_blocks(
    rows: np.ndarray, columns: np.ndarray, how: Distances
) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, squared distances [B, columns]) for one block of rows after another; float32.

    The caller may change a block. The next block may reuse its memory.
    """
    row_norms, column_norms = how.norms(rows), how.norms(columns)
    memory = np.empty((min(BLOCK_ROWS, len(rows)), len(columns)), np.float32)
    for start in range(0, len(rows), BLOCK_ROWS):
        block = rows[start : start + BLOCK_ROWS]
        squared = how.round(np.matmul(-2 * block, columns.T, out=memory[: len(block)]))
        with np.errstate(invalid="ignore"):  # in float16, inf - inf is NaN, which is near nobody
            squared += row_norms[start : start + BLOCK_ROWS, None]
            squared = how.round(squared)
            squared += column_norms
        yield start, how.round(squared)


def _smallest(distances: np.ndarray, rank: int) -> np.ndarray:
    """The value of `rank` (1 is the smallest) in each row; overwrites the smaller ones.

    A few passes of argmin take a fraction of a partition's time, but count NaN as the smallest.
    """
    if np.isnan(distances.min()):
        return np.partition(distances, rank - 1, axis=1)[:, rank - 1]
    rows = np.arange(len(distances))
    for _ in range(rank - 1):
        distances[rows, distances.argmin(axis=1)] = np.inf
    return distances.min(axis=1)
