"""Runs of several seeds as one: the table, the marks, and the figures for papers."""

import csv
import re
import statistics
import sys

import numpy as np
import pytest
from commands import ROOT
from recorded_runs import score, write_lines, write_run

import report
from support.report.curves import Curve
from support.report.figures import Line, Panel, colour_of
from support.report.groups import mean_lines
from support.report.paper import MATPLOTLIB, write_figures
from support.report.runs import read_run
from support.report.tables import Table, mark_best, text_of
from support.scores.summary import Value, over_seeds
from support.scores.table import Yardstick
from support.system.files import UserError


def write_sweep(folder, rates=("2.0e-3", "1.0e-3"), seeds=(0, 1, 2)):
    """Runs of all learning rates and seeds; the second rate's FD is better by 3 and by 100."""
    runs = []
    for number, rate in enumerate(rates):
        for seed in seeds:
            run = write_run(folder / f"rate{number}-s{seed}", seed)
            path = run / "config.yaml"
            path.write_text(path.read_text().replace("2.0e-3", rate))
            values = {"FD": 300.0 + 4 * seed**2 - 3 * number, "IS": 10.0 + seed + 100 * number}
            write_lines(run / "evals/eval_results.jsonl", [score(500, 1, **values)])
            runs.append(run)
    return runs


def grouped(folder, runs, ending="csv"):
    """The table over seeds as rows of a CSV file, or as text."""
    table = folder / f"table.{ending}"
    options = ["--group", "seed", "--output", folder / "page.html", "--table", table]
    report.main([*map(str, [*runs, *options])])
    with open(table) as file:
        return [*csv.DictReader(file)] if ending == "csv" else file.read()


# The table


def test_runs_that_differ_in_the_seed_alone_have_their_mean_and_deviation(tmp_path):
    runs = write_sweep(tmp_path)
    rows = grouped(tmp_path, runs)
    assert [(row["runs"], row["learning_rate"], row["n"]) for row in rows] == [
        ("rate0-s*", "0.002", "3"),
        ("rate1-s*", "0.001", "3"),
    ]
    assert [*rows[0]][:6] == ["runs", "learning_rate", "step", "NFE", "images", "n"]
    values = [300.0, 304.0, 316.0]
    assert float(rows[0]["FD"]) == pytest.approx(statistics.mean(values))
    assert float(rows[0]["FD deviation"]) == pytest.approx(statistics.stdev(values))
    assert {"Vel_MSE deviation", "held-out velocity deviation"} <= {*rows[0]}
    page = (tmp_path / "page.html").read_text()
    assert "<h2>Over seeds</h2>" in page
    assert "306.7 ± 8.3" in page
    # FD differs by less than the deviations, IS by more.
    latex = grouped(tmp_path, runs, "tex")
    for cell in (r"\textbf{306.7 $\pm$ 8.3}", r" 11.0 $\pm$ 1.0 ", r"\textbf{111.0 $\pm$ 1.0}"):
        assert cell in latex
    assert "| **111.0 ± 1.0** |" in grouped(tmp_path, runs, "md")


def test_a_run_alone_or_of_a_seed_that_came_before_has_no_deviation(tmp_path):
    (first, *_) = write_sweep(tmp_path)
    again = write_run(tmp_path / "again", seed=0)
    other = write_run(tmp_path / "rate0", seed=5)
    (other / "config.yaml").unlink()
    rows = grouped(tmp_path, [first, again, other])
    assert [(row["runs"], row["n"]) for row in rows if row["NFE"] == "1"] == [
        ("rate0-s0", "1"),
        ("again", "1"),
        ("rate0", "1"),
    ]
    assert {row["FD deviation"] for row in rows} == {""}
    assert "±" not in grouped(tmp_path, [first], "md")


@pytest.mark.parametrize(
    ("record", "named", "left"),
    [
        (score(500, 1, num_images=50, FD=1.0), "numbers of images", ["Vel_MSE"]),
        (score(500, 1, FD=1.0) | {"graph": {"sha256": "c"}}, "graphs", ["Vel_MSE"]),
        (score(250, 1, FD=1.0), "steps", []),
    ],
)
def test_values_measured_differently_are_not_averaged(tmp_path, capsys, record, named, left):
    runs = write_sweep(tmp_path, rates=["2.0e-3"])
    write_lines(runs[2] / "evals/eval_results.jsonl", [record])
    (row,) = grouped(tmp_path, runs)
    assert [name for name in ("FD", "Vel_MSE") if row[name]] == left
    (line,) = [text for text in capsys.readouterr().out.splitlines() if "rate0-s*" in text]
    assert named in line
    assert line in (tmp_path / "page.html").read_text()


def test_a_mean_has_the_digits_of_its_deviation():
    texts = {
        Value(192.0251, 6.6918): "192.0 ± 6.7",
        Value(0.0266, 0.00031): "0.02660 ± 0.00031",
        Value(10672.98, 1799.8): "10673 ± 1800",
        Value(0.5, 0.0): "0.5000 ± 0.0000",
        over_seeds([0.5]): "0.5000",
    }
    assert {value: text_of(value) for value in texts} == texts


