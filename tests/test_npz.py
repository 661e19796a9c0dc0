"""Archives are written and read as streams, and nothing a file declares is believed."""

import os
import pickle
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest
from damage import damaged, in_memory
from hypothesis import example, given, settings

from support.scores.image_sets import archive_images
from support.scores.npz import read_archive, write_images
from support.system.files import UserError


def some_pixels(count=5, height=3, width=4, channels=3):
    return np.random.default_rng(0).integers(0, 256, (count, height, width, channels), np.uint8)


def npy_bytes(header: str, data: bytes, version=(1, 0)) -> bytes:
    text = header.encode() + b"\n"
    length = struct.pack("<H" if version == (1, 0) else "<I", len(text))
    return b"\x93NUMPY" + bytes(version) + length + text + data


def header_text(descr="|u1", shape=(1, 2, 2, 3), order=False) -> str:
    return f"{{'descr': {descr!r}, 'fortran_order': {order}, 'shape': {shape!r}, }}"


def write_member(path, content: bytes, name="arr_0.npy", compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr(name, content)
    return path


def read_all(path, batch_images=2):
    with read_archive(path) as archive:
        return list(archive.batches(batch_images))


def assert_refused(path, *words):
    with pytest.raises(UserError) as caught:
        read_all(path)
    line = str(caught.value)
    assert line.startswith(str(path))
    assert "\n" not in line
    for word in words:
        assert word in line


# Writing.


def test_numpy_and_the_reader_read_what_the_writer_streamed(tmp_path):
    pixels, labels = some_pixels(), np.arange(5)
    with write_images(tmp_path / "a.npz", 5) as writer:
        writer.append(pixels[:3])
        writer.append(pixels[3:])
        writer.further_arrays.update(arr_1=labels, mu=np.arange(3.0), count=np.array(7))
    with np.load(tmp_path / "a.npz") as archive:
        assert archive.files == ["arr_0", "arr_1", "mu", "count"]
        np.testing.assert_array_equal(archive["arr_0"], pixels)
        assert archive["mu"].tolist() == [0, 1, 2]
    np.testing.assert_array_equal(np.concatenate(read_all(tmp_path / "a.npz")), pixels)
    assert archive_images(tmp_path / "a.npz").num_images == 5
    with read_archive(tmp_path / "a.npz") as archive:
        assert archive.integer("count") == 7
        np.testing.assert_array_equal(archive.labels(5), labels)
        with pytest.raises(UserError, match="mu: "):
            archive.integer("mu")


@pytest.mark.parametrize(
    "batches",
    [
        [some_pixels(4)],
        [some_pixels(6)],
        [np.zeros((5, 2, 2, 3))],
        [some_pixels(2), some_pixels(3, 4, 4)],
    ],
    ids=["too few", "too many", "floats", "two sizes"],
)
def test_archive_with_other_images_than_announced_never_appears(tmp_path, batches):
    with pytest.raises(ValueError, match=r"images|pixels"):  # noqa: SIM117
        with write_images(tmp_path / "a.npz", 5) as writer:
            for batch in batches:
                writer.append(batch)
    assert os.listdir(tmp_path) == []


# Reading.


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_reader_gives_the_images_in_order_and_batches(tmp_path, save):
    save(tmp_path / "a.npz", some_pixels())
    for size, lengths in {1: [1] * 5, 2: [2, 2, 1], 5: [5], 100: [5]}.items():
        batches = read_all(tmp_path / "a.npz", size)
        assert [len(batch) for batch in batches] == lengths
        np.testing.assert_array_equal(np.concatenate(batches), some_pixels())


def test_memory_is_that_of_one_batch_which_is_small_for_large_images(tmp_path):
    with write_images(tmp_path / "a.npz", 10) as writer:
        for _ in range(10):
            writer.append(np.zeros((1, 4096, 4096, 1), np.uint8))
    tracemalloc.start()
    with read_archive(tmp_path / "a.npz") as archive:
        assert [len(batch) for batch in archive.batches(1000)] == [4, 4, 2]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < (2 << 26) + (3 << 20)


@pytest.mark.parametrize("dtype", ["<f2", "<f4", "<f8", ">f8"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_float_arrays_come_as_float64_of_the_expected_shape(tmp_path, dtype, order):
    values = np.asarray(np.random.default_rng(0).normal(size=(3, 4)).astype(dtype), order=order)
    np.savez(tmp_path / "a.npz", sigma=values, note="Größe")
    with read_archive(tmp_path / "a.npz") as archive:
        read = archive.floats("sigma", (3, 4))
        assert read.dtype == np.float64
        np.testing.assert_array_equal(read, values)
        assert archive.text("note") == "Größe"
        assert "sigma" in archive
        assert "arr_0" not in archive
        with pytest.raises(UserError, match=r"sigma: .*\[4\].*\[3, 4\]"):
            archive.floats("sigma", (4,))
        with pytest.raises(UserError, match="mu"):
            archive.floats("mu", (4,))
        with pytest.raises(UserError, match="sigma"):
            archive.text("sigma")


# Files that are not what they should be.


def test_absent_empty_and_foreign_files_are_named(tmp_path):
    (tmp_path / "empty.npz").touch()
    (tmp_path / "text.npz").write_text("<html>Please log in</html>")
    (tmp_path / "folder.npz").mkdir()
    for name, word in {"absent": "", "empty": "empty", "text": "HTML", "folder": ""}.items():
        assert_refused(tmp_path / f"{name}.npz", word)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"images": some_pixels()}, ["arr_0", "images"]),
        ({"arr_0": np.zeros((2, 4, 4, 3))}, ["arr_0", "float64 [2, 4, 4, 3]"]),
        ({"arr_0": np.zeros((2, 4, 4), np.uint8)}, ["arr_0", "[2, 4, 4]"]),
        ({"arr_0": np.asfortranarray(some_pixels())}, ["Fortran"]),
        ({"arr_0": np.zeros((0, 4, 4, 3), np.uint8)}, ["arr_0", ", 4, 3]"]),
        ({"arr_0": np.zeros((4, 0, 4, 3), np.uint8)}, ["arr_0", ", 4, 3]"]),
        ({"arr_0": np.array([some_pixels(), None], object)}, ["arr_0"]),
    ],
)
def test_other_arrays_are_refused_with_what_would_be_right(tmp_path, arrays, words):
    np.savez(tmp_path / "a.npz", **arrays)
    assert_refused(tmp_path / "a.npz", *words)


