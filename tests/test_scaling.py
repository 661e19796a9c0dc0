"""Estimates for GPUs that are not here: what is counted, by known numbers; what is refused."""

import json
import re

import pytest
import torch
from commands import ROOT, digits_settings

from training import preview
import train
from config import Config, load_config
from training.draws import draw_batch
from models import backbone_of
from support.data.batches import BatchPlan
from support.data.datasets import MadeUpData
from support.runs import scaling
from support.runs.counting import Counting, count
from support.runs.gpus import GPUS, find_gpu
from support.system.files import UserError


def recipe(name: str, *settings: str) -> Config:
    return load_config(ROOT / "configs" / f"{name}.yaml", settings)


@pytest.fixture(scope="module")
def small():
    """A recipe of latents, for a small network."""
    return recipe("imagenet", "model_type=DiT-Nano-4", "batch_size=40")


def forward_flops(config: Config) -> float:
    """Of one image."""
    with preview.FakeTensorMode(), Counting() as counting, torch.no_grad():
        x, t = torch.empty(1, 4, 32, 32), torch.empty(1)
        labels = torch.empty(1, dtype=torch.int64)
        preview.hollow_model(config, "cpu").eval().jump(x, t, t, labels)
    return sum(counting.flops.values())


def test_a_forward_pass_counts_what_the_dit_paper_says():
    # Table 4 of arXiv 2212.09748, in multiplications; ours has a second time embedding besides.
    assert forward_flops(recipe("imagenet")) / 2e9 == pytest.approx(5.56, rel=0.005)


@pytest.mark.parametrize(
    ("settings", "forwards"),
    [
        # 0.75 (3 + 0.9) + 0.25 (3 + 1 + 1.8), of which backward 2
        ([], 4.375),
        (["activation_checkpointing=true"], 5.375),
        (["cfg_scale=1", "cfg_drop_rate=0"], 3.25),
    ],
)
def test_a_step_counts_the_forward_passes_that_it_makes(small, settings, forwards):
    config = recipe("imagenet", "model_type=DiT-Nano-4", *settings)
    counts = preview.count_step(config, config.activation_checkpointing)
    flops, backward_share = preview.step_flops(config, counts)
    assert flops["tf32"] / forward_flops(config) == pytest.approx(forwards, rel=0.01)
    backward = 3 if config.activation_checkpointing else 2
    assert backward_share == pytest.approx(backward / forwards, rel=0.01)


def test_in_bf16_only_the_consistency_passes_count_as_tf32(small):
    config = small.model_copy(update={"precision": "bf16"})
    flops, _ = preview.step_flops(config, preview.count_step(config, False))
    assert flops["tf32"] / forward_flops(config) == pytest.approx(0.25 * 4, rel=0.01)


@pytest.mark.parametrize("is_checkpointing", [False, True])
def test_counted_activations_are_those_that_a_real_step_keeps(small, is_checkpointing):
    config = small.model_copy(update={"cfg_drop_rate": 0.1})
    torch.manual_seed(0)
    model = preview.hollow_model(config, "cpu")
    model.network.activation_checkpointing = is_checkpointing
    plan = BatchPlan(40, 30, 1, 1)
    data = MadeUpData(config.data_request(), 40)
    batch = draw_batch(config, plan, data, data.whole(), 0, 0, torch.device("cpu"))
    real = count(lambda: model(batch).loss, model.parameters())
    counted = preview.count_step(config, is_checkpointing)
    assert counted.kept_bytes == pytest.approx(real.kept_bytes, rel=0.01)
    assert counted.kernels == pytest.approx(real.kernels, rel=0.02)


def test_a_ring_exchanges_twice_the_gradients_but_for_the_own_share():
    assert scaling.exchanged_bytes(100, 1) == 0
    assert scaling.exchanged_bytes(100, 2) == 100
    assert scaling.exchanged_bytes(100, 64) == 200 * 63 / 64


# The estimate, in numbers that can be worked out by hand


