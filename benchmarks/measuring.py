"""What the benchmarks share: the learner they drive, the machine's name, memory, medians."""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import support  # noqa: E402, F401  # before torch: tells its threads how to wait

# isort: split
import torch  # noqa: E402

from config import Config, load_config  # noqa: E402
from models import Batch  # noqa: E402
from support.data.batches import BatchPlan  # noqa: E402
from support.data.datasets import PixelData, RawBatch  # noqa: E402
from support.system.processes import Processes, usable_cores  # noqa: E402
from training.draws import draw_batch  # noqa: E402
from training.learner import Learner, build_learner  # noqa: E402

NUM_CLASSES = 1000


def bench_parser(
    description: str, model: str = "DiT-B-4", batch: int = 16, tries: int = 5
) -> argparse.ArgumentParser:
    """A parser with what benchmarks of training have in common."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=model)
    parser.add_argument("--batch", type=int, default=batch, help="over all processes")
    parser.add_argument("--tries", type=int, default=tries, help="turns that are counted")
    return parser


def bench_config(model_type: str, batch_size: int, *overrides: str, device: str = "cpu") -> Config:
    """The published recipe of a DiT on latents, or of the UNet on CIFAR-10, for another batch."""
    name = "cifar" if model_type == "UNet" else "imagenet"
    settings = (f"model_type={model_type}", f"batch_size={batch_size}", f"device={device}")
    settings += overrides
    return load_config(ROOT / "configs" / f"{name}.yaml", settings)


def bench_learner(
    config: Config, processes: Processes, report: Callable[[str], None] = print
) -> Learner:
    """A learner whose every weight matters, as those of a fresh network do not."""
    plan = BatchPlan(
        config.batch_size,
        config.flow_matching_count,
        processes.world_size,
        config.accumulation_steps,
    )
    learner, notes = build_learner(config, processes, plan, data_shape(config)[0], NUM_CLASSES)
    for note in notes:
        report(f"note: {note}")
    with torch.no_grad():
        for parameter in learner.state.model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    return learner


def data_shape(config: Config) -> tuple[int, int, int]:
    """[C, H, W] of x_0."""
    return (4 if config.is_latent else 3, config.data_size, config.data_size)


def raw_batch(learner: Learner) -> RawBatch:
    """Random data for a microbatch, from where a loader of training would leave it."""
    size = learner.config.batch_size // learner.plan.num_microbatches
    pixels = torch.randint(256, (size, *data_shape(learner.config)), dtype=torch.uint8)
    labels = torch.randint(NUM_CLASSES, (size,))
    if learner.processes.device.type == "cuda":
        pixels, labels = pixels.pin_memory(), labels.pin_memory()
    return RawBatch(pixels, labels)


def drawn_batches(learner: Learner, raw: RawBatch | None = None) -> Iterator[Batch]:
    """The process's microbatches of `raw`, or of fresh random data, drawn as training draws."""
    config, plan, processes = learner.config, learner.plan, learner.processes
    data = PixelData(
        torch.zeros(1, *data_shape(config), dtype=torch.uint8),
        torch.zeros(1),
        tuple(map(str, range(NUM_CLASSES))),
    )
    raw = raw or raw_batch(learner)
    for microbatch in plan.microbatches_of(processes.rank):
        yield draw_batch(
            config, plan, data, raw, learner.state.finished_steps, microbatch, processes.device
        )


def forward_of(learner: Learner) -> Callable[[], None]:
    """One inference forward of as many samples as a step takes."""
    config, model = learner.config, learner.state.ema_model
    size = config.batch_size // learner.plan.num_microbatches
    x = torch.randn(size, *data_shape(config))
    t = torch.rand(size)
    labels = torch.randint(NUM_CLASSES, (size,)) if config.is_conditional else None

    @torch.inference_mode()
    def forward() -> None:
        model.solution(x, t, torch.zeros_like(t), labels)

    return forward


def seconds_of(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    wait_for_device()
    started = time.perf_counter()
    work()
    wait_for_device()
    return time.perf_counter() - started


def wait_for_device() -> None:
    """Return when a GPU, where one is in use, has done what it was told."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def in_turns(works: dict[str, Callable[[], object]], tries: int) -> dict[str, list[float]]:
    """Seconds of each work, one after the other in turn, after one turn that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(tries + 1):
        for name, work in works.items():
            taken = seconds_of(work)
            if turn > 0:
                seconds[name].append(taken)
    return seconds


def median_ratio(above: list[float], below: list[float]) -> float:
    """The median of the ratios turn by turn, which holds when the machine's speed drifts."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def machine() -> str:
    """The processor, its cores and torch, in one line."""
    name = "unknown processor"
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":")[1].strip() for line in lines if "model name" in line), name)
    threads = torch.get_num_threads()
    return f"{name}, {usable_cores()} cores, {threads} threads, torch {torch.__version__}"


def memory_mb(entry: str) -> float:
    """This process's resident memory now (VmRSS) or at most so far (VmHWM), as Linux counts it."""
    # Not getrusage: its maximum is inherited from the process that started this one.
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(entry)) / 1024
