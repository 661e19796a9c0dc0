"""A run's numbers in metrics.jsonl and in what `log_to` names."""

import json
import re
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from support.runs import trackers
from support.runs.metrics import append_numbers, cut_after
from support.runs.trackers import TRACKERS, Trackers, check_installed
from support.system.files import UserError

ROOT = Path(__file__).parent.parent


def steps_in(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_numbers_come_back_by_name(tmp_path):
    nan, inf = float("nan"), float("inf")
    numbers = {"step": 1, "Vel_MSE": 0.1, "Grad_Norm": nan, "weights": {"velocity": [inf, 2.0]}}
    append_numbers(tmp_path / "m.jsonl", numbers)
    (line,) = (tmp_path / "m.jsonl").read_text().splitlines()
    told = {"step": 1, "Vel_MSE": 0.1, "Grad_Norm": None, "weights": {"velocity": [None, 2.0]}}
    assert json.loads(line) == told


@pytest.mark.parametrize("step, left", [(0, []), (2, [1, 2]), (3, [1, 2, 3]), (9, [1, 2, 3, 4])])
def test_numbers_later_than_a_step_are_cut(tmp_path, step, left):
    path = tmp_path / "m.jsonl"
    for number in (1, 2, 3, 4):
        append_numbers(path, {"step": number})
    cut_after(path, step)
    assert steps_in(path) == left


def test_a_torn_last_line_is_cut_and_an_unreadable_one_before_it_left(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"step": 1}\n\xff{{\n{"step": 2}\n{"step": 3')
    cut_after(path, 5)
    assert path.read_bytes() == b'{"step": 1}\n\xff{{\n{"step": 2}\n'


def tell(name: str, folder: Path, ranges: list[range]) -> list[str]:
    """What is complained of by a run that is continued once for each further range."""
    said: list[str] = []
    for steps in ranges:
        told = Trackers(said.append)
        told.open([name], folder, {"seed": 42, "betas": [0.9, 0.99]}, steps.start - 1)
        for step in steps:
            told.add(step, {"Vel_MSE": step / 4})
        told.close()
    return said


def test_tensorboard_reads_back_what_a_continued_run_told_it(tmp_path):
    pytest.importorskip("tensorboard", reason="needs tensorboard")
    # Killed at 4, continued from the checkpoint of 2: what was told of 3 and 4 is purged.
    assert tell("tensorboard", tmp_path, [range(1, 5), range(3, 7)]) == []
    from tensorboard.backend.event_processing import event_accumulator as loading

    events = loading.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("Vel_MSE")] == [
        (step, step / 4) for step in range(1, 7)
    ]


def test_wandb_goes_on_in_the_same_run(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="needs wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert tell("wandb", tmp_path, [range(1, 3), range(3, 5)]) == []
    files = sorted((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert {path.stem for path in files} == {f"run-{trackers.run_id(tmp_path)}"}
    assert b"Vel_MSE" in b"".join(path.read_bytes() for path in files)


def test_trackio_goes_on_in_the_same_run(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    trackio = pytest.importorskip("trackio", reason="needs trackio")
    monkeypatch.setattr(trackio.utils, "TRACKIO_DIR", tmp_path / "trackio", raising=False)
    assert tell("trackio", tmp_path, [range(1, 3), range(3, 5)]) == []
    (database,) = (tmp_path / "trackio").glob("*.db")
    with sqlite3.connect(database) as connection:
        rows = connection.execute("SELECT run_name, step FROM metrics ORDER BY step").fetchall()
    name = f"{tmp_path.name}-{trackers.run_id(tmp_path)}"
    assert rows == [(name, step) for step in range(1, 5)]


class Failing:
    """A tracker that fails at its second number."""

    def __init__(self, folder, run_id, settings, step):
        self.told = 0

    def add(self, step, numbers):
        self.told += 1
        if self.told == 2:
            raise ConnectionError("no route to host")

    def close(self):
        raise AssertionError("was left out")


def test_a_tracker_that_fails_is_said_once_and_ends_nothing(tmp_path, monkeypatch):
    monkeypatch.setitem(TRACKERS, "failing", Failing)
    said = tell("failing", tmp_path, [range(1, 6)])
    (line,) = said
    assert re.search("failing .*no route to host", line)


def test_a_tracker_that_is_not_installed_is_said_with_the_package():
    with pytest.raises(UserError, match=r"^log_to: no_such "):
        check_installed(["no_such"])


def test_importing_trackers_imports_none_of_their_libraries():
    code = (
        "import sys, support.runs.trackers as t; sys.exit(bool(set(t.TRACKERS) & {*sys.modules}))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
