"""Folders that are whole or absent."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from support.system.files import make_folder, reporting_os_errors, sync, sync_folder, temporary_path
from support.system.locks import hold_lock


@contextlib.contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """A folder to fill; it appears as `path` only when the block ends without an error.

    A folder that was there before stays until then, and for good when the block raises. UserError
    where the place cannot be written or another process is making the same folder.
    """
    path = Path(path).resolve()  # a link stays one
    partial, before = temporary_path(path), path.with_name(f".{path.name}.old")
    make_folder(path.parent)
    with (
        hold_lock(path.with_name(f".{path.name}.lock"), f"{path}: another process is making it"),
        reporting_os_errors(f"{path}: not written"),
    ):
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            yield partial
            for made in [*filter(Path.is_file, partial.rglob("*")), partial]:
                sync(made)
            if path.exists():
                shutil.rmtree(before, ignore_errors=True)
                path.rename(before)
            partial.rename(path)
            sync_folder(path.parent)
        except BaseException:
            if before.exists() and not path.exists():
                before.rename(path)
            raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            if path.exists():  # otherwise it is all that is left
                shutil.rmtree(before, ignore_errors=True)
