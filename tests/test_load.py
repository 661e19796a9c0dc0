"""A model in three lines: found, loaded, sampled; what cannot be is said in one line."""

import json
import math

import numpy as np
import pytest
import torch
from commands import digits_settings
from PIL import Image
from safetensors.torch import save_file

import inference
import train
from sampling import chain, check_times, even_times, load, renoise, sample
from support.runs.counting import most_bytes
from support.runs.stored import read_stored
from support.system.files import UserError, sha256_of


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "digits"
    train.main([*digits_settings(folder, total_steps=3, ema_decay_rate=0.1), "--set=seed=5"])
    return folder


@pytest.fixture(scope="module")
def model(run):
    return load(run, device="cpu", report=lambda line: None)


def test_what_is_loaded_is_said(run, capsys):
    load(run, device="cpu")
    assert capsys.readouterr().err == (
        f"{run / 'ckpts' / '3.pt'}: DiT-Nano-2, 1,323,780 parameters, averaged over 3 steps, "
        "10 classes, on cpu\n"
    )


def test_labels_and_seeds_give_grey_pictures_and_arrays(model):
    images = model.sample(labels=[3, 3, 7], seeds=[0, 1, 2], steps=1)
    assert [image.size for image in images] == [(8, 8)] * 3
    assert all(isinstance(image, Image.Image) and image.mode == "L" for image in images)
    assert images.numpy().shape == (3, 8, 8, 1)
    np.testing.assert_array_equal(images.numpy()[1, ..., 0], np.asarray(images[1]))
    assert images.latents.shape == (3, 1, 8, 8)


def test_an_image_is_of_its_seed_in_any_batch_and_at_any_place(model):
    whole = model.sample(labels=[1, 2, 3, 4, 5], seeds=[9, 8, 7, 6, 5], steps=2)
    cut = model.sample(labels=[1, 2, 3, 4, 5], seeds=[9, 8, 7, 6, 5], steps=2, batch_size=2)
    alone = model.sample(labels=3, seeds=7, steps=2)
    torch.testing.assert_close(cut.latents, whole.latents, atol=1e-5, rtol=0)
    torch.testing.assert_close(alone.latents[0], whole.latents[2], atol=1e-5, rtol=0)


@pytest.mark.parametrize("steps", [1, 2])
def test_the_image_of_a_seed_is_the_first_that_inference_makes_of_it(run, model, tmp_path, steps):
    output = tmp_path / "s.npz"
    flags = ["--num-samples=1", "--seed=11", f"--eval-NFE={steps}", f"--output={output}"]
    inference.main([f"--ckpt={run / 'ckpts' / '3.pt'}", *flags, "--set=device=cpu"])
    with np.load(output) as archive:
        first, label = archive["arr_0"], archive["arr_1"]
    mine = model.sample(seeds=11, steps=steps)
    np.testing.assert_array_equal(mine.numpy(), first)
    np.testing.assert_array_equal(model.sample([int(label[0])], 11, steps).numpy(), first)


def test_what_a_network_holds_at_most_is_counted_without_its_weights():
    layers = torch.nn.Sequential(torch.nn.Linear(1000, 2000), torch.nn.Linear(2000, 10))
    # The input was made inside, too, and lives as long as what is made of it.
    assert most_bytes(lambda: layers(torch.empty(100, 1000))) == 4 * 100 * (1000 + 2000 + 10)


def test_batches_fit_into_the_memory_that_is_given(model):
    sizes = []  # of the batches; where a memory is given, after one image for counting
    hook = model.model.network.register_forward_pre_hook(lambda _, x: sizes.append(len(x[0])))
    try:
        each = next(gb for gb in (1e-5 * k for k in range(1, 1000)) if can_hold(model, gb))
        whole = model.sample(labels=1, seeds=range(5))
        cut = model.sample(labels=1, seeds=range(5), memory_gb=2.5 * each)
    finally:
        hook.remove()
    assert sizes[-5:] == [5, 1, 2, 2, 1]
    torch.testing.assert_close(cut.latents, whole.latents, atol=1e-5, rtol=0)


def can_hold(model, memory_gb: float) -> bool:
    try:
        return model.images_within(memory_gb) > 0
    except UserError:
        return False


def test_noise_may_be_passed_in(model):
    noise = torch.randn(2, 1, 8, 8)
    images = model.sample(labels=4, noise=noise)
    expected = sample(model.model, [noise], torch.tensor([4, 4]))
    assert torch.equal(images.latents, expected)


