"""Running the project's commands: in processes of their own, in forks of this one, or here."""

import functools
import importlib
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run(
    *arguments: object, folder: Path = ROOT, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """The finished process of `python {arguments}` in `folder`, its output captured.

    With one thread, as the tests themselves: threads that wait for each other on a busy machine
    are many times slower.
    """
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
        capture_output=True,
        text=True,
        timeout=300,
    )


def succeed(*arguments: object, folder: Path = ROOT) -> str:
    """The output of a command that has to succeed."""
    finished = run(*arguments, folder=folder)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


@functools.cache
def template() -> subprocess.Popen[str]:
    """The process that is forked; it ends with this one."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "forks.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        text=True,
    )


def forked(
    *arguments: object, ranks: int = 1, folder: Path = ROOT, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Like `run`, in forks of a process that has loaded torch: no seconds for that.

    Several `ranks` are processes of one run, as torchrun starts them: their outputs are joined.
    """
    words = [*map(str, arguments)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    if ranks > 1:
        with socket.create_server(("127.0.0.1", 0)) as free:
            env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        env["WORLD_SIZE"] = str(ranks)
    with tempfile.TemporaryDirectory() as place:
        paths = {name: Path(place, name) for name in ("out", "err")}
        request = {"words": words, "ranks": ranks, "folder": str(folder), "env": env}
        request |= {name: str(path) for name, path in paths.items()}
        pipes = template()
        print(json.dumps(request), file=pipes.stdin, flush=True)
        states = json.loads(pipes.stdout.readline())
        texts = [path.read_text() for path in paths.values()]
    return subprocess.CompletedProcess(words, next(filter(None, states), 0), *texts)


def run_here(script: str, *words: object) -> int:
    """The status of `python SCRIPT WORDS`, in this process."""
    sys.path.insert(0, str((ROOT / script).parent))
    before, sys.argv = sys.argv, [script, *map(str, words)]
    try:
        return importlib.import_module(Path(script).stem).main() or 0
    except SystemExit as end:
        return end.code or 0
    finally:
        sys.argv = before
        del sys.path[0]


def digits_settings(folder: Path, **values: object) -> list[str]:
    """Options of a small, quick digits run in `folder`."""
    settings = {
        "working_dir": folder, "total_steps": 6, "batch_size": 12, "eval_demo_steps": 0,
        "eval_steps": 0, "eval_num_samples": 10, "ckpt_saving_steps": 0, "logging_steps": 2,
        "eval_demo_shape": "[2, 2]", **values,
    }  # fmt: skip
    options = [f"--set={key}={value}" for key, value in settings.items()]
    return ["--config", str(ROOT / "configs" / "digits.yaml"), *options]
