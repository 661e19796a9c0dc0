"""The machinery around the method: configs, data, checkpoints, sampling. Imports nothing above."""

import os
import sys

__version__ = "0.1.0"

# Read when torch is loaded, so this has to be imported first. GNU OpenMP's threads wait by spinning
# 300,000 times, so long that other programs on the same cores can bring training on the CPU to a
# halt. With this many turns a training step on two idle cores was measured to be as fast; with
# 1,000, or with threads that sleep at once, it took half as long again.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def hide_triton_from_torch() -> None:
    """Where TensorFlow is loaded and triton is not: make torch go without triton.

    The two crash the process if triton comes second, and torch imports it for its compiler as soon
    as a network is built on the meta device.
    """
    if "tensorflow" in sys.modules and "triton" not in sys.modules:
        sys.modules["triton"] = None  # type: ignore[assignment]  # an import of it fails
