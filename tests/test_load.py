"""A model in three lines: found, loaded, sampled; invalid arguments raise one clear line."""

import json
import math

import numpy as np
import pytest
import torch
from commands import succeed
from exact import ExactNetwork
from PIL import Image

import export
import inference
from models import SoFlow
from sampler import chain, renoise
from sampling import load, sample
from support.system.files import UserError


@pytest.fixture(scope="module")
def model(run):
    return load(run, device="cpu", report=None)


def test_what_is_loaded_is_reported(run, capsys):
    load(run, device="cpu")
    said = capsys.readouterr().err
    assert said.startswith(f"{run / 'ckpts' / '3.pt'}: DiT-Nano-2, 1,323,780 parameters")
    assert "3 steps" in said and "10 classes" in said and said.endswith("on cpu\n")


@pytest.mark.slow
def test_a_model_samples_in_a_process_that_has_tensorflow(run):
    """After it, triton, which torch's compiler brings in, crashes the process."""
    script = f"import tensorflow, sampling; m = sampling.load({str(run)!r}, device='cpu'); "
    assert "PIL.Image" in succeed("-c", f"{script}print(m.sample())")


def test_labels_and_seeds_give_grey_pictures_and_arrays(model):
    images = model.sample(labels=[3, 3, 7], seeds=[0, 1, 2], steps=1)
    assert [image.size for image in images] == [(8, 8)] * 3
    assert all(isinstance(image, Image.Image) and image.mode == "L" for image in images)
    assert images.numpy().shape == (3, 8, 8, 1)
    np.testing.assert_array_equal(images.numpy()[1, ..., 0], np.asarray(images[1]))
    assert images.latents.shape == (3, 1, 8, 8)


def test_an_image_depends_on_its_seed_and_not_on_batch_or_place_or_containers(model):
    asked = {"labels": [1, 2, 3, 4, 5], "seeds": [9, 8, 7, 6, 5], "steps": 2}
    whole, cut = model.sample(**asked), model.sample(**asked, batch_size=2)
    alone = model.sample(labels=3, seeds=7, steps=2)
    arrays = model.sample(torch.arange(1, 6), np.arange(9, 4, -1), np.int64(2))
    assert torch.equal(arrays.latents, whole.latents)
    torch.testing.assert_close(cut.latents, whole.latents, atol=1e-5, rtol=0)
    torch.testing.assert_close(alone.latents[0], whole.latents[2], atol=1e-5, rtol=0)


@pytest.mark.parametrize("steps", [1, 2])
def test_the_image_of_a_seed_is_the_first_that_inference_makes(run, model, tmp_path, steps):
    output = tmp_path / "s.npz"
    flags = ["--num-samples=1", "--seed=11", f"--eval-NFE={steps}", f"--output={output}"]
    inference.main([f"--ckpt={run / 'ckpts' / '3.pt'}", *flags, "--set=device=cpu"])
    with np.load(output) as archive:
        first, label = archive["arr_0"], archive["arr_1"]
    np.testing.assert_array_equal(model.sample(seeds=11, steps=steps).numpy(), first)
    np.testing.assert_array_equal(model.sample([int(label[0])], 11, steps).numpy(), first)


def test_noise_may_be_given(model):
    noise = torch.randn(2, 1, 8, 8)
    expected = sample(model.model, [noise], torch.tensor([4, 4]))
    assert torch.equal(model.sample(labels=4, noise=noise).latents, expected)
    assert torch.equal(model.sample(labels=4, noise=noise.double()).latents, expected)


def test_every_place_of_a_model_gives_the_same_images(run, model, tmp_path):
    folder = tmp_path / "exported"
    export.main([str(run), str(folder)])
    expected = model.sample(seeds=[1, 2])
    weights = folder / "model.safetensors"
    for place in (run / "ckpts" / "3.pt", run / "ckpts", folder, weights, str(folder)):
        loaded = load(place, device=torch.device("cpu"), report=None)
        assert torch.equal(loaded.sample(seeds=[1, 2]).latents, expected.latents), place
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(UserError, match=r"model\.safetensors: .*SHA-256"):
        load(folder)


def test_a_damaged_average_is_refused_and_other_damage_does_not_matter(run, model, tmp_path):
    content = (run / "ckpts" / "3.pt").read_bytes()
    weights = torch.load(run / "ckpts" / "3.pt", weights_only=True)
    for part in ("ema_model", "model"):
        largest = max(weights[part].values(), key=torch.Tensor.numel)
        place = content.index(largest.numpy().tobytes()) + 40
        path = tmp_path / f"{part}.pt"
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    with pytest.raises(UserError, match=r"ema_model\.pt: .*network\."):
        load(tmp_path / "ema_model.pt")
    loaded = load(tmp_path / "model.pt", device="cpu", report=None)
    assert torch.equal(loaded.sample(seeds=1).latents, model.sample(seeds=1).latents)


def refused(call, arguments: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named) as caught:
        call(**arguments)
    assert isinstance(caught.value, UserError) and "\n" not in str(caught.value)