class Payload:
    def __reduce__(self):
        return os.mkdir, ("/tmp/soflow-payload-ran",)


@pytest.mark.parametrize("descr", ["|O", "|u1", [("a", "|O")]])
def test_a_pickle_in_an_array_is_never_run(tmp_path, descr):
    data = pickle.dumps(Payload())
    write_member(tmp_path / "a.npz", npy_bytes(header_text(descr, (1, 1, 1, 3)), data))
    assert_refused(tmp_path / "a.npz", "arr_0")
    assert not os.path.exists("/tmp/soflow-payload-ran")


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize(
    "shape", [(1 << 30, 64, 64, 3), (-1, 2, 2, 3), (1, 2, 2, 2), (10**40, 1, 1, 1), (True,) * 4]
)
def test_size_declared_in_the_header_must_be_there(tmp_path, compression, shape):
    content = npy_bytes(header_text(shape=shape), bytes(12))
    write_member(tmp_path / "a.npz", content, compression=compression)
    assert_refused(tmp_path / "a.npz", "arr_0", "12")


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_size_declared_by_zip_and_header_alike_must_be_there(tmp_path, compression):
    content = npy_bytes(header_text(shape=(1 << 30, 64, 64, 3)), bytes(12))
    path = write_member(tmp_path / "a.npz", content, compression=compression)
    declared = len(content) - 12 + (1 << 30) * 64 * 64 * 3
    data = bytearray(path.read_bytes())
    directory = data.rindex(b"PK\x01\x02")
    # A zip64 record: the 32-bit sizes are all ones and the true ones follow as an extra field.
    name_end = directory + 46 + len("arr_0.npy")
    sizes = (declared, len(data) if compression else declared)
    extra = struct.pack("<HHQQ", 1, 16, *sizes)
    data[directory + 20 : directory + 28] = b"\xff" * 8
    data[directory + 30 : directory + 32] = struct.pack("<H", len(extra))
    data[name_end:name_end] = extra
    end = data.rindex(b"PK\x05\x06")
    (size,) = struct.unpack("<I", data[end + 12 : end + 16])
    data[end + 12 : end + 16] = struct.pack("<I", size + len(extra))
    path.write_bytes(data)
    assert_refused(path, "arr_0", str(declared))


