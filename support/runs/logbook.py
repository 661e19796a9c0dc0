"""A run's log.txt, and the record beside each result."""

import functools
import json
import platform
import resource
import subprocess
import sys
from collections.abc import Mapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import support
from support.system.digests import settings_digest
from support.system.files import append_line, atomic_write
from support.system.processes import Processes


class Logbook:
    """Writes lines to log.txt and the screen, on rank 0 only."""

    def __init__(self, path: Path, is_main: bool):
        self.path, self.is_main = path, is_main

    def line(self, text: str) -> None:
        """Write a line; the file gets the time, too."""
        if not self.is_main:
            return
        tqdm.write(text, file=sys.stdout)  # above a progress bar
        sys.stdout.flush()
        append_line(self.path, f"{datetime.now():%Y-%m-%d %H:%M:%S} {text}")


def peak_memory_gb(device: torch.device) -> float:
    """Peak memory so far, in GB: torch's on a GPU, otherwise this process's resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e9 if sys.platform == "darwin" else peak * 1024 / 1e9


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, as 1:02:03."""
    return str(timedelta(seconds=round(seconds)))


@functools.cache
def code_version() -> str:
    """The version; in a git checkout also the commit, with `-dirty` if files have changed."""
    root = Path(__file__).resolve().parent.parent.parent
    if not (root / ".git").exists():
        return support.__version__
    try:
        commit = subprocess.check_output(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"],
            stderr=subprocess.DEVNULL,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return support.__version__
    return f"{support.__version__}+{commit.strip()}"


def device_name(device: torch.device) -> str:
    """The device's kind and product name."""
    if device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(device)})"
    return f"{device.type} ({platform.processor() or platform.machine()})"


def record_of(
    path: Path, settings: Mapping[str, Any], processes: Processes, seed: int, **details: Any
) -> dict[str, Any]:
    """The origin of the result `path`; the settings are a config's plain values."""
    return {
        "file": path.name,
        "made_at": datetime.now().astimezone().isoformat(timespec="seconds"),
        **details,
        "seed": seed,
        "code_version": code_version(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": device_name(processes.device),
        "processes": processes.world_size,
        "threads": torch.get_num_threads(),
        "config_sha256": settings_digest(settings),
        "config": dict(settings),
    }


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Write a record beside its result `path`, as {stem}.json."""
    with atomic_write(path.with_suffix(".json")) as file:
        file.write(json.dumps(record, indent=2).encode() + b"\n")
