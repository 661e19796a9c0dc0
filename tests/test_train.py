"""Training: exact continuation, results that are due, refusals before any work."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
import yaml
from checkpoints import assert_equal, load, numbers_of, state_of
from commands import ROOT, digits_settings, succeed
from PIL import Image

import inference
import train
from models import Execution
from support.scores.npz import read_archive
from support.system.files import UserError, make_folder
from support.system.locks import hold_lock
from training import outputs


@pytest.fixture
def small_run(tmp_path):
    """A folder and a function that trains in it, in this process, with some settings replaced."""

    def start(*flags: str, folder: str = "run", **values):
        train.main([*digits_settings(tmp_path / folder, **values), *flags])
        return tmp_path / folder

    return start


@pytest.mark.slow
def test_six_steps_equal_three_a_new_process_and_three(tmp_path):
    # 100 samples a step: an epoch has 11 steps, so that the break is in the middle of one, and
    # evals and demos lie between the halves of one run only.
    settings = {"batch_size": 100, "num_workers": 2, "ckpt_saving_steps": 3}
    whole = ["train.py", *digits_settings(tmp_path / "whole", **settings)]
    parts = ["train.py", *digits_settings(tmp_path / "parts", **settings, eval_steps=2)]
    assert "fresh run" in succeed(*whole)
    succeed(*parts, "--set=eval_demo_steps=1")
    (tmp_path / "parts" / "ckpts" / "6.pt").unlink()
    assert "resumed at step 3" in succeed(*parts)
    assert_equal(state_of(load(tmp_path / "whole", 6)), state_of(load(tmp_path / "parts", 6)))


def test_metrics_of_a_run_broken_between_two_log_lines_are_those_of_an_unbroken_one(small_run):
    settings = {"logging_steps": 4, "total_steps": 8}
    whole = small_run(folder="whole", **settings)
    broken = small_run(folder="broken", ckpt_saving_steps=3, **settings)
    for step in (6, 8):
        (broken / "ckpts" / f"{step}.pt").unlink()
    small_run(folder="broken", ckpt_saving_steps=3, **settings)  # from 3 on
    numbers = numbers_of(whole)
    assert [line["step"] for line in numbers] == [4, 8]
    assert [line["images"] for line in numbers] == [48, 96]
    assert numbers[1]["epoch"] == pytest.approx(96 / (1197 // 12 * 12))
    assert {"Vel_MSE", "Con_MSE", "Grad_Norm", "Gap_Fraction", "Learning_Rate"} < numbers[0].keys()
    assert numbers_of(broken) == numbers


def test_accumulation_in_two_runs_equals_one(small_run):
    whole = small_run(folder="whole", accumulation_steps=3)
    broken = small_run(folder="broken", accumulation_steps=3, ckpt_saving_steps=2)
    for step in (4, 6):
        (broken / "ckpts" / f"{step}.pt").unlink()
    small_run(folder="broken", accumulation_steps=3, ckpt_saving_steps=2)
    assert_equal(state_of(load(whole, 6)), state_of(load(broken, 6)))


def test_the_first_and_the_last_step_are_saved_and_a_finished_run_does_nothing(small_run, capsys):
    folder = small_run()
    assert sorted(path.name for path in (folder / "ckpts").glob("*.pt")) == ["0.pt", "6.pt"]
    before = {path: path.stat().st_mtime_ns for path in (folder / "ckpts").iterdir()}
    capsys.readouterr()
    small_run()
    assert "6 steps" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (folder / "ckpts").iterdir()} == before


def test_checkpoint_has_the_form_of_the_reference(small_run):
    folder = small_run()
    checkpoint = load(folder, 6)
    assert list(checkpoint)[:5] == [
        "model", "ema_model", "optimizer", "finished_steps", "finished_epochs",
    ]  # fmt: skip
    assert checkpoint["finished_steps"] == 6
    assert checkpoint["finished_epochs"] == 0
    assert list(checkpoint["model"]) == list(checkpoint["ema_model"])
    assert all(name.startswith("network.") for name in checkpoint["model"])
    assert all(tensor.dtype == torch.float32 for tensor in checkpoint["ema_model"].values())
    (group,) = checkpoint["optimizer"]["param_groups"]
    assert group["params"] == list(range(len(checkpoint["model"])))
    # Entry 0 is pos_embed, which takes no gradient.
    assert sorted(checkpoint["optimizer"]["state"]) == group["params"][1:]
    assert next(iter(checkpoint["model"])) == "network.pos_embed"
    assert set(checkpoint["optimizer"]["state"][1]) == {"step", "exp_avg", "exp_avg_sq"}


def test_checkpoint_with_the_references_five_keys_alone_resumes(small_run):
    whole = small_run(folder="whole")
    small_run(folder="five", ckpt_saving_steps=3)
    folder = whole.parent / "five"
    checkpoint = load(folder, 3)
    for step in (0, 6):
        (folder / "ckpts" / f"{step}.pt").unlink()
    five = {key: checkpoint[key] for key in list(checkpoint)[:5]}
    torch.save(five, folder / "ckpts" / "3.pt")
    (folder / "config.yaml").unlink()
    small_run(folder="five", ckpt_saving_steps=3)
    assert_equal(state_of(load(whole, 6)), state_of(load(folder, 6)))


def test_results_that_are_due_are_made_with_their_records(small_run):
    folder = small_run(eval_steps=3, eval_demo_steps=2, eval_batch_size=4, eval_NFE=2)
    assert sorted(path.name for path in (folder / "figs").iterdir()) == ["2.png", "4.png", "6.png"]
    with Image.open(folder / "figs" / "2.png") as picture:
        assert picture.size == (2 * 50, 2 * 50)
    evals = sorted(path.name for path in (folder / "evals").iterdir())
    assert evals == ["3.json", "3.npz", "6.json", "6.npz"]
    with read_archive(folder / "evals" / "6.npz") as archive:
        assert archive.images_header().shape == (10, 8, 8, 1)
    record = json.loads((folder / "evals" / "6.json").read_text())
    assert record["num_images"] == 10
    assert record["NFE"] == 2
    assert record["seed"] == 42
    assert record["config"]["batch_size"] == 12
    assert len(record["config_sha256"]) == len(record["weights_sha256"]) == 64
    assert json.loads((folder / "ckpts" / "6.json").read_text())["finished_steps"] == 6
    assert not list(folder.rglob("*.tmp"))


def test_a_result_missing_at_the_step_of_the_last_checkpoint_is_made_on_resume(small_run):
    folder = small_run(eval_steps=6, eval_demo_steps=6)
    for path in (folder / "evals" / "6.npz", folder / "figs" / "6.png"):
        content = path.read_bytes()
        path.unlink()
        small_run(eval_steps=6, eval_demo_steps=6)
        assert path.read_bytes() == content


def test_log_has_all_metrics_and_how_the_run_started(small_run):
    folder = small_run()
    text = (folder / "log.txt").read_text()
    assert "fresh run" in text
    assert "12 = 1 process x 12 x 1 accumulation" in text
    assert text.count("Step: ") == 3
    for word in (
        "Step: 6/6 (100.0%)",
        "Vel_MSE",
        "Vel_Weight",
        "Con_MSE",
        "Con_Weight",
        "Grad_Norm",
        "Memory",
        "Seconds",
        "ETA",
    ):
        assert word in text


def test_log_has_the_gap_and_the_learning_rate_of_the_step_just_done(small_run):
    folder = small_run(warmup_steps=4, l_schedule="Linear", l_init_ratio=0.6, l_end_ratio=0.3)
    lines = [line for line in (folder / "log.txt").read_text().splitlines() if "Step: " in line]
    # The second, fourth and sixth step of six.
    expected = [("0.55", "0.001"), ("0.45", "0.002"), ("0.35", "0.002")]
    for line, (gap, rate) in zip(lines, expected, strict=True):
        assert f", Gap_Fraction: {gap}, Learning_Rate: {rate}, Memory: " in line
        assert re.search(r"GB, Seconds: [0-9.]+, Images/s: [0-9.]+, ETA: ", line)


@pytest.mark.parametrize(
    ("seconds", "said"), [(9.9, []), (74.2, ["first step: 74.2 s"])], ids=["short", "long"]
)
@pytest.mark.parametrize("is_compiled", [False, True])
def test_a_first_step_that_is_long_or_compiles_is_said(seconds, said, is_compiled):
    lines: list[str] = []
    execution = Execution(fixed_shapes=is_compiled)
    state = SimpleNamespace(model=SimpleNamespace(execution=execution))
    run = SimpleNamespace(
        learner=SimpleNamespace(state=state), logbook=SimpleNamespace(line=lines.append)
    )
    train.log_first_step(run, seconds)
    assert lines == ([f"first step: {seconds} s, compiling included"] if is_compiled else said)


def test_the_first_step_of_a_run_is_timed_once(small_run, monkeypatch):
    monkeypatch.setattr(outputs, "LONG_SECONDS", 0)
    text = (small_run() / "log.txt").read_text()
    assert len(re.findall(r"first step: [0-9.e-]+ s\n", text)) == 1
    assert text.index("first step: ") < text.index("Step: 2/6")


def test_recorded_config_loads_to_the_same_config_and_is_never_overwritten(small_run, capsys):
    folder = small_run()
    recorded = (folder / "config.yaml").read_text()
    assert yaml.safe_load(recorded)["optimizer"] == "AdamW"
    train.main(["--config", str(folder / "config.yaml")])
    assert "finished" in capsys.readouterr().out
    small_run(logging_steps=3)
    assert "logging_steps changed: 2 -> 3" in capsys.readouterr().out
    assert (folder / "config.yaml").read_text() == recorded


def test_a_run_that_a_full_disk_ended_at_its_start_binds_nobody(small_run, monkeypatch):
    """Its config.yaml describes nothing that was trained: another batch size may follow."""
    with monkeypatch.context() as full_disk:
        full_disk.setattr(train, "make_result", lambda run, path: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            small_run()
    assert (small_run(batch_size=6) / "config.yaml").read_text().count("batch_size: 6\n") == 1
    with pytest.raises(UserError, match="batch_size 6 -> 12"):
        small_run()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--learning-rate", "1e-4"], r"^--learning-rate: .*--set learning_rate=1e-4"),
        (["--batch_size=3"], "^--batch_size: .*--set batch_size=3"),
        (["--seed", "-1"], "^--seed: .*--set seed=-1"),
        (["--compile", "--dry-run"], "^--compile: .*--set compile=VALUE"),
    ],
)
def test_a_key_among_the_options_is_answered_with_set(words, said):
    with pytest.raises(UserError, match=said):
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
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(UserError) as refusal:
        small_run(seed=1, p=0.5)
    message = str(refusal.value)
    assert "p 1.0 -> 0.5" in message
    assert "seed 42 -> 1" in message
    assert "--allow-changed p --allow-changed seed" in message
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    with pytest.raises(UserError, match=r"model_type .*DiT-Nano-4.*working_dir"):
        small_run(model_type="DiT-Nano-4")
    small_run("--allow-changed", "total_steps", total_steps=8)
    assert load(folder, 8)["finished_steps"] == 8


def test_changed_learning_rate_takes_effect_and_is_said(small_run, capsys):
    folder = small_run(ckpt_saving_steps=3)
    (folder / "ckpts" / "6.pt").unlink()
    small_run(ckpt_saving_steps=3, learning_rate=0.01)
    assert "learning_rate changed: 0.002 -> 0.01" in capsys.readouterr().out
    assert load(folder, 6)["optimizer"]["param_groups"][0]["lr"] == 0.01


def test_a_run_whose_checkpoints_are_all_unreadable_is_not_started_afresh(small_run):
    folder = small_run()
    for path in (folder / "ckpts").glob("*.pt"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match=r"ckpts: .*6\.pt"):
        small_run()


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
    ("values", "message"),
    [
        ({"batch_size": 2000}, "batch_size: 2000 .*1197.*Digits"),
        ({"accumulation_steps": 5}, "accumulation_steps: 5 .*batch_size 12"),
        ({"device": "cuda"}, "device: 'cuda'"),
    ],
)
def test_what_cannot_run_is_refused_before_a_folder_is_made(small_run, tmp_path, values, message):
    with pytest.raises(UserError, match=message):
        small_run(**values)
    assert not (tmp_path / "run").exists()


def test_working_dir_below_a_file_is_refused_in_one_line(small_run, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="working_dir: "):
        small_run(folder="file/run")


def test_checkpoint_of_another_model_is_refused_with_the_difference(small_run):
    folder = small_run(model_type="DiT-Nano-4", folder="other")
    target = folder.parent / "run"
    small_run()
    for path in (target / "ckpts").glob("*.pt"):
        path.unlink()
    checkpoint = {key: value for key, value in load(folder, 6).items() if key != "config"}
    torch.save(checkpoint, target / "ckpts" / "6.pt")
    with pytest.raises(UserError) as refusal:
        small_run()
    assert "weights of another model" in str(refusal.value)
    assert "network.pos_embed: [1, 4, 128] in the file, [1, 16, 128] in the model" in str(
        refusal.value
    )


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


def test_a_refused_resume_leaves_the_folder_as_it_was(small_run):
    """A five-key file says nothing of its config; a wrong one must not be recorded for it."""
    whole = small_run(folder="whole")
    folder = whole.parent / "run"
    (folder / "ckpts").mkdir(parents=True)
    content = load(whole, 6)
    torch.save({key: content[key] for key in list(content)[:5]}, folder / "ckpts" / "6.pt")
    with pytest.raises(UserError, match=r"6\.pt: "):
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


def test_a_loss_that_is_not_finite_stops_the_run_before_anything_is_saved(small_run, tmp_path):
    with pytest.raises(UserError, match=r"step \d+: .*_MSE"):
        small_run(learning_rate=1e18, ckpt_saving_steps=1, eval_demo_steps=1)
    for path in (tmp_path / "run" / "ckpts").glob("*.pt"):
        weights = load(tmp_path / "run", int(path.stem))["model"]
        assert all(tensor.isfinite().all() for tensor in weights.values()), path.name


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


def test_other_data_than_the_checkpoint_was_trained_on_are_refused(small_run):
    folder = small_run()
    content = load(folder, 6)
    content["data"]["class_names"][3] = "drei"
    torch.save(content, folder / "ckpts" / "6.pt")
    with pytest.raises(UserError, match=r"drei.*"):
        small_run()
