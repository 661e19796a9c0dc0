"""How the tests run: each with one thread, those of a file in turn, slow files first."""

import os
import shutil

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when NumPy and torch are loaded
# Tests compare bits, and fork processes that have loaded torch. benchmarks/gpu.py tries a GPU.
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import pytest
import torch
from commands import digits_settings

import train


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


@pytest.fixture
def new_page(browser):
    """Opens a page; at the end, its console is empty and all requests began with one of `own`."""
    opened = []

    def open_page(own: tuple[str, ...], **options):
        context = browser.new_context(**options)
        page, said, asked = context.new_page(), [], []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        opened.append((context, own, said, asked))
        return page

    yield open_page
    for context, own, said, asked in opened:
        assert said == []
        assert [url for url in asked if not url.startswith(own)] == []
        context.close()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of digits of three steps."""
    folder = tmp_path_factory.mktemp("run") / "digits"
    train.main([*digits_settings(folder, total_steps=3, ema_decay_rate=0.1), "--set=seed=5"])
    return folder


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Start with the slow files, so that all workers end together."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
