"""One thread for every test: two waiting for each other on a busy machine are far slower."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when NumPy and torch are loaded

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)
