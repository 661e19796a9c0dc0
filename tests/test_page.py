"""The page of a model: the same noise as Python's, the same images, and the page in a browser."""

import itertools
import json
import shutil
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
import torch
from commands import ROOT, digits_settings
from PIL import Image
from torch import nn

import page
import train
from sampling import load
from support.data.images import to_pixels
from support.page import runtime
from support.page.assembly import worker_source
from support.page.halves import compare, store_halves
from support.runs.graphs import write_graph
from support.system.files import MARKED_BYTES, PAGE_MARK, UserError
from support.system.randomness import PerImageStream

STEPS_AND_SAMPLERS = [(1, "renoise"), (2, "renoise"), (4, "renoise"), (2, "chain"), (4, "chain")]


def test_pages_of_others_are_not_replaced(tmp_path):
    file = tmp_path / "site.html"
    file.write_text("<!doctype html> precious")
    with pytest.raises(UserError, match=r"site\.html"):
        page.main([str(tmp_path), str(file)])
    assert "precious" in file.read_text()
    assert PAGE_MARK in (ROOT / "support/page/page.html").read_bytes()[:MARKED_BYTES]


def in_node(script: str) -> Any:
    """The result of a script that runs after those of the page's worker."""
    if shutil.which("node") is None:
        pytest.skip("node is not installed")
    text = f"let ort = null; {worker_source()}\n"
    text += f"(async () => {{ {script} }})().then(found => console.log(JSON.stringify(found)));"
    return json.loads(
        subprocess.run(["node", "-"], input=text, capture_output=True, text=True, check=True).stdout
    )


# Noise and labels


def noise_of(seed: int, shape: tuple[int, ...] = (1, 8, 8), step: int = 0) -> np.ndarray:
    return PerImageStream(seed, None, shape).draw([0], step + 1).noises[step].numpy()


def test_the_page_draws_pythons_noise_to_the_last_bit_but_in_the_far_tail():
    shape, seeds = (3, 64, 64), [*range(30), 10**12 - 1]
    script = f"return {seeds}.map(seed => [...drawNoise(seed, seed % 3, {np.prod(shape)})]);"
    drawn = np.array(in_node(script), np.float32)
    expected = np.array([noise_of(seed, shape, seed % 3).ravel() for seed in seeds])
    assert np.allclose(drawn, expected, rtol=3e-7, atol=0)
    differing = expected[drawn != expected]  # the last bit of a logarithm depends on the system
    assert len(differing) < 20 and (np.abs(differing) > 3.65).all()


def test_the_page_draws_pythons_labels():
    counts = [1, 2, 3, 10, 100, 1000, 3 * 2**30]  # of the last, a quarter is drawn again
    found = in_node(f"return {counts}.map(n => [...Array(200).keys()].map(s => drawLabel(s, n)));")
    for count, labels in zip(counts, found, strict=True):
        streams = [PerImageStream(seed, count, (1, 1, 1)) for seed in range(200)]
        assert labels == [int(stream.draw([0], 0).labels) for stream in streams], count


def slerp(a: np.ndarray, b: np.ndarray, share: float) -> np.ndarray:
    angle = np.arccos((a * b).sum() / np.sqrt((a**2).sum() * (b**2).sum()))
    return (np.sin((1 - share) * angle) * a + np.sin(share * angle) * b) / np.sin(angle)


def test_a_model_without_classes_is_asked_for_no_label():
    asked, pixels = in_node(
        "const asked = []; class Tensor { constructor(type, data) { this.data = data; } };"
        "const run = given => { asked.push(...Object.keys(given)); return {x_s: given.noise}; };"
        "const model = {shape: [3, 2, 2], isConditional: false, steps: {1: {times: [1, 0]}}};"
        "const given = {images: [{seed: 1}, {seed: 2}], label: null, steps: 1, sampler: 'chain'};"
        "const {pixels} = await new Engine({Tensor}, {run}, model).draw(given);"
        "return [asked, [...pixels]];"
    )
    assert asked == ["noise", "t", "s"]
    noises = np.concatenate([noise_of(seed, (3, 2, 2)) for seed in (1, 2)])
    rgb = np.array(pixels).reshape(2, 2, 2, 4)[..., :3]
    assert np.array_equal(rgb, to_pixels(noises).transpose(0, 2, 3, 1))


# The file


def test_weights_in_half_the_bytes_give_nearly_the_same(tmp_path):
    pytest.importorskip("onnxruntime", reason="needs onnxruntime")
    pytest.importorskip("onnxscript", reason="needs onnxscript")
    torch.manual_seed(0)
    whole, half = tmp_path / "whole.onnx", tmp_path / "half.onnx"
    write_graph(whole, nn.Linear(200, 200), "y", lambda count: {"x": torch.ones(count, 200)})
    store_halves(Path(shutil.copyfile(whole, half)))
    assert half.stat().st_size < 0.55 * whole.stat().st_size
    inputs = {"x": np.random.default_rng(0).uniform(-1, 1, (4, 200)).astype(np.float32)}
    assert compare(whole, half, inputs).max() <= 1


