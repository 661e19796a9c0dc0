"""The measures of generated images, in numpy: Frechet distance, Inception Score, precision, recall.

They work on features of whatever network; what is called FID is the Frechet distance of Inception
features. Definitions: Heusel et al. 2017 (FID), Salimans et al. 2016 (Inception Score),
Kynkaanniemi et al. 2019 (precision and recall); splits, neighbours and names as in ADM's evaluator.
"""

# N images, D width of the features, K classes.

import contextlib
import functools
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

NEIGHBOUR = 3
SPLIT_IMAGES = 5000
BLOCK_ROWS = 1000
# Squared distances in float32 are sums of norms and products: below this share of the squared norm
# they are rounding, so that equal features count as equal.
ROUNDING = 1e-5


@dataclass(frozen=True)
class Statistics:
    """Mean [D] and covariance [D, D] of features, float64 (`numpy.cov` with rowvar=False)."""

    mean: np.ndarray
    covariance: np.ndarray

    @functools.cached_property
    def factor(self) -> np.ndarray:
        """A with A A' = covariance: Cholesky's where all eigenvalues are positive, as it is cheap.

        Else, with fewer images than features or dead ones, [D, R] with R positive eigenvalues.
        """
        with contextlib.suppress(np.linalg.LinAlgError):
            return np.linalg.cholesky(self.covariance)
        values, vectors = np.linalg.eigh(self.covariance)
        positive = values > 0
        return vectors[:, positive] * np.sqrt(values[positive])


class Moments:
    """Gathers the `Statistics` of features that come in batches, without keeping the features."""

    def __init__(self):
        self._count = 0
        self._waiting: list[np.ndarray] = []

    def add(self, features: np.ndarray) -> None:
        """Take in [B, D]."""
        self._waiting.append(features)
        # A product of a few rows would spend its time on reading and writing the D x D sums.
        if sum(map(len, self._waiting)) >= BLOCK_ROWS:
            self._fold()

    def _fold(self) -> None:
        rows = np.concatenate(self._waiting).astype(np.float64)
        self._waiting = []
        if self._count == 0:
            # Sums about a point near the mean lose nothing when the mean is taken out at the end.
            self._origin = rows.mean(axis=0)
            self._sum, self._products = np.zeros_like(self._origin), 0.0
        rows -= self._origin
        self._count += len(rows)
        self._sum += rows.sum(axis=0)
        self._products += rows.T @ rows

    def statistics(self) -> Statistics:
        """Mean and covariance of everything added; at least two rows."""
        if self._waiting:
            self._fold()
        offset = self._sum / self._count
        scatter = self._products - self._count * np.outer(offset, offset)
        return Statistics(self._origin + offset, scatter / (self._count - 1))


def frechet_distance(samples: Statistics, reference: Statistics) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 sqrt(S1 S2)), by eigenvalues of symmetric matrices alone.

    With S2 = A A', S1 S2 has the eigenvalues of A' S1 A besides zeros. The latter is symmetric and
    has no negative ones but by rounding, so nothing turns complex, and singular covariances (fewer
    images than features) need no special case. The factor A is computed once per reference.
    """
    difference = samples.mean - reference.mean
    product = reference.factor.T @ samples.covariance @ reference.factor
    eigenvalues = np.linalg.eigvalsh((product + product.T) / 2)
    root_trace = np.sqrt(eigenvalues.clip(min=0)).sum()
    traces = np.trace(samples.covariance) + np.trace(reference.covariance)
    return float(difference @ difference + traces - 2 * root_trace)


def inception_score(
    features: np.ndarray, class_weights: np.ndarray, split_images: int = SPLIT_IMAGES
) -> float:
    """exp of the mean KL(p(class | image) || p(class)), averaged over splits of the images.

    `features` [N, D], `class_weights` [D, K] without a bias. A shorter last split counts as one.
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


@dataclass(frozen=True)
class Manifold:
    """Features [N, D] float32, each with the ball that reaches to its 3rd nearest neighbour."""

    features: np.ndarray
    squared_radii: np.ndarray

    @classmethod
    def of(cls, features: np.ndarray, neighbour: int = NEIGHBOUR) -> "Manifold":
        """The balls of `features`; at least `neighbour` + 1 of them."""
        features = features.astype(np.float32, copy=False)
        if len(features) <= neighbour:
            raise ValueError(f"{len(features)} features have no neighbour number {neighbour}")
        norms = squared_norms(features)
        radii = np.empty(len(features), np.float32)
        for start, distances in _distance_blocks(features, norms, features, norms):
            rows = np.arange(len(distances))
            distances[rows, start + rows] = np.inf  # itself
            radii[start : start + len(rows)] = _smallest(distances, neighbour)
        return cls(features, radii)


@dataclass(frozen=True)
class PrecisionRecall:
    """Share of samples inside some reference ball; share of references inside some sample ball."""

    precision: float
    recall: float


def precision_recall(samples: Manifold, reference: Manifold) -> PrecisionRecall:
    """How far the two sets of balls cover each other's centres."""
    sample_norms, reference_norms = map(squared_norms, (samples.features, reference.features))
    sample_reach = np.maximum(samples.squared_radii, ROUNDING * sample_norms)
    reference_reach = np.maximum(reference.squared_radii, ROUNDING * reference_norms)
    sample_inside = np.zeros(len(sample_norms), bool)
    reference_inside = np.zeros(len(reference_norms), bool)
    for start, distances in _distance_blocks(
        samples.features, sample_norms, reference.features, reference_norms
    ):
        rows = slice(start, start + len(distances))
        sample_inside[rows] = (distances <= reference_reach).any(axis=1)
        reference_inside |= (distances <= sample_reach[rows, None]).any(axis=0)
    return PrecisionRecall(float(sample_inside.mean()), float(reference_inside.mean()))


def squared_norms(features: np.ndarray) -> np.ndarray:
    """|x|^2 of each row, float32."""
    return np.einsum("nd,nd->n", features, features)


def _distance_blocks(
    rows: np.ndarray, row_norms: np.ndarray, columns: np.ndarray, column_norms: np.ndarray
) -> Iterable[tuple[int, np.ndarray]]:
    """(first row, squared distances [B, columns]) for block after block of rows; float32.

    Each block is the same piece of memory, which the caller may change.
    """
    memory = np.empty((min(BLOCK_ROWS, len(rows)), len(columns)), np.float32)
    for start in range(0, len(rows), BLOCK_ROWS):
        block = rows[start : start + BLOCK_ROWS]
        distances = np.matmul(-2 * block, columns.T, out=memory[: len(block)])
        distances += row_norms[start : start + BLOCK_ROWS, None]
        distances += column_norms
        yield start, distances


def _smallest(distances: np.ndarray, rank: int) -> np.ndarray:
    """The value of `rank` (1 is the least) in each row; overwrites the lesser ones.

    A few passes of argmin cost a small part of a partition's time.
    """
    rows = np.arange(len(distances))
    for _ in range(rank - 1):
        distances[rows, distances.argmin(axis=1)] = np.inf
    return distances.min(axis=1)
