"""The scores written out plainly, to hold the real ones against."""

import numpy as np
import scipy.linalg


def plain_frechet(a, b):
    """Of features [N, D], by the matrix square root."""
    covariances = [np.cov(values, rowvar=False) for values in (a, b)]
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    squared = ((a.mean(axis=0, dtype=float) - b.mean(axis=0, dtype=float)) ** 2).sum()
    return squared + np.trace(sum(covariances)) - 2 * np.trace(root)


def plain_inception_score(p, split):
    """Of class probabilities [N, K]."""
    values = []
    for start in range(0, len(p), split):
        part = p[start : start + split]
        pairs = [zip(row, part.mean(axis=0), strict=True) for row in part]
        kl = [sum(q * np.log(q / m) for q, m in pair if q > 0) for pair in pairs]
        values.append(np.exp(np.mean(kl)))
    return np.mean(values)


def plain_kernel_distance(a, b):
    """Of features [N, D]: the mean of 100 unbiased squared MMDs of subsets, image by image."""
    generator = np.random.default_rng(0)
    size = min(1000, len(a), len(b))
    found = []
    for _ in range(100):
        x, y = (z[generator.choice(len(z), size, replace=False)].astype(float) for z in (a, b))
        within = [
            np.mean([np.delete((z @ row / len(row) + 1) ** 3, i).mean() for i, row in enumerate(z)])
            for z in (x, y)
        ]
        found.append(sum(within) - 2 * np.mean((x @ y.T / x.shape[1] + 1) ** 3))
    return np.mean(found)


def exact_distances(a, b):
    return ((a[:, None] - b[None]) ** 2).sum(axis=2)


def plain_precision_recall(samples, reference, distances=exact_distances):
    """Of features [N, D], with the 3rd nearest neighbour."""

    def radii(features):
        squared = distances(features, features)
        np.fill_diagonal(squared, np.inf)
        return np.sort(squared, axis=1)[:, 2]

    cross = distances(samples, reference)
    precision = (cross <= radii(reference)).any(axis=1).mean()
    return precision, (cross <= radii(samples)[:, None]).any(axis=0).mean()
