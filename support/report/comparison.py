"""Runs side by side: how their configs differ, and how their results compare."""

from collections.abc import Collection, Mapping, Sequence

from support.report.runs import RecordedRun, Score
from support.report.tables import Table, mark_best
from support.scores.table import COLUMNS
from support.system.files import shorten
from support.system.settings import either


def differing_keys(runs: Sequence[RecordedRun], keys: Collection[str]) -> list[str]:
    """The keys in which the runs' configs differ; all of them if a config is unknown."""
    settings = [run.settings for run in runs]
    if not all(settings):
        return [*keys]
    return [key for key in keys if any(s.get(key) != settings[0].get(key) for s in settings)]


def differing_settings(runs: Sequence[RecordedRun]) -> Table:
    """The keys in which the runs' configs differ, with a column for each run."""
    keys = differing_keys(runs, dict.fromkeys(key for run in runs for key in run.settings))
    # Each run has a working_dir of its own.
    differing = [key for key in keys if key != "working_dir"]
    rows = [[key, *(shorten(run.settings.get(key)) for run in runs)] for key in differing]
    return Table(["key", *(run.name for run in runs)], rows)


def missing_metrics(runs: Sequence[RecordedRun]) -> list[str]:
    """A line for each metric that some of the runs lack."""
    names = {name: None for run in runs for name in run.curves}
    lacking = {name: [run.name for run in runs if name not in run.curves] for name in names}
    return [f"{name}: {either(of)} has none" for name, of in lacking.items() if of]


def results(
    runs: Sequence[RecordedRun], better: Mapping[str, str], target: Collection[str]
) -> tuple[Table, list[str]]:
    """A row for each run and NFE at its last scored step, or its last step; and remarks.

    `better` says of columns whether "lower" or "higher" is better. The best value is marked only
    where values can be compared: scores if they were measured alike, errors if the runs agree in
    the keys `target`, which decide what the network learns.
    """
    shown = [(run, score) for run in runs for score in _last_scores(run)]
    scores = [name for name in COLUMNS if any(s and name in s.values for _, s in shown)]
    losses = {key.loss: None for run in runs for key in run.held_out}
    metrics = [name for name in better if any(name in run.curves for run in runs)]
    held_out = [f"held-out {loss}" for loss in losses]
    rows = []
    for run, score in shown:
        step = score.step if score else run.last_step
        row: list = [run.name, step, score and score.nfe, score and score.num_images]
        row += [score and score.values.get(name) for name in scores]
        row += [_held_out_at(run, loss, step) for loss in losses]
        row += [run.curves[name].at(step) if name in run.curves else None for name in metrics]
        rows.append(row)
    table = Table(["run", "step", "NFE", "images", *scores, *held_out, *metrics], rows)
    remarks = []
    if how := ways_of_measuring([score for _, score in shown if score]):
        scores = []
        remarks.append(f"The scores cannot be compared, because they have different {how}.")
    errors = [name for name in (*held_out, *metrics) if name in better]
    if len(runs) > 1 and errors and (keys := differing_keys(runs, target)):
        remarks.append(
            f"{either(errors)} cannot be compared, because the runs learn different targets: they "
            f"differ in {', '.join(keys)}."
        )
        errors = []
    mark_best(table, {name: better[name] for name in (*scores, *errors) if name in better})
    return table, remarks


def ways_of_measuring(scores: Sequence[Score]) -> str:
    """What makes these scores incomparable, in words; "" if nothing does."""
    ways: dict[str, set] = {
        "numbers of images": {score.num_images for score in scores},
        "references": {score.yardstick.reference_sha256 for score in scores},
        "graphs": {score.yardstick.graph_sha256 for score in scores},
        "distances": {score.yardstick.distances for score in scores},
    }
    return ", ".join(name for name, found in ways.items() if len(found) > 1)


def _last_scores(run: RecordedRun) -> list[Score | None]:
    """The score of the last step for each NFE; [None] if there is no score."""
    return [*{score.nfe: score for score in run.scores}.values()] or [None]


def _held_out_at(run: RecordedRun, loss: str, step: int) -> float | None:
    """The average's held-out loss up to a step, over all bins of t."""
    curves = [c for key, c in run.held_out.items() if key.loss == loss and key.whose == "average"]
    values = [value for curve in curves if (value := curve.at(step)) is not None]
    return sum(values) / len(values) if values else None
