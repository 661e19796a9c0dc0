"""Evals scored while training: the evaluator's numbers, and no other step."""

import json
import shutil

import numpy as np
import pytest
from checkpoints import assert_equal, load, state_of
from commands import ROOT, digits_settings

import evaluator
import train
from quickstart.small_sets import SMALL_SETS
from report import make
from support.report.runs import read_runs
from support.scores import graph
from support.system.files import UserError
from training import outputs

GRAPH = ROOT / "quickstart" / "digit_classifier.pb"


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    path = tmp_path_factory.mktemp("reference") / "held_out.npz"
    np.savez(path, SMALL_SETS["Digits"].load(None).held_out.pixels[:100])
    return path


def settings(folder, reference, **more):
    keys = {"eval_score": True, "eval_reference": reference, "eval_graph": GRAPH}
    every = {"total_steps": 4, "eval_steps": 2, "eval_num_samples": 50, "logging_steps": 2}
    return digits_settings(folder, **{**every, **keys, **more})


def test_evals_are_scored_as_the_evaluator_does_and_the_steps_stay_the_same(
    tmp_path, reference, capsys
):
    for name, is_scoring in (("with", True), ("without", False)):
        train.main(settings(tmp_path / name, reference, eval_score=is_scoring))
    assert_equal(*(state_of(load(tmp_path / name, 4)) for name in ("with", "without")))
    evals = tmp_path / "with" / "evals"
    records = [json.loads(x) for x in (evals / "eval_results.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [2, 4]
    assert {record["backend"] for record in records} == {"torch"}
    lines = (tmp_path / "with" / "metrics.jsonl").read_text().splitlines()
    logged = [row for row in map(json.loads, lines) if "FD" in row]
    assert [{**record["scores"], "step": record["step"]} for record in records] == [
        {key: value for key, value in row.items() if key != "Time"} for row in logged
    ]
    assert f"FD: {logged[-1]['FD']!r}" in (tmp_path / "with" / "log.txt").read_text()
    words = ["--ref_batch", reference, "--sample_batch_dir", evals, "--inception", GRAPH]
    before = len(records)
    assert evaluator.main([*map(str, words)]) == 0  # finds nothing left to do
    assert len((evals / "eval_results.jsonl").read_text().splitlines()) == before
    (run,) = read_runs([tmp_path / "with"])
    assert {"Vel_MSE", "Con_MSE"} <= run.curves.keys()
    assert "FD" not in run.curves
    assert [score.step for score in run.scores] == [2, 4]
    assert make([run]).results()[0].columns.count("FD") == 1


def test_what_a_score_needs_is_checked_before_the_first_step(tmp_path, reference):
    larger = tmp_path / "larger.npz"
    np.savez(larger, np.zeros((9, 16, 16, 1), np.uint8))
    for changed, named in (
        ({"eval_reference": "null"}, "eval_reference"),
        ({"eval_steps": 0}, "eval_steps"),
        ({"eval_num_samples": 3}, "eval_num_samples"),
        ({"eval_reference": tmp_path / "absent.npz"}, "absent.npz"),
        ({"eval_reference": larger}, "16 x 16"),
        ({"eval_graph": tmp_path / "absent.pb"}, "eval_graph"),
    ):
        with pytest.raises(UserError, match=named):
            train.main(
                settings(tmp_path / "run", reference)
                + ["--set"]
                + [f"{key}={value}" for key, value in changed.items()]
            )
    assert not (tmp_path / "run").exists()


def test_dry_run_says_what_scoring_costs(tmp_path, reference, capsys):
    train.main([*settings(tmp_path / "run", reference), "--dry-run"])
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("# scoring")]
    assert "2 evals of 50" in line
    assert "100" in line
    assert GRAPH.name in line


def test_dry_run_fetches_no_graph(tmp_path, reference, capsys, monkeypatch):
    def refuse(*arguments):
        raise AssertionError("fetched")

    monkeypatch.setattr(graph, "download", refuse)
    train.main([*settings(tmp_path / "run", reference, eval_graph="null"), "--dry-run"])
    assert graph.DEFAULT_NAME in capsys.readouterr().out


def test_a_score_that_fails_ends_no_run(tmp_path, reference, monkeypatch):
    moved = tmp_path / "moved.npz"
    shutil.copy(reference, moved)
    made = outputs.write_samples

    def lose_reference(*arguments):
        made(*arguments)
        moved.unlink(missing_ok=True)

    monkeypatch.setattr(outputs, "write_samples", lose_reference)
    train.main(settings(tmp_path / "run", moved))
    assert load(tmp_path / "run", 4)["finished_steps"] == 4
    log = (tmp_path / "run" / "log.txt").read_text()
    assert log.count(str(moved)) == log.count("warning") == 2