@pytest.mark.parametrize(
    ("is_latent", "shape", "values", "flags", "named"),
    [
        (True, (4, 32, 32), 10, [], "latents"),
        (False, (3, 128, 128), 10, [], "128x128.*64x64"),
        (False, (3, 8, 8), 15_000_000, [], "60 MB.*--fp16.*40 MB"),
        (False, (3, 8, 8), 30_000_000, ["--fp16"], "60 MB.*40 MB"),
    ],
)
def test_a_model_that_no_page_can_hold_is_refused_with_the_command_that_serves_it(
    monkeypatch, is_latent, shape, values, flags, named
):
    model = page.SoFlow(nn.ParameterList([nn.Parameter(torch.empty(values, device="meta"))]))
    loaded = SimpleNamespace(config=SimpleNamespace(is_latent=is_latent), shape=shape, model=model)
    given = {}
    monkeypatch.setattr(page, "load", lambda *args, **kwargs: given.update(kwargs) or loaded)
    arguments = page.parse_arguments(["a run", "page.html", "--ema", "0.9", *flags])
    with pytest.raises(UserError, match=f"{named}.*`python demo.py 'a run' --ema=0.9`"):
        page.write_page(arguments)
    assert given["ema"] == "0.9"


@pytest.mark.parametrize(
    ("npm", "named"),
    [
        (None, "npm.*--ort"),
        ("echo no network >&2; exit 1", "npm.*no network.*--ort"),
        ("mkdir -p package/dist; tar czf a.tgz package", runtime.SCRIPT),
    ],
)
def test_npm_that_fails_or_gives_another_package_leaves_nothing(tmp_path, monkeypatch, npm, named):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":" if npm else None)
    if npm:
        (tmp_path / "npm").write_text(f"#!/bin/sh\n{npm}\n")
        (tmp_path / "npm").chmod(0o755)
    with pytest.raises(UserError, match=named):
        runtime.read_runtime()
    assert not (tmp_path / "cache").exists()


# In a browser


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model after a few steps of training, and its page."""
    try:
        runtime.read_runtime()
    except UserError as error:
        pytest.skip(f"no onnxruntime-web: {error}")
    pytest.importorskip("onnxruntime", reason="needs onnxruntime")
    pytest.importorskip("onnxscript", reason="needs onnxscript")
    folder = tmp_path_factory.mktemp("page")
    run, file = folder / "digits", folder / "page.html"
    train.main([*digits_settings(run, total_steps=20, ema_decay_rate=0.1), "--set=seed=5"])
    page.main([str(run), str(file), "--title", "Small <digits>", f"--ort={runtime.cache_folder()}"])
    return load(run, device="cpu", report=None), file


@pytest.fixture
def open_page(new_page, made):
    """Opens the page at a link, offline."""
    place = made[1].as_uri()
    opened = new_page((place, "blob:"), offline=True, viewport={"width": 1366, "height": 800})

    def open_at(link: str = "", **media):
        opened.emulate_media(**media)
        opened.goto(f"{place}{link}")
        opened.wait_for_selector("#along canvas")
        return opened

    return open_at


def shown(opened, selector: str) -> np.ndarray:
    """The grey levels, [H, W], that a canvas shows."""
    values = opened.evaluate(
        "selector => { const c = document.querySelector(selector);"
        "return [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]; }",
        selector,
    )
    return np.array(values).reshape(8, 8, 4)[..., 0]


def assert_alike(found: np.ndarray, expected: np.ndarray) -> None:
    """The same pixels, except for rounding in a few."""
    differences = np.abs(found.astype(int) - expected)
    assert differences.max() <= 1 and (differences > 0).mean() < 0.01


def until(opened, condition: str) -> None:
    """Wait for a JavaScript condition. The page's policy forbids playwright's own way."""
    end = time.monotonic() + 60
    while not opened.evaluate(condition):
        assert time.monotonic() < end, f"still not: {condition}"
        opened.wait_for_timeout(20)


def wait_for(opened, **state) -> None:
    """Wait until the grid shows these values of the page's state."""
    drawn = "JSON.parse(document.getElementById('grid').dataset.drawn ?? '{}')"
    for name, value in state.items():
        until(opened, f"{drawn}.{name} === {json.dumps(value)}")


@pytest.mark.slow
def test_the_page_makes_pythons_images_of_64_seeds(made, open_page):
    model, opened = made[0], open_page()
    for (steps, sampler), label in itertools.product(STEPS_AND_SAMPLERS, (None, 3)):
        given = {"label": label, "steps": steps, "sampler": sampler}
        given["images"] = [{"seed": seed} for seed in range(64)]
        found = opened.evaluate("async given => [...(await ask('draw', given)).pixels]", given)
        expected = model.sample(label, range(64), steps, sampler=sampler).numpy()
        assert_alike(np.array(found).reshape(64, 8, 8, 4)[..., :1], expected)


