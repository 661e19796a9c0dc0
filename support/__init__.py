"""The machinery around the method: configs, data, checkpoints, sampling. Imports nothing above."""

import os

__version__ = "0.1.0"

# Read when torch is loaded, so this has to be imported first. GNU OpenMP's threads wait by spinning
# 300,000 times, so long that other programs on the same cores can bring training on the CPU to a
# halt. With this many turns a training step on two idle cores was measured to be as fast; with
# 1,000, or with threads that sleep at once, it took half as long again.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
