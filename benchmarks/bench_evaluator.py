"""The evaluator's time over that of the least work that its results need.

    python benchmarks/bench_evaluator.py

Needs TensorFlow and scipy. Each time is the best of a few in turns.
"""

import contextlib
import io
import sys
import tempfile
from pathlib import Path

import numpy as np
import scipy.linalg
from measuring import ROOT, in_turns, judge

sys.path.insert(0, str(ROOT / "tests"))

from toy_graph import write_toy_graph

import evaluator
from support.scores.measures import (
    Manifold,
    Statistics,
    frechet_distance,
    precision_recall,
)

FEATURES, WIDTH = 10_000, 2048
TOY_IMAGES, TOY_SIZE, TOY_WIDTH = 1500, 32, 256


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


def bench_runs(folder: Path) -> None:
    generator = np.random.default_rng(0)
    graph = write_toy_graph(folder / "toy.pb", features=TOY_WIDTH, stride=4, layers=6)
    shape = (TOY_IMAGES, TOY_SIZE, TOY_SIZE, 3)
    np.savez(folder / "ref.npz", generator.integers(0, 256, shape, np.uint8))
    for place in ("all", "0", "1", "2"):
        (folder / place).mkdir()
    for number in "012":
        np.savez(folder / "all" / f"{number}.npz", generator.integers(0, 256, shape, np.uint8))
        (folder / number / "a.npz").hardlink_to(folder / "all" / f"{number}.npz")

    def run(place: str, *flags: str) -> None:
        for results in (folder / place).glob("eval_results.*"):
            results.unlink()
        reference = ["--ref_batch", str(folder / "ref.npz"), "--inception", str(graph)]
        with contextlib.redirect_stdout(io.StringIO()):
            evaluator.main([*reference, "--sample_batch_dir", str(folder / place), *flags])

    def three_in_one_run() -> None:
        for cache in folder.glob("*.cache"):
            cache.unlink()
        run("all")

    def three_runs() -> None:
        for place in "012":
            run(place, "--no_cache")

    works = {"one": three_in_one_run, "three": three_runs, "cached": lambda: run("all")}
    one, three, cached = (min(row) for row in in_turns(works, 5).values())
    judge("three files in one run / three runs without cache", one / three, "times", most=0.75)
    judge("the same run again with the cache / the first", cached / one, "times", most=0.8)


if __name__ == "__main__":
    bench_precision_recall("exact", 1.4)
    bench_precision_recall("float16", 3)
    bench_frechet()
    with tempfile.TemporaryDirectory() as folder:
        bench_runs(Path(folder))
