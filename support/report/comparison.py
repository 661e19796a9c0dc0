"""Runs side by side: how their configs differ, and how their results compare."""

from collections.abc import Collection, Mapping, Sequence
from math import isfinite
from typing import NamedTuple

from support.report.runs import RecordedRun, Score
from support.report.tables import Table, mark_best
from support.scores.summary import Value, indistinct
from support.scores.table import COLUMNS, listed
from support.system.files import shorten
from support.system.settings import either


class Result(NamedTuple):
    """A run at one NFE: at its last scored step, or at its last step if it has no scores."""

    number: int  # of the run
    run: RecordedRun
    score: Score | None
    step: int
    nfe: int | None
    num_images: int | None
    values: Mapping[str, float | None]  # by column


def differing_keys(configs: Sequence[Mapping], keys: Collection[str]) -> list[str]:
    """The keys in which configs differ; all of them if one is unknown."""
    if not all(configs):
        return [*keys]
    return [key for key in keys if any(of.get(key) != configs[0].get(key) for of in configs)]


def differing_settings(runs: Sequence[RecordedRun]) -> Table:
    """The keys in which the runs' configs differ, with a column for each run."""
    configs = [run.settings for run in runs]
    keys = differing_keys(configs, dict.fromkeys(key for config in configs for key in config))
    # Each run has a working_dir of its own.
    differing = [key for key in keys if key != "working_dir"]
    rows = [[key, *(shorten(run.settings.get(key)) for run in runs)] for key in differing]
    return Table(["key", *(run.name for run in runs)], rows)


def missing_metrics(runs: Sequence[RecordedRun]) -> list[str]:
    """A line for each metric that some of the runs lack."""
    names = {name: None for run in runs for name in run.curves}
    lacking = {name: [run.name for run in runs if name not in run.curves] for name in names}
    return [f"{name}: {either(of)} has none" for name, of in lacking.items() if of]


def results_of(runs: Sequence[RecordedRun], names: Collection[str]) -> list[Result]:
    """The scores, held-out losses and the metrics among `names` of each run and NFE."""
    shown = [(i, run, score) for i, run in enumerate(runs) for score in _last_scores(run)]
    scores = [name for name in COLUMNS if any(s and name in s.values for _, _, s in shown)]
    losses = {key.loss: None for run in runs for key in run.held_out}
    metrics = [name for name in names if any(name in run.curves for run in runs)]
    results = []
    for number, run, score in shown:
        step, nfe, num_images = score[:3] if score else (run.last_step, None, None)
        values = {name: score.values.get(name) if score else None for name in scores}
        values |= {f"held-out {loss}": _held_out_at(run, loss, step) for loss in losses}
        curves = run.curves
        values |= {name: curves[name].at(step) if name in curves else None for name in metrics}
        results.append(Result(number, run, score, step, nfe, num_images, values))
    return results


def result_table(results: Sequence[Result]) -> Table:
    """A row for each run and NFE, and a note on distances that are close."""
    rows = [[r.run.name, r.step, r.nfe, r.num_images, *r.values.values()] for r in results]
    columns = ["run", "step", "NFE", "images", *results[0].values]
    return Table(columns, rows, notes=within_retraining(results))


def mark_comparable(
    table: Table, results: Sequence[Result], better: Mapping[str, str], target: Collection[str]
) -> list[str]:
    """Mark the best values of a table of these results; returns remarks.

    `better` says of columns whether "lower" or "higher" is better. The best value is marked only
    where values can be compared: scores if they were measured alike, errors if the runs agree in
    the keys `target`, which decide what the network learns.
    """
    ranked = [name for name in results[0].values if name in better]
    scores = [name for name in ranked if name in COLUMNS]
    errors = [name for name in ranked if name not in COLUMNS]
    remarks = []
    if how := ways_of_measuring(results):
        scores = []
        remarks.append(f"The scores cannot be compared, because they have different {how}.")
    configs = {result.number: result.run.settings for result in results}
    if len(configs) > 1 and errors and (keys := differing_keys([*configs.values()], target)):
        remarks.append(
            f"{either(errors)} cannot be compared, because the runs learn different targets: they "
            f"differ in {', '.join(keys)}."
        )
        errors = []
    mark_best(table, {name: better[name] for name in (*scores, *errors)})
    return remarks


def within_retraining(results: Sequence[Result]) -> list[str]:
    """A line for FID and FD on the results as near to the best as training again gives."""
    if ways_of_measuring(results):
        return []
    values = {
        f"{r.run.name} (NFE {r.nfe})": {
            k: Value(v) for k, v in r.values.items() if v is not None and isfinite(v)
        }
        for r in results
    }
    remarks = indistinct(values, ["FID", "FD"])
    return [f"{remark}: {listed(names)}" for remark, names in remarks.items() if names]


def ways_of_measuring(results: Sequence[Result]) -> str:
    """What makes the scores of these results incomparable, in words; "" if nothing does."""
    scores = [result.score for result in results if result.score]
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
