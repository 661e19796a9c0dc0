"""The report of runs: what it reads, what it says, and the page in a real browser."""

import csv
import fcntl
import json
import re
import socket
import time
from pathlib import Path

import numpy as np
import pytest
from commands import ROOT
from PIL import Image
from recorded_runs import score, write_lines, write_run

import report
from config import FIELDS, load_config
from support.report.curves import Curve
from support.report.expected import Band, read_expected
from support.report.page import render
from support.report.pictures import TOTAL_BYTES, embed
from support.report.runs import RecordedRun, read_run
from support.system.files import UserError

LIMIT_BYTES = 6_000_000


# Reading


@pytest.mark.parametrize("name", ["page.html", "table.md", "table.csv", "table.tex"])
def test_files_of_other_kinds_are_not_replaced_and_our_own_are(tmp_path, name):
    run, file = write_run(tmp_path / "run"), tmp_path / name
    words = [run, "--output" if name == "page.html" else "--table", file]
    file.write_text("somebody's")
    with pytest.raises(UserError, match=f"{name}: "):
        report.main([*map(str, words)])
    assert file.read_text() == "somebody's"
    file.unlink()
    for _ in range(2):
        report.main([*map(str, words)])
    assert len(file.read_text()) > 100


def test_settings_are_those_of_the_newest_checkpoint(tmp_path):
    folder = write_run(tmp_path / "run")
    settings = read_run(folder, "run").settings
    assert settings["learning_rate"] == 0.002
    changed = {"config": {**settings, "learning_rate": 0.5, "total_steps": 2000}}
    (folder / "ckpts" / "500.json").write_text(json.dumps(changed))
    run = read_run(folder, "run")
    assert (run.settings["learning_rate"], run.total_steps) == (0.5, 2000)


def test_metrics_and_warnings_are_read_and_unreadable_lines_named(tmp_path):
    rows = [{"step": s, "epoch": 0.1, "Odd": 3, "Time": "t"} for s in (1, 3)]
    first, last = map(json.dumps, rows)
    (tmp_path / "metrics.jsonl").write_text(f'{first}\n{{"step": 2, "O\n17\n{last}\n')
    (tmp_path / "broken_step_15.json").write_text("{}")
    warnings = [
        "2026-11-25 03:46:26 resumed at step 50 from runs/digits/ckpts/50.pt",
        "2026-11-25 03:46:26 learning_rate changed: 0.002 -> 0.001",
    ]
    torn = "2026-11-25 03:46:36 Step: 150/1000 (15.0%), Vel_MSE: 0.2, Seco"
    (tmp_path / "log.txt").write_text("\n".join([*warnings, torn]))
    run = read_run(tmp_path, "run")
    assert {name: [*curve.steps] for name, curve in run.curves.items()} == {"Odd": [1, 3]}
    assert run.curves["Odd"].at(2) == 3
    assert run.warnings[:2] == warnings
    assert "broken_step_15.json" in run.warnings[2]
    assert run.last_line == "2026-11-25 03:46:36"
    assert "metrics.jsonl: line 2, line 3 " in run.notes[0]