def test_every_place_of_a_model_gives_the_same_images(run, model, tmp_path):
    stored = read_stored(run)
    folder = tmp_path / "exported"
    folder.mkdir()
    weights = {name: tensor.clone() for name, tensor in stored.weights.items()}
    save_file(weights, folder / "model.safetensors")
    digest = sha256_of(folder / "model.safetensors")
    record = {"config": stored.config, "data": stored.data, "finished_steps": 3}
    (folder / "config.json").write_text(json.dumps({**record, "file_sha256": digest}))
    expected = model.sample(seeds=[1, 2])
    for place in (run / "ckpts" / "3.pt", run / "ckpts", folder, folder / "model.safetensors"):
        loaded = load(place, device="cpu", report=lambda line: None)
        assert torch.equal(loaded.sample(seeds=[1, 2]).latents, expected.latents), place
    with open(folder / "model.safetensors", "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    with pytest.raises(UserError, match=r"safetensors: damaged: its SHA-256 is not the one in"):
        load(folder)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"labels": "threee"}, "labels: 'threee' is not a class; those are 0 to 9"),
        ({"labels": 10}, "labels: '10' is not a class; those are 0 to 9"),
        ({"labels": [1, 2], "seeds": [1, 2, 3]}, "labels: 2 for 3 images; give one, or as many"),
        ({"seeds": []}, r"seeds: \[\] are not whole numbers of 0 or more"),
        ({"seeds": [-1]}, "seeds: .* are not whole numbers of 0 or more"),
        ({"steps": 0}, "steps: 0 is not a whole number of 1 or more"),
        ({"steps": 1.5}, "steps: 1.5 is not a whole number of 1 or more"),
        ({"times": [1, 0.5, 0.6, 0]}, r"times: \[1, 0.5, 0.6, 0\] do not fall from 1 to 0"),
        ({"times": [0.9, 0]}, "do not fall from 1 to 0"),
        ({"times": 3}, "times: 3 is not a list of numbers"),
        ({"times": [1, "half", 0]}, "times: .* is not a list of numbers"),
        ({"memory_gb": float("inf")}, "memory_gb: inf is not a number above 0"),
        ({"memory_gb": 0}, "memory_gb: 0 is not a number above 0"),
        ({"memory_gb": 1e-6}, "memory_gb: an image of DiT-Nano-2 takes 0.0001 GB"),
        ({"times": [1, 0], "steps": 5}, "steps: goes without times"),
        ({"batch_size": 0}, "batch_size: 0 is not a whole number of 1 or more"),
        ({"steps": True}, "steps: true is not a whole number of 1 or more"),
        ({"labels": 1.5}, "labels: '1.5' is not a class"),
        ({"sampler": ["chain"]}, r"sampler: \['chain'\] is not one of renoise, chain"),
        ({"noise": "noise"}, r"noise: must be a tensor \[N, 1, 8, 8\], not a str"),
        ({"noise": torch.zeros(0, 1, 8, 8)}, r"must be a tensor .*, not a Tensor \[0, 1, 8, 8\]"),
        ({"times": [1]}, "do not fall from 1 to 0"),
        ({"sampler": "euler"}, "sampler: 'euler' is not one of renoise, chain"),
        ({"noise": torch.zeros(2, 3, 8, 8)}, r"noise: must be a tensor \[N, 1, 8, 8\], not"),
        ({"noise": torch.zeros(2, 1, 8, 8), "seeds": [1]}, "noise: 2 for 1 seeds"),
        (
            {"noise": torch.tensor([0, math.nan, math.inf]).repeat(64, 1).T.view(3, 1, 8, 8)},
            "2 of 3 images come out as nan or inf",
        ),
    ],
)
def test_what_cannot_be_sampled_is_a_line(model, asked, said):
    with pytest.raises(UserError, match=said) as refused:
        model.sample(**asked)
    assert isinstance(refused.value, ValueError)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"device": "gpu"}, "device: 'gpu' is not available on this machine; there is .*cpu"),
        ({"dtype": "bfloat16"}, "dtype: 'bfloat16' is not one for weights, such as torch.bfl"),
        ({"dtype": torch.int8}, "dtype: torch.int8 is not one for weights"),
    ],
)
def test_a_way_of_loading_that_there_is_not_is_a_line(run, how, said):
    with pytest.raises(UserError, match=said):
        load(run, **how)


