"""What this machine can do, and how it is told to: memory, precision, compilation."""

import contextlib
import ctypes
import sys

import torch
from torch import nn

from soflow.files import one_line

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # what glibc's mallopt calls them
NEVER, NONE = -1, 0


def keep_freed_memory() -> None:
    """Let glibc keep what this process frees, for its next allocation; elsewhere nothing happens.

    By default glibc hands large blocks back to the system as soon as they are freed, and a training
    step on the CPU, which frees and takes the same activations over and over, spends a fifth of its
    time on the page faults of getting them back. The process's peak memory stays what it is; what
    it has taken once it holds to its end.
    """
    if not sys.platform.startswith("linux"):
        return
    with contextlib.suppress(AttributeError):  # a C library of another kind
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_MAX, NONE)
        mallopt(M_TRIM_THRESHOLD, NEVER)


def allow_tf32(device: torch.device, is_allowed: bool) -> None:
    """Let CUDA's float32 matrix products and convolutions round their inputs to TF32, or not."""
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = is_allowed
        torch.backends.cudnn.allow_tf32 = is_allowed


def obstacle_to_bf16(device: torch.device) -> str | None:
    """Why autocast to bfloat16 does not work on `device`, or None where it does."""
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return f"{torch.cuda.get_device_name(device)} has no bfloat16 arithmetic"
    try:
        with torch.autocast(device.type, torch.bfloat16):
            nn.Linear(2, 2, device=device)(torch.ones(2, 2, device=device))
    except (RuntimeError, TypeError) as error:
        return one_line(error)
    return None


def obstacle_to_compiling(device: torch.device) -> str | None:
    """Why torch.compile does not work on `device`, or None where it does; takes some seconds."""
    try:
        torch.compile(lambda x: x + 1)(torch.ones(2, device=device))
    except Exception as error:  # of the compiler, its compilers, or the want of them: any kind
        return one_line(error)
    return None
