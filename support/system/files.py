"""Files that are whole or absent, and errors that a user can fix.

Needs the standard library alone: the evaluator's environment may have no torch.
"""

import contextlib
import errno
import fcntl
import hashlib
import http.client
import json
import os
import re
import stat
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

MARKED_BYTES = 1024  # at the start of a file, which tell what made it
PAGE_MARK = b"Whoever opens this page can be sure"  # in the pages of report.py and page.py


class UserError(ValueError):
    """An error that the user can fix; its text is the one line that they see."""

    def __str__(self) -> str:
        # Names from files and command lines may contain line ends.
        return " ".join(super().__str__().splitlines())


class Stopped(Exception):  # noqa: N818 - no error
    """Work ended early because it was asked to; started again, it continues."""


def shorten(value: Any) -> str:
    """One short line: an error's first line, or a value as a user would write it."""
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


@contextlib.contextmanager
def reporting_os_errors(what: str) -> Iterator[None]:
    """A block in which an OSError is a UserError: `what`, and the system's reason."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{what} ({error.strerror or error})") from error


def temporary_path(path: Path) -> Path:
    """Where `path` is written until it is whole: a fixed name, so leftovers are overwritten."""
    return path.with_name(f".{path.name}.tmp")


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[IO[bytes]]:
    """A seekable binary file that appears as `path` only when the block ends without an error.

    The bytes reach the disk before the name does (fsync, then os.replace). A file that was there
    before stays until then, and for good when the block raises. UserError where the place cannot
    be written or another process is writing the same file.
    """
    path = Path(path)
    partial = temporary_path(path)
    with reporting_os_errors(f"{path}: cannot be written"):
        # Not "wb": that would empty the file of a process that holds the lock.
        descriptor = os.open(partial, os.O_RDWR | os.O_CREAT, 0o666)
    with reporting_os_errors(f"{path}: not written"), os.fdopen(descriptor, "r+b") as file:
        if not try_lock(file, partial):
            raise UserError(f"{path}: another process is writing this file")
        try:
            file.truncate(0)
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(partial, path)
            sync_folder(path.parent)
        except BaseException:
            with contextlib.suppress(OSError):  # the folder may be read-only by now
                partial.unlink()
            with contextlib.suppress(OSError):
                file.close()  # flushes, which may fail on a full disk; the file is gone already
            raise


def try_lock(file: IO[bytes], path: Path) -> bool:
    """Lock `file`, which is open at `path`; False where another process holds it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True  # a file system without locks: os.replace must suffice
    # The former holder may have removed the name between our opening and our locking.
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def sync(path: Path) -> None:
    """Flush the file or folder at `path` to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def regular_only(path: str | os.PathLike[str], flags: int) -> int:
    """An `opener` for `open`: OSError for pipes, devices and folders, without waiting."""
    descriptor = os.open(path, flags | os.O_NONBLOCK)
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return descriptor
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    raise OSError(errno.EINVAL, "not a regular file")


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` durable, where the system can sync folders."""
    with contextlib.suppress(OSError):
        sync(folder)


def make_folder(folder: str | Path) -> Path:
    """Create `folder` and its parents if needed; UserError where nothing can be written there."""
    folder = Path(folder)
    probe = folder / f".writable-{os.getpid()}"
    with reporting_os_errors(f"{folder}: not a writable folder"):
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    return folder


def check_writable(path: str | Path) -> None:
    """UserError where no file can be written at `path`; creates its folder."""
    path = Path(path)
    make_folder(path.parent)
    if path.is_dir():
        raise UserError(f"{path}: is a folder, not a file to write")


def refuse_foreign(path: Path, mark: bytes, way_out: str) -> None:
    """UserError where a file at `path` lacks `mark` near its start, which ours have."""
    if not path.is_file():
        return
    with (
        reporting_os_errors(f"{path}: cannot be read"),
        open(path, "rb", opener=regular_only) as file,
    ):
        is_ours = mark in file.read(MARKED_BYTES)
    if not is_ours:
        raise UserError(f"{path}: exists, and was not made by this command; {way_out}")


def append_line(path: str | Path, line: str) -> None:
    """Append `line` as a whole; where that fails, the file stays as it was: UserError.

    If a killed process left a last line without its end, that end is written first.
    """
    with reporting_os_errors(f"{path}: not written"), open(path, "a+b", buffering=0) as file:
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


def download(url: str, path: str | Path, timeout_seconds: float = 30) -> None:
    """Fetch `url` to `path`, as a whole or not at all, with progress on stderr.

    UserError where the server cannot be reached, refuses, or ends early.
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
    """What a file of an unexpected kind is, by its first bytes; completes "it is ..."."""
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
    """Hex SHA-256 of a file's bytes."""
    with reporting_os_errors(f"{path}: cannot be read"), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def numbered_files(folder: Path, suffix: str) -> dict[int, Path]:
    """Number -> file, in ascending order, of every {number}{suffix} in `folder`."""
    if not folder.is_dir():
        return {}
    name = re.compile(rf"(0|[1-9][0-9]*){re.escape(suffix)}", re.ASCII)
    with reporting_os_errors(f"{folder}: cannot be read"):
        matches = [(name.fullmatch(path.name), path) for path in folder.iterdir()]
    return dict(sorted((int(match[1]), path) for match, path in matches if match))


def natural_key(name: str) -> list[int | str]:
    """Sort key by which 2.npz comes before 10.npz."""
    parts = re.split(r"([0-9]+)", name)  # text and numbers in turn
    return [int(part) if place % 2 else part for place, part in enumerate(parts)]
