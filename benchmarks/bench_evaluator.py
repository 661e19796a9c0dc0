"""The evaluator's measures and backends, over the least work that they need, and over ADM's way.

    python benchmarks/bench_evaluator.py
    python benchmarks/bench_evaluator.py --whole 3 --images 200

Each time is the best of a few in turns. --whole scores so many files against one reference, of so
many images each, with a graph of Inception's structure and random weights; ADM's way is a process
for each file, which runs reference and samples through TensorFlow, takes sqrtm, and compares in
float16. That takes minutes. Needs scipy and TensorFlow.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import scipy.linalg
from measuring import ROOT, in_turns, judge

# isort: split
from support.scores.graph import BACKENDS, FeatureGraph
from support.scores.measures import (
    Manifold,
    Statistics,
    frechet_distance,
    inception_score,
    precision_recall,
)

sys.path.insert(0, str(ROOT / "tests"))
from inception_graph import write_inception_graph

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


def bench_backends(place: Path) -> None:
    """Both run batches of 16; the torch backend should lose nothing."""
    graph, pixels = write_inception_graph(place / "graph.pb"), some_pixels(16, 0)
    engines = {
        name: FeatureGraph(graph, pixels.shape[1:], batch_images=16, backend=name)
        for name in BACKENDS
    }
    works = {name: lambda e=engine: list(e.features(pixels)) for name, engine in engines.items()}
    times = {name: min(row) for name, row in in_turns(works, 6).items()}
    print(f"torch: {len(pixels) / times['torch']:.1f} images/s")
    judge("features, torch / TensorFlow", times["torch"] / times["tensorflow"], "times", most=1.0)


def bench_whole(place: Path, files: int, images: int) -> None:
    """evaluator.py on a folder, and ADM's way on each file of it."""
    graph, samples = write_inception_graph(place / "graph.pb"), place / "samples"
    samples.mkdir()
    reference = place / "reference.npz"
    np.savez(reference, some_pixels(images, 0))
    paths = [samples / f"{number}.npz" for number in range(files)]
    for number, path in enumerate(paths):
        np.savez(path, some_pixels(images, number + 1))
    flags = ["--ref_batch", reference, "--sample_batch_dir", samples, "--inception", graph]
    ours = seconds(ROOT / "evaluator.py", *flags, "--backend", "torch")
    adms = sum(seconds(__file__, "--adm", graph, reference, path) for path in paths)
    print(f"{files} files of {images} images: ours {ours:.0f} s, ADM's way {adms:.0f} s")
    judge("whole evaluation / ADM's way", ours / adms, "times", most=0.25)


def seconds(*command: object) -> float:
    """The time of a Python command."""
    started = time.monotonic()
    words = [sys.executable, *map(str, command)]
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - started


def some_pixels(count: int, seed: int) -> np.ndarray:
    """Smooth random pictures."""
    coarse = np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 3)).astype(np.uint8)
    return coarse.repeat(8, axis=1).repeat(8, axis=2)


def score_as_adm(graph_path: Path, reference: Path, samples: Path) -> None:
    """The five scores by the steps of ADM's evaluator, in one process and without a cache."""
    sets = [np.load(path)["arr_0"] for path in (samples, reference)]
    graph = FeatureGraph(graph_path, sets[0].shape[1:], backend="tensorflow")
    measured = []
    for pixels in sets:
        batches = list(graph.features(pixels))
        measured.append([np.concatenate(parts) for parts in zip(*batches, strict=True)])
    inception_score(measured[0][0], graph.class_weights)
    for a, b in zip(*measured, strict=True):
        covariances = [np.cov(features, rowvar=False) for features in (a, b)]
        scipy.linalg.sqrtm(covariances[0] @ covariances[1])
    pools = [pool for pool, _ in measured]
    radii = [np.sort(float16_distances(pool, pool), axis=1)[:, 3] for pool in pools]
    between = float16_distances(*pools)
    (between <= radii[1]).any(axis=1).mean()
    (between <= radii[0][:, None]).any(axis=0).mean()


def float16_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Squared distances [A, B] by TensorFlow."""
    import tensorflow as tf

    a, b = (tf.cast(features, tf.float16) for features in (a, b))
    norms = [tf.reduce_sum(features * features, axis=1) for features in (a, b)]
    return (norms[0][:, None] - 2 * tf.matmul(a, b, transpose_b=True) + norms[1]).numpy()


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--whole", type=int, metavar="FILES", default=0)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--adm", nargs=3, type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.adm:
        score_as_adm(*arguments.adm)
        return
    with tempfile.TemporaryDirectory() as place:
        if arguments.whole:
            bench_whole(Path(place), arguments.whole, arguments.images)
            return
        bench_backends(Path(place))
    bench_precision_recall("exact", 1.4)
    bench_precision_recall("float16", 3)
    bench_frechet()


if __name__ == "__main__":
    main()
