"""Fashion-MNIST is read from any whole copy, verified by what is in it, padded and divided."""

import gzip
import hashlib
import os
import sys

import numpy as np
import pytest
from torchvision.datasets import FashionMNIST

from support.data import fashion
from support.data.datasets import DataRequest, build_data
from support.scores.image_sets import find_images
from support.system.files import UserError

TRAINING_COUNT, OWN_COUNT, TEST_COUNT = 50, 20, 30  # of all training images, of the classifier's


def idx(pixels):
    """A file of the published format."""
    sizes = b"".join(size.to_bytes(4, "big") for size in pixels.shape)
    return bytes([0, 0, 8, pixels.ndim]) + sizes + pixels.tobytes()


@pytest.fixture
def made(tmp_path, monkeypatch):
    """Contents by name of a made-up data set, which lies packed in tmp_path and counts as the one.

    Without a network.
    """
    monkeypatch.setattr(FashionMNIST, "mirrors", ["http://127.0.0.1:9/"])
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


def request(folder, **values):
    return DataRequest("FashionMNIST", 32, str(folder), **values)


def refusal(folder):
    with pytest.raises(UserError) as caught:
        build_data(request(folder))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_pictures_lie_in_the_middle_of_black(made, tmp_path):
    data = build_data(request(tmp_path))
    assert data.spec.shape == (1, 32, 32)
    assert data.spec.class_names == fashion.CLASS_NAMES
    images = made["train-images-idx3-ubyte"]
    np.testing.assert_array_equal(data.pixels[:, 0, 2:-2, 2:-2], images[: len(data)])
    assert (data.pixels == 0).sum() == len(data) * (32**2 - 28**2)


def test_a_link_to_debians_folder_counts_where_an_attempt_to_fetch_has_left_a_folder(
    made, tmp_path
):
    debians, mine = tmp_path / "share" / "fashion-mnist", tmp_path / "mine"
    debians.parent.mkdir()
    (tmp_path / fashion.FOLDER).rename(debians)
    assert "lacks train-images-idx3-ubyte.gz" in refusal(mine)
    assert mine.is_dir()
    (mine / debians.name).symlink_to(debians)  # as ln -s does, given a folder
    assert len(build_data(request(mine))) == TRAINING_COUNT - OWN_COUNT


def test_runs_train_on_what_neither_classifier_nor_test_sees(made, tmp_path):
    data = build_data(request(tmp_path, held_out=TEST_COUNT))
    own = fashion.load_classifier_set(tmp_path)
    training = np.concatenate([data.pixels[:, 0, ..., None], own.pixels])
    np.testing.assert_array_equal(
        training[:, 2:-2, 2:-2, 0], made["train-images-idx3-ubyte"], "each in one, in order"
    )
    assert (len(data), len(own.labels)) == (TRAINING_COUNT - OWN_COUNT, OWN_COUNT)
    assert [*data.labels, *own.labels] == made["train-labels-idx1-ubyte"].tolist()
    held_out = data.held_out[[0, 1]]
    np.testing.assert_array_equal(
        held_out.stored[:, 0, 2:-2, 2:-2], made["t10k-images-idx3-ubyte"][:2]
    )


def test_reference_holds_the_test_images_as_training_pads_them(made, tmp_path):
    images = find_images(tmp_path)
    assert (images.num_images, images.image_shape) == (TEST_COUNT, (32, 32, 1))
    pixels = np.concatenate(list(images.batches()))
    np.testing.assert_array_equal(pixels, fashion.load_test_set(tmp_path).pixels)


def test_copy_may_lie_in_the_folder_itself_unpacked_and_only_to_be_read(made, tmp_path):
    place = tmp_path / fashion.FOLDER
    for path in place.iterdir():
        (tmp_path / path.stem).write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()
    before = sorted(os.listdir(tmp_path))
    assert len(build_data(request(tmp_path))) == 30
    assert sorted(os.listdir(tmp_path)) == before


def test_other_half_may_be_missing(made, tmp_path):
    for name in fashion.TEST:
        (tmp_path / fashion.FOLDER / f"{name}.gz").unlink()
    assert len(build_data(request(tmp_path))) == 30


def damage_of(content):
    """Ways in which a packed file may be damaged, or be another, and what is said of them."""
    flipped = bytearray(gzip.decompress(content))
    flipped[100] ^= 1
    return {
        "it cannot be unpacked: ": content[: len(content) // 2],
        "it cannot be unpacked: Not a gzipped file": b"<html>Please log in</html>",
        "it holds 100 bytes instead of ": gzip.compress(bytes(100)),
        "it holds more bytes instead of ": gzip.compress(bytes(1 << 20)),
        "the SHA-256 of its content is ": gzip.compress(flipped),
    }


@pytest.mark.parametrize("number", range(5))
def test_damaged_file_is_refused_by_name(made, tmp_path, number):
    path = tmp_path / fashion.FOLDER / "train-images-idx3-ubyte.gz"
    said, content = list(damage_of(path.read_bytes()).items())[number]
    path.write_bytes(content)
    line = refusal(tmp_path)
    assert line.startswith(f"{path}: not Fashion-MNIST's published file, {said}")
    assert line.endswith("; delete it, and the next start fetches it")


def test_what_is_no_file_is_refused_without_waiting_for_it(made, tmp_path):
    path = tmp_path / fashion.FOLDER / "train-labels-idx1-ubyte.gz"
    path.unlink()
    os.mkfifo(path)
    assert refusal(tmp_path) == f"{path}: cannot be read (not a regular file)"


def test_missing_files_are_fetched_and_nothing_else(made, tmp_path, monkeypatch):
    published = tmp_path / fashion.FOLDER
    monkeypatch.setattr(FashionMNIST, "mirrors", [f"{published.as_uri()}/"])
    new = tmp_path / "new"
    assert len(build_data(request(new))) == 30
    assert sorted(os.listdir(new / fashion.FOLDER)) == [f"{name}.gz" for name in fashion.TRAINING]


def test_missing_file_offline_says_what_to_fetch_and_where_to_put_it(made, tmp_path):
    place = tmp_path / fashion.FOLDER
    (place / "train-labels-idx1-ubyte.gz").unlink()
    line = refusal(tmp_path)
    assert line.startswith(f"{place}: lacks train-labels-idx1-ubyte.gz; http://127.0.0.1:9/train-")
    assert line.endswith(
        "put them there yourself, or name the folder of Debian's package dataset-fashion-mnist"
    )
    assert not list(place.glob(".*")), "neither a part nor a lock stays"


def test_torchvision_is_asked_for_only_where_files_are_to_be_fetched(made, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    assert len(build_data(request(tmp_path))) == 30
    (tmp_path / fashion.FOLDER / "train-labels-idx1-ubyte.gz").unlink()
    assert "needs torchvision, which is not installed" in refusal(tmp_path)


def test_classes_are_named_as_torchvision_names_them():
    assert list(fashion.CLASS_NAMES) == FashionMNIST.classes
