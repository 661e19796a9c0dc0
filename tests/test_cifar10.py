"""CIFAR-10 is fetched once, and verified before torchvision unpickles anything."""

import contextlib
import hashlib
import http.server
import multiprocessing
import os
import pickle
import shutil
import sys
import threading
import time

import numpy as np
import pytest
import standins
import torch
from refusals import refusal
from torchvision.datasets import CIFAR10

import support.system.locks
from support.data.build import build_data
from support.data.cifar10 import find_copy, load_training_set
from support.data.datasets import DataRequest
from support.system.files import UserError, temporary_path


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """A whole copy of a stand-in; without a network, as far as the test does not start a server."""
    standins.write_cifar10(tmp_path, monkeypatch)
    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")
    return tmp_path / standins.CIFAR_FOLDER


def test_copy_is_found_in_the_folder_or_one_below_complete_or_not(copy):
    (copy / "data_batch_1").unlink()
    assert find_copy(copy) == find_copy(copy.parent) == copy
    assert find_copy(copy.parent / "absent") is None


def test_training_set_is_all_batches_in_order(tmp_path, monkeypatch):
    pixels = standins.write_cifar10(tmp_path, monkeypatch)
    for folder in (tmp_path, tmp_path / standins.CIFAR_FOLDER):
        data = build_data(DataRequest("CIFAR10", 32, str(folder)))
        assert data.spec.class_names == standins.CIFAR_NAMES
        assert data.pixels.dtype == torch.uint8
        np.testing.assert_array_equal(data.pixels.permute(0, 2, 3, 1), pixels)
        assert data.labels.tolist() == [*range(10)] * 5


def test_copy_without_the_test_images_and_of_another_name_is_enough(copy):
    (copy / "test_batch").unlink()
    other = copy.rename(copy.parent / "other")
    assert len(load_training_set(other).labels) == 50


def test_missing_torchvision_is_named(copy, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    with pytest.raises(ModuleNotFoundError, match="torchvision"):
        load_training_set(copy)


def test_whole_copy_is_read_where_nothing_can_be_written(copy, monkeypatch):
    monkeypatch.setattr(
        support.system.locks, "one_at_a_time", lambda _: pytest.fail("took the lock")
    )
    before = sorted(os.walk(copy.parent))
    load_training_set(copy.parent)
    assert sorted(os.walk(copy.parent)) == before


def test_flipped_bit_is_refused_by_name_before_anything_is_unpickled(copy, monkeypatch):
    monkeypatch.setattr(pickle, "loads", lambda *_, **__: pytest.fail("unpickled"))
    path = copy / "data_batch_3"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert refusal(load_training_set, copy.parent).startswith(f"{path}: ")


def test_missing_file_offline_says_what_to_fetch_and_where_to_put_it(copy):
    (copy / "data_batch_2").unlink()
    said = refusal(load_training_set, copy.parent)
    assert said.startswith(f"{copy}: lacks data_batch_2; ")
    for named in ("http://127.0.0.1:9/cifar-10-python.tar.gz", f"into {copy.parent} "):
        assert named in said
    assert [path.name for path in copy.parent.iterdir()] == [copy.name]


def test_archive_put_there_by_hand_is_unpacked_and_kept_or_refused_if_damaged(copy, monkeypatch):
    archive = copy.parent / "cifar-10-python.tar.gz"
    content = standins.archive_of_cifar10(copy, monkeypatch)
    shutil.rmtree(copy)
    archive.write_bytes(content[:-1])
    assert f"{archive}: " in refusal(load_training_set, copy.parent)
    assert not os.path.exists(copy / "data_batch_1")
    archive.write_bytes(content)
    assert len(load_training_set(copy.parent).labels) == 50
    assert sorted(os.listdir(copy)) == [f"data_batch_{number}" for number in range(1, 6)]
    assert archive.exists()


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `content`, or 404 for None, each answer after a while; counts the requests."""

    content: bytes | None
    asked: list[str]

    def do_GET(self):
        self.asked.append(self.path)
        time.sleep(0.5)
        self.send_response(200 if self.content else 404)
        self.end_headers()
        self.wfile.write(self.content or b"")

    def log_message(self, *_):
        pass


@pytest.fixture
def served(monkeypatch):
    """A function that publishes CIFAR-10 with this content; it returns a list of the requests."""
    with contextlib.ExitStack() as stack:

        def serve(content):
            handler = type("Handler", (Handler,), {"content": content, "asked": []})
            server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
            stack.enter_context(server).daemon_threads = True
            stack.callback(server.shutdown)
            address = f"http://127.0.0.1:{server.server_port}/cifar-10-python.tar.gz"
            monkeypatch.setattr(CIFAR10, "url", address)
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
            return handler.asked

        yield serve


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
    asked = served(standins.archive_of_cifar10(copy, monkeypatch))
    folder = copy.parent / "new"
    processes, said = start_loading(folder, 4)
    assert [said.get() for _ in processes] == ["50"] * 4
    assert len(asked) == 1
    assert os.listdir(folder) == [copy.name], "neither the archive nor a lock stays"


def test_download_that_fails_ends_all_that_wait_for_it(copy, served):
    asked = served(None)
    processes, said = start_loading(copy.parent / "new", 4)
    lines = sorted(said.get() for _ in processes)
    assert len(asked) == 1
    assert sum("404" in line for line in lines) == 1
    assert sum("another process" in line for line in lines) == 3


def test_killed_download_is_noticed_and_the_next_start_tries_again(copy, monkeypatch, served):
    asked = served(standins.archive_of_cifar10(copy, monkeypatch))
    folder = copy.parent / "new"
    (first,), _ = start_loading(folder, 1)
    while not asked:
        time.sleep(0.05)
    _, said = start_loading(folder, 1)
    time.sleep(0.1)
    first.kill()
    assert "another process" in said.get()
    assert len(load_training_set(folder).labels) == 50


def test_what_was_downloaded_instead_of_the_archive_is_refused_and_removed(copy, served):
    served(b"<html>Please log in</html>")
    (copy / "data_batch_5").unlink()
    said = refusal(load_training_set, copy.parent)
    assert "lacks data_batch_5; " in said
    assert hashlib.md5(b"<html>Please log in</html>").hexdigest() in said
    archive = copy.parent / "cifar-10-python.tar.gz"
    assert not archive.exists()
    assert not temporary_path(archive).exists()
