"""Check and measure this code on a GPU; a section that fails is a row, and the others go on.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --minutes 8 --output h100.json
    python benchmarks/gpu.py --sections exactness steps
    python benchmarks/gpu.py --tiny --device cpu    # tries the command; its numbers mean nothing

Writes a JSON file and a Markdown table beside it after each section, so a run that is ended keeps
what it has measured. Sections share the minutes; what does not fit is a row that says so.
"""

import contextlib
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from measuring import ROOT  # noqa: F401 - first: it finds the rest

# isort: split
import torch

from support.runs.budget import size
from support.runs.logbook import device_name
from support.system.command import command_parser, run_command
from support.system.files import UserError, atomic_write, check_writable
from support.system.processes import choose_device

# A process for each section: what breaks its GPU context, or kills it, ends that section alone.
WORKER = Path(__file__).resolve().with_name("gpu_sections.py")
SHARES = {"exactness": 4, "steps": 24, "waits": 3, "sampling": 4, "profile": 3, "commands": 10}
GRACE_SECONDS = 30  # for the task that runs when a section's time is up

Row = dict[str, Any]  # section, name, and value with unit, or error


def rows_of(section: str, device: str, is_tiny: bool, seconds: float) -> list[Row]:
    """The rows of a section; the last one says how its process failed, where it did."""
    command = [sys.executable, WORKER, section, device, str(int(is_tiny)), str(seconds)]
    with tempfile.TemporaryFile("w+") as output:
        with subprocess.Popen(command, stdout=output, start_new_session=True) as process:
            try:
                status = process.wait(seconds + GRACE_SECONDS)
                reason = f"the section's process has died with exit status {status}"
            except subprocess.TimeoutExpired:
                status, reason = 1, f"stopped after {seconds + GRACE_SECONDS:.0f} s"
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        output.seek(0)
        rows = [{"section": section, **json.loads(line)} for line in output if line[-1] == "\n"]
    return rows + ([{"section": section, "name": section, "error": reason}] if status else [])


def shown(row: Row) -> str:
    """A row's value for people."""
    if "error" in row:
        return row["error"].replace("|", "/")
    value, unit = row["value"], row["unit"]
    if unit.startswith("bytes"):
        return size(value) + unit.removeprefix("bytes")
    text = value if isinstance(value, str) else f"{value:.4g}"
    return f"{text} {unit}".strip().replace("|", "/")


def save(path: Path, facts: dict[str, str], rows: list[Row]) -> None:
    """Write the JSON file and the table."""
    with atomic_write(path) as file:
        file.write(json.dumps({**facts, "rows": rows}, indent=1).encode() + b"\n")
    lines = [", ".join(facts.values()), "", "| section | what | value |", "| --- | --- | ---: |"]
    lines += [f"| {row['section']} | {row['name']} | {shown(row)} |" for row in rows]
    with atomic_write(path.with_suffix(".md")) as file:
        file.write("\n".join([*lines, ""]).encode())


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("--minutes", type=float, default=9.5, help="for all of it (default %(default)s)")
    add("--output", type=Path, metavar="FILE.json", help="default: gpu-DEVICE-DATE.json")
    add("--sections", nargs="+", choices=SHARES, default=list(SHARES))
    add("--device", choices=("auto", "cuda", "cpu"), default="auto")
    add("--tiny", action="store_true", help="small models and few steps")
    arguments = parser.parse_args(argv)
    device = choose_device(arguments.device)
    name = device_name(device)
    if device.type != "cuda" and not arguments.tiny:
        raise UserError(f"device: {name} is not a GPU; --tiny tries the command on any machine")
    words = re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")
    path = arguments.output or Path(f"gpu-{words}-{datetime.now(UTC):%Y-%m-%d}.json")
    if path.suffix != ".json":
        raise UserError(f"--output {path}: must end in .json; the table goes beside it as .md")
    check_writable(path)
    date = datetime.now(UTC).isoformat(timespec="seconds")
    versions = {"torch": f"torch {torch.__version__}", "python": f"Python {sys.version.split()[0]}"}
    facts = {"device": name, "date": date, **versions, "system": platform.platform()}
    rows: list[Row] = []
    deadline = time.monotonic() + 60 * arguments.minutes
    for index, section in enumerate(arguments.sections):
        shares = [SHARES[name] for name in arguments.sections[index:]]
        seconds = max(0.0, deadline - time.monotonic()) * shares[0] / sum(shares)
        for row in rows_of(section, device.type, arguments.tiny, seconds):
            print(f"{row['section']:<10} {row['name']}: {shown(row)}", flush=True)
            rows.append(row)
        save(path, facts, rows)
    print(f"written: {path} and {path.with_suffix('.md')}")


if __name__ == "__main__":
    run_command(main)
