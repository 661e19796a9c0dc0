"""Import TensorFlow without the lines that it prints about itself.

While TensorFlow loads, file descriptor 2 goes through a second process, which drops lines that are
known to mean nothing. This file is also that process's program, so it imports little. Unlike a
thread, the process still passes on what a crash leaves behind. TF_CPP_MIN_LOG_LEVEL=0 shows all.
"""

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator

# Information, a missing GPU or driver, a library that two parts register. The severity comes first
# or after a date.
STARTUP_LINE = re.compile(
    rb"WARNING: All log messages before absl::InitializeLog\(\) is called are written to STDERR"
    rb"|(I\d{4} |[\d-]+ [\d:.]+ I )"
    rb"|To enable the following instructions: .* rebuild TensorFlow with the appropriate compiler"
    rb"|([EW]\d{4} |[\d-]+ [\d:.]+ [EW] ).*"
    rb"(failed call to cuInit: .*(UNKNOWN ERROR \(303\)|CUDA_ERROR_NO_DEVICE)"
    rb"|Unable to register cu\w+ factory|computation placer already registered)"
)


def import_tensorflow():
    """The module, its devices found; UserError if it is not installed."""
    from support.system.files import UserError, shorten

    # The level must be set before the import: 1 drops information and keeps warnings.
    level = os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")
    with contextlib.nullcontext() if level == "0" else without_startup_lines():
        try:
            import tensorflow
        except ImportError as error:
            raise UserError(
                f"TensorFlow cannot be loaded ({shorten(error)}); "
                "pip install -r requirements_soflow_eval.txt, or use --backend torch"
            ) from error
        tensorflow.config.list_physical_devices()  # the first call prints lines, too
    return tensorflow


@contextlib.contextmanager
def without_startup_lines() -> Iterator[None]:
    """A block in which lines that match `STARTUP_LINE` do not reach file descriptor 2."""
    sys.stderr.flush()
    stderr = os.dup(2)
    # In its own session, so that Ctrl-C does not end it before the last line.
    command = [sys.executable, "-I", "-S", __file__]
    sieve = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    assert sieve.stdin is not None
    os.dup2(sieve.stdin.fileno(), 2)
    sieve.stdin.close()
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(stderr, 2)  # this ends the process's input
        os.close(stderr)
        sieve.wait()


if __name__ == "__main__":
    for line in sys.stdin.buffer:
        if not STARTUP_LINE.match(line):
            sys.stderr.buffer.write(line)
            sys.stderr.buffer.flush()
