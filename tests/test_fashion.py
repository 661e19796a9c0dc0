"""Fashion-MNIST is read from any complete copy, verified by its content, padded and divided."""

import gzip
import hashlib
import os
import sys

import numpy as np
import pytest
from refusals import refusal
from torchvision.datasets import FashionMNIST

from support.data import fashion
from support.data.build import build_data
from support.data.datasets import DataRequest
from support.scores.image_sets import find_images

TRAINING_COUNT, OWN_COUNT, TEST_COUNT = 50, 20, 30  # of all training images, of the classifier's


def idx(pixels):
    """A file of the published format."""
    sizes = b"".join(size.to_bytes(4, "big") for size in pixels.shape)
    return bytes([0, 0, 8, pixels.ndim]) + sizes + pixels.tobytes()


@pytest.fixture
def made(tmp_path, monkeypatch):
    """A made-up data set, packed in tmp_path, with the published digests replaced by its own.

    Contents by file name. There is no network.
    """
    monkeypatch.setattr(fashion, "URL", "http://127.0.0.1:9")
    monkeypatch.setattr(fashion, "CLASSIFIER_COUNT", OWN_COUNT)
    draws = np.random.RandomState(0)
    arrays = {}
    for files, count in ((fashion.TRAINING, TRAINING_COUNT), (fashion.TEST, TEST_COUNT)):
        images, labels = files
        arrays[images] = draws.randint(1, 256, (count, 28, 28)).astype(np.uint8)
        arrays[labels] = (np.arange(count) % 10).astype(np.uint8)
        for name in files:
            digest = hashlib.sha256(idx(arrays[name])).hexdigest()
            monkeypatch.setitem(files, name, fashion.Published(arrays[name].shape, digest))
    place = tmp_path / fashion.FOLDER
    place.mkdir(parents=True)
    for name, array in arrays.items():
        (place / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
    return arrays


def load(folder, **values):
    return build_data(DataRequest("FashionMNIST", 32, str(folder), **values))


def test_runs_train_on_what_neither_classifier_nor_test_sees_in_the_middle_of_black(made, tmp_path):
    data = load(tmp_path, held_out=TEST_COUNT)
    assert data.spec.shape == (1, 32, 32)
    assert list(data.spec.class_names) == FashionMNIST.classes
    own = fashion.load_classifier_set(tmp_path)
    training = np.concatenate([data.pixels[:, 0], own.pixels[..., 0]])
    middle = training[:, 2:-2, 2:-2]
    np.testing.assert_array_equal(middle, made["train-images-idx3-ubyte"], "each in one, in order")
    assert training.sum() == middle.sum()
    assert (len(data), len(own.labels)) == (TRAINING_COUNT - OWN_COUNT, OWN_COUNT)
    assert [*data.labels, *own.labels] == made["train-labels-idx1-ubyte"].tolist()
    held_out = data.held_out[[0, 1]].stored[:, 0, 2:-2, 2:-2]
    np.testing.assert_array_equal(held_out, made["t10k-images-idx3-ubyte"][:2])


def test_reference_holds_the_test_images_as_training_pads_them(made, tmp_path):
    images = find_images(tmp_path)
    assert (images.num_images, images.image_shape) == (TEST_COUNT, (32, 32, 1))
    pixels = np.concatenate(list(images.batches()))
    np.testing.assert_array_equal(pixels, fashion.load_test_set(tmp_path).pixels)


def test_half_a_copy_may_lie_unpacked_in_the_folder_itself_and_only_to_be_read(made, tmp_path):
    place = tmp_path / fashion.FOLDER
    for name in fashion.TRAINING:
        (tmp_path / name).write_bytes(gzip.decompress((place / f"{name}.gz").read_bytes()))
    for path in place.iterdir():
        path.unlink()
    before = sorted(os.listdir(tmp_path))
    assert len(load(tmp_path)) == 30
    assert sorted(os.listdir(tmp_path)) == before


def flipped(content):
    """The packed file, packed again with one other bit."""
    unpacked = bytearray(gzip.decompress(content))
    unpacked[100] ^= 1
    return gzip.compress(unpacked)


DAMAGES = {
    "cut": lambda content: content[: len(content) // 2],
    "page": lambda _: b"<html>Please log in</html>",
    "short": lambda _: gzip.compress(bytes(100)),
    "long": lambda _: gzip.compress(bytes(1 << 20)),
    "flipped": flipped,
    "a pipe": None,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_or_none_is_refused_by_name(made, tmp_path, damage):
    path = tmp_path / fashion.FOLDER / "train-images-idx3-ubyte.gz"
    if damage:
        path.write_bytes(damage(path.read_bytes()))
    else:
        path.unlink()
        os.mkfifo(path)
    assert refusal(load, tmp_path).startswith(f"{path}: ")


def test_missing_files_are_fetched_and_nothing_else(made, tmp_path, monkeypatch):
    published = tmp_path / fashion.FOLDER
    monkeypatch.setattr(fashion, "URL", published.as_uri())
    new = tmp_path / "new"
    assert len(load(new)) == 30
    assert sorted(os.listdir(new / fashion.FOLDER)) == [f"{name}.gz" for name in fashion.TRAINING]


def test_missing_files_are_named_with_where_they_are_published_where_there_is_no_network(
    made, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)  # which is not needed
    assert len(load(tmp_path)) == 30
    place = tmp_path / fashion.FOLDER
    (place / "train-labels-idx1-ubyte.gz").unlink()
    line = refusal(load, tmp_path)
    assert line.startswith(f"{place}: lacks train-labels-idx1-ubyte.gz; ")
    assert "http://127.0.0.1:9/train-" in line
    assert not list(place.glob(".*")), "neither a part nor a lock stays"
