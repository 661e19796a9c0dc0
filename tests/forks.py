"""Forks of one process that has loaded the packages: a fresh Python without the seconds of a start.

    python tests/forks.py

reads requests, a line of JSON each, and answers each with a line: the exit status of every rank.
The process has a single thread, so that its forks inherit no lock that nobody would release.
"""

import json
import os
import runpy
import signal
import sys
import traceback
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT_SECONDS = 300


def load_packages() -> None:
    """Import what most commands need and is slow; nothing of the project, nothing of the hub."""
    import h5py  # noqa: F401
    import pydantic  # noqa: F401
    import torchvision  # noqa: F401

    assert len(os.listdir("/proc/self/task")) == 1, "a package has started a thread"


def answer(request: dict) -> list[int]:
    """The exit statuses of `python WORDS` in each rank; its output goes to two files."""
    children = []
    for rank in range(request["ranks"]):
        if not (child := os.fork()):
            be_python(request, rank)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def be_python(request: dict, rank: int) -> NoReturn:
    """Go on as `python WORDS`, to the end of this process."""
    signal.alarm(TIMEOUT_SECONDS)  # ends it
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, to in ((1, "out"), (2, "err")):
        os.dup2(os.open(request[to], os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    status = 1
    try:
        os.environ.clear()
        os.environ.update(request["env"])
        if request["ranks"] > 1:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
        os.chdir(request["folder"])
        words = sys.argv = request["words"]
        sys.path[0] = str(ROOT if words[0] == "-c" else Path(words[0]).resolve().parent)
        if words[0] == "-c":
            exec(sys.argv.pop(1), {"__name__": "__main__"})
        else:
            runpy.run_path(words[0], run_name="__main__")
        status = 0
    except SystemExit as end:
        status = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    load_packages()
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)
