"""The measures agree with their definitions, written out plainly, and with closed forms."""

import warnings

import numpy as np
import pytest
from plain_scores import (
    plain_frechet,
    plain_inception_score,
    plain_kernel_distance,
    plain_precision_recall,
)

from support.scores import bootstrap
from support.scores import measures as scores
from support.scores.measures import (
    Manifold,
    Moments,
    Statistics,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)
from support.scores.tensorflow_start import import_tensorflow


def gaussian_features(count, width, seed, shift=0.0):
    random_state = np.random.RandomState(seed)
    mixing = random_state.normal(size=(width, width)) / width**0.5
    return random_state.normal(size=(count, width)) @ mixing + shift


def statistics_of(features):
    return Statistics(features.mean(axis=0), np.cov(features, rowvar=False))


# Means and covariances.


@pytest.mark.parametrize("batch", [1, 7, 1000, 5000])
@pytest.mark.parametrize("offset", [0.0, 1e5])
def test_streamed_statistics_are_those_of_numpy(batch, offset):
    features = gaussian_features(2345, 12, 0) + offset
    moments = Moments()
    for start in range(0, len(features), batch):
        moments.add(features[start : start + batch])
    found, expected = moments.statistics(), statistics_of(features)
    np.testing.assert_allclose(found.mean, expected.mean, rtol=1e-12)
    np.testing.assert_allclose(found.covariance, expected.covariance, rtol=1e-8, atol=1e-10)


# Frechet distance.


@pytest.mark.parametrize("width", [2, 16, 100])
def test_frechet_distance_is_that_of_the_matrix_square_root(width):
    features = [gaussian_features(4 * width, width, seed, shift=seed / 10) for seed in (1, 2)]
    a, b = map(statistics_of, features)
    expected = plain_frechet(*features)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("count", [5, 50, 200])
def test_frechet_distance_to_itself_is_zero_even_with_few_images(count):
    a = statistics_of(gaussian_features(count, 100, 3))
    assert abs(frechet_distance(a, a)) < 1e-5 * np.trace(a.covariance)


def test_frechet_distance_with_fewer_images_than_features_is_exact_and_silent():
    features = [gaussian_features(30, 100, seed) for seed in (4, 5)]
    a, b = map(statistics_of, features)
    # tr sqrt(S1 S2) is the sum of the singular values of X1 X2' / 29, X the centred features.
    centred = [values - values.mean(axis=0) for values in features]
    root_trace = np.linalg.svd(centred[0] @ centred[1].T / 29, compute_uv=False).sum()
    squared = ((a.mean - b.mean) ** 2).sum()
    expected = squared + np.trace(a.covariance) + np.trace(b.covariance) - 2 * root_trace
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        distance = frechet_distance(a, b)
    assert type(distance) is float
    assert distance == pytest.approx(expected, rel=1e-6)


# Kernel distance.


def test_kernel_distance_is_that_of_its_definition_and_without_bias():
    a, b = (gaussian_features(n, 6, seed).astype(np.float32) for n, seed in ((80, 1), (60, 2)))
    assert kernel_distance(a, b).mean == pytest.approx(plain_kernel_distance(a, b), rel=1e-4)
    same = [gaussian_features(3000, 6, 1) for _ in range(2)]  # one mixing, so one distribution
    rows = np.random.RandomState(0).permutation(3000)
    first, second = (same[0][part].astype(np.float32) for part in (rows[:1500], rows[1500:]))
    found = kernel_distance(first, second)
    assert abs(found.mean) < found.deviation
    assert kernel_distance(first, second + 1).mean > 5 * found.deviation


@pytest.mark.parametrize("block_rows", [7, 1000])
def test_intervals_tell_how_distances_spread_over_other_images_of_the_same_model(
    monkeypatch, block_rows
):
    monkeypatch.setattr(bootstrap, "BLOCK_ROWS", block_rows)
    mixing = np.random.RandomState(5).normal(size=(4, 4))
    reference = gaussian_features(400, 4, 5).astype(np.float32)

    def images(seed):
        return (np.random.RandomState(seed).normal(size=(200, 4)) @ mixing + 0.5).astype(np.float32)

    statistics = statistics_of(reference)
    frechet = [frechet_distance(statistics_of(images(seed)), statistics) for seed in range(100)]
    kernel = [kernel_distance(images(seed), reference[:200]).mean for seed in range(20)]
    halves = [bootstrap.frechet_half_width(images(seed), statistics, 60) for seed in range(5)]
    assert np.mean(halves) == pytest.approx(1.96 * np.std(frechet), rel=0.25)
    halves = [bootstrap.kernel_half_width(images(seed), reference[:200], 60) for seed in range(5)]
    assert np.mean(halves) == pytest.approx(1.96 * np.std(kernel), rel=0.4)


# Inception Score.


