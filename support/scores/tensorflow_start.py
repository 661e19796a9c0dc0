"""TensorFlow, loaded without the lines that it writes about itself at its start.

What its C++ code writes to file descriptor 2 meanwhile passes through a process that leaves out the
lines known to mean nothing; this file is that process's program too, so it imports little. Unlike a
thread, the process passes on what a crash leaves behind. TF_CPP_MIN_LOG_LEVEL=0 shows everything.
"""

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator

# Of information alone; that there is no GPU or driver; one library registered by two parts. The
# severity stands first, or behind a date.
STARTUP_LINE = re.compile(
    rb"WARNING: All log messages before absl::InitializeLog\(\) is called are written to STDERR"
    rb"|(I\d{4} |[\d-]+ [\d:.]+ I )"
    rb"|To enable the following instructions: .* rebuild TensorFlow with the appropriate compiler"
    rb"|([EW]\d{4} |[\d-]+ [\d:.]+ [EW] ).*"
    rb"(failed call to cuInit: .*(UNKNOWN ERROR \(303\)|CUDA_ERROR_NO_DEVICE)"
    rb"|Unable to register cu\w+ factory|computation placer already registered)"
)


def import_tensorflow():
    """The module, its devices found; UserError where it is not installed."""
    from support.system.files import UserError, shorten

    # The level has to be set before the import: 1 leaves out information, and keeps warnings.
    level = os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")
    with contextlib.nullcontext() if level == "0" else without_startup_lines():
        try:
            import tensorflow
        except ImportError as error:
            raise UserError(
                f"TensorFlow cannot be loaded ({shorten(error)}); "
                "pip install -r requirements_soflow_eval.txt"
            ) from error
        tensorflow.config.list_physical_devices()  # which writes too, when asked first
    return tensorflow


@contextlib.contextmanager
def without_startup_lines() -> Iterator[None]:
    """A block during which file descriptor 2 leaves out what `STARTUP_LINE` matches."""
    sys.stderr.flush()
    stderr = os.dup(2)
    # In a session of its own, so that Ctrl-C ends it only with the last line.
    command = [sys.executable, "-I", "-S", __file__]
    sieve = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    assert sieve.stdin is not None  # a pipe, as asked for
    os.dup2(sieve.stdin.fileno(), 2)
    sieve.stdin.close()
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(stderr, 2)  # the sieve's input ends here
        os.close(stderr)
        sieve.wait()


def pass_on() -> None:
    """Copy lines from stdin to stderr, those left out that `STARTUP_LINE` matches."""
    for line in sys.stdin.buffer:
        if not STARTUP_LINE.match(line):
            sys.stderr.buffer.write(line)
            sys.stderr.buffer.flush()


if __name__ == "__main__":
    pass_on()
