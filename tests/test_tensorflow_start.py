"""TensorFlow starts without lines about itself, and no other line is lost."""

import re
import signal

import pytest
from commands import run

NOISE = """\
WARNING: All log messages before absl::InitializeLog() is called are written to STDERR
I0000 00:00:1795569613.487526    6039 port.cc:153] oneDNN custom operations are on.
2025-11-25 01:20:13.487526: I tensorflow/core/platform/cpu_feature_guard.cc:227] This is optimized.
To enable the following instructions: FMA, rebuild TensorFlow with the appropriate compiler flags.
E0000 00:00:1795569615.823996    6039 cuda_platform.cc:52] failed call to cuInit: INTERNAL: CUDA \
error: Failed call to cuInit: UNKNOWN ERROR (303)
2025-11-25 01:20:15.1: E external/local_xla/cuda.cc:51] failed call to cuInit: CUDA_ERROR_NO_DEVICE
E0000 00:00:1795569615.1 6039 cuda_dnn.cc:8310] Unable to register cuDNN factory: Attempting to
W0000 00:00:1795569615.1 6039 computation_placer.cc:177] computation placer already registered.
"""
NEWS = """\
W0000 00:00:1795569615.1 6039 gpu_device.cc:2344] Cannot dlopen some GPU libraries.
E0000 00:00:1795569615.1 6039 cuda_platform.cc:52] failed call to cuInit: CUDA_ERROR_OUT_OF_MEMORY
F0000 00:00:1795569615.1 6039 tensor.cc:1] Check failed
import.py:1: UserWarning: I have something to say
a line without an end"""


@pytest.fixture
def start(tmp_path):
    """Runs `import_tensorflow` of a stand-in that writes to file descriptor 2 and goes on."""

    def write_and_run(written: str, then: str = "", after: str = "", **env: str):
        (tmp_path / "tensorflow.py").write_text(
            f"import os, types\nos.write(2, {written.encode()!r})\n{then}\n"
            "config = types.SimpleNamespace(list_physical_devices=lambda: None)\n"
        )
        code = "import os, support.scores.tensorflow_start as start; start.import_tensorflow(); "
        code += after
        return run("-c", code, env={"PYTHONPATH": str(tmp_path), **env})

    return write_and_run


def test_start_up_lines_are_left_out_and_everything_else_is_passed_on(start):
    finished = start(NOISE + NEWS)
    assert (finished.returncode, finished.stderr) == (0, NEWS)
    # after the start, or if all lines are asked for, nothing is left out
    assert start(NOISE, after=f"os.write(2, {NOISE.encode()!r})").stderr == NOISE
    assert start(NOISE, TF_CPP_MIN_LOG_LEVEL="0").stderr == NOISE


@pytest.mark.parametrize(
    ("end", "status"), [("os.abort()", -signal.SIGABRT), ("os.kill(os.getpid(), 9)", -9)]
)
def test_last_words_of_a_start_that_crashes_are_passed_on(start, end, status):
    finished = start(NOISE + NEWS, end)
    assert (finished.returncode, finished.stderr) == (status, NEWS)


def test_start_that_raises_shows_what_was_written_then_the_error(start):
    finished = start(NEWS + "\n", "raise RuntimeError('unlike any other')")
    assert finished.stderr.startswith(NEWS + "\nTraceback")
    assert finished.stderr.endswith("RuntimeError: unlike any other\n")
    finished = start(NOISE, "raise ImportError('no libfoo.so')")
    assert re.search("UserError.*no libfoo.so.*requirements_soflow_eval.txt", finished.stderr)
