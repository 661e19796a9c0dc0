"""A command from its first import to its exit status: whatever a user can cause ends in one line.

Every command imports this first. It needs the standard library alone, and so can speak where the
rest cannot be imported. Ctrl-C and a missing package are seen to from here on, but only in the
process of a command: imported from elsewhere, a command's module changes nothing.
"""

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

STOPPED_STATUS = 75  # what sysexits.h calls a temporary failure: try again
INTERRUPTED_STATUS = 130  # what shells say of SIGINT
UNREAD_STATUS = 141  # and of SIGPIPE
PATIENCE_SECONDS = 3  # torchrun ends the others within a tenth of a second of one's end
ROOT = Path(__file__).resolve().parent.parent.parent
REQUIREMENTS = (
    "requirements_soflow.txt",
    "requirements_soflow_demo.txt",
    "requirements_soflow_eval.txt",
)
PACKAGES = {"yaml": "PyYAML", "PIL": "pillow", "sklearn": "scikit-learn"}  # imported as: called


def run_command(main: Callable[[], int | None]) -> None:
    """Exit with main's status; a `UserError` becomes one line on stderr and status 1.

    Where nobody reads what is printed any more (`| head`), the command ends without a word.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        try:
            status = _status_of(main)
        finally:  # here: from the interpreter's way out, an error could not be caught
            _flush()
    except BrokenPipeError:
        unread = [stream for stream in _streams() if _is_unread(stream)]
        if not unread:
            raise
        for stream in unread:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        status = UNREAD_STATUS
    if _has_others():
        # Without the interpreter's way out: there, threads of torch's connections that are still
        # there have been seen to abort a process that had finished its work.
        _flush()
        os._exit(status)
    sys.exit(status)


def is_first_process() -> bool:
    """Whether this process talks: of those that torchrun has started, or because it is alone."""
    return os.environ.get("RANK", "0") == "0"


def _has_others() -> bool:
    """Whether this is one of several processes of a run."""
    return os.environ.get("WORLD_SIZE", "1") != "1"


def _status_of(main: Callable[[], int | None]) -> int:
    """Main's status, or that of what ended it, which is said."""
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
        # At once and in one piece: the others end next, each with a line of its own.
        text = f"process {os.environ.get('RANK')}: {traceback.format_exc()}"
        print(text, end="", file=sys.stderr, flush=True)
        return 1


def refuse_empty_words(words: Sequence[str]) -> None:
    """UserError where an option is given nothing, as by a variable of the shell that is not set.

    As if it had not been given, it would start something else than what was meant.
    """
    empty = [word[:-1] for word in words if re.fullmatch(r"--[\w-]+=", word)]
    empty += [before for before, word in pairwise(words) if before.startswith("--") and not word]
    if empty:
        raise UserError(f"{empty[0]}: is given nothing; give it a value, or leave it out")


def _say_error(text: str) -> None:
    """One line on stderr; what all processes of a machine meet the first of them says.

    torchrun ends the others, on other machines only those that it has heard of.
    """
    whose = ""
    if not is_first_process():
        if os.environ.get("LOCAL_RANK") != "0":
            time.sleep(PATIENCE_SECONDS)
        whose = f" (process {os.environ['RANK']})"
    print(f"error{whose}: {text}", file=sys.stderr, flush=True)


def _streams() -> list[TextIO]:
    """Stdout and stderr, as far as the process has them."""
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
    """Until `run_command`, end at Ctrl-C at once, and explain a missing package."""
    script = getattr(sys.modules["__main__"], "__file__", None)
    if script is None or Path(script).resolve().parent != ROOT:
        return
    sys.excepthook = _explain
    # Python's handler would raise in the middle of an import, where some packages catch everything.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def _explain(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """The hook for what nobody catches: a line where a package is missing, else the traceback."""
    name = error.name if isinstance(error, ModuleNotFoundError) else None
    is_ours = name and ((ROOT / f"{name}.py").exists() or (ROOT / name).exists())
    if not name or "." in name or is_ours:
        sys.__excepthook__(kind, error, trace)
    else:
        _say_error(_describe_missing(PACKAGES.get(name, name)))


def _describe_missing(package: str) -> str:
    """Which package is missing where, and what to do."""
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
