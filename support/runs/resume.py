"""Where a run continues: at the newest checkpoint of its folder that is whole and fits the run."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from support.runs.budget import size
from support.runs.checkpoint import TrainState, find_checkpoints, read_checkpoint
from support.system.files import UserError
from support.system.processes import Processes

LARGE_BYTES = 10**9  # such files take a while to read

# Compares a checkpoint's entries (empty for a fresh run), read from a path, with the run. Returns a
# line for each change of data, batches and settings; UserError where it is another experiment.
Compare = Callable[[Mapping[str, Any], Path], list[str]]


def resume(
    folder: Path, state: TrainState, processes: Processes, compare: Compare
) -> tuple[Path | None, list[str]]:
    """Load the folder's newest usable checkpoint into `state`; returns its path and lines to log.

    The path is None for a fresh run, in a folder without checkpoints. Writes nothing. UserError
    where there are checkpoints and none can be used, or where the newest usable one is of another
    experiment.
    """
    notes: list[str] = []
    path, content = None, None
    if processes.is_main:
        path, content = newest_usable(folder / "ckpts", state, compare, notes)
    path = processes.broadcast_object(path)
    if path is None:
        return None, notes + compare({}, folder / "config.yaml")
    if content is None:
        content = read_checkpoint(path, is_verified=True)
    try:
        changes = compare(content, path)
    except UserError as error:
        raise UserError("; ".join([str(error), *notes])) from None
    settings = state.load_state_dict(content, str(path))
    if content.get("interval"):
        state.interval.load_state_dict(content["interval"], processes)
    if "config" not in content:  # else `compare` has reported these
        changes += settings
    changes += [
        f"average {name} is not in {path}: it starts as its ema_model"
        for name in state.averages
        if name not in content.get("averages", {})
    ]
    return path, notes + changes


def newest_usable(
    folder: Path, state: TrainState, compare: Compare, notes: list[str]
) -> tuple[Path | None, dict[str, Any] | None]:
    """The newest checkpoint that fits the state; adds to `notes` a line for each passed over.

    None if no file has a checkpoint's name. If all are unusable, UserError with the newest one's
    reason: only the user may decide to start afresh in that folder.
    """
    found = find_checkpoints(folder)
    reasons = []
    for path in reversed(found.values()):
        try:
            if path.stat().st_size > LARGE_BYTES:
                print(f"checking {path}: {size(path.stat().st_size)}", flush=True)
            content = read_checkpoint(path)
            try:
                state.check(content, str(path))
            except UserError:
                compare(content, path)  # its error says more, where it is another experiment
                raise
            return path, content
        except UserError as error:
            notes.append(f"passed over: {error}")
            reasons.append(str(error))
    if reasons:
        raise UserError(
            f"{folder}: none of its {len(found)} checkpoints can be used; the newest: {reasons[0]}"
        )
    return None, None