def test_a_header_that_unpacks_to_gigabytes_is_not_unpacked(tmp_path):
    content = b"\x93NUMPY\x02\x00" + struct.pack("<I", 1 << 28) + bytes(1 << 28)
    path = write_member(tmp_path / "a.npz", content, compression=zipfile.ZIP_DEFLATED)
    del content
    tracemalloc.start()
    assert_refused(path, "arr_0")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 << 20


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_file_cut_anywhere_or_with_flipped_pixels_is_named(tmp_path, save):
    save(tmp_path / "a.npz", some_pixels())
    data = (tmp_path / "a.npz").read_bytes()
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 255
    for content in (flipped, *(data[:size] for size in range(0, len(data), len(data) // 20))):
        (tmp_path / "a.npz").write_bytes(content)
        assert_refused(tmp_path / "a.npz")


def test_other_compression_encryption_and_header_versions_are_refused(tmp_path):
    content = npy_bytes(header_text(), bytes(12))
    write_member(tmp_path / "a.npz", content, compression=zipfile.ZIP_LZMA)
    assert_refused(tmp_path / "a.npz", "arr_0")
    write_member(tmp_path / "a.npz", npy_bytes(header_text(), bytes(12), (3, 0)))
    assert_refused(tmp_path / "a.npz", "3.0")
    data = bytearray(write_member(tmp_path / "a.npz", content).read_bytes())
    data[6] |= 1
    data[data.rindex(b"PK\x01\x02") + 8] |= 1
    (tmp_path / "a.npz").write_bytes(data)
    assert_refused(tmp_path / "a.npz", "encrypted")


def test_a_header_that_cannot_be_parsed_is_refused(tmp_path):
    for header in ("", "[]", "{'descr': '|u1'}", "__import__('os')", "(" * 9000):
        write_member(tmp_path / "a.npz", npy_bytes(header, bytes(12)))
        assert_refused(tmp_path / "a.npz", "arr_0")


MEAN = np.arange(3.0)
STORED = in_memory(lambda file: np.savez(file, arr_0=some_pixels(), mu=MEAN))
DEFLATED = in_memory(lambda file: np.savez_compressed(file, arr_0=some_pixels(), mu=MEAN))


@settings(max_examples=300, deadline=None)
@given(content=damaged(STORED) | damaged(DEFLATED))
@example(content=STORED)
@example(content=DEFLATED)
def test_a_damaged_archive_gives_what_it_held_or_one_line(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "damaged.npz"
    path.write_bytes(content)
    try:
        with read_archive(path) as archive:
            pixels, mean = np.concatenate(list(archive.batches(2))), archive.floats("mu", (3,))
    except UserError as error:
        assert str(path) in str(error)
        assert "\n" not in str(error)
    else:
        np.testing.assert_array_equal(pixels, some_pixels())
        np.testing.assert_array_equal(mean, MEAN)
