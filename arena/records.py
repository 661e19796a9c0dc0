"""Records of what made a file: the job, and the source files of the code that ran."""

import json
import os
import sys
import sysconfig
from pathlib import Path
from typing import Any

from arena.plan import Job
from support.system.command import ROOT
from support.system.files import atomic_write, sha256_of

Record = dict[str, Any]


def sources(*others: str | Path) -> dict[str, str]:
    """SHA-256 by path of all Python files that this process has imported, and of other files.

    The standard library and installed packages are left out.
    """
    imported = (getattr(module, "__file__", None) for module in list(sys.modules.values()))
    files = {Path(file).resolve() for file in [*imported, *others] if file}
    library = Path(sysconfig.get_path("stdlib")).resolve()
    own = [
        file
        for file in files
        if file.is_file()
        and library not in file.parents
        and not {"site-packages", "dist-packages"} & {*file.parts}
    ]
    return {os.path.relpath(file, ROOT): sha256_of(file) for file in sorted(own)}


def write_record(folder: Path, job: Job, name: str, files: dict[str, str], **values: Any) -> None:
    """Write `values` into a job's folder, with the job and the sources that made them."""
    with atomic_write(folder / job.file_name / name) as file:
        record = {"job": job.record(), "sources": files, **values}
        file.write(json.dumps(record, indent=1).encode())


def read_record(folder: Path, job: Job, name: str) -> Record | None:
    """A job's record, unless it is absent, of another job, or of sources that have changed."""
    try:
        record = json.loads((folder / job.file_name / name).read_bytes())
        files = record["sources"].items()
        is_current = all(sha256_of(ROOT / file) == digest for file, digest in files)
        return record if is_current and record["job"] == job.record() else None
    except (OSError, ValueError, KeyError):
        return None
