"""The server of a demo: what it draws, what it refuses, and that it stays on this machine."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import ROOT, digits_settings
from PIL import Image
from tiny_vae import make_tiny_vae

import export
import train
from sampling import load
from support.runs.stored import StoredModel
from support.system.files import UserError
from support.system.randomness import PerImageStream

pytest.importorskip("gradio", reason="gradio is not installed")

import demo
from config import config_from_dict
from models import build_model
from sampling import assemble
from support.page.serving import check_port

SCALE = 16  # of digits, so that they are 128 pixels wide


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "digits"
    train.main([*digits_settings(folder, total_steps=3, ema_decay_rate=0.1), "--set=seed=5"])
    return folder


@pytest.fixture(scope="module")
def model(run):
    return load(run, device="cpu", report=lambda line: None)


def levels(image) -> np.ndarray:
    return np.array(image)[::SCALE, ::SCALE]


def test_images_are_those_of_sample(model):
    shown = demo.Demo(model).draw("3", 7, 2, 2, "chain")
    expected = model.sample(3, [7, 8], 2, sampler="chain").numpy()[..., 0]
    found = [levels(picture) for picture, _ in shown.pictures]
    assert np.array_equal(found, expected)
    assert [text for _, text in shown.pictures] == ["seed 7", "seed 8"]
    drawn = demo.Demo(model).draw(demo.ANY, 7, 1, 1, "renoise").pictures[0][0]
    assert np.array_equal(levels(drawn), model.sample(None, [7]).numpy()[0, ..., 0])


def test_the_way_between_two_seeds_starts_and_ends_at_theirs(model):
    asked = demo.Demo(model)
    ends = [levels(asked.between("3", 7, 8, share, 1)) for share in (0, 1)]
    expected = model.sample(3, [7, 8]).numpy()[..., 0]
    assert np.abs(np.array(ends).astype(int) - expected).max() <= 1
    assert not np.array_equal(levels(asked.between("3", 7, 8, 0.5, 1)), expected[0])
    assert np.array_equal(levels(asked.between("3", 7, 7, 0.5, 1)), expected[0])


def test_an_image_is_followed_over_its_jumps_and_along_s(model):
    shown = demo.Demo(model).follow("3", 7, 2, "renoise")
    named = {text: levels(picture) for picture, text in shown.pictures}
    assert [*named] == ["noise", "jump 1", "jump 2", *(f"s = {s:g}" for s in demo.PATH)]
    assert np.array_equal(named["jump 2"], model.sample(3, [7], 2).numpy()[0, ..., 0])
    assert np.array_equal(named["jump 1"], named["s = 0"])
    noise = PerImageStream(7, None, (1, 8, 8)).draw([0], 1).noises[0]
    assert np.array_equal(named["noise"], demo.pixels_of(noise)[0, ..., 0].numpy())


def test_latents_are_decoded(tmp_path):
    vae = make_tiny_vae(tmp_path / "vae")
    settings = {"working_dir": "w", "dataset_type": "Imagenet", "data_size": 4, "vae": str(vae)}
    config = config_from_dict({**settings, "model_type": "DiT-Nano-2"}, "here")
    torch.manual_seed(0)
    weights = build_model(**config.model_arguments(4, 1000)).state_dict()
    stored = StoredModel(tmp_path, weights, config.to_dict(), {"channels": 4, "num_classes": 1000})
    latent = assemble(config, stored, torch.device("cpu"))
    shown = demo.Demo(latent).follow("999", 7, 1, "renoise")
    expected = np.array(latent.sample(999, [7])[0])
    jump = np.array(shown.pictures[1][0])
    scale = len(jump) // len(expected)
    assert np.abs(jump[::scale, ::scale].astype(int) - expected).max() <= 1


FAIR = {"word": "3", "seed": 7, "count": 2, "steps": 1, "sampler": "chain"}
HOSTILE = [
    ("count", 1e9, "images: 1000000000.0 is not a whole number from 1 to 16"),
    ("count", True, "images: true is not"),
    ("count", 1.5, "images: 1.5 is not"),
    ("count", None, "images: null is not"),
    ("seed", -1, "seed: -1 is not a whole number from 0 to 1000000000000"),
    ("seed", float("nan"), "seed: nan is not"),
    ("seed", float("inf"), "seed: inf is not"),
    ("seed", "7", "seed: '7' is not"),
    ("word", "13", "class: '13' is not one of the classes"),
    ("word", ["3"], "class: \\['3'\\] is not"),
    ("steps", 1000, "jumps: 1000 is not one of 1, 2, 4"),
    ("steps", [1], "jumps: \\[1\\] is not"),
    ("sampler", {}, "sampler: {} is not one of renoise, chain"),
]


@pytest.mark.parametrize(("name", "value", "said"), HOSTILE)
def test_requests_out_of_bounds_are_refused_in_a_line(model, name, value, said):
    with pytest.raises(UserError, match=said):
        demo.Demo(model).draw(**FAIR | {name: value})


def test_a_share_that_is_none_is_refused(model):
    for share in (2, "x", float("nan"), None):
        with pytest.raises(UserError, match=r"share: .* is not a number from 0 to 1"):
            demo.Demo(model).between("3", 1, 2, share, 1)


def test_an_address_that_is_taken_or_not_here_is_a_line():
    with socket.socket() as taken:
        taken.bind((demo.LOCALHOST, 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"--port {port}: another program listens there"):
            check_port(demo.LOCALHOST, port)
    with pytest.raises(UserError, match=r"--host 203\.0\.113\.1: nothing can listen there"):
        check_port("203.0.113.1", port)


# The server


def free_port() -> int:
    with socket.socket() as tried:
        tried.bind((demo.LOCALHOST, 0))
        return tried.getsockname()[1]


@pytest.fixture(scope="module")
def address(run, tmp_path_factory):
    """A Space's app.py, as it runs on a machine without the rest of the project."""
    folder = tmp_path_factory.mktemp("space") / "digits"
    export.main([str(run), str(folder), "--space"])
    port, lines = free_port(), []
    env = {name: value for name, value in os.environ.items() if not name.startswith("GRADIO")}
    env |= {"GRADIO_SERVER_PORT": str(port), "GRADIO_TEMP_DIR": str(folder.parent / "shown")}
    server = subprocess.Popen(
        [sys.executable, "app.py"],
        cwd=folder,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert server.stdout is not None
    for line in server.stdout:
        lines.append(line)
        if "Ctrl-C ends it" in line:
            break
    assert server.poll() is None, "".join(lines)
    yield f"http://{demo.LOCALHOST}:{port}"
    server.send_signal(signal.SIGINT)
    said = server.communicate(timeout=30)[0]
    assert said == "interrupted\n"  # and no traceback, whatever was asked


def client(address: str):
    from gradio_client import Client

    return Client(address, verbose=False)


@pytest.mark.slow
def test_two_users_at_once_get_their_images(address, model):
    def user(seed: int) -> np.ndarray:
        found, said = client(address).predict("3", seed, 4, 2, "renoise", api_name="/draw")
        assert "2 jumps each" in said
        return np.array([levels(Image.open(one["image"]).convert("L")) for one in found])

    with ThreadPoolExecutor(2) as users:
        first, second = users.map(user, (10, 20))
    assert np.array_equal(first, model.sample(3, range(10, 14), 2).numpy()[..., 0])
    assert np.array_equal(second, model.sample(3, range(20, 24), 2).numpy()[..., 0])


@pytest.mark.slow
def test_the_server_refuses_what_is_out_of_bounds_or_too_large_and_goes_on(address):
    from gradio_client.exceptions import AppError

    user = client(address)
    for changed in ({"count": 1e9}, {"word": "13"}, {"steps": 1e9}, {"sampler": "x" * 9000}):
        with pytest.raises(AppError, match="is not"):
            user.predict(*(FAIR | changed).values(), api_name="/draw")
    host = address.removeprefix("http://")
    for size, is_chunked in [(100_000, False), (10, True)]:
        connection = http.client.HTTPConnection(host, timeout=20)
        body = json.dumps({"data": ["3" * size]}).encode()
        given = {"body": iter([body]), "encode_chunked": True} if is_chunked else {"body": body}
        headers = {"Transfer-Encoding": "chunked"} if is_chunked else {}
        connection.request("POST", "/gradio_api/call/draw", headers=headers, **given)
        assert connection.getresponse().status == 413
        connection.close()
    assert len(user.predict(*FAIR.values(), api_name="/draw")[0]) == 2


@pytest.mark.slow
def test_nothing_listens_beyond_this_machine(address):
    port = int(address.rsplit(":", 1)[1])
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    here = {
        row[1].split(":")[0] for row in rows if row[1].endswith(f":{port:04X}") and row[3] == "0A"
    }
    assert here == {"0100007F"}


@pytest.mark.slow
def test_the_page_draws_in_a_browser_and_asks_no_other_host(address, browser):
    opened, said, asked = browser.new_page(), [], []
    opened.on("console", lambda message: message.type == "error" and said.append(message.text))
    opened.on("pageerror", lambda error: said.append(str(error)))
    opened.on("request", lambda request: asked.append(request.url))
    opened.goto(address)
    opened.wait_for_selector("#images img")
    opened.get_by_role("button", name="Draw").click()
    opened.get_by_role("tab", name="How it gets there").click()
    opened.get_by_role("button", name="Show the first image").click()
    opened.wait_for_selector("#followed img")
    opened.close()
    assert said == []
    assert [url for url in asked if not url.startswith((address, "blob:", "data:"))] == []


def test_a_space_has_all_that_it_runs(run, tmp_path):
    export.main([str(run), str(tmp_path / "out"), "--space"])
    export.main([str(run), str(tmp_path / "out"), "--space", "--overwrite"])
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nsdk: gradio\nsdk_version: ")
    assert "gradio==" in (tmp_path / "out" / "requirements.txt").read_text()
    assert (tmp_path / "out" / "soflow" / "sampling.py").read_text() == (
        ROOT / "sampling.py"
    ).read_text()
    assert torch.equal(
        load(tmp_path / "out", report=lambda line: None).sample(3, [1]).latents,
        load(run, report=lambda line: None).sample(3, [1]).latents,
    )