def test_arrays_of_labels_and_seeds_are_taken_like_lists(model):
    lists = model.sample(labels=[1, 2], seeds=[3, 4], steps=2)
    arrays = model.sample(torch.tensor([1, 2]), np.array([3, 4]), np.int64(2))
    assert torch.equal(arrays.latents, lists.latents)


def test_a_place_without_a_model_says_what_is_looked_for(tmp_path, run):
    with pytest.raises(UserError, match=f"^{tmp_path}/nowhere: "):
        load(tmp_path / "nowhere")
    with pytest.raises(UserError, match=rf"^{tmp_path}: .*model\.safetensors"):
        load(tmp_path)
    with pytest.raises(UserError, match=r"digits$"):
        load(run.parent)


# Samplers


class Flow(torch.nn.Module):
    """The exact solution for data that are one point c: straight lines to it."""

    def __init__(self, c: float):
        super().__init__()
        self.c, self.asked = c, []

    def jump(self, x, t, s, labels):
        self.asked.append((float(t[0]), float(s[0])))
        return self.c + (x - self.c) * (s / t)[:, None, None, None]

    def interpolate(self, x_0, x_1, t):
        wide = t[:, None, None, None]
        return (1 - wide) * x_0 + wide * x_1, None


def test_jumps_are_those_of_the_sampler_at_the_times_that_are_asked_for():
    noises = [torch.randn(2, 1, 4, 4) for _ in range(3)]
    times = (1.0, 0.8, 0.4, 0.0)
    for run_it, given, jumps in (
        (renoise, noises, [(1.0, 0.0), (0.8, 0.0), (0.4, 0.0)]),
        (chain, noises[:1], [(1.0, 0.8), (0.8, 0.4), (0.4, 0.0)]),
    ):
        flow = Flow(0.25)
        x_0 = run_it(flow, given, None, times)
        assert flow.asked == [pytest.approx(pair) for pair in jumps]
        torch.testing.assert_close(x_0, torch.full_like(x_0, 0.25))


def test_times_are_evenly_apart_by_themselves():
    assert even_times(1) == (1.0, 0.0)
    assert even_times(4) == (1.0, 0.75, 0.5, 0.25, 0.0)
    assert check_times([1, 0.5, 0], "times") == (1.0, 0.5, 0.0)


def test_one_jump_is_the_same_by_both_and_a_chain_draws_one_noise(model):
    one, other = (model.sample(seeds=[1, 2], sampler=name) for name in ("renoise", "chain"))
    assert torch.equal(one.latents, other.latents)
    chained = model.sample(seeds=[1, 2], steps=3, sampler="chain")
    again = model.sample(seeds=[1, 2], times=even_times(3), sampler="chain")
    assert torch.equal(chained.latents, again.latents)
    assert not torch.equal(chained.latents, model.sample(seeds=[1, 2], steps=3).latents)


def test_inference_makes_a_file_for_each_number_of_jumps_and_names_other_ways(run):
    start = [f"--ckpt={run / 'ckpts' / '3.pt'}", "--num-samples=3", "--set=device=cpu"]
    inference.main([*start, "--eval-NFE=1,2"])
    inference.main([*start, "--eval-NFE=2", "--sampler=chain"])
    inference.main([*start, "--times=1,0.6,0"])
    made = {path.name for path in (run / "evals").glob("3_*.npz")}
    assert made == {
        *("3_1NFE_42.npz", "3_2NFE_42.npz", "3_2NFE_42_chain.npz", "3_2NFE_42_1-0.6-0.npz")
    }
    record = json.loads((run / "evals" / "3_2NFE_42_1-0.6-0.json").read_text())
    assert (record["NFE"], record["times"]) == (2, [1.0, 0.6, 0.0])
    assert "sampler" not in json.loads((run / "evals" / "3_2NFE_42.json").read_text())
    with pytest.raises(UserError, match="--grid: "):
        inference.main([*start, "--eval-NFE=1,2", "--grid=g.png"])
    with pytest.raises(UserError, match="--eval-NFE: 'x' is not a whole number"):
        inference.main([*start, "--eval-NFE=1,x"])
    output = str(run / "evals" / "3_2NFE_42.npz")
    with pytest.raises(UserError, match=r"sampler null there, .chain."):
        inference.main([*start, "--eval-NFE=2", "--sampler=chain", f"--output={output}"])
