"""Training steps: their seconds beside those of other methods, their kernels, their spread."""

import functools
import itertools
import re
import statistics
from collections import Counter
from collections.abc import Iterator

from measuring import bench_config, in_turns, median_ratio, seconds_of

# isort: split
import torch
from baselines import STEPS, Flops, count_flops
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from gpu_sections.bench import LEAST_BATCH, Bench, Task, Value, at_largest, training_step
from support.system.hardware import allow_tf32

PRECISIONS = ("bf16", "tf32", "fp32")
PLAIN = "flow matching"  # what trains the same network to sample in many steps
ATTENTION = re.compile("flash|fmha|attention|sdpa", re.IGNORECASE)
# Upper ends of a histogram's bars, in medians.
BARS = (0.9, 1.1, 1.5, 2, 5)


# Seconds a step


def step_tasks(bench: Bench) -> list[Task]:
    """Each model in each precision beside plain training, then beside MeanFlow, then compiled."""
    pairs = [
        f"{model_type} {precision}" for precision in PRECISIONS for model_type in bench.batches
    ]
    # Last, since compiling the largest may take all the time that is left.
    compiled = [f"{model_type} bf16 compiled" for model_type in bench.batches]
    return [
        *(Task(name, functools.partial(plain_values, bench, name)) for name in pairs),
        *(
            Task(f"{name} over MeanFlow", functools.partial(meanflow_values, bench, name))
            for name in pairs
        ),
        *(Task(name, functools.partial(plain_values, bench, name)) for name in compiled),
    ]


def plain_values(bench: Bench, name: str) -> Iterator[Value]:
    """SoFlow's step, beside that of plain training and beside what the arithmetic says."""
    model_type, precision, *_ = name.split()
    batch, seconds = seconds_beside(PLAIN, bench, name)
    an_image = statistics.median(seconds["SoFlow"]) / batch
    yield Value(name, an_image, "s/image")
    yield Value(f"{name} batch", batch, "images")
    ratio = median_ratio(seconds["SoFlow"], seconds[PLAIN])
    yield Value(f"{name} over {PLAIN}", ratio, "x")
    flops = flops_of(model_type, "SoFlow").step
    expected = flops / flops_of(model_type, PLAIN).step
    yield Value(f"{name} over {PLAIN} by arithmetic", expected, "x")
    yield Value(f"{name} arithmetic", flops / an_image, "FLOP/s")
    share = flops / an_image / matmul_rate(bench, precision)
    yield Value(f"{name} share of a large matmul's", share)


def meanflow_values(bench: Bench, name: str) -> Iterator[Value]:
    """SoFlow's step over MeanFlow's."""
    _, seconds = seconds_beside("MeanFlow", bench, name)
    yield Value(f"{name} over MeanFlow", median_ratio(seconds["SoFlow"], seconds["MeanFlow"]), "x")


def seconds_beside(other: str, bench: Bench, name: str) -> tuple[int, dict[str, list[float]]]:
    """The largest batch that fits, and seconds of steps in turns with another method's.

    The name says which model, its precision, and `compiled` where it is.
    """
    model_type, precision, *compiled = name.split()
    if precision == "tf32" or compiled:
        bench.need_cuda()

    def measure(batch: int) -> dict[str, list[float]]:
        options = (f"precision={precision}", f"compile={'true' if compiled else 'false'}")
        learner = bench.learner(model_type, batch, *options)
        # Several, since a device works on while the next step is prepared.
        steps, turns = (1, 1) if bench.is_tiny else (2, 3)

        def work(name: str) -> None:
            method = STEPS[name](learner.state.model)
            # Autocast for the others: precision is otherwise SoFlow's own matter.
            is_cast = precision == "bf16" and name != "SoFlow"
            cast = torch.autocast(bench.device.type, torch.bfloat16, enabled=is_cast)
            learner.parallel_model = cast(method)
            step = training_step(learner)
            for _ in range(steps):
                step()

        works = {name: functools.partial(work, name) for name in ("SoFlow", other)}
        seconds = in_turns(works, turns)
        return {name: [taken / steps for taken in row] for name, row in seconds.items()}

    return at_largest(bench.batches[model_type], measure)


