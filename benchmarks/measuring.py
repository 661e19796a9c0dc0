"""Shared by the benchmarks: the learner they drive, the machine's name, memory, times in turns."""

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
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from config import Config, load_config  # noqa: E402
from models import Batch  # noqa: E402
from support.data.datasets import PixelData, RawBatch  # noqa: E402
from support.system.processes import Processes, usable_cores  # noqa: E402
from training.draws import draw_batch  # noqa: E402
from training.learner import Learner, build_learner  # noqa: E402

NUM_CLASSES = 1000


def bench_config(model_type: str, batch_size: int, *overrides: str, device: str = "cpu") -> Config:
    """The published recipe of a DiT on latents, or of the UNet on CIFAR-10, for another batch."""
    name = "cifar" if model_type == "UNet" else "imagenet"
    settings = (f"model_type={model_type}", f"batch_size={batch_size}", f"device={device}")
    return load_config(ROOT / "configs" / f"{name}.yaml", settings + overrides)


def bench_learner(
    config: Config, processes: Processes, report: Callable[[str], None] = print
) -> Learner:
    """A learner with random noise in all weights, since some of a fresh network are zero."""
    plan = config.batch_plan(processes.world_size)
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
    """Random data for a microbatch, where a training loader would leave it."""
    size = learner.config.batch_size // learner.plan.num_microbatches
    pixels = torch.randint(256, (size, *data_shape(learner.config)), dtype=torch.uint8)
    labels = torch.randint(NUM_CLASSES, (size,))
    if learner.processes.device.type == "cuda":
        pixels, labels = pixels.pin_memory(), labels.pin_memory()
    return RawBatch(pixels, labels)


def drawn_batches(learner: Learner, raw: RawBatch) -> Iterator[Batch]:
    """The process's microbatches of `raw`, drawn as in training."""
    config, plan, processes = learner.config, learner.plan, learner.processes
    step, device = learner.state.finished_steps, processes.device
    pixels = torch.zeros(1, *data_shape(config), dtype=torch.uint8)
    data = PixelData(pixels, torch.zeros(1), tuple(map(str, range(NUM_CLASSES))))
    for microbatch in plan.microbatches_of(processes.rank):
        yield draw_batch(config, plan, data, raw, step, microbatch, device)


def step_of(learner: Learner) -> Callable[[], object]:
    """The learner's next step on random data."""
    raw = raw_batch(learner)
    return lambda: learner.step(drawn_batches(learner, raw))


def forward_of(learner: Learner) -> Callable[[], None]:
    """One inference forward of as many samples as a step takes."""
    config, model = learner.config, learner.state.ema_model
    size = config.batch_size // learner.plan.num_microbatches
    x = torch.randn(size, *data_shape(config))
    t = torch.rand(size)
    labels = torch.randint(NUM_CLASSES, (size,)) if config.is_conditional else None

    @torch.inference_mode()
    def forward() -> None:
        model.jump(x, t, torch.zeros_like(t), labels)

    return forward


def seconds_of(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def in_turns(works: dict[str, Callable[[], object]], tries: int) -> dict[str, list[float]]:
    """Seconds of each work, one after the other in turn, after one turn that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(tries + 1):
        for name, work in works.items():
            taken = seconds_of(work)
            if turn > 0:
                seconds[name].append(taken)
    return seconds


def count_flops(work: Callable[[], object]) -> int:
    """The FLOPs of one call. The counter sees attention only in its plain form."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def median_ratio(above: list[float], below: list[float]) -> float:
    """The median ratio of the same turns, which a drift of the machine's speed does not change."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def judge(name: str, value: float, unit: str, most: float = float("inf"), least: float = 0) -> None:
    """Print a value beside its limit."""
    limit = f">= {least}" if least else f"<= {most}"
    verdict = "ok" if least <= value <= most else "OUT OF LIMIT"
    print(f"{name:52} {value:8.2f} {unit}  ({limit}) {verdict}", flush=True)


def machine() -> str:
    """The processor, its cores and torch, in one line."""
    name = "unknown processor"
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":")[1].strip() for line in lines if "model name" in line), name)
    threads = torch.get_num_threads()
    return f"{name}, {len(usable_cores())} cores, {threads} threads, torch {torch.__version__}"


def memory_mb(entry: str) -> float:
    """This process's resident memory now (VmRSS) or at its highest (VmHWM), on Linux."""
    # Not getrusage: a process inherits that maximum from the one that started it.
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(entry)) / 1024
