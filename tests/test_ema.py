"""The averaged weights against plain loops; several of them kept, continued, sampled, combined."""

import copy
import json
import re

import checkpoints
import numpy as np
import pytest
import torch
from commands import digits_settings
from safetensors.torch import load_file
from torch import nn

import dit
import export
import inference
import posthoc_ema
import train
from sampling import load
from support.runs.averages import Average, Exponential, PowerFunction, Profile, combine, gamma_of
from support.system.files import UserError, sha256_of


def shares_of(rule: Exponential | PowerFunction, moves: list[int]) -> list[float]:
    """The share of the weights at each move in the average, the initial weights first."""
    if isinstance(rule, Exponential):
        every = moves[1] - moves[0]
        factors = [rule.decay ** (every * left) for left in range(len(moves), -1, -1)]
        return [factors[0], *np.diff(factors)]
    # The share of (before, step] in the integral of k^gamma from 0 to the last move.
    power = gamma_of(rule.relative_std) + 1
    return [0, *np.diff([(step / moves[-1]) ** power for step in (0, *moves)])]


@pytest.mark.parametrize("every", [1, 16])
@pytest.mark.parametrize("rule", [Exponential(0.99), PowerFunction(0.1)])
def test_an_average_weighs_the_weights_by_their_time_and_copies_buffers(rule, every):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    average = copy.deepcopy(model)
    ema = Average(average, model, rule, every)
    moves = [*range(1, 41, every)]
    seen = [nn.utils.parameters_to_vector(model.parameters()).detach().double()]
    for step in range(1, 41):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape))
        model[1].running_mean += 1
        ema.follow(step)
        if step in moves:
            seen.append(nn.utils.parameters_to_vector(model.parameters()).detach().double())
        assert average[1].running_mean[0] == max(move for move in moves if move <= step)
    found = nn.utils.parameters_to_vector(average.parameters()).detach()
    assert found.dtype == torch.float32
    shares = torch.tensor(shares_of(rule, moves), dtype=torch.float64)
    torch.testing.assert_close(found.double(), shares @ torch.stack(seen), rtol=1e-5, atol=1e-5)
    assert average[1].num_batches_tracked.dtype == torch.int64


@pytest.mark.parametrize("std", [0.01, 0.05, 0.1, 0.28])
def test_a_power_function_average_has_the_standard_deviation_that_is_asked_for(std):
    gamma = gamma_of(std)
    mean = (gamma + 1) / (gamma + 2)
    mean_square = (gamma + 1) / (gamma + 3)
    assert (mean_square - mean**2) ** 0.5 == pytest.approx(std, rel=1e-9)


def test_profiles_overlap_by_the_integral_of_their_product():
    one, other = Profile(3.5, 40.0), Profile(7.0, 100.0)
    k = (np.arange(400_000) + 0.5) * (40.0 / 400_000)
    product = (4.5 * k**3.5 / 40**4.5) * (8.0 * k**7.0 / 100**8.0)
    assert one.overlap(other) == pytest.approx(product.sum() * 40.0 / 400_000, rel=1e-6)
    assert one.overlap(other) == other.overlap(one)


def test_kept_averages_combine_to_one_that_was_not_kept_and_say_how_nearly():
    kept = [Profile(gamma_of(std), step) for step in range(10, 101, 10) for std in (0.05, 0.1)]
    shares, error = combine(kept, Profile(gamma_of(0.15), 100))
    assert error < 0.03
    assert shares.sum() == pytest.approx(1, abs=1e-9)
    assert combine(kept, kept[-1]).error < 1e-6
    assert combine(kept[-2:], Profile(gamma_of(0.25), 100)).error > 0.1


AVERAGES = {"ema_decay_rates": "[0.5,0.9]", "ema_power": "[0.05,0.1,0.15]", "ema_snapshot_steps": 2}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("averages") / "run"
    with pytest.MonkeyPatch.context() as patch:  # a twentieth of the bytes of each checkpoint
        patch.setitem(dit.SIZES, "Nano", dit.Size(width=32, depth=2, heads=2))
        train.main(digits_settings(folder, total_steps=12, **AVERAGES))
        yield folder


def test_several_averages_are_continued_bit_for_bit(run, tmp_path):
    words = digits_settings(tmp_path, total_steps=12, ckpt_saving_steps=5, **AVERAGES)
    train.main(words)
    for lost in ("ckpts/10.pt", "ckpts/12.pt", "averages/12.pt"):
        (tmp_path / lost).unlink()
    train.main(words)
    first, second = (checkpoints.load(folder, 12) for folder in (run, tmp_path))
    assert list(first["averages"]) == ["0.5", "0.9", "power-0.05", "power-0.1", "power-0.15"]
    checkpoints.assert_equal(first["averages"], second["averages"])
    assert (tmp_path / "averages" / "12.pt").exists()
    weights = {
        name: average["network.x_embedder.proj.weight"]
        for name, average in {**first["averages"], "main": first["ema_model"]}.items()
    }
    assert len({tuple(tensor.flatten().tolist()) for tensor in weights.values()}) == 6


