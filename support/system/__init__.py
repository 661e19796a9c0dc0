"""Processes, hardware, files, randomness."""
