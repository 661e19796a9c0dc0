"""A number over the steps of training: thinned for a page, and smoothed."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

SMOOTHED_SHARE = 1 / 40  # of a curve's points, averaged to either side
FEWEST_SMOOTHED = 10  # points; shorter curves stay as they are


@dataclass(frozen=True)
class Curve:
    """Values at ascending steps, both [N]."""

    steps: np.ndarray
    values: np.ndarray

    @classmethod
    def of(cls, values_by_step: Mapping[int, float]) -> "Curve":
        steps = sorted(values_by_step)
        values = [values_by_step[step] for step in steps]
        return cls(np.array(steps, dtype=np.int64), np.array(values, dtype=np.float64))

    @property
    def interval(self) -> float:
        """The median number of steps between two points; 0 for a single point."""
        return float(np.median(np.diff(self.steps))) if len(self.steps) > 1 else 0.0

    def at(self, step: int) -> float | None:
        """The last value up to a step, if there is one."""
        index = int(np.searchsorted(self.steps, step, side="right")) - 1
        return float(self.values[index]) if index >= 0 else None

    def thinned(self, most: int) -> "Curve":
        """About `most` points: the lowest and the highest of each stretch of the curve.

        Each stretch also keeps its first value that is not finite.
        """
        if len(self.steps) <= most:
            return self
        kept = {0, len(self.steps) - 1}
        for stretch in np.array_split(np.arange(len(self.steps)), max(1, most // 2)):
            values = self.values[stretch]
            broken = ~np.isfinite(values)
            lowest = np.argmin(np.where(broken, np.inf, values))
            highest = np.argmax(np.where(broken, -np.inf, values))
            kept.update(stretch[[lowest, highest]], stretch[broken][:1])
        indices = sorted(kept)
        return Curve(self.steps[indices], self.values[indices])

    def smoothed(self) -> "Curve":
        """Means over as many points before each as after it, without values that are not finite."""
        if len(self.steps) < FEWEST_SMOOTHED:
            return self
        half = max(1, int(len(self.steps) * SMOOTHED_SHARE))
        # Fewer at the ends, so that the means there do not drift towards the middle.
        place = np.arange(len(self.steps))
        reach = np.minimum(half, np.minimum(place, place[::-1]))
        finite = np.isfinite(self.values)
        sums = np.concatenate([[0], np.cumsum(np.where(finite, self.values, 0))])
        counts = np.concatenate([[0], np.cumsum(finite)])
        first, last = place - reach, place + reach + 1
        count = counts[last] - counts[first]
        with np.errstate(invalid="ignore", divide="ignore"):
            means = (sums[last] - sums[first]) / count
        return Curve(self.steps, means)


def at_shared_steps(curves: Sequence[Curve]) -> tuple[np.ndarray, np.ndarray]:
    """The steps that all curves have [N], and their values there [curves, N]."""
    steps = functools.reduce(np.intersect1d, [curve.steps for curve in curves])
    return steps, np.stack([curve.values[np.isin(curve.steps, steps)] for curve in curves])