def test_an_average_that_is_asked_for_later_starts_as_the_first_one_and_says_so(tmp_path, capsys):
    train.main(digits_settings(tmp_path, total_steps=2))
    words = digits_settings(tmp_path, total_steps=3, ema_decay_rates=0.9)
    allowed = ["--allow-changed=ema_decay_rates", "--allow-changed=total_steps"]
    with pytest.raises(UserError, match=r"ema_decay_rates .*0\.9"):
        train.main(words)
    train.main([*words, *allowed, "--set=learning_rate=0"])
    assert re.search(r"average 0\.9 .*2\.pt", capsys.readouterr().out)
    before, after = (checkpoints.load(tmp_path, step) for step in (2, 3))
    name = "network.x_embedder.proj.weight"
    expected = torch.lerp(before["ema_model"][name], before["model"][name], 1 - 0.9)
    torch.testing.assert_close(after["averages"]["0.9"][name], expected)


def test_each_average_is_loaded_sampled_and_exported_by_its_name(run, tmp_path):
    images = {
        ema: load(run, device="cpu", ema=ema, report=None).sample(seeds=[1]).latents
        for ema in ("", 0.5, "0.50", "power-0.1")
    }
    assert torch.equal(images[0.5], images["0.50"])
    assert not torch.equal(images[0.5], images[""])
    assert not torch.equal(images["power-0.1"], images[""])
    flags = [f"--ckpt={run}", "--num-samples=1", "--seed=1", "--set=device=cpu"]
    inference.main([*flags, "--ema=0.50"])
    with np.load(run / "evals" / "12_1NFE_1_0.5.npz") as archive:
        half = load(run, device="cpu", ema=0.5, report=None).sample(seeds=[1])
        np.testing.assert_array_equal(archive["arr_0"], half.numpy())
    with pytest.raises(UserError, match=r"12\.pt: .*'0\.7'.* 0\.995, 0\.5, 0\.9, "):
        load(run, ema=0.7)
    export.main([str(run), str(tmp_path / "out"), "--ema", "0.5"])
    assert "| weights | averaged, 0.5 |" in (tmp_path / "out" / "README.md").read_text()
    for ema in ("", "0.5"):
        loaded = load(tmp_path / "out", device="cpu", ema=ema)
        assert torch.equal(loaded.sample(seeds=[1]).latents, images[0.5])
    inference.main([f"--ckpt={tmp_path / 'out'}", "--num-samples=1", "--set=device=cpu"])
    of_export, of_run = (
        json.loads(path.read_text())["weights_sha256"]
        for path in (tmp_path / "out_1NFE_42_0.5.json", run / "evals" / "12_1NFE_1_0.5.json")
    )
    assert of_export == of_run  # the same weights, in whatever order a file has them
    assert (tmp_path / "out_1NFE_42_0.5.npz").exists()  # beside the folder, which stays an export
    with pytest.raises(UserError, match=r"'0\.9'.* 0\.5$"):
        load(tmp_path / "out", ema=0.9)


def test_an_average_is_made_of_snapshots_that_is_the_one_a_run_kept(run, tmp_path, capsys):
    two = tmp_path / "run"
    (two / "averages").mkdir(parents=True)
    kept = torch.load(run / "averages" / "12.pt", weights_only=True)["averages"]["power-0.15"]
    for path in (run / "averages").glob("*.pt"):
        content = torch.load(path, weights_only=True)
        del content["averages"]["power-0.15"]
        torch.save(content, two / "averages" / path.name)
    posthoc_ema.main([str(two), str(tmp_path / "out"), "--std", "0.15"])
    assert re.search(r"power-0\.15 .*12 steps.*12 .*6 snapshots", capsys.readouterr().out)
    made = load_file(tmp_path / "out" / "model.safetensors")
    last = torch.load(run / "ckpts" / "12.pt", weights_only=True)["model"]
    for name, tensor in kept.items():
        # Of 12 steps the sum is not yet the integral; the weights themselves are farther by far.
        assert (made[name] - tensor).norm() <= 0.1 * (last[name] - tensor).norm() + 1e-6, name
    for options, named in (
        ([str(tmp_path), "x", "--std=0.1"], "averages: .*ema_snapshot_steps"),
        ([str(two), "x", "--std=0.1", "--step=5"], "--step 5: .*2, 4, 6, 8, 10, 12"),
        ([str(two), "x", "--std=0.3"], "--std 0.3: .*0.28"),
    ):
        with pytest.raises(UserError, match=named):
            posthoc_ema.main(options)
    assert not (tmp_path / "x").exists()


def test_snapshots_of_a_run_that_started_from_another_model_say_so_in_the_card(run, tmp_path):
    folder, out = tmp_path / "run", tmp_path / "out"
    averages = {"ema_power": "[0.05,0.1]", "ema_snapshot_steps": 1}
    train.main(digits_settings(folder, total_steps=2, init_from=run, **averages))
    posthoc_ema.main([str(folder), str(out), "--std", "0.1"])
    card = (out / "README.md").read_text()
    digest = sha256_of(run / "ckpts" / "12.pt")
    assert f"| started from | run after 12 steps, file's SHA-256 {digest};" in card
    assert str(run) not in card
