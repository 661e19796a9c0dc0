"""Where a run continues, and in several processes: the main one alone checks and copies."""

import re

import pytest
import torch
from checkpoints import fresh_state, save, step
from commands import digits_settings

import inference
import train
from config import load_config
from support.runs import checkpoint, results, stored
from support.runs.resume import resume
from support.system.files import UserError
from support.system.processes import Processes

ALONE = Processes(0, 0, 1, torch.device("cpu"))
MAIN, OTHER = (Processes(rank, rank, 2, torch.device("cpu")) for rank in (0, 1))


@pytest.fixture
def folder(tmp_path):
    """A run's folder with checkpoints of steps 0, 2 and 11, and some that cannot be read."""
    (tmp_path / "ckpts").mkdir()
    state = fresh_state()
    for state.finished_steps in (0, 2, 11):
        save(state, tmp_path / "ckpts" / f"{state.finished_steps}.pt")
    newest = tmp_path / "ckpts" / "11.pt"
    newest.write_bytes(newest.read_bytes()[:-100])
    (tmp_path / "ckpts" / "30.pt").mkdir()
    (tmp_path / "ckpts" / "20.pt").write_text("not a checkpoint")
    return tmp_path


def resumed(folder, compare=lambda content, path: []):
    return resume(folder, fresh_state(), ALONE, compare)


def test_the_newest_usable_checkpoint_is_loaded_and_those_passed_over_are_named(folder):
    path, notes = resumed(folder)
    assert path.name == "2.pt"
    assert [re.search(r"(\d+\.pt):", note)[1] for note in notes] == ["30.pt", "20.pt", "11.pt"]


def test_without_checkpoints_a_run_is_fresh(tmp_path):
    assert resumed(tmp_path) == (None, [])


def test_a_refusal_names_the_checkpoints_that_were_passed_over(folder):
    def refuse(content, path):
        raise UserError(f"{path}: another experiment")

    with pytest.raises(UserError, match=r"/2\.pt: .*30\.pt.*20\.pt.*11\.pt"):
        resumed(folder, refuse)


@pytest.fixture
def calls(monkeypatch):
    """What has been called of what reads or copies all of a checkpoint."""
    found: list[str] = []

    def count(place, name: str) -> None:
        real = getattr(place, name)
        monkeypatch.setattr(place, name, lambda *given: found.append(name) or real(*given))

    count(checkpoint, "_check_sums")
    count(stored, "check_sums")
    count(inference, "weights_digest")
    count(results, "host_copy")
    return found


@pytest.mark.parametrize(("processes", "expected"), [(MAIN, ["_check_sums"]), (OTHER, [])])
def test_continuing_checks_sums_in_the_main_process_alone(
    tmp_path, monkeypatch, calls, processes, expected
):
    (tmp_path / "ckpts").mkdir()
    saved, path = fresh_state(), tmp_path / "ckpts" / "1.pt"
    step(saved)
    save(saved, path)
    monkeypatch.setattr(Processes, "broadcast_object", lambda self, value: path)
    state = fresh_state()
    assert resume(tmp_path, state, processes, lambda content, path: []) == (path, [])
    assert calls == expected
    assert torch.equal(state.model[0].weight, saved.model[0].weight)


def test_saving_copies_in_the_main_process_alone(tmp_path, calls):
    schedule = results.ResultSchedule(1, 1, None, None)
    for processes in (MAIN, OTHER):
        (tmp_path / str(processes.rank) / "ckpts").mkdir(parents=True)
        own = results.Results(tmp_path / str(processes.rank), processes, schedule, {}, 0)
        with results.background() as own.jobs:
            own.save("ckpts", fresh_state().state_dict(1))
    assert calls == ["host_copy"]
    assert (tmp_path / "0" / "ckpts" / "0.pt").exists()
    assert not list((tmp_path / "1" / "ckpts").iterdir())


def test_sampling_checks_and_hashes_in_the_main_process_alone(tmp_path, calls):
    train.main(digits_settings(tmp_path / "run", total_steps=1))
    config = load_config(tmp_path / "run" / "config.yaml")
    path = tmp_path / "run" / "ckpts" / "1.pt"
    calls.clear()
    models = [inference.load_model(config, path, MAIN.device, is_main=True)]
    assert calls == ["check_sums", "weights_digest"]
    models.append(inference.load_model(config, path, MAIN.device, is_main=False))
    assert calls == ["check_sums", "weights_digest"]
    weights = [[*loaded.model.parameters()] for loaded in models]
    assert all(map(torch.equal, *weights))
