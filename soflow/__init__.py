"""The machinery around the method: configs, data, checkpoints, sampling. Imports nothing above."""

import os

__version__ = "0.1.0"

# Read when torch is loaded, so this has to be imported first. By default OpenMP's threads wait by
# spinning: with other programs on the same cores, training on the CPU was seen to come to a halt
# where threads that sleep took twice their time.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