def test_a_killed_run_a_running_one_and_a_finished_one_look_different(tmp_path):
    folder = write_run(tmp_path / "run", lines=3)
    (folder / ".lock").write_text(json.dumps({"host": socket.gethostname(), "process": 1}))

    def facts():
        report.main([str(folder)])
        page = (folder / "report.html").read_text()
        assert "last line of the log 2026-11-25 04:26:20" in page
        return re.search("(Running|Stopped|Finished)[^;]*", page)[0]

    killed = facts()
    assert killed.startswith("Stopped")
    with open(folder / ".lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert facts() == "Running on this machine"
    (folder / ".lock").write_text(json.dumps({"host": "elsewhere"}))
    assert facts() == "Running on elsewhere"
    (folder / ".lock").unlink()
    assert facts() == killed
    write_lines(folder / "metrics.jsonl", [{"step": 1000, "Vel_MSE": 0.1}])
    assert facts() == "Finished"


@pytest.mark.parametrize("damage", ["held_out.jsonl", "evals/eval_results.jsonl", "ckpts/500.json"])
def test_lines_of_another_form_do_no_harm(tmp_path, damage):
    folder = write_run(tmp_path / "run")
    (folder / damage).write_text('{"step": 5, "average": {"velocity": 3}, "file": 1}\n[]\nx\n')
    report.main([str(folder)])


# Curves and bands


def test_thinning_keeps_the_ends_the_extremes_and_what_is_not_finite():
    values = np.random.default_rng(0).standard_normal(40_000)
    values[[17_000, 23_000, 31_000]] = 100, -100, np.nan
    thin = Curve(np.arange(40_000), values).thinned(500)
    assert len(thin.steps) <= 503
    assert {0, 17_000, 23_000, 31_000, 39_999} <= {*thin.steps}
    assert (np.diff(thin.steps) > 0).all()


def test_smoothing_follows_a_line_to_its_ends():
    curve = Curve(np.arange(400), np.arange(400) * 2.0)
    assert np.allclose(curve.smoothed().values, curve.values)


def test_a_band_holds_its_runs_and_says_since_when_another_is_outside():
    steps, rng = np.arange(50, 1001, 50), np.random.default_rng(0)
    curves = [Curve(steps, 0.2 + 0.01 * rng.standard_normal(20)) for _ in range(4)]
    band = Band.around(curves[:3])
    assert [band.judge(curve) for curve in curves] == ["inside"] * 4
    off = np.where(steps >= 600, 0.4, 0.2)
    assert band.judge(Curve(steps, off)) == "outside since step 600"
    off[-1] = np.nan
    assert band.judge(Curve(steps, off)) == "outside since step 600"
    off[steps >= 700] = 0.2
    said = "inside, but for 2 of 20 lines (step 600 first)"
    assert band.judge(Curve(steps, off)) == said
    often = Curve(np.arange(10, 1001, 10), np.full(100, 0.2))
    assert band.judge(often) == "not compared: the band is of every 50 steps"


def test_bands_made_from_runs_are_drawn_for_runs_of_the_same_experiment(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(report, "EXPECTED", tmp_path / "expected")
    (tmp_path / "expected").mkdir()
    runs = [str(write_run(tmp_path / f"run-{seed}", seed)) for seed in range(4)]
    band = ["--band", str(tmp_path / "expected/mine.json"), *runs[:3]]
    for _ in range(2):
        report.main(band)
    with pytest.raises(UserError, match=r"config\.yaml: "):
        report.main(["--band", f"{runs[0]}/config.yaml", *runs[:3]])
    (expected,) = read_expected(tmp_path / "expected").values()
    assert [*expected.bands] == ["Vel_MSE"]  # no schedule, no speed
    report.main([runs[3]])
    assert "As expected: inside the bands of 3 runs" in Path(runs[3], "report.html").read_text()
    bad = str(write_run(tmp_path / "bad", seed=5, shift=0.5))
    report.main([bad])
    said = Path(bad, "report.html").read_text()
    assert "Not as expected: Vel_MSE outside since step 50" in said


def test_the_experiment_is_what_decides_the_result_without_the_seed_and_that_of_digits_is_known(
    tmp_path,
):
    def digest(**values):
        settings = {**load_config(ROOT / "configs/digits.yaml").to_dict(), **values}
        return report.experiment_of(RecordedRun(tmp_path, "run", settings))

    assert digest(seed=1, logging_steps=7, working_dir="elsewhere") == digest()
    for change in ({"ema_decay_rate": 0.9}, {"learning_rate": 0.5}, {"precision": "bf16"}):
        assert digest(**change) != digest()
    assert digest(of_another_version=1) == digest()
    known = read_expected(report.EXPECTED)[digest()]
    assert len({run["seed"] for run in known.made_from}) == 3
    assert {"Vel_MSE", "Con_MSE", "Grad_Norm"} <= {*known.bands}


# Tables


def test_the_best_of_what_can_be_compared_is_bold(tmp_path):
    runs = [write_run(tmp_path / f"{name}_{seed}", seed) for seed, name in enumerate("ab")]
    for ending in ("md", "csv", "tex"):
        table = tmp_path / f"results.{ending}"
        output = ["--output", str(tmp_path / "report.html")]
        report.main([*map(str, runs), "--table", str(table), *output])
    markdown = (tmp_path / "results.md").read_text().splitlines()
    assert [cell.strip() for cell in markdown[3].split("|")[1:6]] == [
        *("a_0", "500", "2", "600", "**4.500**")  # of two steps; the last scored step
    ]
    assert markdown[5].split("|")[5].strip() == "5.500"
    assert r"a\_0 & 500 & 2 & 600 & \textbf{4.500}" in (tmp_path / "results.tex").read_text()
    with open(tmp_path / "results.csv") as file:
        assert [row["FD"] for row in csv.DictReader(file)] == ["9.0", "4.5", "10.0", "5.5"]


def bold(folders, *changes):
    """The columns with a best value, and the remarks, of runs with changed settings."""
    runs = [read_run(folder, folder.name) for folder in folders]
    for run, change in zip(runs, changes, strict=False):
        run.settings |= change
    table, remarks = report.make(runs).results()
    return {table.columns[column] for _, column in table.best}, " ".join(remarks)


def test_only_numbers_that_rank_are_bold_and_only_where_they_can_be_compared(tmp_path):
    assert {*report.TARGET} <= {*FIELDS}
    folders = [write_run(tmp_path / name, seed) for seed, name in enumerate("ab")]
    losses = {"velocity": [0.4, 0.3, 0.2, 0.1], "consistency": [0.6, 0.4, 0.3, 0.2]}
    write_lines(folders[0] / "held_out.jsonl", [{"step": 250, "average": losses}])
    write_lines(folders[1] / "held_out.jsonl", [{"step": 250, "average": {"velocity": [0.9]}}])
    everything = {"FD", "Vel_MSE", "held-out velocity"}
    assert bold(folders, {"learning_rate": 0.5}) == (everything, "")
    for key, value in {"mix_ratio": 0.125, "cfg_scale": 9.0, "dataset_type": "CIFAR10"}.items():
        columns, remarks = bold(folders, {key: value})
        assert columns == {"FD"}
        assert all(word in remarks for word in ("Vel_MSE", "held-out velocity", key))
    path = folders[0] / "evals/eval_results.jsonl"
    write_lines(path, [score(250, 1, num_images=50, FD=1.0), score(500, 1, FD=1.0)])
    assert bold(folders) == (everything, "")  # the 50 images are not shown
    write_lines(path, [score(500, 1, num_images=1000, FD=1.0)])
    columns, remarks = bold(folders)
    assert columns == everything - {"FD"}
    assert "numbers of images" in remarks
    assert bold(folders[1:]) == ({"FD"}, "")  # NFE 1 and 2 of one run


# The command


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere"], "nowhere: "),
        (["empty"], "empty: "),
        (["run", "--table", "t.doc"], "--table t.doc: "),
        (["run", "--output", "no/r.html"], "no/r.html: "),
        (["--band", "b.json", "run"], "2 runs"),
        (["--band", "b.json", "run", "run"], "[0, 0]"),
        (["--band", "b.json", "run", "short"], "short: at step 150 of 1000"),
        (["--band", "b.json", "run", "other"], "--band b.json: "),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    write_run(tmp_path / "run")
    write_run(tmp_path / "short", seed=1, lines=3)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/log.txt").write_text("")
    with pytest.raises(UserError) as error:
        report.main(words)
    assert said in str(error.value)
    assert not [*tmp_path.glob("*.html"), *tmp_path.glob("*/*.html"), *tmp_path.glob("*.json")]


def test_runs_of_different_metrics_are_shown_together_and_that_is_said(tmp_path, capsys):
    runs = [write_run(tmp_path / name) for name in "ab"]
    write_lines(runs[1] / "metrics.jsonl", [{"step": 50, "Other_MSE": 0.5}])
    page = tmp_path / "page.html"
    report.main([*map(str, runs), "--output", str(page)])
    assert "Other_MSE: a has none\n" in capsys.readouterr().out
    assert "Other_MSE: a has none" in page.read_text()


def test_the_report_alone_is_written_and_names_are_text(tmp_path):
    folder = write_run(tmp_path / "<b>run")
    (folder / "metrics.jsonl").unlink()  # nothing logged yet
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    report.main([str(folder)])
    page = (folder / "report.html").read_text()
    assert "<b>run" not in page
    assert "&lt;b&gt;run" in page
    (folder / "report.html").unlink()
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_watching_makes_the_page_anew_until_it_is_interrupted(tmp_path, monkeypatch, capsys):
    folder, seen = write_run(tmp_path / "run", lines=3), []

    def sleep(seconds):
        page = (folder / "report.html").read_text()
        assert "setInterval(reload, 1000 * 5)" in page
        seen.append((seconds, "150 of 1,000" in page))
        if len(seen) == 2:
            raise KeyboardInterrupt
        with open(folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": 200, "Vel_MSE": 0.2}) + "\n")

    monkeypatch.setattr(time, "sleep", sleep)
    report.main([str(folder), "--watch", "--every", "5"])
    assert seen == [(5, True), (5, False)]
    assert capsys.readouterr().out == f"{folder}/report.html\n"


# The page


@pytest.mark.slow
def test_five_long_runs_make_a_page_of_bounded_size(tmp_path):
    runs = [write_run(tmp_path / str(seed), seed) for seed in range(5)]
    rng, names = np.random.default_rng(0), [f"Metric_{i}" for i in range(10)]
    Image.fromarray(rng.integers(0, 255, (256, 512, 3), np.uint8)).save(tmp_path / "noise.png")
    for folder in runs:
        values = [dict(zip(names, row, strict=True)) for row in rng.random((4000, 10)).tolist()]
        rows = [{"step": 100 * (i + 1), **row} for i, row in enumerate(values)]
        write_lines(folder / "metrics.jsonl", rows)
        for step in range(1000, 21_000, 1000):
            (folder / "figs" / f"{step}.png").hardlink_to(tmp_path / "noise.png")
    report.main([*map(str, runs), "--output", str(tmp_path / "page.html")])
    assert (tmp_path / "page.html").stat().st_size < LIMIT_BYTES
    paths = dict.fromkeys(range(100), tmp_path / "noise.png")
    pictures = embed(dict.fromkeys(range(3), paths), []).values()
    assert sum(len(picture["source"]) for of_run in pictures for picture in of_run) < TOTAL_BYTES
    assert [of_run[0]["step"] for of_run in pictures] == [0] * 3
    assert [of_run[-1]["step"] for of_run in pictures] == [99] * 3


@pytest.fixture(params=[("light", 1366), ("dark", 390)], ids=["laptop, light", "phone, dark"])
def open_page(new_page, request):
    """Opens a page offline, on a screen that it fits."""
    theme, width = request.param
    touch = {"has_touch": True, "is_mobile": True} if width == 390 else {}
    screen = {"color_scheme": theme, "viewport": {"width": width, "height": 800}, **touch}
    page = new_page(("file:", "data:", "blob:"), offline=True, **screen)

    def go_to(path):
        page.goto(path.as_uri())
        page.wait_for_selector(".panel:last-child .scatterlayer .trace", state="attached")
        page.wait_for_function(
            "[...document.querySelectorAll('.plot')].every(p => p.querySelector('.trace'))"
        )
        return page

    yield go_to
    assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0


@pytest.mark.slow
def test_two_runs_in_a_browser(tmp_path, open_page):
    runs = [write_run(tmp_path / name, seed) for seed, name in enumerate("ab")]
    report.main([*map(str, runs), "--output", str(tmp_path / "page.html")])
    page = open_page(tmp_path / "page.html")

    panel = page.locator(".panel", has=page.get_by_role("heading", name="Vel_MSE", exact=True))
    thick = panel.locator(".scatterlayer .trace path.js-line[style*='stroke-width: 2px']")
    assert thick.count() == 2
    assert panel.locator("p").inner_text().startswith("Squared error of the velocity")

    table = page.locator("h2:has-text('What differs') + div table tr")
    rows = [row.split() for row in table.all_inner_texts()]
    assert rows == [["key", "a", "b"], ["seed", "0", "1"]]

    image = page.locator(".pictures img").first
    last = image.get_attribute("src")
    slider = page.locator("#step")
    slider.focus()
    slider.press("ArrowLeft")
    assert image.get_attribute("src") != last
    assert page.locator("#chosen").inner_text() == "step 250"

    hints = page.locator("footer span").evaluate_all("e => e.map(e => e.checkVisibility())")
    is_touch = page.evaluate("matchMedia('(pointer: coarse)').matches")
    assert hints == [not is_touch, is_touch]  # a mouse drags over a curve, a finger taps it

    page.locator("#log").check()
    kind = "document.querySelector('.plot')._fullLayout.yaxis.type"
    page.wait_for_function(f"{kind} === 'log'")
    assert page.get_by_text("resumed at step 100").count() == 2
    assert page.get_by_text("500 (3.0 MB)").count() == 2


@pytest.mark.slow
def test_a_page_that_is_watched_follows_its_file_but_not_under_who_looks_closer(
    tmp_path, open_page
):
    folder = write_run(tmp_path / "run", lines=3)
    path = tmp_path / "page.html"

    def rewrite(step):
        write_lines(folder / "metrics.jsonl", [{"step": s, "Vel_MSE": 1 / s} for s in (50, step)])
        path.write_text(render(report.make([read_run(folder, "run")], 3600), "now"))

    rewrite(100)
    page = open_page(path)
    page.locator("#log").check()
    rewrite(200)
    with page.expect_navigation():
        page.evaluate("reload()")
    page.wait_for_function("document.querySelector('.plot')._fullLayout?.yaxis.type === 'log'")
    rewrite(300)
    page.locator("#step").press("ArrowLeft")
    page.evaluate("reload()")
    page.wait_for_timeout(300)
    assert page.get_by_text("200 of 1,000").count() == 1
    page.locator("#step").press("ArrowRight")
    with page.expect_navigation():
        page.evaluate("reload()")
    page.wait_for_selector("text=300 of 1,000")
