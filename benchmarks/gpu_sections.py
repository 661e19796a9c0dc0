"""The sections of benchmarks/gpu.py, which runs each in a process of its own; prints JSON rows."""

import gc
import itertools
import json
import math
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
from measuring import ROOT, bench_config, bench_learner, drawn_batches, raw_batch, step_of
from PIL import Image

# isort: split
import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile
from torch.utils.benchmark import Timer

from models import Batch
from sampler import sample
from support.data.images import to_pixels
from support.system.files import shorten
from support.system.hardware import allow_tf32, is_out_of_memory
from support.system.processes import Processes, exchanging_gradients
from training.learner import Learner

LEAST_BATCH = 4
# Batches to begin with; a batch that does not fit is halved.
BATCHES = {"DiT-B-4": 256, "UNet": 128, "DiT-XL-2": 64}
VARIANTS = {
    "bf16": ("precision=bf16",),
    "fp32": ("precision=fp32",),
    "tf32": ("precision=tf32",),
    "bf16 checkpointed": ("precision=bf16", "activation_checkpointing=true"),
    "bf16 compiled": ("precision=bf16", "compile=true"),
}

Values = Iterator[tuple[str, float | str, str]]  # what, value, unit


class Skipped(Exception):  # noqa: N818 - no error
    """Why a value is missing although nothing failed."""


@dataclass(frozen=True)
class Bench:
    """Where a section runs, and how much it does."""

    device: torch.device
    is_tiny: bool
    folder: Path  # for temporary files

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def batches(self) -> dict[str, int]:
        """Batch sizes by model type."""
        return {"DiT-Nano-4": LEAST_BATCH} if self.is_tiny else BATCHES

    def need_gpu(self) -> None:
        if not self.on_gpu:
            raise Skipped("needs CUDA")

    def learner(self, model_type: str, batch: int, *settings: str, device: str = "") -> Learner:
        """A learner of the published recipe; Skipped if the device lacks what it asks for."""
        if {"precision=tf32", "compile=true"} & {*settings}:
            self.need_gpu()
        place = torch.device(device or self.device)

        def refuse(note: str) -> None:
            if "goes on without" in note:
                raise Skipped(note)

        with place:  # on a CPU, the initial weights of a large model take ten seconds
            config = bench_config(model_type, batch, *settings, device=place.type)
            return bench_learner(config, Processes(0, 0, 1, place), refuse)

    def seconds(self, work: Callable[[], object]) -> float:
        """Median seconds of a warm call, the device's work included."""
        timer = Timer("work()", globals={"work": work}, num_threads=torch.get_num_threads())
        return (timer.timeit(1) if self.is_tiny else timer.blocked_autorange(min_run_time=2)).median


def beside_cpu(bench: Bench, model_type: str, precision: str) -> Values:
    """A step's gradient and sampled pixels beside the CPU's, from the same weights and draws."""
    if precision == "tf32":
        bench.need_gpu()
    here = bench.learner(model_type, LEAST_BATCH)
    reference = bench.learner(model_type, LEAST_BATCH, device="cpu")
    reference.state.model.load_state_dict(here.state.model.state_dict())
    allow_tf32(bench.device, precision == "tf32")
    (drawn,) = drawn_batches(reference, raw_batch(reference))
    gradients, pixels = [], []
    for learner in (here, reference):
        model = learner.state.model.eval()  # dropout masks differ by device
        batch = on(learner.processes.device, drawn)
        learner.accumulate_gradients(iter([batch]))
        trained = [p.grad.cpu().flatten() for p in model.parameters() if p.grad is not None]
        gradients.append(torch.cat(trained))
        pixels.append(to_pixels(sample(model, [batch.x_1], batch.labels)[:, :3]).cpu().int())
    error = (gradients[0] - gradients[1]).norm() / gradients[1].norm()
    yield "gradient", error.item(), "relative error"
    off = (pixels[0] - pixels[1]).abs()
    yield "pixels, greatest difference", off.max().item(), "of 255"
    yield "pixels that differ", (off > 0).float().mean().item(), "share"


