"""How the tests run: each with one thread, those of a file in turn, slow files first."""

import os
import shutil

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when NumPy and torch are loaded

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Two threads that wait for each other on a busy machine are far slower."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def browser():
    """A real Chromium."""
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not installed")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Let files share what they set up, and start with the slow, so that all workers end together.

    Tests that fill the machine are one group, of which one runs at a time.
    """
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
    for item in items:
        if not item.get_closest_marker("xdist_group"):
            item.add_marker(pytest.mark.xdist_group(item.path.stem))
