"""How far distances would move with other images of the same model: resampled features.

A set with repeated images has a larger Frechet distance than one without, so the resampled
distances are not centred on the measured one. Their deviation is what is used: the interval of 95 %
is 1.96 deviations to each side of the measured distance. It tells of the choice of images alone,
not of another training with another seed.
"""

import numpy as np

from support.scores.measures import (
    BLOCK_ROWS,
    Moments,
    Statistics,
    frechet_distance,
    kernel,
    kernel_diagonal,
)

NORMAL_95 = 1.96


def frechet_half_width(samples: np.ndarray, reference: Statistics, replicates: int) -> float:
    """Half of the interval of the Frechet distance of features [N, D]."""
    generator = np.random.default_rng(0)
    found = []
    for _ in range(replicates):
        rows = np.sort(generator.integers(len(samples), size=len(samples)))
        moments = Moments()
        for start in range(0, len(rows), BLOCK_ROWS):
            moments.add(samples[rows[start : start + BLOCK_ROWS]])
        found.append(frechet_distance(moments.statistics(), reference))
    return NORMAL_95 * float(np.std(found, ddof=1))


def kernel_half_width(samples: np.ndarray, reference: np.ndarray, replicates: int) -> float:
    """Half of the interval of the kernel distance of features [N, D], over all N images.

    With counts c of a replicate, its distance is the sum of c_i c_j k_ij over pairs of different
    images, over the number of such pairs, less twice the mean of k between samples and reference.
    """
    # R replicates
    num_images = len(samples)
    share = np.full(num_images, 1 / num_images)
    counts = np.random.default_rng(0).multinomial(num_images, share, replicates)  # [R, N]
    counts = counts.astype(np.float32)
    within = -(counts**2 @ kernel_diagonal(samples))  # a pair of the same image
    across = np.zeros(replicates)
    for start in range(0, num_images, BLOCK_ROWS):
        rows = slice(start, start + BLOCK_ROWS)
        sums = counts @ kernel(samples, samples[rows])  # [R, rows]
        within += (sums * counts[:, rows]).sum(axis=1, dtype=float)
        across += counts[:, rows] @ kernel(samples[rows], reference).mean(axis=1, dtype=float)
    pairs = num_images**2 - (counts**2).sum(axis=1, dtype=float)
    pairs = np.maximum(pairs, 1)  # of a few images, a replicate may be one of them many times
    return NORMAL_95 * float(np.std(within / pairs - 2 * across / num_images, ddof=1))
