"""Every config's step, held-out loss and sampling keep to their device, which is not the CPU.

Weights and batches are on the meta device; data and draws are on the CPU, as with a GPU. An
operation on tensors of both devices raises, and so does waiting for a value of the device.
"""

import contextlib
import sys
from pathlib import Path

import pytest
import torch
from commands import ROOT
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sampler
from config import Config, load_config
from support.data.datasets import MadeUpData
from support.runs.metrics import Interval
from support.system.processes import Processes
from support.system.randomness import PerImageStream
from training import execution
from training.draws import draw_batch
from training.held_out import draw_held_out, measure
from training.learner import build_learner

pytestmark = pytest.mark.slow

META = torch.device("meta")
aten = torch.ops.aten
MAY_MIX = {aten.copy_, aten._to_copy, aten.index, aten.index_put_}  # on GPUs, too


class OneDevice(TorchDispatchMode):
    """A block in which an operation on tensors of two devices raises; single numbers may mix."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        devices = {tensor.device.type for tensor in tensors if tensor.dim() > 0}
        if len(devices) > 1 and operation.overloadpacket not in MAY_MIX:
            raise AssertionError(f"{operation} on {devices}")
        return operation(*args, **(kwargs or {}))


class OnMeta(Processes):
    """One process on the meta device; its sums can be read, as zeros."""

    def sum_over_ranks(self, values):
        assert values.device == META
        return torch.zeros(values.shape)


PROCESSES = OnMeta(0, 0, 1, META)


@pytest.fixture(autouse=True)
def able_meta(monkeypatch):
    """Let the meta device draw from seeds and take part in autocast, as a GPU does."""
    real_autocast, adam = torch.autocast, sys.modules[torch.optim.Adam.__module__]

    class Generator(torch.Generator):
        def __new__(cls, device="cpu"):
            return super().__new__(cls, "cpu")

    def autocast(device, *arguments, **options):
        if device == "meta":
            return contextlib.nullcontext()
        return real_autocast(device, *arguments, **options)

    monkeypatch.setattr(torch, "Generator", Generator)
    monkeypatch.setattr(torch, "autocast", autocast)
    monkeypatch.setattr(adam, "_device_dtype_check_for_fused", lambda *_: None)
    monkeypatch.setattr(execution, "obstacle_to_bf16", lambda device: None)


def small(name: str, folder: Path) -> Config:
    """A config of the project with a small DiT, if any, and every option that it can take."""
    source = ROOT / "configs" / f"{name}.yaml"
    for class_name in ("a", "b"):
        (folder / class_name).mkdir()
        (folder / class_name / "1.png").touch()
    settings = [f"dataset_path={folder}", "activation_checkpointing=true", "gradient_clip=1"]
    settings += ["batch_size=8", "accumulation_steps=2", "eval_batch_size=2", "ema_power=[0.1]"]
    kind, _, patch = load_config(source, settings).model_type.rpartition("-")
    settings += [f"model_type=DiT-Nano-{patch}", "precision=bf16"] if kind else []
    settings += ["horizontal_flips=true"] if "folder" in name else []
    return load_config(source, settings)


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "configs").glob("*.yaml")))
def test_a_config_trains_measures_and_samples_on_its_device_alone(name, tmp_path, monkeypatch):
    monkeypatch.setattr(sampler, "refuse_non_finite", lambda images: images)  # it waits for them
    config = small(name, tmp_path)
    plan = config.batch_plan(world_size=1)
    data = MadeUpData(config.data_request(), plan.microbatch_size)
    spec = data.spec
    learner, notes = build_learner(config, PROCESSES, plan, spec.channels, spec.num_classes)
    assert notes == []
    average, interval = learner.state.ema_model, Interval()
    classes = spec.num_classes if config.is_conditional else None
    stream = PerImageStream(0, classes, spec.shape)
    with OneDevice():
        batches = (
            draw_batch(config, plan, data, data.whole(), 0, microbatch, META)
            for microbatch in plan.microbatches_of(0)
        )
        interval.add(learner.step(batches))
        means, _, _ = interval.close(PROCESSES)
        errors = measure(average, draw_held_out(config, data, PROCESSES), PROCESSES)
        for way in sampler.SAMPLERS:
            request = sampler.SampleRequest(2, 2, 2, stream, sampler=way)
            (batch,) = sampler.sample_batches(average, request, PROCESSES, lambda x_0: x_0)
            assert batch.pixels.device == META
    assert {"Vel_MSE", "Con_MSE", "Grad_Norm"} <= means.keys()
    assert all(len(bins) == 4 for bins in errors.values())
