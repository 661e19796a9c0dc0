"""Locks between processes: each is a file that exists while a process holds it."""

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from support.system.files import UserError, make_folder, reporting_os_errors, try_lock

_open_locks: set[IO[bytes]] = set()
# Otherwise a forked loader worker that outlives its killed parent would keep the lock.
os.register_at_fork(after_in_child=lambda: [file.close() for file in _open_locks])


@contextlib.contextmanager
def _hold(path: Path, wait: Callable[[IO[bytes]], None]) -> Iterator[IO[bytes]]:
    """A block that holds the lock `path`; the death of the process releases it.

    Calls `wait` with the open file for as long as another process holds the lock. Excludes nobody
    where the file system has no locks.
    """
    while True:
        with reporting_os_errors(f"{path}: cannot be written"):
            file = open(path, "a+b")  # noqa: SIM115 - closed below
        _open_locks.add(file)
        try:
            with file:
                if not try_lock(file, path):
                    wait(file)
                    continue  # the former holder has removed this file: lock the next one
                try:
                    yield file
                finally:
                    # A file that remains, unlocked, excludes nobody.
                    with contextlib.suppress(OSError):
                        path.unlink()
                return
        finally:
            _open_locks.discard(file)


@contextlib.contextmanager
def hold_lock(path: str | Path, refusal: str, patience_seconds: float = 120) -> Iterator[None]:
    """A block that holds the lock `path`; UserError(refusal) where another process keeps it.

    A live process of this machine is refused at once. For any other this waits: on a file system
    that machines share, the lock of a dead machine stays for a while.
    """
    deadline = 0.0

    def wait(file: IO[bytes]) -> None:
        nonlocal deadline
        holder, is_here = _holder(file)
        if is_here or 0 < deadline <= time.monotonic():
            raise UserError(f"{refusal} ({holder})")
        if not deadline:
            deadline = time.monotonic() + patience_seconds
            print(f"{refusal} ({holder}); waiting at most {patience_seconds:g} s", flush=True)
        time.sleep(min(1, patience_seconds))

    with _hold(Path(path), wait) as file:
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        note = {"host": socket.gethostname(), "process": os.getpid(), "since": since}
        with contextlib.suppress(OSError):  # on a full disk the lock holds without its note
            os.ftruncate(file.fileno(), 0)
            os.write(file.fileno(), json.dumps(note).encode())
        yield


def _holder(file: IO[bytes]) -> tuple[str, bool]:
    """Who holds a lock, in words, and whether that is a live process of this machine."""
    try:
        note = json.loads(os.pread(file.fileno(), 1000, 0))
        said = f"process {note['process']} on {note['host']}, since {note['since']}"
        return said, note["host"] == socket.gethostname() and _is_alive(note["process"])
    except (OSError, ValueError, KeyError):
        return "the lock does not tell whose", False


def _is_alive(pid: int) -> bool:
    """Whether this machine has such a process, ours or another user's."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


@contextlib.contextmanager
def one_at_a_time(path: str | Path) -> Iterator[bool]:
    """A block that one process at a time enters; True for those that waited for another."""
    has_waited = False

    def wait(file: IO[bytes]) -> None:
        nonlocal has_waited
        has_waited = True
        fcntl.flock(file, fcntl.LOCK_EX)

    with _hold(Path(path), wait):
        yield has_waited


def fetch_once(
    place: Path, missing: Callable[[], list[str]], fetch: Callable[[], None], advice: str
) -> None:
    """Let one of the processes `fetch` what is `missing` in `place`; the others wait for it.

    A process that waited in vain raises a UserError. It does not try again: without a network, the
    time-outs of many processes would add up.
    """
    if not missing():
        return
    with one_at_a_time(make_folder(place) / ".fetching.lock") as has_waited:
        if not missing():
            return
        try:
            if has_waited:
                raise UserError("another process failed to fetch this")
            fetch()
        except UserError as error:
            raise UserError(f"{place}: lacks {', '.join(missing())}; {error}; {advice}") from error
