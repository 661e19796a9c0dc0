"""From where a run goes on: the newest checkpoint of its folder that is whole and of this run."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from support.data.batches import BatchPlan
from support.runs.checkpoint import TrainState, find_checkpoints, read_checkpoint
from support.system.files import UserError
from support.system.processes import Processes

# A line for each change of a run's data and settings since a checkpoint, which is given by its
# entries (none: a fresh run) and its path; raises UserError where it is of another experiment.
Compare = Callable[[Mapping[str, Any], Path], list[str]]


def resume(
    folder: Path, state: TrainState, processes: Processes, plan: BatchPlan, compare: Compare
) -> tuple[Path | None, list[str]]:
    """Bring the state to where the folder's newest checkpoint is; gives that, and what to say.

    None where there is no checkpoint: then the run is a fresh one. All is checked, nothing is
    written. UserError where there are checkpoints and none can be used.
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
    notes += compare(content, path)
    settings = state.load_state_dict(content, str(path))
    notes += compare_plans(plan, content, path)
    if content.get("interval"):
        state.interval.load_state_dict(content["interval"], processes)
    # Where the file has its config, the comparison with that has said it.
    notes += settings if "config" not in content else []
    notes += [
        f"average {name} is not in {path}: it starts as its ema_model"
        for name in state.averages
        if name not in content.get("averages", {})
    ]
    return path, notes


def newest_usable(
    folder: Path, state: TrainState, compare: Compare, notes: list[str]
) -> tuple[Path | None, dict[str, Any] | None]:
    """The newest checkpoint that the state can take over; those passed over are noted.

    Nothing where there are no files named like one. UserError, with the newest's reason, where
    none is left: starting afresh over somebody's run must be their decision.
    """
    found = find_checkpoints(folder)
    reasons = []
    for path in reversed(found.values()):
        try:
            content = read_checkpoint(path)
            try:
                state.check(content, str(path))
            except UserError:
                compare(content, path)  # says more, where it is another experiment
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


def compare_plans(plan: BatchPlan, content: Mapping[str, Any], path: Path) -> list[str]:
    """A line where the batch was cut otherwise before: noise is drawn by microbatch."""
    before = content.get("parts", plan.record())
    if before == plan.record():
        return []
    try:
        was = BatchPlan.from_record(before)
    except (KeyError, TypeError, ZeroDivisionError, UserError):
        raise UserError(f"{path}: its entry `parts` is damaged") from None
    order = "goes on" if was.batch_size == plan.batch_size else "is another"
    noise = "goes on" if was.num_microbatches == plan.num_microbatches else "is another"
    return [f"batch {plan} now, {was} before: the order of the data {order}, the noise {noise}"]