@pytest.mark.slow
def test_a_link_says_what_is_shown_and_the_controls_change_it(made, open_page):
    model, opened = made[0], open_page("#class=3&seed=7&steps=2&sampler=chain&pick=5")
    wait_for(opened, seed=7, steps=2)
    expected = model.sample(3, range(7, 23), 2, sampler="chain").numpy()[..., 0]
    for place in (0, 15):
        assert_alike(shown(opened, f"#grid button:nth-child({place + 1}) canvas"), expected[place])
    call = 'model.sample(labels=[3], seeds=[12], steps=2, sampler="chain")'
    assert opened.inner_text("#python") == call
    assert opened.locator("h1").inner_text() == "Small <digits>"
    opened.locator("#classes label", has_text="8").click()
    opened.keyboard.press("1")
    opened.fill("#seed", "40")
    wait_for(opened, seed=40, steps=1, label=8)
    assert_alike(shown(opened, "#grid canvas"), model.sample(8, [40]).numpy()[0, ..., 0])
    until(opened, "location.hash.includes('seed=40')")
    assert "class=8" in opened.url and "steps" not in opened.url
    opened.evaluate("location.hash = 'seed=-1&class=10&steps=3&at=x&sampler=__proto__'")
    wait_for(opened, seed=0, steps=1, label=None)
    opened.locator("#grid button").first.focus()
    opened.keyboard.press("ArrowDown")
    until(opened, "document.getElementById('chosen').textContent.includes('seed 4')")


@pytest.mark.slow
def test_the_slider_redraws_the_image_between_two_seeds(made, open_page):
    model, opened = made[0], open_page("#class=2&seed=3&to=9&at=300")
    for at in (300, 700, 1000):
        if at > 300:
            opened.locator("#share").fill(str(at))
        until(opened, f"document.getElementById('between').dataset.drawn === '{at}'")
        noise = slerp(noise_of(3), noise_of(9), at / 1000)
        expected = model.sample(2, noise=torch.from_numpy(noise)).numpy()[0, ..., 0]
        assert_alike(shown(opened, "#between"), expected)
    assert_alike(shown(opened, "#to"), model.sample(2, [9]).numpy()[0, ..., 0])


@pytest.mark.slow
def test_the_way_from_noise_is_shown_step_by_step_and_along_s(made, open_page):
    model, opened = made[0], open_page("#class=2&seed=3&steps=4&sampler=chain")
    assert opened.locator("#after canvas").count() == 5
    first = model.sample(2, [3], times=[1, 0.75, 0.5, 0.25, 0], sampler="chain").numpy()
    assert_alike(shown(opened, "#after figure:last-child canvas"), first[0, ..., 0])
    one, s = torch.ones(1), torch.full((1,), 0.4)
    along = model.model.jump(torch.from_numpy(noise_of(3)), one, s, torch.tensor([2]))[0, 0]
    assert_alike(shown(opened, "#along figure:nth-child(4) canvas"), to_pixels(along.numpy()))


@pytest.mark.slow
def test_the_grid_is_saved_as_a_png_with_gaps_between_the_same_pixels(made, open_page, tmp_path):
    model, opened = made[0], open_page("#class=1&seed=20")
    wait_for(opened, seed=20)
    with opened.expect_download() as saved:
        opened.keyboard.press("s")
    assert unquote(saved.value.suggested_filename).endswith("_class1_seed20_1.png")
    saved.value.save_as(tmp_path / "grid.png")
    image = np.array(Image.open(tmp_path / "grid.png").convert("L"))
    assert image.shape == (536, 536)  # four images of 128 pixels, three gaps of 8
    padded = np.pad(image, (0, 8), constant_values=255).reshape(4, 136, 4, 136)
    assert (padded[:, 128:] == 255).all() and (padded[..., 128:] == 255).all()
    expected = model.sample(1, range(20, 36)).numpy().reshape(4, 4, 8, 8).transpose(0, 2, 1, 3)
    assert_alike(padded[:, 8:128:16, :, 8:128:16], expected)


@pytest.mark.slow
@pytest.mark.parametrize(("motion", "most"), [("no-preference", 3), ("reduce", 1)])
def test_play_draws_new_seeds_without_flashing_until_it_is_stopped(open_page, motion, most):
    opened = open_page(reduced_motion=motion)
    opened.keyboard.press("p")
    until(opened, "state.seed >= 16")
    start, first = time.monotonic(), opened.evaluate("state.seed")
    until(opened, f"state.seed >= {first} + 3 * 16")
    assert time.monotonic() - start >= 3 / most
    opened.keyboard.press("p")
    until(opened, "!isPlaying && waiting.size === 0")
    assert str(opened.evaluate("state.seed")) in opened.inner_text("#chosen")


@pytest.mark.slow
def test_what_is_chosen_can_be_seen_with_forced_colors_and_fits_a_phone(open_page):
    opened = open_page("#steps=2", forced_colors="active")
    chips, tiles = "#steps .chips span", "#grid button canvas"
    look = "e => (s => [s.backgroundColor, s.outlineStyle].join())(getComputedStyle(e))"
    for selector, chosen in ((chips, 1), (tiles, 0)):
        looks = [found.evaluate(look) for found in opened.locator(selector).all()]
        assert looks.count(looks[chosen]) == 1
    opened.set_viewport_size({"width": 390, "height": 844})
    assert opened.evaluate("document.documentElement.scrollWidth") <= 390
