"""The kept digit classifier knows digits, and its scores tell good ones from bad ones."""

import sys
from pathlib import Path

import numpy as np
import pytest

from support.data.datasets import digits_split
from support.scores.graph import FeatureGraph
from support.scores.npz import write_images
from support.system.files import UserError

QUICKSTART = Path(__file__).resolve().parent.parent / "quickstart"
sys.path.insert(0, str(QUICKSTART))

import check_digits  # noqa: E402
import score  # noqa: E402


def test_kept_graph_recognises_digits_that_it_never_saw():
    split = digits_split()
    graph = FeatureGraph(score.GRAPH, (8, 8, 1))
    assert graph.widths == (48, 4 * 4 * 7, 10)
    assert not graph.is_inception
    features = np.concatenate([batch.pool for batch in graph.features(split.held_out_pixels)])
    found = (features @ graph.class_weights).argmax(axis=1)
    assert (found == split.held_out_labels).mean() > 0.97


def test_table_puts_training_digits_near_blurred_ones_between_and_noise_far(tmp_path, capsys):
    pixels = digits_split().training_pixels[-1000:]
    with write_images(tmp_path / "blurred.npz", 1000) as writer:
        writer.append((pixels // 2 + np.roll(pixels // 2, 1, axis=2)).astype(np.uint8))
    score.main([str(tmp_path / "blurred.npz")])
    header, *rows, remark = capsys.readouterr().out.splitlines()
    assert remark == "(600 images bias FD and sFD upwards; prec and recall by exact distances)"
    assert header.split() == ["600", "images", "a", "row", "FD", "sFD", "prec", "recall"]
    scores = np.array([row.split()[-4:] for row in rows], float)
    blurred, training, noise = scores
    assert (training[:2] < blurred[:2]).all()
    assert (blurred[:2] < noise[:2]).all()
    assert (training[2:] > 0.85).all()
    assert (noise[2:] < 0.05).all()


def test_archives_that_are_not_600_digits_are_named(tmp_path):
    np.savez(tmp_path / "a.npz", np.zeros((599, 8, 8, 1), np.uint8))
    with pytest.raises(UserError, match=r"a\.npz: must hold 600 digits .* not \[599, 8, 8, 1\]"):
        score.main([str(tmp_path / "a.npz")])


def test_digits_are_judged_by_the_labels_in_their_archive(tmp_path, capsys):
    split = digits_split()
    pixels, labels = split.training_pixels[:200], split.training_labels[:200]
    np.savez(tmp_path / "right.npz", pixels, labels)
    np.savez(tmp_path / "wrong.npz", pixels, (labels + 1) % 10)
    check_digits.main([str(tmp_path / name) for name in ("right.npz", "wrong.npz")])
    shares = [line.split()[-2] for line in capsys.readouterr().out.splitlines()[2:]]
    assert float(shares[0]) > 0.97
    assert float(shares[1]) < 0.03


@pytest.mark.parametrize(
    ("labels", "line"),
    [
        ([], r"a\.npz: holds no labels \(arr_1\), as samples do now; sample it again"),
        ([np.zeros(4)], r"arr_1: must be 5 labels, not float64 \[4\]"),
    ],
)
def test_digits_without_their_labels_are_refused(tmp_path, labels, line):
    np.savez(tmp_path / "a.npz", np.zeros((5, 8, 8, 1), np.uint8), *labels)
    with pytest.raises(UserError, match=line):
        check_digits.main([str(tmp_path / "a.npz")])
