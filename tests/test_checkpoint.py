"""Checkpoints: found by name, read without trust, refused with a reason."""

import pickle
import re

import pytest
import torch
from checkpoints import fresh_state, save, step
from damage import Payload
from safetensors.torch import save_file
from torch import nn

from support.runs.checkpoint import check_weights, find_checkpoints, read_checkpoint
from support.system.files import UserError


def test_state_comes_back_and_goes_on_the_same(tmp_path):
    one, other = fresh_state(), fresh_state()
    for _ in range(5):
        step(one)
    save(one, tmp_path / "5.pt")
    content = read_checkpoint(tmp_path / "5.pt")
    assert content["finished_steps"] == 5
    assert content["finished_epochs"] == 2
    assert content["data"] == {"names": ["a", "b"]}
    assert other.load_state_dict(content, "5.pt") == []
    step(one)
    step(other)
    assert other.finished_steps == 6
    for left, right in zip(one.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(left, right)


def test_average_starts_as_a_copy_of_its_own():
    state = fresh_state()
    step(state)
    assert not torch.equal(state.model[0].weight, state.ema_model[0].weight)
    assert not any(p.requires_grad for p in state.ema_model.parameters())
    assert not state.ema_model.training


def test_settings_stay_those_of_the_config_and_the_change_is_said():
    # A list is no change: YAML has one, and with it the published checkpoints.
    old, new = fresh_state(lr=0.1, betas=[0.9, 0.99]), fresh_state(lr=0.2, betas=(0.9, 0.99))
    step(old)
    assert new.load_state_dict(old.state_dict(1), "1.pt") == ["lr is 0.2 now; it was 0.1 in 1.pt"]
    assert new.optimizer.param_groups[0]["lr"] == 0.2
    assert new.optimizer.state[new.model[0].weight]["step"] == 1


def test_only_whole_numbers_with_the_ending_are_checkpoints(tmp_path):
    names = ["0.pt", "10.pt", "9.pt", "007.pt", "1.pt.tmp", ".5.pt.tmp", "a.pt", "-1.pt", "3.json",
             "2.pt2", "٣.pt"]  # fmt: skip
    for name in names:
        (tmp_path / name).touch()
    assert list(find_checkpoints(tmp_path)) == [0, 9, 10]
    assert find_checkpoints(tmp_path / "none") == {}


@pytest.mark.parametrize("where", ["file", "entry", "zip"])
def test_pickled_code_is_never_run(tmp_path, where):
    path, trace = tmp_path / "1.pt", tmp_path / "trace"
    content = fresh_state().state_dict(1)
    if where == "file":
        path.write_bytes(pickle.dumps(Payload(trace)))
    else:
        content["optimizer"]["state"][0] = Payload(trace)
        torch.save(content, path, _use_new_zipfile_serialization=where == "zip")
    with pytest.raises(UserError, match=r"1\.pt: "):
        read_checkpoint(path)
    assert not trace.exists()


def test_absent_step_lists_those_there_are(tmp_path):
    for name in (10, 0, 9):
        save(fresh_state(), tmp_path / f"{name}.pt")
    with pytest.raises(UserError, match=r"5\.pt: .* 0, 9, 10$"):
        read_checkpoint(tmp_path / "5.pt")
    with pytest.raises(UserError, match=r"none/5\.pt: "):
        read_checkpoint(tmp_path / "none" / "5.pt")


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({"model": {}}, ["ema_model", "optimizer", "finished_steps", "finished_epochs"]),
        ([1], ["list"]),
    ],
)
def test_files_that_are_no_training_checkpoint_are_refused(tmp_path, content, named):
    torch.save(content, tmp_path / "1.pt")
    with pytest.raises(UserError, match=rf"1\.pt: .*{'.*'.join(named)}"):
        read_checkpoint(tmp_path / "1.pt")


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 12345\n"


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda path: path.write_bytes(b""), "empty"),
        (lambda path: path.write_bytes(LFS), "git lfs pull"),
        (lambda path: path.write_bytes(b"\n<!DOCTYPE html>\n<html>Not found"), "HTML"),
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), "cut short"),
        (lambda path: save_file({"x": torch.ones(3)}, path), "safetensors"),
        (lambda path: path.write_bytes(pickle.dumps({"x": 3})), "pickle"),
        (lambda path: path.write_text("not a checkpoint"), "another format"),
    ],
)
def test_a_file_that_is_no_archive_is_refused_as_the_kind_that_it_is(tmp_path, make, named):
    path = tmp_path / "1.pt"
    save(fresh_state(), path)
    make(path)
    with pytest.raises(UserError, match=rf"1\.pt: .*{named}"):
        read_checkpoint(path)


def test_weights_of_another_model_are_refused_with_the_difference():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    weights = dict(model.state_dict())
    check_weights(model, weights, "x.pt")
    weights["0.weight"] = torch.zeros(5, 2)
    weights["2.weight"] = weights.pop("1.weight")
    weights["3.weight"] = torch.zeros(1)
    with pytest.raises(UserError) as refusal:
        check_weights(model, weights, "x.pt")
    assert re.fullmatch(
        r"x.pt: .* 1 .*'1\.weight'.* 2 .*'2\.weight'.* 1 .*0\.weight.*\[5, 2\].*\[3, 2\].*",
        str(refusal.value),
    )
    with pytest.raises(UserError, match=r"^x\.pt: "):
        check_weights(model, [1], "x.pt")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda optimizer: optimizer.clear(), "`optimizer`"),
        (lambda optimizer: optimizer["param_groups"][0]["params"].pop(), "3 parameters.* 4$"),
        (lambda optimizer: optimizer["state"][0].update(exp_avg=torch.zeros(9)),
         r"exp_avg of parameter 0 .*\[9\].*\[3, 2\]"),
    ],
)  # fmt: skip
def test_optimizer_state_that_does_not_fit_changes_nothing(spoil, message):
    old, new = fresh_state(), fresh_state()
    step(old)
    content = old.state_dict(1)
    spoil(content["optimizer"])
    before = [p.clone() for p in new.model.parameters()]
    with pytest.raises(UserError, match=message):
        new.load_state_dict(content, "1.pt")
    assert new.finished_steps == 0
    assert all(map(torch.equal, before, new.model.parameters()))