NOT_NUMBERS = torch.tensor([0, math.nan, math.inf]).repeat(64, 1).T.view(3, 1, 8, 8)


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({"labels": "threee"}, "labels: 'threee' .*0 to 9"),
        ({"labels": 1.5}, "labels: '1.5'"),
        ({"labels": []}, "labels: "),
        ({"labels": [1, 2], "seeds": [1, 2, 3]}, "labels: 2 for 3 images"),
        ({"seeds": []}, "seeds: "),
        ({"seeds": [-1]}, "seeds: -1"),
        ({"seeds": "1"}, "seeds: '1'"),
        ({"steps": 0}, "steps: 0"),
        ({"steps": True}, "steps: true"),
        ({"steps": 10**12}, "steps: 10{12} .*1,000"),
        ({"times": [1, 0], "steps": 5}, "steps: .*times"),
        ({"times": [1, 0.5, 0.6, 0]}, r"times: \[1.0, 0.5, 0.6, 0.0\]"),
        ({"times": 3}, "times: 3"),
        ({"times": [1, "half", 0]}, "times: .*half"),
        ({"batch_size": 0}, "batch_size: 0"),
        ({"sampler": ["chain"]}, r"sampler: \['chain'\] .*renoise, chain"),
        ({"noise": "noise"}, r"noise: .*\[N, 1, 8, 8\].*'noise'"),
        ({"noise": torch.zeros(0, 1, 8, 8)}, r"noise: .*\[0, 1, 8, 8\]"),
        ({"noise": torch.zeros(2, 3, 8, 8)}, r"noise: .*\[2, 3, 8, 8\]"),
        ({"noise": torch.zeros(1, 1, 8, 8).int()}, r"noise: .*int32"),
        ({"noise": torch.zeros(2, 1, 8, 8), "seeds": [1]}, "noise: 2 for 1 images"),
        ({"noise": NOT_NUMBERS}, "2 of 3 images .*nan"),
    ],
)
def test_an_invalid_argument_of_sample_is_one_line_that_names_it(model, asked, named):
    refused(model.sample, asked, named)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"source": None}, "null"),
        ({"source": b"runs"}, "b'runs'"),
        ({"source": "nowhere\0"}, "nowhere"),
        ({"source": "x" * 5000}, "x"),
        ({"subfolder": None}, "subfolder: null"),
        ({"device": "gpu"}, "device: 'gpu' .*cpu"),
        ({"device": "cpu:7"}, "device: 'cpu:7'"),
        ({"device": torch.device("meta")}, "device: 'meta'"),
        ({"dtype": "bfloat16"}, r"dtype: 'bfloat16' .*torch\.bfloat16"),
        ({"ema": 0.5}, r"3\.pt: .*'0\.5'.*0\.1"),
        ({"report": "loud"}, "report: 'loud'"),
    ],
)
def test_an_invalid_argument_of_load_is_one_line_that_names_it(run, given, named):
    refused(load, {"source": run, **given}, named)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_dtype_that_is_offered_makes_images(run, model, dtype):
    images = load(run, device="cpu", dtype=dtype, report=None).sample(1, 2, steps=2)
    assert images.latents.dtype == torch.float32
    expected = model.sample(1, 2, steps=2).latents
    torch.testing.assert_close(images.latents, expected, atol=0.3, rtol=0)


def test_a_folder_without_a_model_names_what_it_lacks_and_where_models_are(tmp_path, run):
    with pytest.raises(UserError, match=rf"^{tmp_path}: .*model\.safetensors"):
        load(tmp_path)
    with pytest.raises(UserError, match=rf"^{run.parent}: .*digits$"):
        load(run.parent)


# Samplers


@pytest.mark.parametrize(
    ("sampler", "steps"),
    [
        (renoise, [(1.0, 0.0), (0.8, 0.0), (0.4, 0.0)]),
        (chain, [(1.0, 0.8), (0.8, 0.4), (0.4, 0.0)]),
    ],
)
def test_each_sampler_takes_its_steps_at_the_given_times(monkeypatch, sampler, steps):
    flow, asked = SoFlow(ExactNetwork(torch.tensor(0.25))), []
    jump = flow.jump

    def spy(x, t, s, labels):
        asked.append((float(t[0]), float(s[0])))
        return jump(x, t, s, labels)

    monkeypatch.setattr(flow, "jump", spy)
    x_0 = sampler(flow, [torch.randn(2, 1, 4, 4)] * 3, None, (1.0, 0.8, 0.4, 0.0))
    assert asked == [pytest.approx(pair) for pair in steps]
    torch.testing.assert_close(x_0, torch.full_like(x_0, 0.25))


def test_one_step_is_the_same_by_both_samplers_and_a_chain_draws_one_noise(model):
    one, other = (model.sample(seeds=[1, 2], sampler=name) for name in ("renoise", "chain"))
    assert torch.equal(one.latents, other.latents)
    chained = model.sample(seeds=[1, 2], steps=3, sampler="chain")
    again = model.sample(seeds=[1, 2], times=[1, 2 / 3, 1 / 3, 0], sampler="chain")
    torch.testing.assert_close(chained.latents, again.latents)
    assert not torch.equal(chained.latents, model.sample(seeds=[1, 2], steps=3).latents)


def test_inference_makes_a_file_for_each_number_of_steps_and_names_other_options(run):
    start = [f"--ckpt={run / 'ckpts' / '3.pt'}", "--num-samples=3", "--set=device=cpu"]
    inference.main([*start, "--eval-NFE=1,2"])
    inference.main([*start, "--eval-NFE=2", "--sampler=chain"])
    inference.main([*start, "--times=1,0.6,0"])
    made = {path.name for path in (run / "evals").glob("3_*.npz")}
    assert made == {f"3_{name}.npz" for name in ("1NFE_42", "2NFE_42", "2NFE_42_chain",
                                                 "2NFE_42_1-0.6-0")}  # fmt: skip
    record = json.loads((run / "evals" / "3_2NFE_42_1-0.6-0.json").read_text())
    assert (record["NFE"], record["times"]) == (2, [1.0, 0.6, 0.0])
    assert "sampler" not in json.loads((run / "evals" / "3_2NFE_42.json").read_text())
    output = str(run / "evals" / "3_2NFE_42.npz")
    with pytest.raises(UserError, match=r"sampler null there, .chain."):
        inference.main([*start, "--eval-NFE=2", "--sampler=chain", f"--output={output}"])
