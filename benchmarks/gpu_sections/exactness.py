"""Rounding: the reference's numbers in each precision, and the quotient of the consistency loss."""

import contextlib
import copy
import functools
import itertools
import sys
from collections.abc import Iterator

from measuring import ROOT

# isort: split
import torch
from torch import Tensor

from gpu_sections.bench import Bench, Task, Value
from models import Method, SoFlow, build_model
from schedules import Times
from support.system.hardware import allow_tf32

sys.path.append(str(ROOT / "tests"))
import goldens

GAP_FRACTIONS = (0.1, 0.01, 0.002)


def tasks(bench: Bench) -> list[Task]:
    """Golden numbers in float32 with TF32 and without, quotients in bfloat16 too."""
    names = ("unet",) if bench.is_tiny else ("dit_b4_guided", "dit_trig_guided", "unet")
    exact = itertools.product(names, ("fp32", "tf32"))
    rough = itertools.product(("fp32", "tf32", "bf16"), GAP_FRACTIONS)
    return [
        *(
            Task(f"{name} {precision}", functools.partial(golden_values, bench, name, precision))
            for name, precision in exact
        ),
        *(
            Task(f"quotient {precision}, r = {r}", functools.partial(quotient, bench, precision, r))
            for precision, r in rough
        ),
    ]


@contextlib.contextmanager
def precision_of(bench: Bench, precision: str) -> Iterator[None]:
    """A block in which all of the network is in that precision."""
    if precision == "tf32":
        bench.need_cuda()
    allow_tf32(bench.device, precision == "tf32")
    with torch.autocast(bench.device.type, torch.bfloat16, enabled=precision == "bf16"):
        yield


@functools.lru_cache(maxsize=1)  # filling the weights takes seconds
def golden(name: str, device: torch.device) -> tuple[SoFlow, dict[str, Tensor]]:
    """A model filled by rule, and the reference's numbers for it."""
    arrays, meta = goldens.load(name)
    channels, classes = (3, 10) if meta["model_type"] == "UNet" else (4, 1000)
    keys = ("cfg_drop_rate", "noising_type", "coefficient_type")
    model = build_model(
        meta["model_type"], channels, 32, classes, *(meta[key] for key in keys)
    ).eval()
    goldens.fill_weights(model.network)
    return model.to(device), {key: array.to(device) for key, array in arrays.items()}


@torch.no_grad()
def golden_values(bench: Bench, name: str, precision: str) -> Iterator[Value]:
    """Relative errors of the network, velocity and solution; 1e-5 is reached on a CPU."""
    with precision_of(bench, precision):
        model, arrays = golden(name, bench.device)
        x, t, s = arrays["in_x0"], arrays["in_t"], arrays["in_s"]
        given = {
            key: arrays[f"in_{key}"]
            for key in ("labels", "augment_labels")
            if f"in_{key}" in arrays
        }
        outputs = {
            "network": model.network(x, t, t - s, **given),
            "velocity": model.velocity(x, t, **given),
            "solution": model.solution(x, t, s, **given),
        }
    for output, value in outputs.items():
        error = goldens.relative_error(value, arrays[output])
        yield Value(f"{name} {precision} {output}", error, "relative error")


@torch.no_grad()
def quotient(bench: Bench, precision: str, r: float) -> Iterator[Value]:
    """The error of (f(x_t, t, s) - f(x_l, l, s)) / (t - l) against float64, at gap fraction r."""
    with precision_of(bench, precision):
        model, exact, x, labels = quotient_models(bench)
        t, s = x.new_tensor([0.7, 0.5, 0.9, 0.3]), x.new_tensor([0.2, 0.3, 0.1, 0.05])
        times = Times(t, t + (s - t) * r, s)
        actual = quotient_of(model, x, labels, times)
    expected = quotient_of(exact, x.double(), labels, times)
    error = goldens.relative_error(actual.double(), expected)
    yield Value(f"quotient {precision}, r = {r}", error, "relative error")


@functools.lru_cache(maxsize=1)
def quotient_models(bench: Bench) -> tuple[Method, Method, Tensor, Tensor]:
    """A model, the same in float64, and x_t with labels."""
    model_type = next(iter(bench.batches))
    model = build_model(model_type, 4, 32, 1000, 0.1).eval()
    goldens.fill_weights(model.network)
    model.to(bench.device)
    source = torch.Generator().manual_seed(0)
    x = torch.randn(4, 4, 32, 32, generator=source).to(bench.device)
    labels = torch.arange(4, device=bench.device)
    return model, copy.deepcopy(model).double(), x, labels


def quotient_of(model: Method, x_t: Tensor, labels: Tensor, times: Times) -> Tensor:
    """The quotient along a velocity that is the same in all precisions."""
    t, l, s = (time.to(x_t.dtype) for time in times)  # noqa: E741
    x_l = x_t * (1 + (l - t)).view(-1, 1, 1, 1)
    f_t, f_l = model.jump(x_t, t, s, labels), model.jump(x_l, l, s, labels)
    return (f_t - f_l) / (t - l).view(-1, 1, 1, 1)
