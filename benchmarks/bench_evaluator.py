"""Ratios of the evaluator's work to what it needs at least; each from one run on this machine.

    python benchmarks/bench_evaluator.py

Needs TensorFlow and scipy. Every time is the best of a few tries, taken in turns.
"""

import contextlib
import io
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import scipy.linalg

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from toy_graph import write_toy_graph  # noqa: E402

import evaluator  # noqa: E402
from support.scores.measures import (  # noqa: E402
    Manifold,
    Statistics,
    frechet_distance,
    precision_recall,
)

FEATURES, WIDTH = 10_000, 2048
TOY_IMAGES, TOY_SIZE, TOY_WIDTH = 1500, 32, 256


def best_seconds(tries: int, *works: Callable[[], object]) -> list[float]:
    """The least time of each work, tried in turns so that a busy moment hits all of them."""
    times = [[] for _ in works]
    for _ in range(tries):
        for work, taken in zip(works, times, strict=True):
            start = time.perf_counter()
            work()
            taken.append(time.perf_counter() - start)
    return [min(taken) for taken in times]


def row(name: str, seconds: float, least_seconds: float, limit: float) -> None:
    ratio = seconds / least_seconds
    verdict = "ok" if ratio <= limit else "TOO SLOW"
    print(
        f"{name:52} {seconds:7.2f} s /{least_seconds:7.2f} s = {ratio:5.2f}  (<= {limit}) {verdict}"
    )


def bench_precision_recall(distances: str, limit: float) -> None:
    samples, reference = np.random.default_rng(0).random((2, FEATURES, WIDTH), np.float32)
    memory = np.empty((FEATURES, FEATURES), np.float32)
    manifolds = [Manifold.of(features, distances) for features in (samples, reference)]

    # Each part beside one product, so that a busy moment weighs on both alike.
    *parts, product = best_seconds(
        4,
        lambda: Manifold.of(samples, distances),
        lambda: Manifold.of(reference, distances),
        lambda: precision_recall(*manifolds),
        lambda: np.matmul(samples, reference.T, out=memory),
    )
    row(f"prec and recall, {distances} / three products", sum(parts), 3 * product, limit)


def bench_frechet() -> None:
    generator = np.random.default_rng(0)

    def statistics() -> Statistics:
        features = generator.normal(size=(5000, WIDTH)) * generator.uniform(0.1, 1, WIDTH)
        return Statistics(features.mean(axis=0), np.cov(features, rowvar=False))

    a, b = statistics(), statistics()

    def by_eigenvalues():
        fresh = Statistics(b.mean, b.covariance)  # without a factor from the try before
        return frechet_distance(a, fresh)

    def by_root():
        root = scipy.linalg.sqrtm(a.covariance @ b.covariance).real
        return ((a.mean - b.mean) ** 2).sum() + np.trace(a.covariance + b.covariance - 2 * root)

    assert abs(by_eigenvalues() / by_root() - 1) < 1e-6
    seconds, least = best_seconds(2, by_eigenvalues, by_root)
    row("Frechet distance / by sqrtm", seconds, least, 0.3)


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

    def three_in_one_run():
        for cache in folder.glob("*.cache"):
            cache.unlink()
        run("all")

    def three_runs():
        for place in "012":
            run(place, "--no_cache")

    run("0", "--no_cache")  # imports TensorFlow
    seconds, apart, cached = best_seconds(6, three_in_one_run, three_runs, lambda: run("all"))
    row("three files in one run / three uncached runs of one", seconds, apart, 0.75)

    row("the same run again with the cache / the first", cached, seconds, 0.8)


if __name__ == "__main__":
    bench_precision_recall("exact", 1.4)
    bench_precision_recall("float16", 3)
    bench_frechet()
    with tempfile.TemporaryDirectory() as folder:
        bench_runs(Path(folder))
