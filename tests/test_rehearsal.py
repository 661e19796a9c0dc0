"""Timing a few steps before a run: no data, no files, one line where they do not fit."""

import re

import pytest
import torch
from commands import digits_settings, run

import dit
import train
from support.runs import budget, rehearsal
from support.system import hardware
from support.system.files import UserError
from support.system.hardware import free_memory_bytes, is_out_of_memory

LATENTS = ["model_type=DiT-Nano-4", "dataset_type=Imagenet", "data_size=8", "cfg_decay_time=1"]
PIXELS = ["model_type=UNet", "dataset_type=CIFAR10", "data_size=32", "cfg_scale=1"]


@pytest.fixture
def unlimited(monkeypatch):
    """Quick, and without a bound on this process's memory, which it could not take back."""
    monkeypatch.setattr(rehearsal, "LEAST_SECONDS", 0)
    monkeypatch.setattr(rehearsal, "limit_memory", lambda: None)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "batch_size"),
    [([], 12), (LATENTS, 12), ([*PIXELS, "cfg_drop_rate=0", "velocity_loss_ratio=0"], 1)],
)
def test_steps_are_timed_without_data_and_files(
    settings, batch_size, tmp_path, capsys, monkeypatch, unlimited
):
    monkeypatch.setattr(rehearsal, "LEAST_STEPS", 2)
    options = digits_settings(tmp_path / "run", batch_size=batch_size, total_steps=1000)
    missing = f"--set=dataset_path={tmp_path / 'missing'}"
    sets = [f"--set={setting}" for setting in settings]
    train.main([*options, missing, *sets, "--dry-run", "--time"])
    said = capsys.readouterr().out
    assert re.search(r"# first step: [0-9.e-]+ s\n# time: [0-9.e+-]+ s a step ", said)
    assert re.search(r"images/s; 1,000 steps take \d+:\d\d:\d\d, without loading data", said)
    assert re.search(r"# memory: [0-9.]+ GB at most in this process; weights, .* of it\n", said)
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_checks_no_data():
    with pytest.raises(UserError, match="--check-data: goes without --dry-run"):
        train.main(["--config", "configs/digits.yaml", "--dry-run", "--check-data"])


def test_time_without_dry_run_is_refused():
    with pytest.raises(UserError, match="--time: goes with --dry-run"):
        train.main(["--config=nowhere.yaml", "--time"])


def test_who_waits_for_minutes_is_told_before_and_after_the_first_step(
    tmp_path, capsys, monkeypatch, unlimited
):
    monkeypatch.setattr(rehearsal, "LONG_SECONDS", 0)
    train.main([*digits_settings(tmp_path / "run"), "--dry-run", "--time"])
    said = capsys.readouterr().out
    assert re.search(
        r"# each may take 0:00:\d+, going by one sample; Ctrl-C ends this here\n", said
    )
    assert re.search(r"# first step: .* s; the others take about 0:.*; Ctrl-C ends this", said)


@pytest.mark.slow
def test_steps_that_do_not_fit_are_refused_in_one_line(tmp_path):
    small = "import support.system.hardware as h; h.free_memory_bytes = lambda device: 4 * 10**8; "
    options = [*digits_settings(tmp_path / "run", batch_size=4000), "--dry-run", "--time"]
    command = f"{small}import train; from support.system.command import run_command; run_command("
    finished = run("-c", f"{command}lambda: train.main({options}))")
    assert finished.returncode == 1
    assert finished.stderr.startswith("error: a step does not fit into the ")
    assert finished.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (RuntimeError("size mismatch"), False),
    ],
)
def test_what_says_that_memory_is_out(error, expected):
    assert is_out_of_memory(error) == expected


def test_free_memory_is_what_the_machine_or_the_container_has_left(tmp_path, monkeypatch):
    cpu = torch.device("cpu")
    assert free_memory_bytes(cpu) > 0
    (tmp_path / "memory.max").write_text("5000\n")
    (tmp_path / "memory.current").write_text("3000\n")
    monkeypatch.setattr(hardware, "CONTAINER", tmp_path)
    assert free_memory_bytes(cpu) == 2000
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory_bytes(cpu) > 2000


def test_the_state_counts_weights_and_average_gradients_and_two_moments():
    model = dit.DiT(dit.SIZES["Nano"], 2, 8, 1, 10, null_class=True)
    weights = sum(p.nbytes for p in model.parameters())
    assert budget.state_bytes(model) == 5 * weights - 3 * model.pos_embed.nbytes
