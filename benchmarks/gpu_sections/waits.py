"""Steps that must not wait for the device, in a group of one process with its exchange."""

import contextlib
import functools
from collections.abc import Iterator

import torch
import torch.distributed as dist

from gpu_sections.bench import (
    Bench,
    Task,
    Value,
    at_largest,
    training_step,
)
from support.system.processes import exchanging_gradients


def tasks(bench: Bench) -> list[Task]:
    """Steps of each model, and the exchange by each of the libraries."""
    return [
        *(
            Task(f"{model_type} in DDP", functools.partial(step_values, bench, model_type))
            for model_type in bench.batches
        ),
        *(Task(name, functools.partial(sum_values, bench, name)) for name in ("nccl", "gloo")),
    ]


@contextlib.contextmanager
def group_of_one(bench: Bench, backend: str) -> Iterator[None]:
    """A block in which this process is a group with that library."""
    device_id = bench.device if backend == "nccl" else None
    dist.init_process_group(
        backend, store=dist.HashStore(), rank=0, world_size=1, device_id=device_id
    )
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def refusing_to_wait(bench: Bench) -> Iterator[None]:
    """A block in which it is an error that the host waits for a GPU."""
    if bench.device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def step_values(bench: Bench, model_type: str) -> Iterator[Value]:
    """Steps whose gradients are exchanged as between several processes."""
    count = 2 if bench.is_tiny else 20

    def measure(batch: int) -> None:
        learner = bench.learner(model_type, batch)
        learner.parallel_model = exchanging_gradients(
            learner.state.model, gradient_as_bucket_view=True
        )
        step = training_step(learner)
        step()  # what is made once, with the optimizer's state, may wait
        step()
        with refusing_to_wait(bench):
            for _ in range(count):
                step()

    with group_of_one(bench, "nccl" if bench.device.type == "cuda" else "gloo"):
        batch, _ = at_largest(bench.batches[model_type], measure)
    yield Value(f"{model_type} in DDP, batch {batch}", count, "steps")
    name = f"{model_type} in DDP without a wait"
    yield bench.on_cuda(name, lambda: count, "steps")


def sum_values(bench: Bench, backend: str) -> Iterator[Value]:
    """A sum over the group."""
    if backend == "nccl":
        bench.need_cuda()
    with group_of_one(bench, backend):
        values = torch.ones(3, device=bench.device if backend == "nccl" else "cpu")
        dist.all_reduce(values)
        found = values.tolist()
    if found != [1.0, 1.0, 1.0]:
        raise ValueError(f"the sum of three ones over one process is {found}")
    yield Value(backend, "sums")
