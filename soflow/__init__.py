"""The machinery around the method: configs, data, checkpoints, sampling. Imports nothing above."""

__version__ = "0.1.0"
