"""Compares SoFlow with other objectives on the same network, data, draws and evaluator."""