def test_means_not_shown_to_differ_from_the_best_are_marked_with_it():
    diverged = over_seeds([10.0, float("inf")])
    cells = [Value(10.0, 1.0), Value(11.0, 1.0), Value(13.0, 1.0), Value(10.5), None, diverged]
    table = Table(["FD"], [[cell] for cell in cells])
    mark_best(table, {"FD": "lower"})
    assert table.best == {(0, 0), (1, 0)}


def test_the_table_says_which_distances_retraining_alone_may_give(tmp_path):
    runs = [write_run(tmp_path / name, seed) for seed, name in enumerate("abc")]
    for run, value in zip(runs, (100.0, 101.2, 101.4), strict=True):
        write_lines(run / "evals/eval_results.jsonl", [score(500, 1, FD=value, sFD=1.0)])
    (note,) = report.make([read_run(run, run.name) for run in runs]).results()[0].notes
    assert re.findall(r"\b([abc]) \(NFE 1\)", note) == ["a", "b"]
    assert "2606.20536" in note
    write_lines(runs[0] / "evals/eval_results.jsonl", [score(500, 1, num_images=7, FD=100.0)])
    assert not report.make([read_run(run, run.name) for run in runs]).results()[0].notes


# Figures


def test_lines_of_a_group_become_their_mean_and_a_band_of_the_deviation():
    steps, ways = np.arange(3), [Yardstick(name, "g", "exact") for name in "ab"]
    values = np.array([[1.0, 2, 3], [3, 4, 7]])
    lines = [Line(Curve(steps, values[i]), i, f"r{i}", yardstick=ways[0]) for i in range(2)]
    lines.append(Line(Curve(steps[1:], values[0, 1:]), 2, "r2", yardstick=ways[1]))
    lines.append(Line(Curve(steps, values[0]), 3, "alone", yardstick=ways[0]))
    (mean, band), *others = mean_lines(lines, ["x", "x", "x", 3])
    assert (mean.name, mean.run, [*mean.curve.values]) == ("r*", 0, [2, 3, 5])
    assert np.allclose(
        [band.low, band.high], mean.curve.values + np.outer([-1, 1], values.std(0, ddof=1))
    )
    assert others == [(lines[2], None), (lines[3], None)]


@pytest.mark.slow
def test_figures_show_each_curve_of_the_page_or_the_means_over_seeds(tmp_path):
    runs, figures = write_sweep(tmp_path), tmp_path / "figures"
    words = ["--output", tmp_path / "page.html", "--figures", figures]
    report.main([*map(str, [runs[0], *words])])
    names = {path.stem for path in figures.glob("*.svg")}
    assert names == {path.stem for path in figures.glob("*.pdf")}
    assert {"FD", "IS", "Vel_MSE", "Learning_Rate", "velocity_t_from_0_to_0.25"} <= names
    for run in runs:
        (run / "held_out.jsonl").unlink()
    report.main([*map(str, [*runs, *words]), "--group", "seed"])
    svg = (figures / "FD.svg").read_text()
    assert [number for number in range(6) if colour_of(number) in svg] == [0, 3]
    assert "rate0-s*, NFE 1, 600 images" in svg
    assert "FillBetween" in svg


def test_names_are_text_and_figures_are_the_same_each_time_and_lie_in_their_folder(tmp_path):
    lines = [Line(Curve(np.arange(3), np.array([1, np.nan, 2])), i, f"_<b>$x_{i}") for i in (0, 1)]
    panels = [Panel(title, "", lines) for title in ("../../a/$b_", "../../a $b_", "x" * 300)]
    for folder in ("one", "two"):
        write_figures(tmp_path / folder, panels, [0, 1])
    one, two = ({f.name: f.read_bytes() for f in (tmp_path / x).iterdir()} for x in ("one", "two"))
    assert one == two
    assert len([*tmp_path.rglob("*.svg")]) == len([*tmp_path.rglob("*.pdf")]) == len(one) == 6
    assert all(data.startswith(b"%PDF") for name, data in one.items() if name.endswith("pdf"))
    text = one[min(name for name in one if name.endswith("svg"))].decode()
    for shown in ("_&lt;b&gt;$x_0", "_&lt;b&gt;$x_1", "a/$b_", colour_of(0), colour_of(1)):
        assert shown in text


@pytest.mark.parametrize("name", ["Vel_MSE.svg", "Vel_MSE.pdf", None])
def test_figures_that_cannot_be_written_leave_all_as_it_was(tmp_path, monkeypatch, name):
    run, figures = write_run(tmp_path / "run"), tmp_path / "figures"
    figures.mkdir()
    if name:
        (figures / name).write_text("somebody's")
    else:
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        assert MATPLOTLIB in (ROOT / "requirements_soflow_dev.txt").read_text().splitlines()
    with pytest.raises(UserError, match=name or MATPLOTLIB):
        report.main([str(run), "--figures", str(figures)])
    assert [path.name for path in figures.iterdir()] == [*filter(None, [name])]
    assert not (run / "report.html").exists()
