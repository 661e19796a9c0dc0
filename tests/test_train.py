"""Training: exact continuation, scheduled results, refusals before any work."""

import json
import re

import pytest
import torch
import yaml
from checkpoints import assert_equal, load, numbers_of, state_of
from commands import ROOT, digits_settings, succeed
from PIL import Image

import inference
import train
from support.scores.npz import read_archive
from support.system.files import UserError, make_folder
from support.system.locks import hold_lock
from training import outputs


@pytest.fixture
def small_run(tmp_path):
    """A function that trains a small run in this process and returns its folder."""

    def start(*flags: str, folder: str = "run", **values):
        train.main([*digits_settings(tmp_path / folder, **values), *flags])
        return tmp_path / folder

    return start


def contents(folder) -> dict:
    """The bytes of every file in a folder."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_six_steps_equal_three_a_new_process_and_three(tmp_path):
    # The break is in the middle of an epoch; only one run has evals and demos in between.
    settings = {"num_workers": 2, "ckpt_saving_steps": 3}
    parts = digits_settings(tmp_path / "parts", **settings, eval_steps=2)
    train.main(digits_settings(tmp_path / "whole", **settings))
    train.main([*parts, "--set=eval_demo_steps=1"])
    (tmp_path / "parts" / "ckpts" / "6.pt").unlink()
    assert "resumed at step 3" in succeed("train.py", *parts)
    assert_equal(state_of(load(tmp_path / "whole", 6)), state_of(load(tmp_path / "parts", 6)))


def test_a_run_broken_between_two_log_lines_has_the_metrics_and_state_of_an_unbroken_one(small_run):
    settings = {"logging_steps": 4, "total_steps": 8, "accumulation_steps": 3}
    whole = small_run(folder="whole", **settings)
    broken = small_run(folder="broken", ckpt_saving_steps=3, **settings)
    for step in (6, 8):
        (broken / "ckpts" / f"{step}.pt").unlink()
    small_run(folder="broken", ckpt_saving_steps=3, **settings)  # continues at 3
    numbers = numbers_of(whole)
    assert [(line["step"], line["images"]) for line in numbers] == [(4, 48), (8, 96)]
    assert numbers[1]["epoch"] == pytest.approx(96 / (1197 // 12 * 12))
    assert {"Vel_MSE", "Con_MSE", "Grad_Norm", "Gap_Fraction", "Learning_Rate"} < numbers[0].keys()
    assert numbers_of(broken) == numbers
    assert_equal(state_of(load(whole, 8)), state_of(load(broken, 8)))


def test_the_first_and_the_last_step_are_saved_and_a_finished_run_does_nothing(small_run, capsys):
    folder = small_run()
    assert sorted(path.name for path in (folder / "ckpts").glob("*.pt")) == ["0.pt", "6.pt"]
    before = contents(folder / "ckpts")
    capsys.readouterr()
    small_run()
    assert "6 steps" in capsys.readouterr().out
    assert contents(folder / "ckpts") == before


def test_a_checkpoint_has_the_references_form_and_resumes_with_its_five_keys_alone(small_run):
    whole = small_run(folder="whole")
    folder = small_run(folder="five", ckpt_saving_steps=3)
    checkpoint = load(folder, 3)
    five = ["model", "ema_model", "optimizer", "finished_steps", "finished_epochs"]
    assert list(checkpoint)[:5] == five
    assert (checkpoint["finished_steps"], checkpoint["finished_epochs"]) == (3, 0)
    assert list(checkpoint["model"]) == list(checkpoint["ema_model"])
    assert all(name.startswith("network.") for name in checkpoint["model"])
    assert all(tensor.dtype == torch.float32 for tensor in checkpoint["ema_model"].values())
    (group,) = checkpoint["optimizer"]["param_groups"]
    assert group["params"] == list(range(len(checkpoint["model"])))
    # Entry 0 is pos_embed, which takes no gradient.
    assert next(iter(checkpoint["model"])) == "network.pos_embed"
    assert sorted(checkpoint["optimizer"]["state"]) == group["params"][1:]
    assert set(checkpoint["optimizer"]["state"][1]) == {"step", "exp_avg", "exp_avg_sq"}

    for path in (folder / "ckpts" / "0.pt", folder / "ckpts" / "6.pt", folder / "config.yaml"):
        path.unlink()
    torch.save({key: checkpoint[key] for key in five}, folder / "ckpts" / "3.pt")
    small_run(folder="five", ckpt_saving_steps=3)
    assert_equal(state_of(load(whole, 6)), state_of(load(folder, 6)))


def test_scheduled_results_are_made_with_their_records_and_a_missing_one_on_resume(small_run):
    settings = {"eval_steps": 3, "eval_demo_steps": 2, "eval_batch_size": 4, "eval_NFE": 2}
    folder = small_run(**settings)
    assert sorted(path.name for path in (folder / "figs").iterdir()) == ["2.png", "4.png", "6.png"]
    with Image.open(folder / "figs" / "2.png") as picture:
        assert picture.size == (2 * 50, 2 * 50)
    evals = sorted(path.name for path in (folder / "evals").iterdir())
    assert evals == ["3.json", "3.npz", "6.json", "6.npz"]
    with read_archive(folder / "evals" / "6.npz") as archive:
        assert archive.images_header().shape == (10, 8, 8, 1)
    record = json.loads((folder / "evals" / "6.json").read_text())
    assert [record[key] for key in ("num_images", "NFE", "seed")] == [10, 2, 42]
    assert record["config"]["batch_size"] == 12
    assert len(record["config_sha256"]) == len(record["weights_sha256"]) == 64
    assert json.loads((folder / "ckpts" / "6.json").read_text())["finished_steps"] == 6
    assert not list(folder.rglob("*.tmp"))
    missing = (folder / "evals" / "6.npz", folder / "figs" / "6.png")
    before = [path.read_bytes() for path in missing]
    for path in missing:
        path.unlink()
    small_run(**settings)
    assert [path.read_bytes() for path in missing] == before


def test_log_has_the_start_the_first_step_the_metrics_and_the_schedules(small_run, monkeypatch):
    monkeypatch.setattr(outputs, "LONG_SECONDS", 0)
    schedules = {"l_schedule": "Linear", "l_init_ratio": 0.6, "l_end_ratio": 0.3}
    text = (small_run(warmup_steps=4, **schedules) / "log.txt").read_text()
    start, *lines = text.split("Step: ")
    for words in ("fresh run", "12 = 1 process x 12 x 1 accumulation", "first step: "):
        assert start.count(words) == 1
    assert text.count("first step: ") == 1
    # The second, fourth and sixth step of six.
    expected = [("0.55", "0.001"), ("0.45", "0.002"), ("0.35", "0.002")]
    for line, (gap, rate) in zip(lines, expected, strict=True):
        assert f", Gap_Fraction: {gap}, Learning_Rate: {rate}, Memory: " in line
        assert re.search(r"GB, Seconds: [0-9.]+, Images/s: [0-9.]+, ETA: ", line)
        for name in ("Vel_MSE", "Vel_Weight", "Con_MSE", "Con_Weight", "Grad_Norm"):
            assert f"{name}: " in line
    assert lines[-1].startswith("6/6 (100.0%)")


def test_recorded_config_loads_to_the_same_config_and_is_never_overwritten(small_run, capsys):
    folder = small_run()
    recorded = (folder / "config.yaml").read_text()
    assert yaml.safe_load(recorded)["optimizer"] == "AdamW"
    train.main(["--config", str(folder / "config.yaml")])
    assert "finished" in capsys.readouterr().out
    small_run(logging_steps=3)
    assert "logging_steps changed: 2 -> 3" in capsys.readouterr().out
    assert (folder / "config.yaml").read_text() == recorded


def test_a_folder_where_nothing_was_trained_may_be_used_by_another_experiment(
    small_run, monkeypatch
):
    with monkeypatch.context() as full_disk:
        full_disk.setattr(train, "make_result", lambda run, path: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            small_run()
    assert (small_run(batch_size=6) / "config.yaml").read_text().count("batch_size: 6\n") == 1
    with pytest.raises(UserError, match="batch_size 6 -> 12"):
        small_run()


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--learning-rate", "1e-4"], "learning_rate=1e-4"),
        (["--batch_size=3"], "batch_size=3"),
        (["--seed", "-1"], "seed=-1"),
        (["--compile", "--dry-run"], "compile=VALUE"),
    ],
)
def test_a_key_among_the_options_is_answered_with_set(words, named):
    option = words[0].split("=")[0]
    with pytest.raises(UserError, match=f"^{option}: .*--set {named}"):
        train.main(["--config=nowhere.yaml", *words])


def test_several_values_follow_one_set():
    arguments = train.parse_arguments(["--config=c", "--set", "a=1", "b=2", "--set=c=3"])
    assert arguments.set == ["a=1", "b=2", "c=3"]


def test_an_unknown_option_is_answered_with_the_nearest(capsys):
    with pytest.raises(SystemExit):
        train.main(["--config=nowhere.yaml", "--dryrun"])
    assert re.search("--dryrun.*--dry-run", capsys.readouterr().err)


def test_another_experiment_in_the_same_folder_is_refused(small_run):
    folder = small_run()
    before = contents(folder)
    named = r"p 1\.0 -> 0\.5.*seed 42 -> 1.*--allow-changed p --allow-changed seed"
    with pytest.raises(UserError, match=named):
        small_run(seed=1, p=0.5)
    assert contents(folder) == before
    with pytest.raises(UserError, match=r"model_type .*DiT-Nano-4.*working_dir"):
        small_run(model_type="DiT-Nano-4")
    small_run("--allow-changed", "total_steps", total_steps=8)
    assert load(folder, 8)["finished_steps"] == 8


def test_dry_run_says_what_a_run_takes_and_leaves_nothing(small_run, capsys):
    folder = small_run("--dry-run", ckpt_saving_steps=2, eval_steps=3)
    said = capsys.readouterr().out
    assert not folder.exists()
    assert yaml.safe_load(said)["ema_every_steps"] == 1
    assert "1,323,780 parameters" in said
    assert "12 = 1 process x 12 x 1 accumulation" in said
    # 1,323,780 float32 weights and their average, two moments of all but pos_embed.
    weights, trained = 1_323_780, 1_323_780 - 16 * 128
    assert f"4 checkpoints of {(2 * weights + 2 * trained) * 4 / 1e6:.3g} MB" in said
    assert "2 evals of 640 B" in said


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"batch_size": 2000}, "batch_size: 2000 .*1197.*Digits"),
        ({"accumulation_steps": 5}, "batch_size: 12 .*5 accumulation_steps"),
        ({"device": "cuda"}, "device: 'cuda'"),
        ({"folder": "file/run"}, "file/run: "),
    ],
)
def test_a_run_that_cannot_start_is_refused_before_a_folder_is_made(
    small_run, tmp_path, values, named
):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=named):
        small_run(**values)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_first_twenty_steps_follow_the_stored_curve(small_run):
    """A refactoring must not move them; `golden/digits_curve.json` says how they were made."""
    stored = json.loads((ROOT / "tests" / "golden" / "digits_curve.json").read_text())
    folder = small_run(**stored["settings"])
    found = {
        name: [float(value) for value in re.findall(rf"{name}: ([-0-9.]+)", log)]
        for log in [(folder / "log.txt").read_text()]
        for name in stored["curve"]
    }
    assert found == {
        name: pytest.approx(values, rel=2e-3) for name, values in stored["curve"].items()
    }


def test_a_checkpoint_of_another_model_is_refused_by_the_difference_and_nothing_is_left(small_run):
    """It has the reference's five keys alone, and so names no config."""
    whole = small_run(folder="whole")
    folder = whole.parent / "run"
    (folder / "ckpts").mkdir(parents=True)
    content = load(whole, 6)
    torch.save({key: content[key] for key in list(content)[:5]}, folder / "ckpts" / "6.pt")
    shapes = r"network\.pos_embed: \[1, 16, 128\] in the file, \[1, 4, 128\] in the model"
    with pytest.raises(UserError, match=rf"6\.pt: .*{shapes}"):
        small_run(model_type="DiT-Nano-4")
    assert [path.name for path in folder.rglob("*")] == ["ckpts", "6.pt"]
    small_run()