def on(device: torch.device, batch: Batch) -> Batch:
    """The batch on a device; the mask of dropped labels stays on the CPU."""
    values = {f.name: getattr(batch, f.name) for f in fields(batch) if f.name != "null_mask"}
    moved = {name: value.to(device) for name, value in values.items() if torch.is_tensor(value)}
    return replace(batch, **moved)


def step_values(bench: Bench, model_type: str, variant: str) -> Values:
    """Seconds and memory of a step with the largest batch that fits."""
    for batch in (max(bench.batches[model_type] >> k, LEAST_BATCH) for k in itertools.count()):
        try:
            step = step_of(bench.learner(model_type, batch, *VARIANTS[variant]))
            started = time.perf_counter()
            step()
            first = time.perf_counter() - started
            seconds = bench.seconds(step)
            break
        except Exception as error:
            if not is_out_of_memory(error) or batch == LEAST_BATCH:
                raise
        step = None
        free_memory()  # only now: the error kept the memory allocated
    yield f"batch {batch}", seconds / batch, "s/image"
    yield "first step", first, "s"
    if bench.on_gpu:
        yield f"batch {batch}, memory", torch.cuda.max_memory_allocated(), "bytes"


def wait_values(bench: Bench, model_type: str, variant: str) -> Values:
    """Steps that must not wait for the GPU, with gradients exchanged in a group of one."""
    backend, device = ("nccl", bench.device) if bench.on_gpu else ("gloo", None)
    store = dist.HashStore()
    dist.init_process_group(backend, store=store, rank=0, world_size=1, device_id=device)
    try:
        learner = bench.learner(model_type, 2 * LEAST_BATCH)
        model = exchanging_gradients(learner.state.model, gradient_as_bucket_view=True)
        learner.parallel_model = model
        step, count = step_of(learner), 2 if bench.is_tiny else 20
        step()  # making the optimizer's state may wait
        step()
        if bench.on_gpu:
            torch.cuda.set_sync_debug_mode("error")
        for _ in range(count):
            step()
    finally:
        if bench.on_gpu:
            torch.cuda.set_sync_debug_mode("default")
        dist.destroy_process_group()
    yield f"by {backend} without a wait", count, "steps"


def sampling_values(bench: Bench, model_type: str, nfe: int) -> Values:
    """Images a second, without their draws."""
    count = LEAST_BATCH if bench.is_tiny else 64
    learner = bench.learner(model_type, count)
    (drawn,) = drawn_batches(learner, raw_batch(learner))

    def work() -> None:
        images = sample(learner.state.ema_model, [drawn.x_1] * nfe, drawn.labels)
        to_pixels(images[:, :3]).cpu()

    yield "NFE", count / bench.seconds(work), "images/s"


def profile_values(bench: Bench, model_type: str, precision: str) -> Values:
    """The kernels that take most of a step's time."""
    batch = max(bench.batches[model_type] // 2, LEAST_BATCH)
    step = step_of(bench.learner(model_type, batch, f"precision={precision}"))
    step()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if bench.on_gpu else [])]
    with profile(activities=activities) as profiled:
        step()
    kind = "self_device_time_total" if bench.on_gpu else "self_cpu_time_total"
    events = sorted(profiled.key_averages(), key=lambda event: getattr(event, kind))
    for event in events[:-9:-1]:
        yield event.key[:70], getattr(event, kind) / 1e6, f"s in {event.count} calls"


