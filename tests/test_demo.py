"""The demo's server: the images it draws, what it refuses, and who can reach it."""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

import export
from sampling import load
from support.system.files import UserError

pytest.importorskip("gradio", reason="gradio is not installed")

import gradio_client

import demo

SCALE = 16  # of digits, so that they are 128 pixels wide
FAIR = {"label": "3", "seed": 7, "count": 2, "steps": 1, "sampler": "chain"}


@pytest.fixture(scope="module")
def space(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("space") / "digits"
    export.main([str(run), str(folder), "--space"])
    return folder


@pytest.fixture(scope="module")
def model(run):
    return load(run, device="cpu", report=None)


def levels(image) -> np.ndarray:
    return np.array(image)[::SCALE, ::SCALE]


def test_images_are_those_of_sample(model):
    pictures, speed = demo.draw_images(model, "3", 7, 2, 2, "chain")
    expected = model.sample(3, [7, 8], 2, sampler="chain").numpy()[..., 0]
    assert np.array_equal([levels(picture) for picture, _ in pictures], expected)
    assert [text for _, text in pictures] == ["seed 7", "seed 8"]
    assert " ms " in speed
    [(drawn, _)], _ = demo.draw_images(model, "", 7, 1, 1, "renoise")
    assert np.array_equal(levels(drawn), model.sample(None, [7]).numpy()[0, ..., 0])


def test_one_of_several_averages_is_served(model, monkeypatch):
    given = {}
    monkeypatch.setattr(demo, "load", lambda *args, **kwargs: given.update(kwargs) or model)
    monkeypatch.setattr(demo, "serve", lambda page, *_: given.update(title=page.title))
    demo.main(["runs/digits/ckpts/6.pt", "--ema", "0.999", "--port", str(free_port())])
    assert given == {"ema": "0.999", "title": "digits-6"}


def free_port() -> int:
    with socket.socket() as tried:
        tried.bind((demo.LOCALHOST, 0))
        return tried.getsockname()[1]


def test_the_address_to_open_is_said_with_who_can_open_it():
    with socket.create_server((demo.LOCALHOST, 0)) as taken:
        port = taken.getsockname()[1]
        for host in (demo.LOCALHOST, "203.0.113.1"):
            with pytest.raises(UserError, match=f"--host {host} --port {port}"):
                demo.find_address(host, port)
    for host, shown in (("localhost", "localhost"), ("::1", "[::1]")):
        found = demo.find_address(host, port)
        assert found.startswith(f"http://{shown}:{port} ") and "only" in found
    everyone = demo.find_address("0.0.0.0", port)
    assert re.match(rf"http://(?!0\.0|localhost)[\w.-]+:{port} .*everyone", everyone)


# The server


@pytest.fixture(scope="module")
def address(space):
    """A space's app.py, as it runs on a machine without the rest of the project."""
    port = str(free_port())
    env = os.environ | {"GRADIO_SERVER_PORT": port, "GRADIO_TEMP_DIR": str(space.parent / "shown")}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    server = subprocess.Popen([sys.executable, "app.py"], cwd=space, env=env, text=True, **pipes)
    assert server.stdout is not None
    address = f"http://{demo.LOCALHOST}:{port}"
    assert any(address in line for line in server.stdout)
    yield address
    server.send_signal(signal.SIGINT)
    assert server.communicate(timeout=30)[0] == "interrupted\n"  # whatever was asked, no traceback


def ask(address: str, method: str, path: str, **kwargs) -> int:
    """The status of the answer."""
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=20)
    connection.request(method, path, encode_chunked=True, **kwargs)
    status = connection.getresponse().status
    connection.close()
    return status


@pytest.mark.slow
def test_two_users_at_once_get_their_images(address, model):
    def user(seed: int) -> list[np.ndarray]:
        client = gradio_client.Client(address, verbose=False)
        found, _ = client.predict("3", seed, 4, 2, "renoise", api_name="/draw")
        return [levels(Image.open(one["image"]).convert("L")) for one in found]

    with ThreadPoolExecutor(2) as users:
        for seed, images in zip((10, 20), users.map(user, (10, 20)), strict=True):
            expected = model.sample(3, range(seed, seed + 4), 2).numpy()[..., 0]
            assert np.array_equal(images, expected)


HOSTILE = [
    *({"count": value} for value in (1e9, 0, None, "x", [2])),
    *({"seed": value} for value in (-1, 1e300, 10**400, None, "7", [7])),
    *({"label": value} for value in ("13", ["3", "4", "5"], {"path": "/etc/passwd"}, None)),
    *({"steps": value} for value in (1000, True, [1], None)),
    *({"sampler": value} for value in ("x" * 9000, {}, None)),
]


@pytest.mark.slow
def test_values_out_of_bounds_are_refused(address):
    user = gradio_client.Client(address, verbose=False)
    for changed in HOSTILE:
        with pytest.raises(gradio_client.exceptions.AppError):
            user.predict(*(FAIR | changed).values(), api_name="/draw")
    assert len(user.predict(*FAIR.values(), api_name="/draw")[0]) == 2


@pytest.mark.slow
def test_requests_that_the_page_never_makes_are_refused(address):
    join, a_file = "/gradio_api/queue/join", b'--x\r\nContent-Disposition: form-data; name="files"'
    for path in ("upload", "component_server", "run/draw", "call/draw", "login"):
        assert ask(address, "POST", f"/gradio_api/{path}", body=a_file) == 404
    assert ask(address, "GET", "/monitoring") == 403
    assert ask(address, "POST", join, body=b"x" * 100_000) == 413
    chunked = {"Transfer-Encoding": "chunked"}
    assert ask(address, "POST", join, body=iter([b"x"]), headers=chunked) == 413
    as_json = {"Content-Type": "application/json"}
    for wrong in (None, [], {"data": 1}, {"data": [], "fn_index": 77, "session_hash": "x"}):
        assert ask(address, "POST", join, body=json.dumps(wrong), headers=as_json) >= 400
    assert ask(address, "GET", "/gradio_api/queue/data?session_hash=nobody") == 200


@pytest.mark.slow
def test_nothing_listens_beyond_one_address(address):
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", int(address.rsplit(":", 1)[1])), timeout=10)


@pytest.mark.slow
def test_the_page_works_on_a_phone_and_with_forced_colors_and_asks_no_other_host(address, new_page):
    phone = {"viewport": {"width": 390, "height": 844}, "forced_colors": "active"}
    opened = new_page((address, "blob:", "data:"), **phone)
    opened.goto(address)
    opened.wait_for_selector("#images img")
    opened.get_by_label("Seed").fill("7")
    opened.get_by_role("button", name="Draw").click()
    opened.get_by_text("seed 14").wait_for()
    assert opened.evaluate("document.documentElement.scrollWidth") <= 390
    for chosen in opened.locator("input:checked").all():
        assert chosen.evaluate("e => getComputedStyle(e).appearance") == "auto"  # is visible


# A space


def test_a_space_says_what_it_runs_with(space):
    first_lines = (space / "README.md").read_text().split("---\n")[1]
    for key in ("sdk", "sdk_version", "python_version", "app_file", "library_name"):
        assert f"\n{key}: " in f"\n{first_lines}"
    assert "gradio==" in (space / "requirements.txt").read_text()
