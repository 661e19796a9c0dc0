"""Running the project's commands: in processes of their own, in forks of this one, or here."""

import importlib
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import IO, NoReturn

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


def forked(
    *arguments: object,
    ranks: int = 1,
    folder: Path = ROOT,
    env: dict[str, str] | None = None,
    afresh: str = "-",
) -> subprocess.CompletedProcess[str]:
    """Like `run`, in forks of this process, which do not take seconds to load torch.

    Several `ranks` are processes of one run, as torchrun starts them: their outputs are joined.
    The package called `afresh` is imported anew, because it reads the environment on import.
    """
    words = [*map(str, arguments)]
    with socket.create_server(("127.0.0.1", 0)) as free:
        world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        children = []
        for rank in range(ranks):
            if ranks > 1:
                world |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
            if not (child := os.fork()):
                os.environ.update(world if ranks > 1 else {}, **(env or {}))
                _be_python(words, folder, afresh, out, err)
            children.append(child)
        states = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        status = next((state for state in states if state), 0)
        texts = [file.seek(0) or file.read() for file in (out, err)]
    return subprocess.CompletedProcess(words, status, *texts)


def _be_python(words: list[str], folder: Path, afresh: str, out: IO[str], err: IO[str]) -> NoReturn:
    """Go on as `python WORDS`, to the end of this process."""
    status: int | str | None = 1
    try:
        signal.alarm(300)  # ends it
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))  # noqa: SIM115
        for name in [name for name in sys.modules if name.split(".")[0] == afresh]:
            del sys.modules[name]
        os.chdir(folder)
        if words[0] == "-c":
            sys.argv = ["-c", *words[2:]]
            exec(words[1], {"__name__": "__main__"})
        else:
            sys.argv = words
            runpy.run_path(str(ROOT / words[0]), run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(int(status or 0))


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
        "working_dir": folder,
        "total_steps": 6,
        "batch_size": 12,
        "eval_demo_steps": 0,
        "eval_steps": 0,
        "eval_num_samples": 10,
        "ckpt_saving_steps": 0,
        "logging_steps": 2,
        "eval_demo_shape": "[2, 2]",
        **values,
    }
    options = [f"--set={key}={value}" for key, value in settings.items()]
    return ["--config", str(ROOT / "configs" / "digits.yaml"), *options]