def estimate(world_size=16, accumulation_steps=1, image_seconds=0.01, **changed):
    work = scaling.Workload(
        plan=BatchPlan(64, 48, world_size, accumulation_steps),
        flops={"tf32": 1e12},
        backward_share=0.5,
        kernels=1000,
        image_bytes={False: 20e9, True: 1e9},
        is_checkpointing=False,
        weight_bytes=1e9,
        gradient_bytes=1e9,
        state_bytes=5e9,
        checkpoint_bytes=4e9,
        saves=10,
        total_steps=86400,
    )
    return scaling.Estimate(
        scaling.replace(work, **changed), GPUS["h100"], image_seconds, 0.0, "a test"
    )


def test_a_step_waits_for_the_gpu_or_for_launches():
    assert estimate().alone_seconds == pytest.approx(4 * 0.01)
    assert estimate(image_seconds=1e-6).alone_seconds == pytest.approx(0.008)
    assert estimate(accumulation_steps=4, image_seconds=1e-6).alone_seconds == pytest.approx(0.032)


def test_an_exchange_hides_behind_the_backward_pass_and_no_more():
    text = "\n".join(estimate().lines())
    # 1.875 GB at 0.8 x 50 GB/s, of which 20 ms hide behind half of 40 ms.
    assert re.search(r"\n400 Gb/s InfiniBand +0\.047 +40% to 54% +0\.067 to 0\.087\n", text)
    assert re.search(r"\nNVLink in a machine +0\.0052 +0% to 12% +0\.04 to 0\.045\n", text)


def test_one_machine_needs_no_network_and_one_gpu_exchanges_nothing():
    assert "InfiniBand" not in "\n".join(estimate(world_size=8).lines())
    assert "whole run: 0.64 days; nothing is exchanged" in list(estimate(world_size=1).lines())


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (
            {"image_bytes": {False: 16e9, True: 1e9}},
            "together 69 GB of the 72 GB that can be used: fits",
        ),
        ({}, "does not fit; accumulation_steps: 2, or activation_checkpointing: true would"),
        (
            {"image_bytes": {False: 70e9, True: 30e9}},
            "does not fit; activation_checkpointing: true with accumulation_steps: 2 would",
        ),
        (
            {"is_checkpointing": True, "image_bytes": {True: 30e9}},
            "does not fit; accumulation_steps: 2 would",
        ),
        ({"state_bytes": 80e9}, "does not fit; a single image is too much"),
    ],
)
def test_what_does_not_fit_is_told_what_would(changed, said):
    (line,) = (line for line in estimate(**changed).lines() if line.startswith("memory"))
    assert line.endswith(said)


def test_a_gpu_without_tf32_computes_in_fp32():
    v100, _ = find_gpu("V100")
    assert v100.arithmetic_seconds({"tf32": 15.7e12}) == pytest.approx(1 / 0.6)


# The command


def estimated(capsys, *options: str) -> str:
    """What the command prints of its estimate."""
    train.main([f"--config={ROOT / 'configs' / 'imagenet.yaml'}", "--dry-run", *options])
    before, found, after = capsys.readouterr().out.partition("# estimate: ")
    assert "\n# disk: " in before
    assert all(line.startswith("# estimate: ") for line in (found + after).splitlines())
    return found + after


def measurements(path, **rows: float) -> str:
    """A file of measurements; of the rows' names the first word is the section."""
    listed = [
        {
            "section": name.split(" ", 1)[0],
            "name": name.split(" ", 1)[1],
            "value": value,
            "unit": "",
        }
        for name, value in rows.items()
    ]
    content = {"device": "NVIDIA A100-SXM4-80GB", "date": "2026-01-01", "torch": "2.7.1"}
    path.write_text(json.dumps({**content, "rows": listed}))
    return f"--gpu={path}"


SMALL = ("--set=model_type=DiT-Nano-4", "--gpus=8")


def test_every_line_of_the_estimate_says_that_it_is_one(capsys):
    said = estimated(capsys, *SMALL, "--gpu=h100")
    assert "8 x NVIDIA H100 SXM 80 GB, 1 machine; batch 256 = 8 processes x 32 x 1" in said
    assert "speed: NVIDIA's published figures, 35% of the tf32 peak assumed" in said


