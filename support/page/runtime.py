"""onnxruntime-web, which runs graphs in a browser: one pinned version of its npm package."""

import base64
import hashlib
import os
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import NamedTuple

from support.system.files import UserError, atomic_write, make_folder, sha256_of, shorten

PACKAGE, VERSION = "onnxruntime-web", "1.30.0"
# As the npm registry has it; the digests of the two files are those within.
INTEGRITY_SHA512 = (
    "q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
)
SCRIPT, WASM = "ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm"
SHA256 = {
    SCRIPT: "11e64bd8ffe11bd1a2a2f0d6275fdfbbba7262f0b76b99b53d228a8a22ef3d90",
    WASM: "3398c10d07d229bd91b364548e130e0e51a8e5704b88c7c083ebbeb78842dee2",
}
TIMEOUT_SECONDS = 300


class Runtime(NamedTuple):
    """What a page needs of the package: a script, an ES module, and what it runs."""

    script: bytes
    wasm: bytes


def read_runtime(folder: Path | None = None) -> Runtime:
    """The files from `folder`: the package, unpacked, or its dist. Without, from the user's cache,
    where npm fetches them once.

    UserError where they cannot be had, or are not those of the pinned version.
    """
    if folder is None:
        folder = _cache()
        if not all((folder / name).is_file() for name in SHA256):
            _fetch(folder)
    elif (folder / "dist").is_dir():
        folder = folder / "dist"
    for name, digest in SHA256.items():
        if not (folder / name).is_file():
            raise UserError(f"{folder}: has no {name} of {PACKAGE} {VERSION}")
        if sha256_of(folder / name) != digest:
            raise UserError(
                f"{folder / name}: is not the one of {PACKAGE} {VERSION}, by its SHA-256"
            )
    return Runtime(*((folder / name).read_bytes() for name in SHA256))


def _cache() -> Path:
    """The folder of the user's cache that the package's files are kept in."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.path.expanduser(cache)) / "soflow" / f"{PACKAGE}-{VERSION}"


def _fetch(folder: Path) -> None:
    """Have npm download the package, and put its files into `folder`."""
    npm = shutil.which("npm")
    instead = f"give --ort FOLDER, with the files of {PACKAGE} {VERSION}"
    if npm is None:
        raise UserError(
            f"npm, which fetches {PACKAGE}, is not installed; install Node.js, or {instead}"
        )
    with tempfile.TemporaryDirectory() as place:
        command = [npm, "pack", f"{PACKAGE}@{VERSION}", "--silent", "--pack-destination", place]
        try:
            done = subprocess.run(
                command, cwd=place, capture_output=True, text=True, timeout=TIMEOUT_SECONDS
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise UserError(
                f"{PACKAGE}: not fetched by npm ({shorten(error)}); {instead}"
            ) from error
        archives = list(Path(place).glob("*.tgz"))
        if done.returncode or not archives:
            said = (done.stderr.strip() or f"status {done.returncode}").splitlines()[0]
            raise UserError(f"{PACKAGE}: not fetched by npm ({said}); {instead}")
        content = archives[0].read_bytes()
        found = base64.b64encode(hashlib.sha512(content).digest()).decode()
        if found != INTEGRITY_SHA512:
            raise UserError(
                f"{PACKAGE} {VERSION}: what npm fetched is another, of SHA-512 {found}; {instead}"
            )
        make_folder(folder)
        with tarfile.open(archives[0]) as archive:
            for name in SHA256:
                file = archive.extractfile(f"package/dist/{name}")
                assert file is not None  # by the digest it is this package
                with atomic_write(folder / name) as target:
                    shutil.copyfileobj(file, target)
