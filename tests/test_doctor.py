"""A step that is not finite is reported with what broke, and can be replayed."""

import json
import re
from pathlib import Path

import pytest
import torch
from commands import digits_settings

import train
from support.data.datasets import PixelData
from support.runs.guard import NonFiniteGuard
from support.system.files import UserError
from support.system.processes import Processes
from training import doctor
from training import run as training_run

PLANTED = 700  # the number of an example


@pytest.fixture
def planted_image(monkeypatch):
    """One of the digits is NaN, wherever it is drawn."""

    def stored(self, indices):
        images = self.pixels[indices].float()
        images[[index == PLANTED for index in indices]] = torch.nan
        return images

    monkeypatch.setattr(PixelData, "stored", stored)


def broken_run(folder: Path, **values: object) -> str:
    with pytest.raises(UserError) as refused:
        train.main(digits_settings(folder, total_steps=100, batch_size=60, **values))
    return str(refused.value)


def replayed(folder: Path, record: Path, capsys, **values: object) -> str:
    capsys.readouterr()
    options = digits_settings(folder, total_steps=100, batch_size=60, **values)
    train.main([*options, "--replay", str(record)])
    return capsys.readouterr().out


@pytest.mark.parametrize("accumulation_steps", [1, 2])
def test_a_planted_image_is_found_by_its_loss_its_t_and_its_batch(
    tmp_path, planted_image, capsys, accumulation_steps
):
    said = broken_run(tmp_path, accumulation_steps=accumulation_steps)
    step = int(re.match(r"step (\d+): ", said)[1])
    kind, t = re.search(r"1 samples of the (\w+) loss broke, t from (\S+) to \2;", said).groups()
    norms = re.search(r"gradient norms before: ([^;]*);", said)[1].split(", ")
    assert len(norms) == min(step - 1, 5)
    record = json.loads((tmp_path / f"broken_step_{step}.json").read_text())
    assert PLANTED in record["indices"]
    assert len(record["indices"]) == 60
    assert [round(value, 3) for value in record["broken"][kind]] == [float(t)]
    path = tmp_path / f"broken_step_{step}.json"
    again = replayed(tmp_path, path, capsys, accumulation_steps=accumulation_steps)
    assert f"1 samples of the {kind} loss broke, t from {t} to {t}" in again
    assert re.search(rf"step {step}: .*Grad_Norm nan", again)


def test_a_planted_infinite_weight_is_found_in_its_block(tmp_path, monkeypatch, capsys):
    build = training_run.build_learner

    def planted(*arguments):
        learner, notes = build(*arguments)
        learner.state.model.network.blocks[2].mlp.fc1.weight.data[0, 0] = torch.inf
        return learner, notes

    monkeypatch.setattr(training_run, "build_learner", planted)
    # The first checkpoint, written beside training, would refuse such weights too.
    monkeypatch.setattr(train, "make_result", lambda run, path: None)
    said = broken_run(tmp_path)
    assert "step 1: " in said
    assert "45 samples of the velocity loss broke, t from 0." in said
    assert "15 samples of the consistency loss broke" in said
    assert "gradient norms before" not in said
    monkeypatch.undo()
    table = replayed(tmp_path, tmp_path / "broken_step_1.json", capsys)
    rows = {line.split()[0]: line.split()[1:] for line in table.splitlines() if "blocks." in line}
    assert rows["blocks.2"][0] == "inf"
    assert rows["blocks.1"][0] != "inf"
    assert rows["blocks.1"][1] != "nan"  # what goes in is still good
    assert rows["blocks.3"][1] == "nan"


def test_a_replay_is_of_the_same_experiment(tmp_path, planted_image, capsys):
    said = broken_run(tmp_path)
    record = Path(re.search(r"--replay (\S+)", said)[1])
    with pytest.raises(UserError, match="seed 42 -> 7"):
        replayed(tmp_path, record, capsys, seed=7)
    with pytest.raises(UserError, match=r"--replay .*none\.json"):
        replayed(tmp_path, tmp_path / "none.json", capsys)
    weights = record.with_suffix(".pt")
    weights.write_bytes(weights.read_bytes()[:5000])
    for damage in (lambda: None, weights.unlink):
        damage()
        with pytest.raises(UserError, match=rf"--replay .*{record.stem}"):
            replayed(tmp_path, record, capsys)


def test_an_error_while_looking_for_the_cause_does_not_hide_what_broke(
    tmp_path, planted_image, monkeypatch
):
    def full(*given):
        raise UserError("broken_step.pt: not written (No space left on device)")

    monkeypatch.setattr(doctor, "save", full)
    said = broken_run(tmp_path)
    assert re.match(r"step \d+: .*Grad_Norm.*broken_step\.pt: .*No space left on device", said)


def test_the_norms_before_the_first_broken_step_are_kept_and_no_others():
    guard = NonFiniteGuard(Processes(0, 0, 1, torch.device("cpu")))
    guard.refuses_at_once = False  # as on a GPU
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
    for step, norm in enumerate(torch.tensor([1, 2, 3, 4, 5, 6, torch.nan, 8]), start=1):
        guard.hold_back(step, norm, {"Grad_Norm": norm}, optimizer)
    assert guard.last_norms() == [2, 3, 4, 5, 6]
    with pytest.raises(UserError, match="step 7: "):
        guard.refuse()


def test_a_gradient_that_is_not_a_number_is_the_largest():
    gradients = {"a": torch.tensor([3.0]), "b": torch.tensor([torch.nan]), "c": None}
    assert doctor.largest(gradients) == "b"
    assert doctor.largest({"a": torch.ones(2), "b": torch.ones(3)}) == "b"
