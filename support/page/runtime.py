"""onnxruntime-web, which runs graphs in a browser: one pinned version of its npm package."""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

from support.system.files import UserError, atomic_write, make_folder, sha256_of, shorten

PACKAGE, VERSION = "onnxruntime-web", "1.30.0"
SCRIPT, WASM = "ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm"
SHA256 = {
    SCRIPT: "11e64bd8ffe11bd1a2a2f0d6275fdfbbba7262f0b76b99b53d228a8a22ef3d90",
    WASM: "3398c10d07d229bd91b364548e130e0e51a8e5704b88c7c083ebbeb78842dee2",
}
TIMEOUT_SECONDS = 300


class Runtime(NamedTuple):
    """The two files of the package that a page needs."""

    script: bytes  # an ES module
    wasm: bytes


def read_runtime(folder: Path | None = None) -> Runtime:
    """The files from `folder`, the unpacked package or its dist; by default from the user's cache.

    npm fetches them once into the cache. UserError if they cannot be had or have other contents.
    """
    if folder is not None:
        return _read(folder / "dist" if (folder / "dist").is_dir() else folder)
    cache = cache_folder()
    if all((cache / name).is_file() for name in SHA256):
        return _read(cache)
    runtime = _fetch()
    make_folder(cache)
    for name, content in zip(SHA256, runtime, strict=True):
        with atomic_write(cache / name) as file:
            file.write(content)
    return runtime


def cache_folder() -> Path:
    """The place of the package's files in the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return cache / "soflow" / f"{PACKAGE}-{VERSION}"


def _read(folder: Path) -> Runtime:
    for name, digest in SHA256.items():
        path = folder / name
        if not path.is_file() or sha256_of(path) != digest:
            raise UserError(f"{path}: is missing or, by its SHA-256, not of {PACKAGE} {VERSION}")
    return Runtime(*((folder / name).read_bytes() for name in SHA256))


def _fetch() -> Runtime:
    with tempfile.TemporaryDirectory() as place:
        command = ["npm", "pack", f"{PACKAGE}@{VERSION}", "--silent", "--pack-destination", place]
        try:
            done = subprocess.run(
                command, cwd=place, capture_output=True, text=True, timeout=TIMEOUT_SECONDS
            )
            if done.returncode:
                raise OSError(done.stderr.strip() or f"status {done.returncode}")
            for archive in Path(place).glob("*.tgz"):
                shutil.unpack_archive(archive, place, filter="data")
        except (OSError, subprocess.TimeoutExpired) as error:
            raise UserError(
                f"{PACKAGE}: npm cannot fetch it ({shorten(error)}); install Node.js, or give "
                f"--ort FOLDER with the files of {PACKAGE} {VERSION}"
            ) from error
        return _read(Path(place, "package", "dist"))
