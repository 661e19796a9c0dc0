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
from collections.abc import Collection
from pathlib import Path
from typing import NoReturn

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
    afresh: Collection[str] = (),
) -> subprocess.CompletedProcess[str]:
    """Like `run`, in forks of this process, which do not take seconds to load torch.

    Several `ranks` are processes of one run, as torchrun starts them: their outputs are joined.
    Modules and packages called `afresh` are imported anew: from another folder, or because they
    read the environment.
    """
    for late in ("sklearn.datasets", "torch._dynamo"):  # so that not every fork imports them
        importlib.import_module(late)
    words = [*map(str, arguments)]
    with socket.create_server(("127.0.0.1", 0)) as free:
        world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        world["WORLD_SIZE"] = str(ranks)
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        children = []
        for rank in range(ranks):
            if not (child := os.fork()):
                os.dup2(out.fileno(), 1)
                os.dup2(err.fileno(), 2)
                if ranks > 1:
                    os.environ.update(world, RANK=f"{rank}", LOCAL_RANK=f"{rank}")
                os.environ.update(env or {})
                _be_python(words, folder, afresh)
            children.append(child)
        states = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        texts = [file.seek(0) or file.read() for file in (out, err)]
    return subprocess.CompletedProcess(words, next(filter(None, states), 0), *texts)


def _be_python(words: list[str], folder: Path, afresh: Collection[str]) -> NoReturn:
    """Go on as `python WORDS`, to the end of this process."""
    signal.alarm(300)  # ends it
    sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))  # noqa: SIM115
    try:
        for name in [name for name in sys.modules if name.split(".")[0] in afresh]:
            del sys.modules[name]
        os.chdir(folder)
        sys.argv = words
        if words[0] == "-c":
            exec(sys.argv.pop(1), {"__name__": "__main__"})
        else:
            sys.path.insert(0, str(Path(words[0]).resolve().parent))
            runpy.run_path(words[0], run_name="__main__")
        status = 0
    except SystemExit as end:
        status = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


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
