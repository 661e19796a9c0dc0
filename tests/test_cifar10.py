"""CIFAR-10's batches are read without running anything that a pickle asks for."""

import os
import pickle

import numpy as np
import pytest

from soflow.cifar10 import read_batch, training_batches
from soflow.files import UserError


def write_batch(path, count=3, seed=0, protocol=2):
    rows = np.random.RandomState(seed).randint(0, 256, (count, 3072)).astype(np.uint8)
    content = {b"data": rows, b"labels": list(range(count)), b"filenames": [b"a.png"] * count}
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_bytes(pickle.dumps(content, protocol))
    return rows


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_batch_gives_images_with_channels_last(tmp_path, protocol):
    rows = write_batch(tmp_path / "data_batch_1", protocol=protocol)
    batch = read_batch(tmp_path / "data_batch_1")
    assert batch.pixels.shape == (3, 32, 32, 3)
    assert batch.pixels.dtype == np.uint8
    assert batch.labels.tolist() == [0, 1, 2]
    assert batch.pixels[2, 5, 7, 1] == rows[2, 1024 + 5 * 32 + 7]


def test_python_2_batch_as_published_is_read(tmp_path):
    # str of Python 2 is a byte string; numpy's modules had their old names
    data = bytes(range(256)) * 12
    pickled = (
        b"\x80\x02}q\x01(U\x04dataq\x02cnumpy.core.multiarray\n_reconstruct\nq\x03cnumpy\nndarray\n"
        b"q\x04K\x00\x85U\x01b\x87R(K\x01K\x01M\x00\x0c\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R"
        b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T"
        + len(data).to_bytes(4, "little")
        + data
        + b"tbU\x06labels]K\x07au."
    )
    (tmp_path / "data_batch_1").write_bytes(pickled)
    batch = read_batch(tmp_path / "data_batch_1")
    assert batch.labels.tolist() == [7]
    assert batch.pixels.transpose(0, 3, 1, 2).tobytes() == data


def test_training_batches_are_found_in_order_also_one_folder_up(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    for number in (2, 1):
        write_batch(folder / f"data_batch_{number}")
    write_batch(folder / "test_batch")
    assert [path.name for path in training_batches(tmp_path)] == ["data_batch_1", "data_batch_2"]
    assert training_batches(folder) == training_batches(tmp_path)
    assert training_batches(tmp_path / "absent") == []


class Payload:
    def __reduce__(self):
        return os.mkdir, ("/tmp/soflow-payload-ran",)


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps(Payload()),
        pickle.dumps({b"data": Payload(), b"labels": []}),
        pickle.dumps({b"data": np.zeros((2, 3072)), b"labels": [1, 2]}),
        pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"labels": [1]}),
        pickle.dumps({b"data": np.array([Payload()], object), b"labels": [1]}),
        pickle.dumps({b"data": np.zeros((2, 3000), np.uint8), b"labels": [1, 2]}),
        pickle.dumps({b"labels": [1]}),
        pickle.dumps(3),
        b"\x80\x02K\x01r\xff\xff\xff\xff.",  # a memo of four billion entries
        b"",
        b"text",
    ],
)
def test_anything_else_is_refused_by_name_and_never_run(tmp_path, content):
    (tmp_path / "data_batch_1").write_bytes(content)
    with pytest.raises(UserError, match="data_batch_1: not a batch of CIFAR-10") as caught:
        read_batch(tmp_path / "data_batch_1")
    assert "\n" not in str(caught.value)
    assert not os.path.exists("/tmp/soflow-payload-ran")
