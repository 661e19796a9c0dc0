"""Expected curves: the band in which a metric of an experiment stays with any seed.

A file of docs/expected/ has the bands of one experiment, identified by a digest of its config.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from support.report.curves import Curve, at_shared_steps
from support.report.runs import RecordedRun
from support.system.files import UserError, atomic_write, refuse_foreign

NEIGHBOURS = 4  # points to either side from which a band's width is estimated
# Standard deviations to either side of the mean. Estimates from few runs are often too small, and
# each of a run's hundred values may lie outside by chance, so there are many.
DEVIATIONS = 6
DIGITS = 5  # of a bound
FEWEST_RUNS = 2


@dataclass(frozen=True)
class Band:
    """The values between which a metric is expected, at ascending steps; all [N]."""

    steps: np.ndarray
    low: np.ndarray
    high: np.ndarray

    @classmethod
    def around(cls, curves: Sequence[Curve]) -> "Band":
        """The band in which other seeds are expected, from the curves of two seeds or more.

        Three seeds say little about the width at one step, so the points beside it count, too.
        """
        steps, values = at_shared_steps(curves)
        variances = values.var(axis=0, ddof=1)
        around = [slice(max(0, i - NEIGHBOURS), i + NEIGHBOURS + 1) for i in range(len(steps))]
        reach = DEVIATIONS * np.sqrt([variances[points].mean() for points in around])
        mean = values.mean(axis=0)
        return cls(steps, _rounded(mean - reach), _rounded(mean + reach))

    def judge(self, curve: Curve) -> str:
        """A verdict on a curve: "inside", "outside since step N", or another."""
        shared = np.isin(curve.steps, self.steps)
        interval = float(np.median(np.diff(self.steps)))
        if not shared.any() or (len(curve.steps) > 1 and curve.interval != interval):
            # Means over intervals of different lengths cannot be compared.
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
    """The bands of an experiment, by metric, and the runs they were made from."""

    experiment: str  # digest
    made_from: Sequence[Mapping[str, Any]]
    bands: Mapping[str, Band]

    @classmethod
    def of(cls, experiment: str, runs: Sequence[RecordedRun], names: Sequence[str]) -> "Expected":
        """The bands of these metrics; UserError if the runs are too few or unfinished."""
        if len(runs) < FEWEST_RUNS:
            raise UserError(f"a band needs {FEWEST_RUNS} runs or more, each with another seed")
        for run in runs:
            if run.last_step != run.total_steps:
                place = f"step {run.last_step} of {run.total_steps}"
                raise UserError(f"{run.folder}: at {place}; a band needs finished runs")
        seeds = [run.settings.get("seed") for run in runs]
        if len({*seeds}) < len(seeds):
            raise UserError(f"a band needs runs of different seeds, not {seeds}")
        made_from = [{"seed": run.settings.get("seed"), **run.made_by} for run in runs]
        bands = {name: Band.around([run.curves[name] for run in runs]) for name in names}
        return cls(experiment, made_from, bands)

    def judge(self, run: RecordedRun) -> dict[str, str]:
        """The verdict on each metric that the run has."""
        shared = [name for name in self.bands if name in run.curves]
        return {name: self.bands[name].judge(run.curves[name]) for name in shared}

    def write(self, path: Path) -> None:
        """Write the file of an experiment."""
        bands = {
            name: {key: values.tolist() for key, values in vars(band).items()}
            for name, band in self.bands.items()
        }
        content = {"experiment": self.experiment, "made_from": self.made_from, "bands": bands}
        refuse_foreign(path, b'"experiment":', "say another --band")
        with atomic_write(path) as file:
            file.write(json.dumps(content).encode() + b"\n")


def _rounded(bounds: np.ndarray) -> np.ndarray:
    return np.array([float(f"{bound:.{DIGITS}g}") for bound in bounds])


def read_expected(folder: Path) -> dict[str, Expected]:
    """The expected curves in a folder, by experiment."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        try:
            content = json.loads(path.read_bytes())
            bands = {
                name: Band(**{key: np.array(values) for key, values in band.items()})
                for name, band in content["bands"].items()
            }
            expected = Expected(content["experiment"], content["made_from"], bands)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: not a file of expected curves ({error})") from error
        found[expected.experiment] = expected
    return found
