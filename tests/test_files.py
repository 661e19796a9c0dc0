"""Files are whole or absent, and what goes wrong is said in one line."""

import errno
import fcntl
import http.server
import json
import os
import re
import signal
import threading
import time
from pathlib import Path

import pytest

from support.system.files import (
    UserError,
    append_line,
    atomic_write,
    download,
    make_folder,
    natural_key,
    sha256_of,
    shorten,
    temporary_path,
)
from support.system.folders import atomic_folder
from support.system.locks import hold_lock, one_at_a_time


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_while_writing_leaves_the_former_file(tmp_path, error):
    path = tmp_path / "a.bin"
    path.write_bytes(b"former")
    with pytest.raises(error), atomic_write(path) as file:
        file.write(b"half")
        raise error
    assert path.read_bytes() == b"former"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_leftover_of_a_killed_writer_is_overwritten_whole(tmp_path):
    path = tmp_path / "a.bin"
    temporary_path(path).write_bytes(b"a long leftover of a killed process")
    with atomic_write(path) as file:
        file.write(b"new")
        assert not path.exists()
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_second_writer_of_the_same_file_is_refused_and_harms_nothing(tmp_path):
    path = tmp_path / "a.bin"
    with atomic_write(path) as file:
        file.write(b"first")
        with pytest.raises(UserError, match=r"a\.bin: "), atomic_write(path):
            pass
    assert path.read_bytes() == b"first"


def test_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/a\.bin: "):
        atomic_write(tmp_path / "file" / "a.bin").__enter__()
    with pytest.raises(UserError, match="file/below: "):
        make_folder(tmp_path / "file" / "below")


def test_digest_is_that_of_the_bytes(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_of(tmp_path / "a").startswith("ba7816bf8f01cfea414140de5dae2223")
    with pytest.raises(UserError, match="absent: "):
        sha256_of(tmp_path / "absent")


def test_numbers_in_names_sort_by_value():
    names = ["b", "10.npz", "2.npz", "a", "1.npz", "a10b2", "a10b10", "a9", ""]
    expected = ["", "1.npz", "2.npz", "10.npz", "a", "a9", "a10b2", "a10b10", "b"]
    assert sorted(names, key=natural_key) == expected


def test_an_error_is_told_in_one_short_line():
    assert shorten(ValueError("first\nsecond")) == "first"
    assert shorten(ValueError()) == "ValueError"
    assert len(shorten(ValueError("x" * 1000))) == 200


# Lines and downloads.


def test_lines_are_appended_whole_and_a_torn_one_stays_alone(tmp_path):
    path = tmp_path / "log.txt"
    append_line(path, "first")
    append_line(path, "odd name \udcff")
    assert path.read_bytes() == b"first\nodd name \xff\n"
    path.write_bytes(b"first\ntor")
    append_line(path, "second")
    assert path.read_bytes() == b"first\ntor\nsecond\n"
    with pytest.raises(UserError, match=r"log\.txt/below: "):
        append_line(path / "below", "line")


def test_a_line_that_does_not_fit_on_the_disk_leaves_no_part_of_itself(tmp_path, monkeypatch):
    path = tmp_path / "log.txt"
    path.write_bytes(b"first\n")

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left"):
        append_line(path, "second")
    assert path.read_bytes() == b"first\n"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(404 if self.path == "/absent" else 200)
        self.send_header("Content-Length", "9" if self.path == "/short" else "5")
        self.end_headers()
        self.wfile.write(b"bytes")

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as served:
        threading.Thread(target=served.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{served.server_port}"
        served.shutdown()


def test_download_arrives_whole_with_progress(tmp_path, server, capsys):
    download(f"{server}/whole", tmp_path / "a.pb")
    assert (tmp_path / "a.pb").read_bytes() == b"bytes"
    assert "a.pb: 0.0 of 0.0 MB" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "line"), [("absent", "absent: .*404"), ("short", "short: .*5 of 9 bytes")]
)
def test_download_that_fails_is_named_and_leaves_nothing(tmp_path, server, name, line):
    with pytest.raises(UserError, match=line):
        download(f"{server}/{name}", tmp_path / "a.pb")
    assert os.listdir(tmp_path) == []


