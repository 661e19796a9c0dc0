"""The evaluator's measures over the least work that they need, and over the usual way.

    python benchmarks/bench_evaluator.py

Each time is the best of a few in turns. Needs scipy.
"""

import numpy as np
import scipy.linalg
from measuring import in_turns, judge

# isort: split
from support.scores.measures import Manifold, Statistics, frechet_distance, precision_recall

FEATURES, WIDTH = 10_000, 2048


def bench_precision_recall(distances: str, most: float) -> None:
    samples, reference = np.random.default_rng(0).random((2, FEATURES, WIDTH), np.float32)
    memory = np.empty((FEATURES, FEATURES), np.float32)
    manifolds = [Manifold.of(features, distances) for features in (samples, reference)]
    works = {
        "samples": lambda: Manifold.of(samples, distances),
        "reference": lambda: Manifold.of(reference, distances),
        "both": lambda: precision_recall(*manifolds),
        "product": lambda: np.matmul(samples, reference.T, out=memory),
    }
    *parts, product = (min(row) for row in in_turns(works, 3).values())
    ratio = sum(parts) / (3 * product)
    judge(f"precision and recall, {distances} / three products", ratio, "times", most)


def bench_frechet() -> None:
    generator = np.random.default_rng(0)

    def statistics() -> Statistics:
        features = generator.normal(size=(5000, WIDTH)) * generator.uniform(0.1, 1, WIDTH)
        return Statistics(features.mean(axis=0), np.cov(features, rowvar=False))

    a, b = statistics(), statistics()

    def by_eigenvalues() -> float:
        # A new object, without the factor that the last try kept.
        return frechet_distance(a, Statistics(b.mean, b.covariance))

    def by_root() -> float:
        root = scipy.linalg.sqrtm(a.covariance @ b.covariance).real
        return ((a.mean - b.mean) ** 2).sum() + np.trace(a.covariance + b.covariance - 2 * root)

    assert abs(by_eigenvalues() / by_root() - 1) < 1e-6
    ours, root = in_turns({"ours": by_eigenvalues, "root": by_root}, 1).values()
    judge("Frechet distance / by sqrtm", min(ours) / min(root), "times", most=0.3)


if __name__ == "__main__":
    bench_precision_recall("exact", 1.4)
    bench_precision_recall("float16", 3)
    bench_frechet()
