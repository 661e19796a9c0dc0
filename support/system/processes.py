"""Processes and devices: started by torchrun or alone; nccl on CUDA, gloo elsewhere."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from support.system.files import UserError
from support.system.hardware import keep_freed_memory

Value = TypeVar("Value")


@dataclass(frozen=True)
class Processes:
    """This process among all that work together, and the device it computes on."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    host_group: dist.ProcessGroup | None = None  # for what is known on the CPU

    @property
    def is_main(self) -> bool:
        """Whether this is the one process that writes files and talks."""
        return self.rank == 0

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """`values` summed over the processes; every process gets the sum."""
        if self.world_size > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def gather_on_main(self, values: Tensor) -> list[Tensor] | None:
        """The processes' `values` (one shape) in rank order; None on all but the main process."""
        if self.world_size == 1:
            return [values]
        gathered = [torch.empty_like(values) for _ in range(self.world_size)]
        dist.gather(values, gathered if self.is_main else None)
        return gathered if self.is_main else None

    def greatest_over_ranks(self, value: int) -> int:
        """The greatest of the processes' values, on every process; no device waits for it."""
        if self.world_size == 1:
            return value
        shared = torch.tensor(value)
        dist.all_reduce(shared, dist.ReduceOp.MAX, group=self.host_group)
        return int(shared)

    def agree(self, value: Value | None) -> Value:
        """The main process's `value`, on every process; the others' are not looked at."""
        shared: list[Any] = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(shared, device=self.device)
        return shared[0]


def choose_device(name: str, local_rank: int = 0, world_size: int = 1) -> torch.device:
    """The device called `name`: auto (the best there is), cuda, mps or cpu."""
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        name = next(kind for kind, there in available.items() if there)
        if name == "mps" and world_size > 1:
            name = "cpu"
    if name == "mps" and world_size > 1:
        raise UserError("device: 'mps' takes one process: gloo cannot connect several there")
    if not available[name]:
        there = ", ".join(kind for kind, is_there in available.items() if is_there)
        raise UserError(f"device: {name!r} is not available on this machine; there is {there}")
    if name != "cuda":
        return torch.device(name)
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"process {local_rank} of this machine has no GPU of its own: there are "
            f"{torch.cuda.device_count()}; start at most that many processes (--nproc-per-node)"
        )
    return torch.device("cuda", local_rank)


def usable_cores() -> int:
    """Processor cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def world_size_asked_for() -> int:
    """How many processes torchrun has started, or 1."""
    return _from_torchrun("WORLD_SIZE", 1)


def _from_torchrun(name: str, default: int) -> int:
    """A number that torchrun, or whoever plays its part, puts into the environment."""
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise UserError(f"the environment's {name} is {text!r}, not a whole number")
    return int(text)


@contextlib.contextmanager
def processes(device: str, timeout_minutes: float) -> Iterator[Processes]:
    """This run's processes, connected for the length of the block where torchrun started several.

    A process that hears nothing from another for `timeout_minutes` gives up.
    """
    rank, local_rank = _from_torchrun("RANK", 0), _from_torchrun("LOCAL_RANK", 0)
    world_size = world_size_asked_for()
    chosen = choose_device(device, local_rank, world_size)
    if chosen.type == "cpu":
        keep_freed_memory()
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    elif world_size > 1:
        # torchrun gives each process one thread; share out the machine's instead.
        local_world_size = _from_torchrun("LOCAL_WORLD_SIZE", world_size)
        torch.set_num_threads(max(1, usable_cores() // local_world_size))
    if world_size == 1:
        yield Processes(rank, local_rank, world_size, chosen)
        return
    timeout = timedelta(minutes=timeout_minutes)
    is_cuda = chosen.type == "cuda"
    with _told_of_losses(rank, timeout_minutes):
        dist.init_process_group(
            "nccl" if is_cuda else "gloo",
            timeout=timeout,
            store=_store_of_this_attempt(timeout),
            rank=rank,
            world_size=world_size,
            device_id=chosen if is_cuda else None,
        )
        # A number instead of a group is for processes outside of it, and none is.
        host_group: Any = dist.new_group(backend="gloo", timeout=timeout)
        yield Processes(rank, local_rank, world_size, chosen, host_group)
        # Leave together, and leave the connections to the end of the process: taking them down by
        # destroy_process_group has been seen to abort a process that had finished its work.
        dist.barrier()


def _store_of_this_attempt(timeout: timedelta) -> dist.Store:
    """Where the processes find each other.

    The store is torchrun's, and it keeps the addresses of processes that it has started anew: taken
    for theirs, they lead nowhere. On one machine all count the same attempts; on several, where one
    of them fails, they do not, and TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 gives each attempt a store.
    """
    store, _, world_size = next(dist.rendezvous("env://", timeout=timeout))
    if _from_torchrun("LOCAL_WORLD_SIZE", world_size) < world_size:
        return store
    return dist.PrefixStore(f"attempt {_from_torchrun('TORCHELASTIC_RESTART_COUNT', 0)}", store)


@contextlib.contextmanager
def _told_of_losses(rank: int, timeout_minutes: float) -> Iterator[None]:
    """A block in which another process's death or silence is a UserError."""
    try:
        yield
    except RuntimeError as error:
        # gloo raises plain RuntimeErrors, which say where in it they come from.
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        is_silence = "timed out" in str(error).lower()
        what = f"was silent for {timeout_minutes:g} minutes" if is_silence else "is gone"
        raise UserError(
            f"process {rank}: another process {what}; nothing is saved of what was under way; "
            f"the same command goes on from the last checkpoint"
        ) from error
