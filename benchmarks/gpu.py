"""What a first GPU has to show, in one table; what fails is a row, and the rest goes on.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --minutes 30 --output h100.json
    python benchmarks/gpu.py --sections step memory
    python benchmarks/gpu.py --tiny

Writes a JSON file and a Markdown table beside it, anew after each section, so that a run that is
ended leaves what it has measured. Sections come in order of worth and share the minutes out; what
does not fit is said. --tiny is for trying the command on any machine: its numbers say nothing.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import platform
import re
import signal
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path

from measuring import ROOT  # noqa: F401 - first: it finds the rest

# isort: split
import torch
from gpu_sections import SECTIONS
from gpu_sections.bench import OUT_OF_TIME, Bench, Row, describe

from support.runs.budget import size
from support.runs.logbook import device_name
from support.system.command import run_command
from support.system.files import UserError, atomic_write, check_writable
from support.system.processes import choose_device, connected

# What a section may take beyond its allowance, for the task under way.
GRACE_SECONDS = 30
# A process per section, so that a GPU left in disorder, or a kill, ends that section alone; by
# fork, so that modules are loaded once. The parent itself computes nothing.
FORK = multiprocessing.get_context("fork")


@dataclass
class Report:
    """What was measured so far, and where it is kept."""

    path: Path
    device: str
    date: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    torch: str = torch.__version__
    python: str = platform.python_version()
    rows: list[Row] = field(default_factory=list)

    def save(self) -> None:
        """Write both files."""
        facts = {name: getattr(self, name) for name in ("device", "date", "torch", "python")}
        with atomic_write(self.path) as file:
            rows = [without_empty_error(asdict(row)) for row in self.rows]
            file.write(json.dumps({**facts, "rows": rows}, indent=1).encode() + b"\n")
        with atomic_write(self.path.with_suffix(".md")) as file:
            file.write(self.table().encode())

    def table(self) -> str:
        """The rows in Markdown."""
        lines = [f"{self.device}, {self.date}, torch {self.torch}, Python {self.python}", ""]
        lines += ["| section | what | value |", "| --- | --- | ---: |"]
        lines += [f"| {row.section} | {row.name} | {shown(row)} |" for row in self.rows]
        return "\n".join(lines) + "\n"


def without_empty_error(row: dict) -> dict:
    """A row's fields, of which the error is left out where there is none."""
    return {name: value for name, value in row.items() if name != "error" or value is not None}


def shown(row: Row) -> str:
    """A row's value for people."""
    if row.error is not None:
        return row.error.replace("|", "/")
    if isinstance(row.value, str):
        return f"{row.value} {row.unit}".strip().replace("|", "/")
    if row.unit.startswith("bytes"):
        return size(row.value) + row.unit.removeprefix("bytes")
    return f"{row.value:.4g} {row.unit}".strip()


# Sections, each in a process


@dataclass(frozen=True)
class Asked:
    """What the command line asks of every section."""

    device: str
    is_tiny: bool


def find_device(asked: Asked) -> tuple[str, str]:
    """The device's kind and name; a child's work, since asking for it takes the GPU up."""
    device = choose_device(asked.device)
    return device.type, device_name(device)


def work_on(section: str, asked: Asked, folder: str, seconds: float, results: Connection) -> None:
    """The child's part: send the names of all tasks, then the rows of each in turn."""
    os.setpgrp()  # so that what it starts ends with it
    deadline = time.monotonic() + seconds
    with results, connected(asked.device, timeout_minutes=10) as processes:
        bench = Bench(processes, asked.is_tiny, Path(folder))
        try:
            tasks = SECTIONS[section].tasks(bench)
            results.send([task.name for task in tasks])
            for rows in bench.run(section, tasks, deadline):
                results.send(rows)
        except Exception as error:  # any kind: the other sections do not depend on it
            results.send([Row(section, section, None, error=describe(error))])


def rows_of_section(section: str, asked: Asked, seconds: float) -> Iterator[Row]:
    """A section's rows as they come; what its process leaves undone is a row too."""
    receiving, sending = FORK.Pipe(duplex=False)
    with tempfile.TemporaryDirectory(prefix="gpu-benchmark-") as folder:
        child = FORK.Process(target=work_on, args=(section, asked, folder, seconds, sending))
        child.start()
        sending.close()  # so that the child's end is the end
        try:
            yield from received(section, receiving, seconds + GRACE_SECONDS)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.kill()
            child.join()


def received(section: str, results: Connection, seconds: float) -> Iterator[Row]:
    """What a child sends within that time, and a row for each task that it then owes."""
    deadline = time.monotonic() + seconds
    owed = [section]  # until it has said what it will do
    reason = f"stopped after {seconds:.0f} s"
    while results.poll(max(0, deadline - time.monotonic())):
        try:
            sent = results.recv()
        except EOFError:
            reason = "the section's process has died"
            break
        if isinstance(sent[0], str):
            owed = sent
        else:
            owed = owed[1:]
            yield from sent
    for name in owed[:1]:
        yield Row(section, name, None, error=reason)
    for name in owed[1:]:
        yield Row(section, name, None, error=OUT_OF_TIME)


# The command


def allowances(sections: Sequence[str], seconds: float) -> Iterator[tuple[str, float]]:
    """Each section with its seconds: its share of what is left when its turn has come."""
    deadline = time.monotonic() + seconds
    for index, section in enumerate(sections):
        shares = [SECTIONS[name].share for name in sections[index:]]
        left = deadline - time.monotonic()
        yield section, max(0, left) * shares[0] / sum(shares)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10, help="for all of it (default 10)")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="(default gpu-*.json)")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--tiny", action="store_true", help="small models and few steps")
    return parser.parse_args(argv)


def default_path(device: str) -> Path:
    """A name that says which device, and which day."""
    words = re.sub("[^a-z0-9]+", "-", device.lower()).strip("-")
    return Path(f"gpu-{words}-{datetime.now(UTC):%Y-%m-%d}.json")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    arguments = parse_arguments(argv)
    asked = Asked(arguments.device, arguments.tiny)
    with FORK.Pool(1) as child:
        kind, name = child.apply(find_device, (asked,))
    if kind != "cuda" and not asked.is_tiny:
        raise UserError(f"device: {name} is no GPU; --tiny tries the command on any machine")
    report = Report(arguments.output or default_path(name), name)
    if report.path.suffix != ".json":
        raise UserError(f"--output {report.path}: ends in .json; the table goes beside it as .md")
    check_writable(report.path)
    for section, seconds in allowances(arguments.sections, 60 * arguments.minutes):
        for row in rows_of_section(section, asked, seconds):
            print(f"{row.section:<10} {row.name}: {shown(row)}", flush=True)
            report.rows.append(row)
        report.save()
    print(f"written: {report.path} and {report.path.with_suffix('.md')}")


if __name__ == "__main__":
    run_command(main)
