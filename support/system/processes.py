"""The processes of a run, started by torchrun or alone, connected by NCCL on CUDA, else by gloo."""

import contextlib
import fcntl
import inspect
import os
import re
import socket
import struct
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from support.system.files import Stopped, UserError
from support.system.hardware import keep_freed_memory, let_segments_expand, unusable_gpu

Value = TypeVar("Value")
SIOCGIFADDR = 0x8915  # Linux's request for the address of a network interface
# gloo raises plain RuntimeErrors that name a place in its source, or have this text if an exchange
# ended because another one timed out.
OF_GLOO = re.compile("gloo|Application timeout caused pair closure")
# In the errors of torch, gloo and NCCL: another process is silent, or has ended.
SILENT = re.compile("timed out|timeout", re.IGNORECASE)
GONE = re.compile(
    "(closed|reset) by peer|broken pipe|remote process exited|got 0 bytes", re.IGNORECASE
)


@dataclass(frozen=True)
class Processes:
    """This process among those of the run, and its device."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    host_group: dist.ProcessGroup | None = None  # for values on the CPU

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the one process that writes files and prints."""
        return self.rank == 0

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """The sum of `values` over the processes, on every process."""
        if self.world_size > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def broadcast_(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite these tensors with those of rank 0, on every process."""
        if self.world_size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)

    def gather_on_main(self, values: Tensor) -> list[Tensor] | None:
        """The processes' `values`, all of one shape, in rank order, on rank 0; None elsewhere."""
        if self.world_size == 1:
            return [values]
        ranks = range(self.world_size)
        gathered = [torch.empty_like(values) for _ in ranks] if self.is_main else None
        dist.gather(values, gathered)
        return gathered

    def begin_greatest(self, value: int) -> Callable[[], int]:
        """Start to exchange a value; returns a function that waits for the greatest of all.

        Does not synchronise with a GPU. Every process has to call this, and then the function.
        """
        if self.world_size == 1:
            return lambda: value
        shared = torch.tensor(value)
        greatest = dist.ReduceOp.MAX
        work = dist.all_reduce(shared, greatest, group=self.host_group, async_op=True)

        def wait() -> int:
            work.wait()
            return int(shared)

        return wait

    def broadcast_object(self, value: Value | None) -> Value:
        """Return rank 0's `value` on every process; the others' values are ignored."""
        shared: list[Any] = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(shared, device=self.device)
        return shared[0]

    def on_rank0(self, work: Callable[[], Value]) -> Value:
        """Run `work` on rank 0 only; every process gets its result, or raises its UserError."""
        outcome: Any = None
        if self.is_main:
            try:
                outcome = work()
            except UserError as error:
                outcome = error
        outcome = self.broadcast_object(outcome)
        if isinstance(outcome, UserError):
            raise outcome
        return outcome

    def gather(self, value: Value) -> list[Value]:
        """The processes' values in rank order, on every process."""
        values: list[Any] = [value]
        if self.world_size > 1:
            values *= self.world_size
            dist.all_gather_object(values, value, group=self.host_group)
        return values

    def check_shared(self, folder: Path, name: str) -> None:
        """UserError that names the machines on which `folder` is not the folder of rank 0.

        Every process has to call this, once rank 0 can write there.
        """
        if self.world_size == 1:
            return
        token = folder / self.broadcast_object(f".shared-{uuid.uuid4().hex}")
        try:
            if self.is_main:
                token.touch()
            self.broadcast_object(None)  # now it is there
            missing = self.gather(None if token.exists() else socket.gethostname())
        finally:
            if self.is_main:
                token.unlink(missing_ok=True)
        if lacking := sorted({machine for machine in missing if machine}):
            raise UserError(
                f"{name}: {folder} on {', '.join(lacking)} is not the folder of that name on the "
                "first machine; it must be on a file system that all machines share"
            )


def exchanging_gradients(model: nn.Module, **options: Any) -> DistributedDataParallel:
    """`model` with a backward pass that averages the gradients over all processes.

    Buffers are not exchanged: torch 2.14 renamed that option. It also brought an option to copy all
    gradients of a bucket in two launches instead of one each.
    """
    known = inspect.signature(DistributedDataParallel).parameters
    word = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    batched = {"batched_grad_copy": True} if "batched_grad_copy" in known else {}
    return DistributedDataParallel(model, **{**batched, **options, word: False})


def choose_device(name: str, local_rank: int = 0, world_size: int = 1) -> torch.device:
    """The device called `name`: auto (the best available), cuda, mps or cpu.

    UserError where torch cannot use a GPU of this machine, unless `name` is cpu.
    """
    with warnings.catch_warnings(action="ignore"):  # the errors below say more
        has_cuda = torch.cuda.is_available()
    if name in ("auto", "cuda") and not has_cuda and (found := unusable_gpu()):
        raise UserError(f"device: {found}; `device: cpu` does without it")
    has_mps = world_size == 1 and torch.backends.mps.is_available()  # gloo cannot connect several
    available = [kind for kind, there in (("cuda", has_cuda), ("mps", has_mps)) if there] + ["cpu"]
    if name == "auto":
        name = available[0]
    if name not in available:
        raise UserError(
            f"device: {name!r} is not available on this machine for {world_size} processes; there "
            f"is {', '.join(available)}"
        )
    if name != "cuda":
        return torch.device(name)
    count = torch.cuda.device_count()
    if count == 1:
        return torch.device("cuda", 0)  # perhaps each process sees only its own: check_own_gpu
    if local_rank >= count:
        raise UserError(_too_few_gpus(local_rank, count))
    return torch.device("cuda", local_rank)


def _too_few_gpus(local_rank: int, count: int) -> str:
    return (
        f"process {local_rank} of this machine has no GPU of its own: there are {count}; start at "
        "most that many processes (--nproc-per-node)"
    )


def check_own_gpu(store: dist.Store, gpu: str, rank: int, local_rank: int, count: int) -> None:
    """UserError where two of this machine's `count` processes would use the same GPU.

    `gpu` is the name of this process's GPU, unique in the world. With SLURM's --gpus-per-task each
    process sees one GPU, which is its own.
    """
    store.set(f"gpu {rank}", gpu)
    first = rank - local_rank
    gpus = [store.get(f"gpu {first + local}").decode() for local in range(count)]
    for local, shown in enumerate(gpus):
        if shown in gpus[:local]:
            raise UserError(_too_few_gpus(local, len(set(gpus))))


def usable_cores() -> list[int]:
    """The processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return sorted(os.sched_getaffinity(0))
    return [*range(os.cpu_count() or 1)]


def share_cores(processes: Processes) -> None:
    """Divide cores among the processes that may run on the same ones, as threads and compilers.

    torchrun lets every process run on all cores, with one thread; SLURM may give each its own.
    """
    mine = (socket.gethostname(), usable_cores())
    share = max(1, len(mine[1]) // processes.gather(mine).count(mine))
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(share))
    if processes.device.type == "cpu":
        torch.set_num_threads(share)


def world_size_asked_for() -> int:
    """The number of processes that torchrun started, or 1."""
    return _from_torchrun("WORLD_SIZE", 1)


def _from_torchrun(name: str, default: int) -> int:
    """A number that torchrun, or SLURM in its place, puts into the environment."""
    return int(os.environ.get(name, default))


@contextlib.contextmanager
def connected(device: str, timeout_minutes: float) -> Iterator[Processes]:
    """A block in which the processes that torchrun started are connected.

    A process that waits longer than `timeout_minutes` for another one gives up.
    """
    rank, local_rank = _from_torchrun("RANK", 0), _from_torchrun("LOCAL_RANK", 0)
    world_size = world_size_asked_for()
    local_world_size = _from_torchrun("LOCAL_WORLD_SIZE", world_size)
    chosen = choose_device(device, local_rank, world_size)
    if chosen.type == "cpu":
        keep_freed_memory()
    if chosen.type == "cuda":
        let_segments_expand()
        torch.cuda.set_device(chosen)
    if world_size == 1:
        yield Processes(rank, local_rank, world_size, chosen)
        return
    timeout = timedelta(minutes=timeout_minutes)
    if rank == 0 and local_world_size < world_size:
        print(f"connecting {world_size} processes: {timeout_minutes:g} minutes at most", flush=True)
    with _reporting_failed_connection(timeout_minutes):
        if local_world_size < world_size:
            _choose_interface()
        store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
        if local_world_size == world_size:
            # torchrun's store still has the addresses of the processes before a restart, so each
            # attempt gets a prefix. Several machines do not count the same attempts: there
            # TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 gives each attempt a store.
            attempt = _from_torchrun("TORCHELASTIC_RESTART_COUNT", 0)
            store = dist.PrefixStore(f"attempt {attempt}", store)
        if chosen.type == "cuda":
            gpu = f"{socket.gethostname()} {torch.cuda.get_device_properties(chosen).uuid}"
            check_own_gpu(store, gpu, rank, local_rank, local_world_size)
        dist.init_process_group(
            "nccl" if chosen.type == "cuda" else "gloo",
            timeout=timeout,
            store=store,
            rank=rank,
            world_size=world_size,
            device_id=chosen if chosen.type == "cuda" else None,
        )
        # Typed as a group or a number, which processes outside the group get: none is.
        host_group: Any = dist.new_group(backend="gloo", timeout=timeout)
    with reporting_lost_processes(rank, timeout_minutes), _leaving_together():
        processes = Processes(rank, local_rank, world_size, chosen, host_group)
        share_cores(processes)
        yield processes


@contextlib.contextmanager
def _leaving_together() -> Iterator[None]:
    """A block that processes leave together: when one ends, launchers kill the others.

    Connections stay open until the process ends: destroy_process_group has been seen to abort a
    process that had finished its work.
    """
    try:
        yield
    except Stopped:
        dist.barrier()
        raise
    dist.barrier()


def _choose_interface() -> None:
    """Let gloo connect machines over the network that leads to the first one.

    By default it takes the address of the machine's name, which is 127.0.1.1 on many machines.
    """
    with contextlib.suppress(OSError), socket.socket(type=socket.SOCK_DGRAM) as probe:
        probe.connect((os.environ.get("MASTER_ADDR", ""), 1))  # sends nothing
        address = probe.getsockname()[0]
        if address.startswith("127."):  # of the loopback interface, which leads nowhere
            return
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # an interface without an address
                answer = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("40s", name.encode()))
                if socket.inet_ntoa(answer[20:24]) == address:
                    os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


@contextlib.contextmanager
def _reporting_failed_connection(timeout_minutes: float) -> Iterator[None]:
    """A block in which a failure to connect the processes is a UserError."""
    try:
        yield
    except UserError:
        raise
    except (RuntimeError, ValueError) as error:  # torch raises the latter for its environment
        where = ", ".join(
            f"{name} {os.environ.get(name, 'not set')}" for name in ("MASTER_ADDR", "MASTER_PORT")
        )
        cause = _cause(error)
        if "EADDRINUSE" in cause:
            advice = "another program uses that port; choose another one"
        elif "waiting for clients" in cause:
            advice = "start all processes, on every machine, with the same address and port"
        else:
            advice = "docs/training.md says what to check"
        raise UserError(
            f"on {socket.gethostname()}: no connection to the other processes within "
            f"{timeout_minutes:g} minutes ({where}): {cause}; {advice}"
        ) from error


@contextlib.contextmanager
def reporting_lost_processes(rank: int, timeout_minutes: float) -> Iterator[None]:
    """A block in which a lost process, or a broken link to it, is a UserError."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and not OF_GLOO.search(str(error)):
            raise
        if SILENT.search(str(error)):
            what = f"another process was silent for {timeout_minutes:g} minutes"
        elif GONE.search(str(error)):
            what = "another process is gone"
        else:
            what = f"the exchange with the others failed ({_cause(error)})"
        raise UserError(
            f"process {rank}: {what}; the steps since the last checkpoint are lost; "
            "the same command continues from there"
        ) from error


def _cause(error: BaseException) -> str:
    """The text of a torch error without its source locations and stack."""
    text = str(error).split("Exception raised from")[0]
    text = re.sub(r"\[\S*\.(cc|cpp|h):\d+\] ?", "", text)
    return " ".join(text.split())[:300].rstrip(".")
