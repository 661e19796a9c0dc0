"""Before a run: what it needs, by counting and by timing a few steps; no data, no files."""

import re

import pytest
import torch
from commands import ROOT, digits_settings, run

import dit
import train
from config import load_config
from support.data.batches import BatchPlan
from support.data.datasets import MadeUpData
from support.runs import budget, rehearsal
from support.runs.budget import activation_bytes
from support.system import hardware
from support.system.files import UserError
from support.system.hardware import free_memory_bytes, is_out_of_memory
from training import preview
from training.draws import draw_batch

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
    assert re.search(r"# first step: [0-9.e-]+ s.* 0:00:\d\d", said)
    assert re.search(r"# time: [0-9.e+-]+ s .* 1,000 steps take \d+:\d\d:\d\d", said)
    assert re.search(r"# measured memory: .*[0-9.]+ GB", said)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "named"), [(["--dry-run", "--check-data"], "--check-data"), (["--time"], "--time")]
)
def test_options_that_ask_a_dry_run_for_too_much_are_refused(options, named):
    with pytest.raises(UserError, match=f"^{named}: "):
        train.main(["--config", "configs/digits.yaml", *options])


# The estimate


def described(capsys, name: str, *settings: str) -> str:
    """What a dry run says of a config's needs."""
    preview.describe(load_config(ROOT / "configs" / f"{name}.yaml", settings))
    return capsys.readouterr().out


def gigabytes(text: str) -> float:
    """The number before a unit."""
    number, unit = re.search(r"([0-9.]+) ([kMG]?B)", text).groups()
    return float(number) * {"GB": 1, "MB": 1e-3, "kB": 1e-6, "B": 1e-9}[unit]


def activations(said: str) -> float:
    return gigabytes(re.search(r"activations .*", said)[0])


def test_a_dry_run_tells_epochs_activations_and_the_copy_of_a_checkpoint(capsys):
    said = described(capsys, "imagenet_xl2")
    assert "307,200,000 images, 239.8 epochs of Imagenet's 1,281,167" in said
    assert activations(said) == pytest.approx(170, rel=0.05)
    total = gigabytes(re.search(r"memory per process.*", said)[0])
    assert total == pytest.approx(activations(said) + 5 * 2.707, rel=0.01)
    assert gigabytes(re.search(r"host memory.*", said)[0]) == pytest.approx(10.83)


def test_activations_shrink_with_the_microbatch_and_with_checkpointing(capsys):
    small = ("model_type=DiT-S-2", "batch_size=64")
    whole = activations(described(capsys, "imagenet", *small))
    cut = activations(described(capsys, "imagenet", *small, "accumulation_steps=4"))
    assert cut == pytest.approx(whole / 4, rel=0.02)
    recomputed = activations(described(capsys, "imagenet", *small, "activation_checkpointing=true"))
    assert recomputed < whole / 8


@pytest.mark.parametrize("is_checkpointing", [False, True])
def test_counted_activations_are_those_that_a_real_step_keeps(is_checkpointing):
    settings = ("model_type=DiT-Nano-4", f"activation_checkpointing={is_checkpointing}")
    config = load_config(ROOT / "configs" / "imagenet.yaml", settings)
    torch.manual_seed(0)
    model = preview.meta_model(config, "cpu")
    model.network.activation_checkpointing = is_checkpointing
    data = MadeUpData(config.data_request(), 40)
    plan = BatchPlan(40, 30, 1, 1)
    batch = draw_batch(config, plan, data, data.whole(), 0, 0, torch.device("cpu"))
    real = activation_bytes(lambda: model(batch).loss, model.parameters())
    assert preview.activations_of(config, 40) == pytest.approx(real, rel=0.01)


def test_the_state_counts_weights_and_average_gradients_and_two_moments():
    model = dit.DiT(dit.SIZES["Nano"], 2, 8, 1, 10, null_class=True)
    weights = sum(p.nbytes for p in model.parameters())
    assert budget.state_bytes(model) == 5 * weights - 3 * model.pos_embed.nbytes


# Memory that is there


@pytest.mark.slow
def test_steps_that_do_not_fit_are_refused_in_one_line(tmp_path):
    small = "import support.system.hardware as h; h.free_memory_bytes = lambda device: 4 * 10**8; "
    options = [*digits_settings(tmp_path / "run", batch_size=4000), "--dry-run", "--time"]
    command = f"{small}import train; from support.system.command import run_command; run_command("
    finished = run("-c", f"{command}lambda: train.main({options}))")
    assert finished.returncode == 1
    assert re.fullmatch(r"error: .* (3|4)\d\d MB .*accumulation_steps.*\n", finished.stderr)


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