def command_values(bench: Bench, script: str, option: str) -> Values:
    """A command end to end; `inference.py` samples what `train.py` has trained."""
    run, latents, vae = (bench.folder / name for name in ("run", "latents", "vae"))
    settings = {"working_dir": run, "device": bench.device.type, "total_steps": 4}
    settings |= {"ckpt_saving_steps": 2, "eval_demo_steps": 0}
    words = ["--config", ROOT / "configs" / "digits.yaml"]
    words += [f"--set={key}={value}" for key, value in settings.items()]
    last = run / "ckpts" / "4.pt"
    if script == "train.py":
        call(script, *words)
        before = weights_of(last)
        last.unlink()
        call(script, *words)
        yield "continued from step 2", (weights_of(last) - before).abs().max().item(), "off at most"
    elif script == "inference.py":
        call(script, *words, "--ckpt", last, "--num-samples", 8, "--output", run / "images.npz")
        with np.load(run / "images.npz") as images:
            yield "wrote", str(images["arr_0"].shape), ""
    else:
        noise = torch.randint(256, (8, 32, 32, 3), dtype=torch.uint8).numpy()
        for index, pixels in enumerate(noise):
            path = bench.folder / "pictures" / str(index % 2) / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
        write_vae(vae)
        words = ["--data-path", bench.folder / "pictures", "--save-path", latents, "--vae", vae]
        call(script, *words, "--image-size", 32, "--num-workers", 0, "--device", bench.device.type)
        yield "wrote", sum(path.stat().st_size for path in latents.iterdir()), "bytes"


def call(script: str, *words: object) -> None:
    """Run a command to its end."""
    command = [sys.executable, str(ROOT / script), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{script}: {done.stderr.strip().splitlines()[-1:]}")


def weights_of(checkpoint: Path) -> torch.Tensor:
    """All weights of a checkpoint's model in one tensor, on the CPU."""
    stored = torch.load(checkpoint, map_location="cpu")["model"]
    return torch.cat([weight.flatten().double() for weight in stored.values()])


def write_vae(folder: Path) -> None:
    """A small VAE of random weights."""
    from diffusers import AutoencoderKL

    down, up = ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4
    vae = AutoencoderKL(3, 3, down, up, (8, 8, 8, 8), latent_channels=4, norm_num_groups=4)
    vae.save_pretrained(folder)


# Section -> what measures a model (or command), and the variants to measure it in.
SECTIONS: dict[str, tuple[Callable[..., Values], Iterable]] = {
    "exactness": (beside_cpu, ("fp32", "tf32")),
    "steps": (step_values, VARIANTS),
    "waits": (wait_values, ("",)),
    "sampling": (sampling_values, (1, 2)),
    "profile": (profile_values, ("bf16",)),
    "commands": (command_values, ("",)),
}
COMMANDS = ("train.py", "inference.py", "latent_dataset.py")


def free_memory() -> None:
    """Free what dead objects held, and start counting memory anew."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def rows_of(name: str, values: Values) -> Iterator[dict]:
    """A row for each value; a failure is the last row."""
    try:
        for what, value, unit in values:
            # JSON has no number for what is not finite.
            is_finite = not isinstance(value, float) or math.isfinite(value)
            value = value if is_finite else str(value)
            yield {"name": f"{name} {what}".strip(), "value": value, "unit": unit}
    except Skipped as reason:
        yield {"name": name, "error": str(reason)}
    except Exception as error:  # any kind: the other rows do not depend on it
        frames = traceback.extract_tb(error.__traceback__)
        place = [frame for frame in frames if "/site-" not in frame.filename][-1]
        text = f"{type(error).__name__}: {shorten(error)}"
        yield {"name": name, "error": f"{text} ({Path(place.filename).name}:{place.lineno})"}


def main(section: str, device: str, is_tiny: str, seconds: str) -> None:
    """Print a section's rows; a task for which no time is left is a row too."""
    deadline = time.monotonic() + float(seconds)
    measure, variants = SECTIONS[section]
    with tempfile.TemporaryDirectory(prefix="gpu-benchmark-") as folder:
        place = torch.device("cuda", 0) if device == "cuda" else torch.device(device)
        bench = Bench(place, bool(int(is_tiny)), Path(folder))
        subjects = COMMANDS if section == "commands" else bench.batches
        for variant, subject in itertools.product(variants, subjects):
            name = f"{subject} {variant}".strip()
            if time.monotonic() > deadline:
                rows: Iterable[dict] = [{"name": name, "error": "left out: time"}]
            else:
                rows = rows_of(name, measure(bench, subject, variant))
            for row in rows:
                print(json.dumps(row), flush=True)
            free_memory()


if __name__ == "__main__":
    main(*sys.argv[1:])
