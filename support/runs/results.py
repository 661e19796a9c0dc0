"""The results of a run: when and where it writes and deletes checkpoints, demos and evals."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from support.runs.background import Background, background
from support.runs.checkpoint import host_copy, refuse_non_finite, save_checkpoint
from support.runs.logbook import record_of, write_record
from support.system.files import make_folder, numbered_files, reporting_os_errors
from support.system.locks import hold_lock
from support.system.processes import Processes

SUFFIXES = {"ckpts": ".pt", "averages": ".pt", "figs": ".png", "evals": ".npz"}  # by folder


def is_due(finished_steps: int, every: int | None) -> bool:
    """Whether something due every so many steps is due now; 0 and None mean never."""
    return bool(every and finished_steps > 0 and finished_steps % every == 0)


@dataclass(frozen=True)
class ResultSchedule:
    """After how many steps a run writes each kind of result; 0 and None mean never.

    The first and the last step get a checkpoint in any case.
    """

    total_steps: int
    ckpts: int | None
    figs: int | None
    evals: int | None
    averages: int | None = None

    def steps(self, kind: str) -> list[int]:
        """The steps after which this kind of result is due, in ascending order."""
        every, last = getattr(self, kind), self.total_steps
        found = {*range(every, last + 1, every)} if every else set()
        return sorted(found | {0, last} if kind == "ckpts" else found)

    def is_due(self, kind: str, step: int) -> bool:
        """Whether this kind of result is due after this step."""
        is_end = kind == "ckpts" and step in (0, self.total_steps)
        return is_end or is_due(step, getattr(self, kind))

    @property
    def has_images(self) -> bool:
        """Whether the run makes images at all."""
        return bool(self.steps("figs") or self.steps("evals"))


@dataclass
class Results:
    """A run's folder as one process sees it; only rank 0 writes there."""

    folder: Path
    processes: Processes
    schedule: ResultSchedule
    settings: Mapping[str, Any]  # the config's plain values, for records
    seed: int
    keep_last: int | None = None
    keep_every_steps: int | None = None
    jobs: Background = field(init=False)  # writes beside training; set in `claimed`

    @contextlib.contextmanager
    def claimed(self) -> Iterator[None]:
        """A block in which the folder exists and no other run can use it.

        UserError where another run is using it. The block ends when all writes have.
        """
        with contextlib.ExitStack() as stack:
            if self.processes.is_main:
                folder = make_folder(self.folder)
                refusal = f"{folder}: another run is using this working_dir"
                stack.enter_context(hold_lock(folder / ".lock", refusal))
            self.processes.check_shared(self.folder, "working_dir")
            self.jobs = stack.enter_context(background())
            yield

    def open(self) -> None:
        """Create the folders of results."""
        for kind in SUFFIXES:
            if kind != "averages" or self.schedule.averages:
                make_folder(self.folder / kind)

    def path(self, kind: str, step: int) -> Path:
        """The path of this kind of result of this step."""
        return self.folder / kind / f"{step}{SUFFIXES[kind]}"

    def due(self, step: int, is_saving: bool = False, is_stopping: bool = False) -> list[Path]:
        """The results to write after this step, the checkpoint first.

        A run that is asked to stop writes the checkpoint only, and the rest when it continues.
        """
        if is_stopping:
            return [self.path("ckpts", step)]
        due = {kind: self.schedule.is_due(kind, step) for kind in SUFFIXES}
        due["ckpts"] |= is_saving
        return [self.path(kind, step) for kind in SUFFIXES if due[kind]]

    def save(self, kind: str, content: Mapping[str, Any]) -> None:
        """Write weights and their record while training goes on."""
        self.jobs.wait()  # two copies at once would take twice the memory
        if not self.processes.is_main:
            return
        step = content["finished_steps"]
        path, copied = self.path(kind, step), host_copy(content)
        record = self.record(path, finished_steps=step)

        def write() -> None:
            refuse_non_finite(copied)
            write_record(path, record)  # first: a kill then leaves no checkpoint without a record
            save_checkpoint(path, copied)
            if kind == "ckpts":
                self.delete_superseded(kind, step)

        self.jobs.start(write)

    def record(self, path: Path, **details: Any) -> dict[str, Any]:
        """The record of a result."""
        return record_of(path, self.settings, self.processes, self.seed, **details)

    def delete_superseded(self, kind: str, newest: int) -> None:
        """Delete older results with their records, once that of step `newest` is whole.

        The last `keep_last` up to `newest` stay (None: all), and those at multiples of
        `keep_every_steps`; so do those beyond `newest`, which are of another branch of the run.
        """
        if self.keep_last is None:
            return
        found = numbered_files(self.folder / kind, SUFFIXES[kind])
        upto = [step for step in found if step <= newest]
        for step in upto[: -self.keep_last]:
            if self.keep_every_steps and step % self.keep_every_steps == 0:
                continue
            with reporting_os_errors(f"{found[step]}: cannot be deleted"):
                # The record first: a kill in between leaves a result, which is found again.
                found[step].with_suffix(".json").unlink(missing_ok=True)
                found[step].unlink()
