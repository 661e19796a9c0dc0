"""Expected curves: the band that a metric of an experiment stays in, whatever the seed.

A file of docs/expected/ has the bands of one experiment, named by a digest of its config's keys.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from support.report.curves import Curve
from support.report.runs import RecordedRun
from support.system.files import UserError, atomic_write, refuse_foreign

NEIGHBOURS = 4  # points to either side from which a band's width is estimated
# A band reaches so many standard deviations to either side of the mean: estimated from few runs,
# they are often too small, and a run has a hundred values that may each be outside by chance.
DEVIATIONS = 6
DIGITS = 5  # of a bound in the file
FEWEST_RUNS = 2


@dataclass(frozen=True)
class Band:
    """Between which values a metric is expected, at ascending steps; all [N]."""

    steps: np.ndarray
    low: np.ndarray
    high: np.ndarray

    @classmethod
    def around(cls, curves: Sequence[Curve]) -> "Band":
        """What another seed is expected to stay in, from the curves of two seeds or more.

        Three seeds say little about the width at one step, so that it is estimated from the
        points beside it too.
        """
        steps = curves[0].steps
        for curve in curves[1:]:
            steps = np.intersect1d(steps, curve.steps)
        values = np.stack([curve.values[np.isin(curve.steps, steps)] for curve in curves])
        variances = values.var(axis=0, ddof=1)
        variances = np.array(
            [
                variances[max(0, i - NEIGHBOURS) : i + NEIGHBOURS + 1].mean()
                for i in range(len(steps))
            ]
        )
        mean, reach = values.mean(axis=0), DEVIATIONS * np.sqrt(variances)
        return cls(steps, mean - reach, mean + reach)

    def judge(self, curve: Curve) -> str:
        """ "inside", "outside since step N", or what else there is to say of a curve."""
        shared = np.isin(curve.steps, self.steps)
        interval = float(np.median(np.diff(self.steps)))
        if not shared.any() or (len(curve.steps) > 1 and curve.interval != interval):
            # A mean over other stretches of training is another number.
            return f"not compared: the band is of every {interval:g} steps"
        steps, values = curve.steps[shared], curve.values[shared]
        here = np.isin(self.steps, steps)
        is_inside = (values >= self.low[here]) & (values <= self.high[here])  # false of NaN
        outside = steps[~is_inside]
        if not len(outside):
            return "inside"
        if is_inside[-1]:
            return f"inside, but for {len(outside)} of {len(steps)} lines (step {outside[0]} first)"
        last_inside = steps[is_inside].max(initial=-1)
        return f"outside since step {outside[outside > last_inside][0]}"


@dataclass(frozen=True)
class Expected:
    """The bands of an experiment, by metric, and the runs that they were made from."""

    experiment: str  # digest
    made_from: Sequence[Mapping[str, Any]]
    bands: Mapping[str, Band]

    @classmethod
    def of(cls, experiment: str, runs: Sequence[RecordedRun], names: Sequence[str]) -> "Expected":
        """The bands of these metrics; UserError where the runs are too few or not whole."""
        if len(runs) < FEWEST_RUNS:
            raise UserError(f"a band needs {FEWEST_RUNS} runs or more, each with another seed")
        for run in runs:
            if run.last_step != run.total_steps:
                raise UserError(
                    f"{run.folder}: at step {run.last_step} of {run.total_steps}; a band needs "
                    "runs that are finished"
                )
        seeds = [run.settings.get("seed") for run in runs]
        if len({*seeds}) < len(seeds):
            raise UserError(f"a band needs runs of different seeds, not {seeds}")
        made_from = [{"seed": run.settings.get("seed"), **run.made_by} for run in runs]
        bands = {name: Band.around([run.curves[name] for run in runs]) for name in names}
        return cls(experiment, made_from, bands)

    def judge(self, run: RecordedRun) -> dict[str, str]:
        """What is to be said of each metric that the run has."""
        return {
            name: band.judge(run.curves[name])
            for name, band in self.bands.items()
            if name in run.curves
        }

    def write(self, path: Path) -> None:
        """Write the file of an experiment."""
        bands = {
            name: {
                "steps": band.steps.tolist(),
                "low": [float(f"{bound:.{DIGITS}g}") for bound in band.low],
                "high": [float(f"{bound:.{DIGITS}g}") for bound in band.high],
            }
            for name, band in self.bands.items()
        }
        content = {"experiment": self.experiment, "made_from": self.made_from, "bands": bands}
        refuse_foreign(path, b'{\n "experiment":', "say another --band")
        with atomic_write(path) as file:
            file.write(_with_lists_in_lines(json.dumps(content, indent=1)).encode() + b"\n")


def _with_lists_in_lines(text: str) -> str:
    """JSON whose lists of numbers take a line each, and not one for every number."""
    return re.sub(r"\[[\d\s.,e+-]+\]", lambda found: " ".join(found[0].split()), text)


def read_expected(folder: Path) -> dict[str, Expected]:
    """What there is in a folder, by experiment."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        try:
            content = json.loads(path.read_bytes())
            bands = {
                name: Band(*(np.array(band[key]) for key in ("steps", "low", "high")))
                for name, band in content["bands"].items()
            }
            expected = Expected(content["experiment"], content["made_from"], bands)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: not a file of expected curves ({error})") from error
        found[expected.experiment] = expected
    return found
