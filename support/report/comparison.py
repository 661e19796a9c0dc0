"""Runs side by side: what differs in their configs, and what came of them."""

from collections.abc import Collection, Mapping, Sequence

from support.report.runs import RecordedRun, Score
from support.report.tables import Table, mark_best
from support.scores.table import COLUMNS
from support.system.files import shorten
from support.system.settings import either


def differing_settings(runs: Sequence[RecordedRun], passed_over: Collection[str]) -> Table:
    """The keys of the configs in which runs differ, a column for each run."""
    keys = {key: None for run in runs for key in run.settings if key not in passed_over}
    rows = []
    for key in keys:
        values = [run.settings.get(key) for run in runs]
        if any(value != values[0] for value in values[1:]):
            rows.append([key, *map(shorten, values)])
    return Table(["key", *(run.name for run in runs)], rows)


def missing_metrics(runs: Sequence[RecordedRun]) -> list[str]:
    """A line for each metric that some of the runs lack."""
    names = {name: None for run in runs for name in run.curves}
    lines = []
    for name in names:
        lacking = [run.name for run in runs if name not in run.curves]
        if lacking:
            lines.append(f"{name}: {either(lacking)} has none")
    return lines


def results(runs: Sequence[RecordedRun], better: Mapping[str, str]) -> Table:
    """A row for each run and number of jumps, of its last scored step; else of its last step.

    `better` says of a column whether "lower" or "higher" values are: the best are marked, scores
    only where all were made alike, and so can be compared.
    """
    last = [(run, score) for run in runs for score in _last_scores(run)]
    names = [name for name in COLUMNS if any(s is not None and name in s.values for _, s in last)]
    losses = {key.loss: None for run in runs for key in run.held_out}
    metrics = [name for name in better if any(name in run.curves for run in runs)]
    rows = []
    for run, score in last:
        step = run.last_step if score is None else score.step
        rows.append(
            [
                run.name,
                step,
                score and score.jumps,
                score and score.num_images,
                *(score and score.values.get(name) for name in names),
                *(_held_out_at(run, loss, step) for loss in losses),
                *(run.curves[name].at(step) if name in run.curves else None for name in metrics),
            ]
        )
    held_out = [f"held-out {loss}" for loss in losses]
    table = Table(["run", "step", "NFE", "images", *names, *held_out, *metrics], rows)
    comparable = {name: how for name, how in better.items() if name not in COLUMNS or alike(runs)}
    mark_best(table, comparable)
    return table


def alike(runs: Sequence[RecordedRun]) -> bool:
    """Whether all scores are of as many images, by the same reference, graph and distances."""
    return len({(s.num_images, s.yardstick) for run in runs for s in run.scores}) < 2


def _last_scores(run: RecordedRun) -> list[Score | None]:
    """For each number of jumps the score of the last step; [None] where there is no score."""
    return [*{score.jumps: score for score in run.scores}.values()] or [None]


def _held_out_at(run: RecordedRun, loss: str, step: int) -> float | None:
    """The average's held-out loss up to a step, over all bins of t."""
    curves = [c for key, c in run.held_out.items() if key.loss == loss and key.whose == "average"]
    values = [value for curve in curves if (value := curve.at(step)) is not None]
    return sum(values) / len(values) if values else None
