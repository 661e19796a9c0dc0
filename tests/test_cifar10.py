"""CIFAR-10 is fetched once, verified, and read without running anything that a pickle asks for."""

import hashlib
import http.server
import multiprocessing
import os
import pickle
import shutil
import signal
import threading
import time

import numpy as np
import pytest
import standins
from torchvision.datasets import CIFAR10

import support.data.cifar10
from support.data.cifar10 import load_training_set, published, read_batch, training_batches
from support.system.files import UserError, temporary_path


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


# The training set.


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """A whole copy of a stand-in; without a network, as far as the test does not start a server."""
    standins.write_cifar10(tmp_path, monkeypatch)
    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")
    return tmp_path / standins.CIFAR_FOLDER


def refusal(folder):
    with pytest.raises(UserError) as caught:
        load_training_set(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_table_is_that_of_the_published_files():
    table = published()
    assert table.training_files == tuple(f"data_batch_{number}" for number in range(1, 6))
    assert table.md5["data_batch_1"] == "c99cafc152244af753f735de768cd75f"
    assert table.md5["batches.meta"] == "5ff9c542aee3614f3951f8cda6e48888"
    assert table.archive_md5 == "c58f30108f718f92721af3b95e74349a"


def test_training_set_is_all_batches_in_order(tmp_path, monkeypatch):
    pixels = standins.write_cifar10(tmp_path, monkeypatch)
    training = load_training_set(tmp_path)
    np.testing.assert_array_equal(training.pixels, pixels)
    assert training.labels.tolist() == [*range(10)] * 5
    assert training.class_names == standins.CIFAR_NAMES
    in_place = load_training_set(tmp_path / standins.CIFAR_FOLDER)
    np.testing.assert_array_equal(in_place.pixels, pixels)


def test_whole_copy_is_read_where_nothing_can_be_written(copy, monkeypatch):
    monkeypatch.setattr(
        support.data.cifar10, "one_at_a_time", lambda _: pytest.fail("took the lock")
    )
    before = sorted(os.walk(copy.parent))
    load_training_set(copy.parent)
    assert sorted(os.walk(copy.parent)) == before


@pytest.mark.parametrize("name", ["data_batch_3", "batches.meta"])
def test_flipped_bit_is_refused_by_name_before_anything_is_unpickled(copy, monkeypatch, name):
    parsed = []
    parse = support.data.cifar10._parse
    monkeypatch.setattr(
        support.data.cifar10, "_parse", lambda data: parsed.append(data) or parse(data)
    )
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / name).write_bytes(content)
    said = refusal(copy.parent)
    assert said.startswith(f"{copy / name}: not the published file, its MD5 is ")
    assert said.endswith("; delete it, and the next start fetches it")
    assert bytes(content) not in parsed


@pytest.mark.parametrize("name", ["data_batch_1", "batches.meta"])
def test_pickle_that_runs_something_is_not_run_even_if_it_had_been_published(
    copy, monkeypatch, name
):
    class Touch:
        def __reduce__(self):
            return os.mkdir, (str(copy / "ran"),)

    touch = Touch()  # one object in two places: it runs once
    payload = pickle.dumps({"data": touch, "labels": [], "label_names": touch})
    (copy / name).write_bytes(payload)
    assert "not the published file" in refusal(copy.parent)
    standins.publish_cifar10(copy, monkeypatch)
    assert "asks for posix.mkdir, which is refused" in refusal(copy.parent)
    assert not (copy / "ran").exists()
    pickle.loads(payload)
    assert (copy / "ran").exists(), "the payload works where nobody checks"


def test_missing_file_offline_says_what_to_fetch_and_where_to_put_it(copy):
    (copy / "data_batch_2").unlink()
    said = refusal(copy.parent)
    assert said.startswith(f"{copy}: lacks data_batch_2; http://127.0.0.1:9/cifar")
    assert "refused" in said
    assert said.endswith(
        "put cifar-10-python.tar.gz from http://127.0.0.1:9/cifar-10-python.tar.gz into "
        f"{copy.parent} yourself"
    )
    assert [path.name for path in copy.parent.iterdir()] == [copy.name]


