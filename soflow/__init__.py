"""The machinery around the method: configs, data, checkpoints, sampling. Imports nothing above."""

import os

__version__ = "0.1.0"

# Read when torch is loaded, so this has to be imported first. GNU OpenMP's threads wait by spinning
# so long that other programs on the same cores can bring training on the CPU to a halt. This is the
# number of turns it takes by itself where it knows that cores are short; on two idle cores a
# training step was measured to be as fast with it.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
