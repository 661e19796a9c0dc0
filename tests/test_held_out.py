"""The held-out loss: of images that no step trains on, and without effect on training."""

import json

import pytest
import standins
import torch
from checkpoints import assert_equal, load, numbers_of, state_of
from commands import digits_settings
from exact import ExactNetwork

import train
from config import load_config
from models import METHODS, SoFlow
from support.data.build import build_data
from support.data.datasets import ALONE, DataRequest
from support.data.digits import load_test_set
from support.system.files import UserError
from support.system.processes import Processes
from training.held_out import BINS, draw_held_out, measure


def digits(**settings: object):
    return load_config("configs/digits.yaml", [f"{k}={v}" for k, v in settings.items()])


def held_out_of(config):
    return build_data(config.data_request()).held_out


def test_a_test_split_is_used_and_nothing_is_taken_away():
    with_it, without = (build_data(digits(held_out=n).data_request()) for n in (200, 0))
    assert len(with_it) == len(without) == 1197
    assert without.held_out is None
    assert "200" in with_it.notes[-1]
    test_images = {pixels.tobytes() for pixels in load_test_set().pixels}
    chosen = with_it.held_out[list(range(200))].stored
    assert {pixels.numpy().tobytes() for pixels in chosen} <= test_images


def test_of_a_folder_the_held_out_images_are_in_no_batch(tmp_path):
    standins.write_image_folder(tmp_path, per_class=6, size=16)
    data, other, whole = (
        build_data(DataRequest("ImageFolder", 16, str(tmp_path), 4, held_out=held_out, seed=seed))
        for held_out, seed in ((5, 1), (5, 2), (0, 1))
    )
    assert len(data) == data.record()["num_examples"] == len(whole) - 5
    assert "5" in data.notes[-1]
    kept, held_out, everything = (
        [pixels.numpy().tobytes() for pixels in part[list(range(len(part)))].stored]
        for part in (data, data.held_out, whole)
    )
    assert sorted(kept + held_out) == sorted(everything)
    assert other.held_out.kept.tolist() != data.held_out.kept.tolist()
    assert torch.equal(data.labels, whole.labels[data.kept])


def test_a_method_that_gives_no_squared_errors_is_refused(monkeypatch):
    class Silent(SoFlow):
        error_names = ()

    monkeypatch.setitem(METHODS, "SoFlow", Silent)
    digits(held_out=0)
    with pytest.raises(UserError, match=r"held_out: 200 .*squared_errors"):
        digits(held_out=200)


def test_more_than_there_are_is_refused_with_the_most_there_can_be(tmp_path):
    with pytest.raises(UserError, match=r"held_out: 601 .*Digits.*600"):
        build_data(digits(held_out=601).data_request())
    standins.write_image_folder(tmp_path, per_class=3, size=16)
    count = len(build_data(DataRequest("ImageFolder", 16, str(tmp_path))))
    with pytest.raises(UserError, match=f"held_out: .*{count - 4}"):
        build_data(DataRequest("ImageFolder", 16, str(tmp_path), 4, held_out=count - 3))


def test_every_stretch_of_t_has_its_share_and_times_are_those_of_the_last_gap():
    config = digits(held_out=100, l_end_ratio=0.01, eval_batch_size=30)
    frozen = draw_held_out(config, held_out_of(config), ALONE)
    assert [batch.flow_matching_rows for batch in frozen] == [30, 30, 30, 10]
    consistency = [batch.parts()[1] for batch in frozen]
    t, l, s = (  # noqa: E741
        torch.cat([getattr(batch, name) for batch in consistency]) for name in "tls"
    )
    assert torch.bincount((t * BINS).long()).tolist() == [25] * BINS
    torch.testing.assert_close((t - l) / (t - s), torch.full((100,), 0.01), atol=1e-4, rtol=1e-2)


def test_draws_are_those_of_the_seed_however_many_processes_share_them():
    def draws(world_size: int, **settings: int) -> torch.Tensor:
        """The noise of all images, in their order."""
        config = digits(held_out=12, eval_batch_size=5, **settings)
        found = {}
        for rank in range(world_size):
            processes = Processes(rank, rank, world_size, torch.device("cpu"))
            frozen = draw_held_out(config, held_out_of(config), processes)
            noise = torch.cat([batch.parts()[0].x_1 for batch in frozen])
            found |= dict(zip(range(rank, 12, world_size), noise, strict=True))
        return torch.stack([found[image] for image in range(12)])

    assert torch.equal(draws(1), draws(3))
    assert not torch.equal(draws(1), draws(1, seed=7))


def test_the_exact_network_has_no_error_and_a_wrong_one_has_it_where_it_errs():
    config = digits(held_out=40, cfg_scale=1, cfg_drop_rate=0)
    frozen = draw_held_out(config, held_out_of(config), ALONE)
    image = torch.zeros(1, 8, 8)
    for batch in frozen:
        batch.x_0.copy_(image.expand_as(batch.x_0))
    exact = SoFlow(ExactNetwork(image))
    errors = measure(exact, frozen, ALONE)
    assert errors.keys() == {"velocity", "consistency"}
    # In float32 the quotient's difference is divided by a gap of 0.2 % of t - s.
    assert max(errors["velocity"]) < 1e-8
    assert max(errors["consistency"]) < 1e-2

    class Late(torch.nn.Module):
        """Wrong beyond t = 3/4 alone."""

        def forward(self, x, t, gap, labels=None):
            return exact.network(x, t, gap) + (t >= 0.75).float()[:, None, None, None]

    assert measure(SoFlow(Late()), frozen, ALONE)["velocity"] == pytest.approx(
        [0, 0, 0, 1], abs=1e-5
    )


def test_a_run_that_looks_has_the_weights_of_one_that_does_not(tmp_path):
    runs = {"blind": [], "looking": ["--set=held_out=30", "--set=held_out_steps=2"]}
    for name, options in runs.items():
        train.main([*digits_settings(tmp_path / name, logging_steps=3), *options])
    assert_equal(*(state_of(load(tmp_path / name, 6)) for name in runs))
    assert numbers_of(tmp_path / "blind") == numbers_of(tmp_path / "looking")
    assert not (tmp_path / "blind" / "held_out.jsonl").exists()
    lines = (tmp_path / "looking" / "held_out.jsonl").read_text().splitlines()
    told = [json.loads(line) for line in lines]
    assert [line["step"] for line in told] == [2, 4, 6]
    assert told[0]["weights"] != told[0]["average"]
    assert [len(told[0]["average"][loss]) for loss in ("velocity", "consistency")] == [4, 4]