def test_measured_rows_are_used_before_figures(capsys, tmp_path):
    rows = {"step DiT-Nano-4 tf32": 0.01, "step DiT-B-4 tf32": 9.0, "step XL tf32": 5.0}
    memory = {"memory DiT-Nano-4 state": 1e9, "memory DiT-Nano-4 activations": 1e9}
    said = estimated(capsys, *SMALL, measurements(tmp_path / "a.json", **rows, **memory))
    assert "8 x NVIDIA A100" in said
    assert "json has of DiT-Nano-4 tf32 on NVIDIA A100-SXM4-80GB\n" in said
    assert "step: 0.32 s without exchange" in said
    assert "activations 32 x 1 GB, together 33 GB of" in said


def test_a_row_of_another_network_is_scaled_by_flops_and_named(capsys, tmp_path):
    asked = measurements(tmp_path / "a.json", **{"step DiT-Ti-4 tf32": 0.01, "step UNet tf32": 1.0})
    said = estimated(capsys, *SMALL, asked)
    ratio = re.search(r"has of DiT-Ti-4 tf32 on .*, times (0\.\d+) for the FLOPs\n", said)
    seconds = re.search(r"step: ([\d.]+) s", said)
    assert float(seconds[1]) == pytest.approx(32 * 0.01 * float(ratio[1]), rel=0.02)


def test_without_a_row_of_the_precision_figures_are_used_and_it_is_said(capsys, tmp_path):
    asked = measurements(tmp_path / "a.json", **{"step DiT-Nano-4 bf16": 0.01})
    assert "has no step in tf32; so by NVIDIA's published figures" in estimated(
        capsys, *SMALL, asked
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--gpus=8", "--gpu=h10"], "--gpu h10: is not one of v100, .*; did you mean h100?"),
        (["--gpus=60", "--gpu=h100"], "--gpus 60: batch_size: 256 cannot be cut into 60 processes"),
        (["--gpus=0", "--gpu=h100"], "--gpus 0: must be 1 or more"),
        (["--gpus=8"], "--gpus and --gpu: give both"),
        (["--gpu=h100"], "--gpus and --gpu: give both"),
        (["--gpus=8", "--gpu=no.json"], r"--gpu no.json: cannot be read \(No such file"),
    ],
)
def test_what_cannot_be_estimated_is_refused_before_anything_is_printed(options, said, capsys):
    with pytest.raises(UserError, match=said):
        train.main([f"--config={ROOT / 'configs' / 'imagenet.yaml'}", "--dry-run", *options])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"device": "H100", "rows": [1]}', "[" * 10**5])
def test_a_file_that_is_something_else_is_refused(text, tmp_path):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match=r"is not a file that benchmarks/gpu\.py has written"):
        find_gpu(str(tmp_path / "a.json"))


def test_measurements_of_a_device_that_is_not_known_are_refused(tmp_path):
    (tmp_path / "a.json").write_text('{"device": "AMD EPYC", "rows": []}')
    with pytest.raises(UserError, match="measured on 'AMD EPYC', whose memory and links are not"):
        find_gpu(str(tmp_path / "a.json"))


def test_gpus_without_dry_run_are_refused(tmp_path):
    with pytest.raises(UserError, match="--gpus and --gpu: go with --dry-run"):
        train.main([*digits_settings(tmp_path), "--gpus=8", "--gpu=h100"])


def test_every_recipe_of_the_benchmark_is_found():
    for model_type in ("DiT-B-4", "UNet"):
        config = preview.published_config(model_type, "fp32")
        assert config.model_type == model_type
        assert backbone_of(model_type).is_conditional == config.is_latent


def test_the_document_shows_what_the_command_prints(capsys):
    text = (ROOT / "docs" / "scaling.md").read_text()
    config, gpus = re.search(
        r"--config configs/(\w+).yaml --dry-run --gpus (\d+) --gpu h100", text
    ).groups()
    shown = text.partition("```text\n")[2].partition("```")[0]
    preview.describe(recipe(config), int(gpus), "h100")
    printed = capsys.readouterr().out.partition("# estimate: ")[2]
    number = r"\d[\d,.]*"
    wording = [" ".join(re.sub(number, "N", each).split()) for each in (shown, printed)]
    assert wording[0].removeprefix("estimate: ") == wording[1].replace("# estimate:", "estimate:")
    # Another version of torch may launch a few kernels more.
    numbers = [
        [float(n.rstrip(",.").replace(",", "")) for n in re.findall(number, each)]
        for each in (shown, printed)
    ]
    assert numbers[0] == pytest.approx(numbers[1], rel=0.1)
