"""The kept classifiers know their sets, and scores by them tell good images from bad ones."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from quickstart import score
from quickstart.small_sets import SMALL_SETS, Split
from support.data import digits
from support.data.images import LabelledImages
from support.scores.graph import FeatureGraph
from support.scores.npz import write_images
from support.system.files import UserError

DIGITS, CLOTHES = SMALL_SETS["Digits"], SMALL_SETS["FashionMNIST"]


def test_kept_graph_recognises_digits_that_it_never_saw():
    graph = FeatureGraph(DIGITS.graph, DIGITS.shape)
    assert graph.widths == (48, 4 * 4 * 7, 10)
    assert not graph.is_inception
    assert score.right_class(digits.load_test_set(), graph) > 0.97


def test_kept_graph_of_the_clothes_is_small_and_tells_shapes_apart():
    assert CLOTHES.graph.stat().st_size < 1_000_000
    graph = FeatureGraph(CLOTHES.graph, CLOTHES.shape)
    assert graph.widths == (64, 8 * 8 * 7, 10)
    trousers = np.zeros((1, *CLOTHES.shape), np.uint8)
    trousers[:, 3:29, 10:15] = trousers[:, 3:29, 17:22] = trousers[:, 3:8, 10:22] = 200
    assert score.right_class(LabelledImages(trousers, np.array([1])), graph) == 1


def save(path, images):
    with write_images(path, len(images.labels)) as writer:
        writer.append(images.pixels)
        writer.further_arrays["arr_1"] = images.labels
    return str(path)


def test_table_puts_training_digits_near_blurred_ones_between_and_noise_far(tmp_path, capsys):
    pixels, labels = digits.load_training_set().part(slice(-1000, None))
    blurred = (pixels // 2 + np.roll(pixels // 2, 1, axis=2)).astype(np.uint8)
    score.main([save(tmp_path / "blurred.npz", LabelledImages(blurred, labels))])
    header, *rows, remark = capsys.readouterr().out.partition("\n\n")[2].splitlines()
    assert "600 images" in remark
    assert header.split()[-5:] == [*score.COLUMNS]
    blurred, training, noise = np.array([row.split()[-5:] for row in rows], float)
    assert (training[:2] < blurred[:2]).all()
    assert (blurred[:2] < noise[:2]).all()
    assert (training[2:] > 0.85).all()
    assert (noise[2:4] < 0.05).all()
    assert noise[4] < 0.2
    assert noise[4] < blurred[4] <= training[4] == 1


def test_clothes_are_known_by_their_shape_and_held_against_clothes(tmp_path, capsys, monkeypatch):
    draws = np.random.RandomState(0)

    def some(count):
        pixels = draws.randint(0, 256, (count, *CLOTHES.shape)).astype(np.uint8)
        return LabelledImages(pixels, np.arange(count) % 10)

    split = Split(some(8), some(8), some(8))
    stand_in = dataclasses.replace(CLOTHES, scored_count=6, load=lambda folder: split)
    monkeypatch.setitem(SMALL_SETS, "FashionMNIST", stand_in)
    path = save(tmp_path / "a.npz", split.training)
    score.main([path])
    neighbours, _, scores = capsys.readouterr().out.partition("\n\n")
    assert neighbours.splitlines()[-1].split()[-1] == "0.000", "the training clothes themselves"
    rows = scores.splitlines()
    assert [row.split()[:2] for row in rows[1:4]] == [
        [path, rows[1].split()[1]], ["training", "clothes"], ["Gaussian", "noise"]
    ]  # fmt: skip
    assert rows[1].split()[1:] == rows[2].split()[2:], "the same images"


@pytest.mark.parametrize(
    ("shapes", "named"),
    [
        ([(600, 8, 8, 3)], r"a\.npz: .*\[8, 8, 3\]"),
        ([(600, 16, 16, 1)], r"a\.npz: .*\[16, 16, 1\]"),
        ([(599, 8, 8, 1)], r"a\.npz: .*600.*\[599, 8, 8, 1\]"),
        ([(5, *DIGITS.shape), (5, *CLOTHES.shape)], r"b\.npz: .*clothes.*a\.npz digits"),
        ([], "holds no archives"),
    ],
)
def test_archives_of_another_set_of_both_sets_or_too_few_images_are_named(tmp_path, shapes, named):
    paths = [tmp_path / name for name in ("a.npz", "b.npz")[: len(shapes)]]
    for path, shape in zip(paths, shapes, strict=True):
        np.savez(path, np.zeros(shape, np.uint8), np.zeros(shape[0], np.int64))
    with pytest.raises(UserError, match=named):
        score.main(list(map(str, paths or [tmp_path])))


def test_digits_are_judged_by_the_labels_in_their_archive(capsys):
    pixels, labels = digits.load_training_set().part(slice(200))
    samples = {"a": LabelledImages(pixels, labels), "b": LabelledImages(pixels, (labels + 1) % 10)}
    score.print_neighbours(samples, DIGITS, DIGITS.load(Path()))
    shares = [float(line.split()[-2]) for line in capsys.readouterr().out.splitlines()[1:]]
    assert shares[0] > 0.97 and shares[1] > 0.97 and shares[2] < 0.03


@pytest.mark.parametrize("labels", [[], [np.zeros(4)]])
def test_digits_without_their_labels_are_refused(tmp_path, labels):
    np.savez(tmp_path / "a.npz", np.zeros((5, 8, 8, 1), np.uint8), *labels)
    with pytest.raises(UserError, match=r"a\.npz: .*arr_1"):
        score.main([str(tmp_path / "a.npz")])
