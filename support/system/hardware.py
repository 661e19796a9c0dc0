"""What this machine can do: memory, GPUs, precision, compilation."""

import contextlib
import ctypes
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

from support.system.files import shorten

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # what glibc's mallopt calls them
NEVER, NONE = -1, 0
CONTAINER = Path("/sys/fs/cgroup")  # has a container's limits, if there are any
DEVICES, DRIVER = Path("/dev"), Path("/proc/driver/nvidia/version")
# In the errors of torch and oneDNN, which are not MemoryErrors.
OUT_OF_MEMORY = re.compile("can't allocate memory|out of memory|could not create a memory")


def keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next allocation; does nothing with other C libraries.

    By default glibc returns large blocks to the system at once. A training step on the CPU frees
    and allocates the same activations again and again, and spends a fifth of its time on the page
    faults that this causes. The peak memory stays the same, and is held until the process ends.
    """
    if not sys.platform.startswith("linux"):
        return
    with contextlib.suppress(AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_MAX, NONE)
        mallopt(M_TRIM_THRESHOLD, NEVER)


def free_memory_bytes(device: torch.device) -> int:
    """Bytes still free on `device`; all that it has, where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    with contextlib.suppress(OSError):  # not Linux
        free.append(_kilobytes("/proc/meminfo", "MemAvailable") * 1024)
    with contextlib.suppress(OSError, ValueError):  # no container, or one without limits
        bound, used = (
            int((CONTAINER / f"memory.{name}").read_text()) for name in ("max", "current")
        )
        free.append(bound - used)
    return max(0, min(free))


def limit_memory() -> None:
    """Let this process's allocations fail beyond the memory that is free now; Linux only.

    Otherwise Linux promises more memory than it has, and then kills the process.
    """
    if not sys.platform.startswith("linux"):
        return
    taken = _kilobytes("/proc/self/status", "VmData") * 1024
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = taken + free_memory_bytes(torch.device("cpu"))
    if hard == resource.RLIM_INFINITY or limit < hard:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out."""
    return isinstance(error, MemoryError) or bool(OUT_OF_MEMORY.search(str(error)))


def _kilobytes(path: str, entry: str) -> int:
    """An entry of one of the kernel's tables of memory."""
    lines = Path(path).read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{entry}:"))


def unusable_gpu() -> str | None:
    """Which NVIDIA GPU torch cannot use, and why; None where there is none.

    GPUs hidden by CUDA_VISIBLE_DEVICES do not count: that is the user's choice.
    """
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1", "NoDevFiles"):
        return None
    nodes = sorted(DEVICES.glob("nvidia[0-9]*"))
    driver = _driver_version()
    if not nodes and driver is None:
        return None
    what = f"an NVIDIA GPU is here ({nodes[0] if nodes else 'nvidia-smi shows it'}, "
    what += f"driver {driver or 'unknown'}), but torch {torch.__version__} cannot use it: "
    if torch.version.cuda is None:
        return f"{what}it is not built for CUDA; install a build that is"
    try:
        torch.cuda.init()  # its error tells of a driver that is too old
    except Exception as error:  # torch raises several kinds
        return f"{what}{shorten(error)}"
    return f"{what}it finds no device"


def _driver_version() -> str | None:
    """The version of NVIDIA's driver, by the kernel or nvidia-smi, if either tells."""
    told = DRIVER.read_text() if DRIVER.exists() else ""
    if not told and (command := shutil.which("nvidia-smi")):
        query = [command, "--query-gpu=driver_version", "--format=csv,noheader"]
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            told = subprocess.run(
                query, capture_output=True, text=True, timeout=30, check=True
            ).stdout
    found = re.search(r"\d{3,}\.\d+(\.\d+)?", told)
    return found[0] if found else None


def let_segments_expand() -> None:
    """Let CUDA's allocator grow its segments, unless the user has settings for it.

    This avoids fragmentation. It takes effect only before CUDA is used. Every version of torch
    reads this name of the variable.
    """
    names = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
    if not any(name in os.environ for name in names):
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"


def allow_tf32(device: torch.device, is_allowed: bool) -> None:
    """Allow or forbid TF32 in CUDA's float32 matrix products and convolutions."""
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = is_allowed
        torch.backends.cudnn.allow_tf32 = is_allowed


def obstacle_to_bf16(device: torch.device) -> str | None:
    """Why autocast to bfloat16 does not work on `device`; None where it works."""
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return f"{torch.cuda.get_device_name(device)} has no bfloat16 arithmetic"
    try:
        with torch.autocast(device.type, torch.bfloat16):
            nn.Linear(2, 2, device=device)(torch.ones(2, 2, device=device))
    except (RuntimeError, TypeError) as error:
        return shorten(error)
    return None


def obstacle_to_compiling(device: torch.device) -> str | None:
    """Why torch.compile does not work on `device`; None where it works. Takes seconds."""
    try:
        torch.compile(lambda x: x + 1)(torch.ones(2, device=device))
    except Exception as error:  # the compilers raise errors of any kind
        return shorten(error)
    return None


def time_convolutions(device: torch.device) -> None:
    """Let cuDNN choose the fastest convolution for each new shape: worth it for fixed shapes."""
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