@pytest.mark.parametrize("split", [10, 25, 60, 1000])
def test_inception_score_is_the_mean_over_splits_a_short_one_counting_as_one(split):
    features = gaussian_features(60, 5, 6)
    weights = gaussian_features(5, 4, 7) * 3
    logits = features @ weights
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    expected = plain_inception_score(p, split)
    assert inception_score(features, weights, split) == pytest.approx(expected, rel=1e-10)


def test_inception_score_of_sure_and_balanced_classes_is_their_number():
    features = 1000.0 * np.eye(4)[np.arange(40) % 4]  # probabilities are exactly 0 and 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert inception_score(features, np.eye(4)) == pytest.approx(4)
        assert inception_score(np.zeros((8, 4)), np.eye(4)) == pytest.approx(1)


# Precision and recall.


@pytest.mark.parametrize("block_rows", [7, 50, 1000])
@pytest.mark.parametrize(("count", "shift"), [(50, 0.0), (80, 0.4), (90, 100.0)])
def test_precision_and_recall_are_those_of_plain_numpy(monkeypatch, block_rows, count, shift):
    monkeypatch.setattr(scores, "BLOCK_ROWS", block_rows)
    samples = gaussian_features(count, 6, 8, shift).astype(np.float32)
    reference = gaussian_features(70, 6, 8).astype(np.float32)
    found = precision_recall(Manifold.of(samples), Manifold.of(reference))
    expected = plain_precision_recall(samples.astype(np.float64), reference.astype(np.float64))
    assert (found.precision, found.recall) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_copies_lie_inside_each_others_empty_balls_in_spite_of_rounding(seed, monkeypatch):
    monkeypatch.setattr(scores, "BLOCK_ROWS", 37)
    images = gaussian_features(10, 2048, seed).astype(np.float32) + 3
    samples, reference = np.repeat(images, 5, axis=0), np.tile(images, (9, 1))
    found = precision_recall(Manifold.of(samples), Manifold.of(reference))
    assert (found.precision, found.recall) == (1.0, 1.0)
    few = precision_recall(Manifold.of(samples[:40]), Manifold.of(reference))
    assert (few.precision, few.recall) == (1.0, 0.8)
    apart = precision_recall(Manifold.of(samples + 1000), Manifold.of(reference))
    assert (apart.precision, apart.recall) == (0.0, 0.0)


def test_an_image_is_not_its_own_neighbour():
    features = np.array([[0.0], [1.0], [3.0], [6.0], [100.0]], np.float32)
    assert Manifold.of(features).squared_radii.tolist() == [36, 25, 9, 36, 99**2]
    with pytest.raises(ValueError, match="3 features"):
        Manifold.of(features[:3])


# Distances in float16.


def inception_like(count, seed, shift=0.0):
    """Features of Inception's width, none below 0, their |a|^2 around 500."""
    random_state = np.random.RandomState(seed)
    mixing = np.random.RandomState(99).normal(size=(64, 2048)) / 8
    common = random_state.normal(size=(count, 64)) @ mixing + shift
    own = random_state.normal(size=(count, 2048))
    return np.abs(0.35 * common + 0.15 * own + 0.3).astype(np.float32)


def float16_distances(a, b):
    """By TensorFlow's float16, [A, B]; sums of squares are added up in float32, as on GPUs."""
    tf = import_tensorflow()
    a, b = (tf.cast(features, tf.float16) for features in (a, b))
    norms = [tf.cast(tf.reduce_sum(tf.cast(x * x, tf.float32), 1), tf.float16) for x in (a, b)]
    squared = norms[0][:, None] - 2 * tf.matmul(a, b, transpose_b=True) + norms[1]
    return tf.maximum(squared, tf.constant(0, tf.float16)).numpy()


@pytest.mark.parametrize("block_rows", [170, 1000])
def test_float16_precision_and_recall_are_those_of_tensorflows_float16(block_rows, monkeypatch):
    monkeypatch.setattr(scores, "BLOCK_ROWS", block_rows)
    samples, reference = inception_like(600, 1, 0.1), inception_like(500, 2)
    given = samples.copy()
    found = precision_recall(*(Manifold.of(x, "float16") for x in (samples, reference)))
    np.testing.assert_array_equal(samples, given)
    expected = plain_precision_recall(samples, reference, float16_distances)
    # Products are added up in another order, which tips one in thousands to the next float16.
    assert (found.precision, found.recall) == pytest.approx(expected, abs=0.0021)
    exact = precision_recall(Manifold.of(samples), Manifold.of(reference))
    assert exact != found
    assert (exact.precision, exact.recall) == pytest.approx(expected, abs=0.02)


def test_overflowing_float16_is_counted_and_near_to_nobody():
    features = np.full((9, 4), 200.0, np.float32)  # |a|^2 is 160,000
    features[:5] *= 0.2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        manifold = Manifold.of(features, "float16")
        found = precision_recall(manifold, manifold)
    assert manifold.num_overflows == 4
    assert Manifold.of(features).num_overflows == 0
    assert found.precision == 5 / 9
    with pytest.raises(ValueError, match="float16"):
        precision_recall(manifold, Manifold.of(features))