def test_archive_put_there_by_hand_is_unpacked_and_kept(copy, monkeypatch):
    archive = copy.parent / "cifar-10-python.tar.gz"
    archive.write_bytes(standins.archive_of_cifar10(copy, monkeypatch))
    shutil.rmtree(copy)
    assert len(load_training_set(copy.parent).labels) == 50
    assert sorted(os.listdir(copy)) == sorted(published().md5)
    assert archive.exists()


def test_damaged_archive_is_refused_by_name(copy, monkeypatch):
    archive = copy.parent / "cifar-10-python.tar.gz"
    archive.write_bytes(standins.archive_of_cifar10(copy, monkeypatch)[:-1])
    (copy / "batches.meta").unlink()
    assert refusal(copy.parent).startswith(f"{archive}: not the published file")
    assert not (copy / "batches.meta").exists()


class Server(http.server.ThreadingHTTPServer):
    """Serves `content`, or 404 for None, each answer after a while; counts the requests."""

    def __init__(self, content):
        self.content, self.requests, self.asked = content, 0, threading.Event()
        super().__init__(("127.0.0.1", 0), Handler)


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.requests += 1
        self.server.asked.set()
        time.sleep(0.5)
        self.send_response(200 if self.server.content else 404)
        self.end_headers()
        self.wfile.write(self.server.content or b"")

    def log_message(self, *_):
        pass


@pytest.fixture
def served(monkeypatch):
    """A function that lets CIFAR-10 be published at a server of this content."""
    servers = []

    def serve(content):
        servers.append(Server(content))
        port = servers[-1].server_port
        monkeypatch.setattr(CIFAR10, "url", f"http://127.0.0.1:{port}/cifar-10-python.tar.gz")
        thread = threading.Thread(target=servers[-1].serve_forever, args=(0.05,), daemon=True)
        thread.start()
        return servers[-1]

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


def start_loading(folder, count):
    """Processes that load the data set at once, and the queue of what they say in the end."""
    context = multiprocessing.get_context("fork")
    said = context.SimpleQueue()

    def load():
        try:
            said.put(str(len(load_training_set(folder).labels)))
        except UserError as error:
            said.put(str(error))

    processes = [context.Process(target=load) for _ in range(count)]
    for process in processes:
        process.start()
    return processes, said


def test_one_process_downloads_and_the_others_wait_for_it(copy, monkeypatch, served):
    server = served(standins.archive_of_cifar10(copy, monkeypatch))
    folder = copy.parent / "new"
    processes, said = start_loading(folder, 4)
    assert [said.get() for _ in processes] == ["50"] * 4
    assert server.requests == 1
    assert os.listdir(folder) == [copy.name], "neither the archive nor a lock stays"
    for process in processes:
        process.join()


def test_download_that_fails_ends_all_that_wait_for_it(copy, served):
    server = served(None)
    processes, said = start_loading(copy.parent / "new", 4)
    lines = sorted(said.get() for _ in processes)
    assert server.requests == 1
    assert sum("404" in line for line in lines) == 1
    assert (
        sum("another process failed to fetch cifar-10-python.tar.gz; put" in line for line in lines)
        == 3
    )
    for process in processes:
        process.join()


def test_killed_download_is_noticed_and_the_next_start_tries_again(copy, monkeypatch, served):
    server = served(standins.archive_of_cifar10(copy, monkeypatch))
    folder = copy.parent / "new"
    (first,), _ = start_loading(folder, 1)
    assert server.asked.wait(20)
    (second,), said = start_loading(folder, 1)
    time.sleep(0.1)
    os.kill(first.pid, signal.SIGKILL)
    assert "another process failed to fetch cifar-10-python.tar.gz; put" in said.get()
    for process in (first, second):
        process.join()
    assert len(load_training_set(folder).labels) == 50


def test_what_was_downloaded_instead_of_the_archive_is_refused_and_removed(copy, served):
    served(b"<html>Please log in</html>")
    (copy / "data_batch_5").unlink()
    said = refusal(copy.parent)
    assert "lacks data_batch_5; " in said
    assert hashlib.md5(b"<html>Please log in</html>").hexdigest() in said
    archive = copy.parent / "cifar-10-python.tar.gz"
    assert not archive.exists()
    assert not temporary_path(archive).exists()