def test_a_second_run_in_the_same_folder_is_refused_while_the_first_goes_on(small_run, tmp_path):
    folder = make_folder(tmp_path / "run")
    with (
        hold_lock(folder / ".lock", "taken"),
        pytest.raises(UserError, match=r"run: .*working_dir"),
    ):
        small_run()
    assert [path.name for path in folder.iterdir()] == []
    small_run()
    assert not (folder / ".lock").exists()


def test_evals_and_demos_are_made_by_the_averaged_model(small_run):
    folder = small_run(eval_steps=6, eval_demo_steps=6, ema_decay_rate=0.5)
    with read_archive(folder / "evals" / "6.npz") as archive:
        (during,) = archive.batches(10)
    picture = (folder / "figs" / "6.png").read_bytes()
    options = digits_settings(folder, eval_steps=6, eval_demo_steps=6, ema_decay_rate=0.5)
    flags = ["--ckpt-steps=6", "--num-samples=10", "--eval-batch-size=250"]
    inference.main([*options, *flags])
    with read_archive(folder / "evals" / "6_1NFE_42.npz") as archive:
        assert (next(archive.batches(10)) == during).all()
    inference.main(
        [*options, *flags, "--labels=0,0,5,5", "--overwrite", f"--grid={folder / 'g.png'}"]
    )
    assert (folder / "g.png").read_bytes() == picture
