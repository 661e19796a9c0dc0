"""A command from its first import to its exit status: every error of a user ends in one line.

Every command imports this module first. It needs the standard library alone, so it can report a
missing package. From then on it handles Ctrl-C and missing packages, but only in the process of a
command: importing a command's module from elsewhere changes nothing.
"""

import argparse
import os
import re
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import TextIO

from support.system.files import Stopped, UserError

STOPPED_STATUS = 75  # a temporary failure in sysexits.h: try again
INTERRUPTED_STATUS = 130  # SIGINT, in shells
UNREAD_STATUS = 141  # SIGPIPE, in shells
PATIENCE_SECONDS = 3  # torchrun ends the others 0.1 s after the first
ROOT = Path(__file__).resolve().parent.parent.parent
REQUIREMENTS = tuple(f"requirements_soflow{kind}.txt" for kind in ("", "_demo", "_eval"))
PACKAGES = {"yaml": "PyYAML", "PIL": "pillow", "sklearn": "scikit-learn"}  # import name: package


def run_command(main: Callable[[], int | None]) -> None:
    """Exit with main's status; a `UserError` becomes one line on stderr and status 1.

    If nobody reads the output any more (`| head`), the command ends silently.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        try:
            status = _status_of(main)
        finally:  # errors at the interpreter's exit could not be caught
            _flush()
    except BrokenPipeError:
        unread = [stream for stream in _streams() if _is_unread(stream)]
        if not unread:
            raise
        for stream in unread:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        status = UNREAD_STATUS
    if _has_others():
        # Skip the interpreter's exit: there, threads of torch's connections have been seen to abort
        # a process that had finished its work.
        _flush()
        os._exit(status)
    sys.exit(status)


def command_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser of a command's options; --help shows the module's docstring as it is."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def is_first_process() -> bool:
    """Whether this is the process that prints: rank 0, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def _has_others() -> bool:
    """Whether the run has several processes."""
    return os.environ.get("WORLD_SIZE", "1") != "1"


def _status_of(main: Callable[[], int | None]) -> int:
    """Main's status, or that of the exception that ended it, which is printed."""
    try:
        refuse_empty_words(sys.argv[1:])
        return main() or 0
    except UserError as error:
        _say_error(str(error))
        return 1
    except Stopped as stop:
        if is_first_process():
            print(stop, flush=True)
        return STOPPED_STATUS
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        return INTERRUPTED_STATUS
    except BrokenPipeError:
        raise
    except Exception:
        if not _has_others():
            raise
        # At once and in one piece: the other processes end next, each with a line of its own.
        text = f"process {os.environ.get('RANK')}: {traceback.format_exc()}"
        print(text, end="", file=sys.stderr, flush=True)
        return 1


def refuse_empty_words(words: Sequence[str]) -> None:
    """UserError where an option has an empty value, as from a shell variable that is not set.

    Ignoring the option would start something that the user did not mean.
    """
    empty = [word[:-1] for word in words if re.fullmatch(r"--[\w-]+=", word)]
    empty += [before for before, word in pairwise(words) if before.startswith("--") and not word]
    if empty:
        raise UserError(f"{empty[0]}: has an empty value; give it one, or leave the option out")


def _say_error(text: str) -> None:
    """Print one line on stderr. An error of all processes is printed by the first of each machine.

    The others wait: torchrun ends them meanwhile.
    """
    whose = ""
    if not is_first_process():
        if os.environ.get("LOCAL_RANK") != "0":
            time.sleep(PATIENCE_SECONDS)
        whose = f" (process {os.environ['RANK']})"
    print(f"error{whose}: {text}", file=sys.stderr, flush=True)


def _streams() -> list[TextIO]:
    """Stdout and stderr, if the process has them."""
    return [stream for stream in (sys.stdout, sys.stderr) if stream is not None]


def _flush() -> None:
    for stream in _streams():
        stream.flush()


def _is_unread(stream: TextIO) -> bool:
    """Whether the stream is a pipe without a reader."""
    poll = select.poll()
    poll.register(stream.fileno(), 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


# The start


def _attend_start() -> None:
    """Until `run_command`: let Ctrl-C end the process at once, and explain a missing package."""
    script = getattr(sys.modules["__main__"], "__file__", None)
    if script is None or Path(script).resolve().parent != ROOT:
        return
    sys.excepthook = _explain
    # Python's handler would raise during an import, where some packages catch everything.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def _explain(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Hook for uncaught exceptions: one line for a missing package, else the traceback."""
    name = error.name if isinstance(error, ModuleNotFoundError) else None
    is_ours = name and ((ROOT / f"{name}.py").exists() or (ROOT / name).exists())
    if not name or "." in name or is_ours:
        sys.__excepthook__(kind, error, trace)
    else:
        _say_error(_describe_missing(PACKAGES.get(name, name)))


def _describe_missing(package: str) -> str:
    """A line that names the missing package and how to install it."""
    files = REQUIREMENTS[::-1] if Path(sys.argv[0]).stem == "evaluator" else REQUIREMENTS
    line = re.compile(rf"^{re.escape(package)}\b", re.MULTILINE | re.IGNORECASE)
    needing = [file for file in files if line.search((ROOT / file).read_text())] or files
    ways = [f"install it: pip install -r {os.path.relpath(ROOT / needing[0])}"]
    environment = ROOT / ".venv"
    is_active = Path(sys.prefix).resolve() == environment.resolve()
    if (environment / "bin" / "activate").exists() and not is_active:
        activate = os.path.relpath(environment / "bin" / "activate")
        ways.insert(0, f"activate the project's environment: . {activate}")
    return f"{package} is missing in {sys.executable}; {'; or '.join(ways)}"


_attend_start()