def test_server_that_cannot_be_reached_is_named(tmp_path):
    with pytest.raises(UserError, match=r"127\.0\.0\.1:9/a: .*refused"):
        download("http://127.0.0.1:9/a", tmp_path / "a.pb")


# Locks.


def test_a_forked_child_does_not_keep_the_lock_of_a_killed_parent(tmp_path):
    path = tmp_path / "lock"
    reader, writer = os.pipe()
    if not (owner := os.fork()):
        with hold_lock(path, "taken"):
            child = os.fork()
            os.write(writer, b"%d\n" % child) if child else None
            time.sleep(10)
            os._exit(0)
    child = int(os.read(reader, 100))
    said = rf"taken \(process {owner} on "  # at once: it lives here
    with pytest.raises(UserError, match=said), hold_lock(path, "taken"):
        pass
    os.kill(owner, signal.SIGKILL)
    os.waitpid(owner, 0)
    try:
        os.kill(child, 0)  # lives on, as a worker of a loader does for a while
        with hold_lock(path, "taken"):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
    assert not path.exists()


@pytest.fixture
def held_lock(tmp_path):
    """A lock that another open file holds, as a process of another machine does."""
    with open(tmp_path / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        json.dump({"host": "alpha", "process": 7, "since": "2026-01-02 03:04:05"}, file)
        file.flush()
        yield file


@pytest.mark.parametrize("named", ["process 7 on alpha, since 2026-01-02 03:04:05", ""])
def test_another_machines_lock_is_waited_for_and_its_holder_named(held_lock, capsys, named):
    if not named:  # the lock was just taken
        os.ftruncate(held_lock.fileno(), 0)
    with (
        pytest.raises(UserError, match=f"^taken .*{named}"),
        hold_lock(held_lock.name, "taken", patience_seconds=0.1),
    ):
        pass
    assert re.fullmatch(rf"taken .*{named}.* 0\.1 s\n", capsys.readouterr().out)


def test_a_lock_that_ends_while_it_is_waited_for_is_taken(held_lock, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda _: held_lock.close())
    with hold_lock(held_lock.name, "taken"), open(held_lock.name) as note:
        assert json.load(note)["process"] == os.getpid()


def test_a_file_left_by_a_killed_process_locks_nobody_out(tmp_path):
    (tmp_path / "lock").touch()
    with hold_lock(tmp_path / "lock", "taken"):
        pass
    (tmp_path / "lock").touch()
    with one_at_a_time(tmp_path / "lock") as has_waited:
        assert not has_waited
    assert os.listdir(tmp_path) == []


def test_nobody_is_refused_where_the_file_system_has_no_locks(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with hold_lock(tmp_path / "lock", "taken"), hold_lock(tmp_path / "lock", "taken"):
        pass
    with one_at_a_time(tmp_path / "lock"):
        pass


@pytest.mark.parametrize("lock", [lambda path: hold_lock(path, "taken"), one_at_a_time])
def test_lock_in_a_folder_that_is_gone_is_one_line_and_makes_none(tmp_path, lock):
    with pytest.raises(UserError, match="gone/lock: "), lock(tmp_path / "gone/lock"):
        pass
    assert os.listdir(tmp_path) == []


def test_a_folder_appears_whole_and_the_one_before_stays_where_it_does_not(tmp_path, monkeypatch):
    folder = tmp_path / "folder"
    with atomic_folder(folder) as place:
        (place / "file").write_text("first")
        assert not folder.exists()
    rename = Path.rename

    def failing(path, target):
        if path.name == ".folder.tmp":
            raise OSError(errno.EIO, "broken")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(UserError, match="folder: "), atomic_folder(folder) as place:
        (place / "file").write_text("second")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    assert (folder / "file").read_text() == "first"
    monkeypatch.undo()
    with atomic_folder(folder) as place:
        (place / "other").touch()
    assert [path.name for path in folder.iterdir()] == ["other"]
