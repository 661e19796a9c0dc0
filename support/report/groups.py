"""Runs that differ in the seed alone, as one: means and deviations over the seeds."""

import os
from collections.abc import Collection, Hashable, Sequence
from dataclasses import replace

import numpy as np

from support.report.comparison import Result, differing_keys, ways_of_measuring
from support.report.curves import Curve, at_shared_steps
from support.report.expected import Band
from support.report.figures import Line
from support.report.runs import RecordedRun
from support.report.tables import Table, text_of
from support.scores.summary import over_seeds
from support.scores.table import COLUMNS, listed
from support.system.files import shorten


def groups_of(runs: Sequence[RecordedRun], experiments: Sequence[str | None]) -> list[Hashable]:
    """The group of each run: its experiment.

    A run of an unknown experiment is a group of its own, and so is one that repeats a seed.
    """
    groups: list[Hashable] = []
    seen = set()
    for number, (run, experiment) in enumerate(zip(runs, experiments, strict=True)):
        seeded = (experiment, run.settings.get("seed"))
        groups.append(number if experiment is None or seeded in seen else experiment)
        seen.add(seeded)
    return groups


def seed_table(
    results: Sequence[Result], groups: Sequence[Hashable], keys: Collection[str]
) -> Table:
    """A row for each group and NFE: means and deviations, and those of `keys` that were swept."""
    members: dict[tuple, list[Result]] = {}
    for result in results:
        members.setdefault((groups[result.number], result.nfe), []).append(result)
    settings = [of_group[0].run.settings for of_group in members.values()]
    swept = differing_keys([known for known in settings if known], keys)
    rows, notes = [], []
    for of_group in members.values():
        first, name = of_group[0], _name([result.run.name for result in of_group])
        values = {key: over_seeds([r.values[key] for r in of_group]) for key in first.values}
        how, left_out = ways_of_measuring(of_group), {*values} & {*COLUMNS}
        if len({result.step for result in of_group}) > 1:
            how, left_out = "last steps", {*values}
        if how:
            values |= dict.fromkeys(left_out)
            notes.append(f"{name}, NFE {text_of(first.nfe)}: no mean of values of different {how}")
        chosen = (first.run.settings.get(key) for key in swept)
        configured = [value if isinstance(value, str) else shorten(value) for value in chosen]
        counts = [first.step, first.nfe, first.num_images, len(of_group)]
        rows.append([name, *configured, *counts, *values.values()])
    columns = ["runs", *swept, "step", "NFE", "images", "n", *results[0].values]
    return Table(columns, rows, notes=notes)


def mean_lines(lines: Sequence[Line], groups: Sequence[Hashable]) -> list[tuple[Line, Band | None]]:
    """The lines of each group as their mean, with a band of one deviation to either side.

    Lines without a step in common stay apart.
    """
    members: dict[tuple, list[Line]] = {}
    for line in lines:
        key = (groups[line.run], line.detail, line.yardstick)
        members.setdefault(key, []).append(line)
    drawn: list[tuple[Line, Band | None]] = []
    for alike in members.values():
        steps, values = at_shared_steps([line.smoothed or line.curve for line in alike])
        if len(alike) == 1 or not len(steps):
            drawn += [(line, None) for line in alike]
            continue
        with np.errstate(invalid="ignore"):  # of infinite values
            mean, deviation = values.mean(axis=0), values.std(axis=0, ddof=1)
        name = _name([line.name for line in alike])
        line = replace(alike[0], curve=Curve(steps, mean), name=name, is_smoothed=False)
        drawn.append((line, Band(steps, mean - deviation, mean + deviation)))
    return drawn


def _name(runs: Sequence[str]) -> str:
    """The name of a run, or of several: digits-*."""
    start = os.path.commonprefix(runs)  # noqa: RUF071 - letters, no folders
    return f"{start}*" if start and len(runs) > 1 else listed([*runs])
