"""Files that are whole or absent, digests, natural order, and errors that a user can mend.

Imports neither torch nor numpy: the evaluator's environment may have no torch.
"""

import contextlib
import errno
import fcntl
import hashlib
import http.client
import json
import os
import re
import shutil
import socket
import stat
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

MARKED_BYTES = 1024  # in which a file says what has made it
PAGE_MARK = b"Whoever opens this page can be sure"  # in the pages of report.py and page.py


class UserError(ValueError):
    """Something the user can mend; its text is the one line that they see."""

    def __str__(self) -> str:
        # Names that come from files and command lines may hold line ends.
        return " ".join(super().__str__().splitlines())


class Stopped(Exception):  # noqa: N818 - no error
    """The end of work that was asked to stop early and goes on when started again."""


def shorten(value: Any) -> str:
    """One short line: the first of an error's text, or a value as a user would write it."""
    if isinstance(value, BaseException):
        lines = str(value).strip().splitlines()
        return lines[0][:200] if lines else type(value).__name__
    if value is None or isinstance(value, bool):
        return json.dumps(value)  # also YAML's spelling
    try:
        text = repr(list(value) if isinstance(value, tuple) else value)
    except RecursionError:
        return "a list of lists of lists"
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"


def temporary_path(path: Path) -> Path:
    """Where `path` is written until it is whole: one name, so that leftovers are overwritten."""
    return path.with_name(f".{path.name}.tmp")


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[IO[bytes]]:
    """A seekable binary file that appears as `path` only when the block ends without an error.

    The bytes are on the disk before the name is (fsync, then os.replace). A file that stood there
    before stays as it was until then, and stays for good when the block raises. Raises UserError
    where the place cannot be written or another process is writing the same file.
    """
    path = Path(path)
    partial = temporary_path(path)
    try:
        # Not "wb": that would empty the file of a process that holds the lock.
        descriptor = os.open(partial, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from error
    with os.fdopen(descriptor, "r+b") as file:
        if not _lock(file, partial):
            raise UserError(f"{path}: another process is writing this file")
        try:
            file.truncate(0)
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(partial, path)
            sync_folder(path.parent)
        except BaseException as error:
            with contextlib.suppress(OSError):  # the folder may be read-only by now
                partial.unlink()
            with contextlib.suppress(OSError):
                file.close()  # here, where what a full disk does not take any more harms nothing
            if isinstance(error, OSError):
                raise UserError(f"{path}: not written ({error.strerror or error})") from error
            raise


def _lock(file: IO[bytes], path: Path) -> bool:
    """Whether `file`, open at `path`, is now ours alone."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True  # a file system without locks: os.replace alone has to do
    # The former owner may have taken the name away between our opening and our locking the file.
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


_open_locks: set[IO[bytes]] = set()
# A forked loader worker that outlives its killed parent would go on holding them.
os.register_at_fork(after_in_child=lambda: [file.close() for file in _open_locks])


@contextlib.contextmanager
def _hold(path: Path, wait: Callable[[IO[bytes]], None]) -> Iterator[IO[bytes]]:
    """A block that holds the lock `path`, a file that is there while somebody does.

    Dying unlocks it; where the file system has no locks, all hold it. `wait` is called with the
    open file for as long as another process holds that.
    """
    while True:
        try:
            file = open(path, "a+b")  # noqa: SIM115 - closed below
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror})") from error
        _open_locks.add(file)
        try:
            with file:
                if not _lock(file, path):
                    wait(file)
                    continue  # the former owner has removed this file: lock the next one
                try:
                    yield file
                finally:
                    # An unlocked file that stays locks nobody out.
                    with contextlib.suppress(OSError):
                        path.unlink()
                return
        finally:
            _open_locks.discard(file)


@contextlib.contextmanager
def hold_lock(path: str | Path, refusal: str, patience_seconds: float = 120) -> Iterator[None]:
    """A block that holds the lock `path`; UserError(refusal) where another process keeps it.

    A live process of this machine is not waited for, any other is: on a file system that machines
    share, the lock of a dead machine stays for a while.
    """
    deadline = 0.0

    def wait(file: IO[bytes]) -> None:
        nonlocal deadline
        holder, is_here = _holder(file)
        now = time.monotonic()
        if is_here or 0 < deadline <= now:
            raise UserError(f"{refusal} ({holder})")
        if not deadline:
            deadline = now + patience_seconds
            print(f"{refusal} ({holder}); waits for it, {patience_seconds:g} s at most", flush=True)
        time.sleep(min(1, patience_seconds))

    with _hold(Path(path), wait) as file:
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        note = {"host": socket.gethostname(), "process": os.getpid(), "since": since}
        with contextlib.suppress(OSError):  # on a full disk it holds all the same
            os.ftruncate(file.fileno(), 0)
            os.write(file.fileno(), json.dumps(note).encode())
        yield


def _holder(file: IO[bytes]) -> tuple[str, bool]:
    """Who holds a lock, in words, and whether that is a live process of this machine."""
    try:
        note = json.loads(os.pread(file.fileno(), 1000, 0))
        said = f"process {note['process']} on {note['host']}, since {note['since']}"
        is_alive = note["host"] == socket.gethostname() and _is_alive(note["process"])
    except (OSError, ValueError, KeyError):
        return "it cannot be told whose", False
    return said, is_alive


def _is_alive(pid: int) -> bool:
    """Whether a process of this machine is there, ours or another user's."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


@contextlib.contextmanager
def one_at_a_time(path: str | Path) -> Iterator[bool]:
    """A block that one process at a time enters; True for those that had to wait for another."""
    has_waited = False

    def wait(file: IO[bytes]) -> None:
        nonlocal has_waited
        has_waited = True
        fcntl.flock(file, fcntl.LOCK_EX)

    with _hold(Path(path), wait):
        yield has_waited


def done_by_one(
    lock: Path,
    work: Callable[[], None],
    is_due: Callable[[], bool],
    refusal: Callable[[], UserError],
) -> None:
    """Let one of the processes do `work` where it is due; the others wait for it.

    Whoever waited does not try in turn, for what failed once would fail again, and without a
    network that adds up: `refusal()` is raised. Where nothing is due, nothing is written.
    """
    if not is_due():
        return
    make_folder(lock.parent)
    with one_at_a_time(lock) as has_waited:
        if is_due():
            if has_waited:
                raise refusal()
            work()


@contextlib.contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """A folder to be filled that appears as `path` only when the block ends without an error.

    What stood there before stays until then, and for good when the block raises. UserError where
    the place cannot be written or another process is making the same folder.
    """
    path = Path(path).resolve()  # a link stays one
    partial, before = temporary_path(path), path.with_name(f".{path.name}.old")
    make_folder(path.parent)
    with hold_lock(path.with_name(f".{path.name}.lock"), f"{path}: another process is making it"):
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            yield partial
            for made in [*filter(Path.is_file, partial.rglob("*")), partial]:
                _sync(made)
            if path.exists():
                shutil.rmtree(before, ignore_errors=True)
                path.rename(before)
            partial.rename(path)
            sync_folder(path.parent)
        except BaseException as error:
            if before.exists() and not path.exists():
                before.rename(path)
            if isinstance(error, OSError):
                raise UserError(f"{path}: not written ({error.strerror or error})") from error
            raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            if path.exists():  # else it is all that is left
                shutil.rmtree(before, ignore_errors=True)


def _sync(path: Path) -> None:
    """Bring what is at `path` to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def regular_only(path: str | os.PathLike[str], flags: int) -> int:
    """An `opener` for `open`: OSError for what is no file, without waiting for a pipe's writer."""
    descriptor = os.open(path, flags | os.O_NONBLOCK)
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return descriptor
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    raise OSError(errno.EINVAL, "not a regular file")


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` durable, where the system lets a folder be synced."""
    with contextlib.suppress(OSError):
        _sync(folder)


def make_folder(folder: str | Path) -> Path:
    """`folder`, created with its parents if need be and proven writable; else UserError."""
    folder = Path(folder)
    probe = folder / f".writable-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"{folder}: not a writable folder ({error.strerror})") from error
    return folder


def check_writable(path: str | Path) -> None:
    """UserError where a file could not be written at `path`; makes the folder it is to be in."""
    path = Path(path)
    make_folder(path.parent)
    if path.is_dir():
        raise UserError(f"{path}: is a folder, not a file to write")


def refuse_foreign(path: Path, mark: bytes, way_out: str) -> None:
    """UserError where a file is at `path` that does not hold `mark` near its start, as ours do."""
    if not path.is_file():
        return
    try:
        with open(path, "rb", opener=regular_only) as file:
            is_ours = mark in file.read(MARKED_BYTES)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    if not is_ours:
        raise UserError(
            f"{path}: exists, and is not a file of this kind that was made here; {way_out}"
        )


def append_line(path: str | Path, line: str) -> None:
    """Append `line`, whole: where that fails, the file keeps what it held and UserError is raised.

    A last line without its end, left by a killed process, is closed first, so that it stays alone.
    """
    try:
        with open(path, "a+b", buffering=0) as file:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX)
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 1))
            start = b"" if file.read(1) in (b"", b"\n") else b"\n"
            data = start + line.encode(errors="surrogateescape") + b"\n"
            try:
                if file.write(data) != len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(file.fileno())
            except OSError:
                file.truncate(size)
                raise
    except OSError as error:
        raise UserError(f"{path}: not written ({error.strerror or error})") from error


def download(url: str, path: str | Path, timeout_seconds: float = 30) -> None:
    """Fetch `url` to `path`, with progress on stderr; whole or not at all.

    Raises UserError where the server cannot be reached, refuses, or ends early.
    """
    try:
        with (
            urllib.request.urlopen(url, timeout=timeout_seconds) as response,
            atomic_write(path) as file,
        ):
            total_bytes = int(response.headers.get("Content-Length") or 0)
            done_bytes = 0
            while piece := response.read(1 << 20):
                file.write(piece)
                done_bytes += len(piece)
                of_total = f" of {total_bytes / 1e6:.1f}" if total_bytes else ""
                print(f"\r{path}: {done_bytes / 1e6:.1f}{of_total} MB", end="", file=sys.stderr)
            print(file=sys.stderr)
            if total_bytes and done_bytes != total_bytes:
                raise UserError(f"{url}: ended after {done_bytes} of {total_bytes} bytes")
    except UserError:
        raise
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise UserError(f"{url}: cannot be fetched ({shorten(error)})") from error


def identify(path: Path) -> str:
    """What a file, which is not of the kind that was expected, is by its first bytes."""
    with open(path, "rb", opener=regular_only) as file:
        start, size = file.read(MARKED_BYTES), os.fstat(file.fileno()).st_size
    if not start:
        return "empty"
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer; `git lfs pull` fetches the file itself"
    if start.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        return "a web page (HTML), which a server sent instead of the file"
    if start.startswith(b"PK\x03\x04"):
        return "a ZIP archive that is cut short"
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < size:
        return "a safetensors file"
    if start.startswith(b"\x80"):
        return "a bare pickle"
    return "of another format"


def sha256_of(path: str | Path) -> str:
    """Hex SHA-256 of a file's bytes, read in pieces."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error


def numbered_files(folder: Path, suffix: str) -> dict[int, Path]:
    """Number -> file, in ascending order, of all that is named {number}{suffix} in `folder`."""
    if not folder.is_dir():
        return {}
    name = re.compile(rf"(0|[1-9][0-9]*){re.escape(suffix)}", re.ASCII)
    try:
        matches = [(name.fullmatch(path.name), path) for path in folder.iterdir()]
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror})") from error
    return dict(sorted((int(match[1]), path) for match, path in matches if match))


def delete_superseded(
    folder: Path, suffix: str, newest: int, keep_last: int | None, keep_every: int | None
) -> None:
    """Delete older files of `numbered_files`, with their records, once `newest` is whole.

    Kept are the last `keep_last` up to `newest` (None: all), multiples of `keep_every`, and those
    beyond `newest`, which are of another branch of the run.
    """
    if keep_last is None:
        return
    found = numbered_files(folder, suffix)
    upto = [number for number in found if number <= newest]
    for number in upto[:-keep_last]:
        if not keep_every or number % keep_every:
            try:
                # The record first: a file that a kill left without one is found again, not so a
                # record without its file.
                found[number].with_suffix(".json").unlink(missing_ok=True)
                found[number].unlink()
            except OSError as error:
                raise UserError(f"{found[number]}: cannot be deleted ({error.strerror})") from error


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """Sort key by which 2.npz comes before 10.npz."""
    return [
        (0, int(part), "") if part.isdecimal() else (1, 0, part)
        for part in re.split(r"([0-9]+)", name)
        if part
    ]