@functools.cache
def flops_of(model_type: str, name: str) -> Flops:
    """FLOPs of one sample in that step."""
    return count_flops(bench_config(model_type, LEAST_BATCH), name)


@functools.cache
def matmul_rate(bench: Bench, precision: str) -> float:
    """FLOP/s of a large matrix product: what can be reached here."""
    side = 256 if bench.is_tiny else 8192
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    allow_tf32(bench.device, precision == "tf32")
    factor = torch.randn(side, side, device=bench.device, dtype=dtype)
    seconds = in_turns({"product": lambda: factor @ factor}, tries=5)
    return 2 * side**3 / statistics.median(seconds["product"])


# Kernels


def profile_tasks(bench: Bench) -> list[Task]:
    """What the device does in a step of each model."""
    return [
        Task(model_type, functools.partial(profile_values, bench, model_type))
        for model_type in bench.batches
    ]


def profile_values(bench: Bench, model_type: str) -> Iterator[Value]:
    """How busy the device is, and what with."""

    def measure(batch: int) -> tuple[float, list]:
        step = training_step(bench.learner(model_type, batch))
        step()
        seconds = seconds_of(step)
        activities = [ProfilerActivity.CPU]
        if bench.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        with profile(activities=activities) as profiled:
            seconds_of(step)  # which waits for the device
        return seconds, list(profiled.events())

    _, (seconds, events) = at_largest(bench.batches[model_type], measure)
    on_device = [
        event
        for event in events
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation
    ]
    busy = sum(event.time_range.elapsed_us() for event in on_device) / 1e6
    calls = Counter(event.name for event in events if event.device_type == DeviceType.CPU)
    launches = sum(count for name, count in calls.items() if "LaunchKernel" in name)
    copies = Counter(event.name for event in on_device if event.name.startswith("Memcpy"))
    attention = Counter(event.name for event in on_device if ATTENTION.search(event.name))
    yield Value(f"{model_type} step", seconds, "s")
    yield Value(f"{model_type} operators", sum("aten::" in n for n in calls.elements()), "a step")
    yield bench.on_cuda(f"{model_type} busy share", lambda: busy / seconds, "of the step")
    yield bench.on_cuda(f"{model_type} launches", lambda: launches, "a step")
    for title, counted in (("copies", copies), ("attention kernels", attention)):
        yield bench.on_cuda(f"{model_type} {title}", functools.partial(listed, counted), "a step")


def listed(counts: Counter) -> str:
    """The commonest things, and how often each was."""
    return ", ".join(f"{count} {name[:60]}" for name, count in counts.most_common(6)) or "none"


# The spread of a step's time, which guidance gives new shapes


def shape_tasks(bench: Bench) -> list[Task]:
    """Steps of a guided model with cuDNN's attention on and off."""
    model_type = next(iter(bench.batches))
    return [
        Task(
            f"{model_type}, cuDNN attention {'on' if is_on else 'off'}",
            functools.partial(spread_values, bench, model_type, is_on),
        )
        for is_on in (True, False)
    ]


def spread_values(bench: Bench, model_type: str, is_on: bool) -> Iterator[Value]:
    """Seconds of single steps, each with other dropped labels."""
    name = f"{model_type}, cuDNN attention {'on' if is_on else 'off'}"
    if not is_on:
        bench.need_cuda()
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(is_on)
    try:

        def measure(batch: int) -> list[float]:
            step = training_step(bench.learner(model_type, batch, "precision=bf16"))
            step()
            return [seconds_of(step) for _ in bench.repeats(3 if bench.is_tiny else 100)]

        _, seconds = at_largest(bench.batches[model_type], measure)
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
    yield Value(f"{name}: first", seconds[0], "s")
    yield Value(f"{name}: median", statistics.median(seconds), "s")
    yield Value(f"{name}: longest", max(seconds), "s")
    yield Value(f"{name}: histogram", histogram(seconds), "steps by medians")


def histogram(seconds: list[float]) -> str:
    """How many steps took up to so many medians."""
    middle = statistics.median(seconds)
    ends = (0, *BARS, float("inf"))
    counts = [
        f"<= {high:g}: {sum(low < taken / middle <= high for taken in seconds)}"
        for low, high in itertools.pairwise(ends)
    ]
    return ", ".join(counts)
