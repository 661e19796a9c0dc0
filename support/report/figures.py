"""Curves as Plotly figures, in colours for light and dark pages."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
import plotly.graph_objects as go

from support.report.curves import Curve
from support.report.expected import Band
from support.scores.table import Yardstick

PALETTE = (
    *("#2f7ed8", "#e07a1f", "#2ca05a", "#b455c8", "#d64550"),
    *("#0fa3a3", "#a07818", "#7a6ff0", "#d0559a", "#788896"),
)
BAND_COLOUR = "rgba(128, 140, 155, 0.22)"
POINTS_PER_METRIC = 4_000  # of all lines, twice: raw and smoothed
FEWEST_POINTS = 100
MARKED_POINTS = 40  # fewer are marked one by one
RAW_OPACITY = 0.35  # of a curve under its smoothed one


@dataclass(frozen=True)
class Line:
    """A curve of a figure, and how it is drawn."""

    curve: Curve
    run: int  # number of the run, which decides the colour
    name: str  # of the run
    detail: str = ""  # which of the run's curves it is
    dash: str = "solid"
    is_smoothed: bool = False  # a smoothed curve over the raw one
    yardstick: Yardstick | None = None  # of scores

    @property
    def label(self) -> str:
        return f"{self.name}, {self.detail}" if self.detail else self.name

    @property
    def smoothed(self) -> Curve | None:
        """The smoothed curve, if one is drawn over the raw one."""
        smoothed = self.curve.smoothed() if self.is_smoothed else self.curve
        is_same = np.array_equal(smoothed.values, self.curve.values, equal_nan=True)
        return None if is_same else smoothed


@dataclass(frozen=True)
class Panel:
    """A figure with the text above it."""

    title: str
    sentence: str
    lines: Sequence[Line]
    bands: Sequence[Band] = ()  # expected
    verdicts: Sequence[str] = ()

    @property
    def figure(self) -> str:
        """JSON for Plotly's script."""
        return draw(self.lines, self.bands)


def colour_of(number: int) -> str:
    """The colour of a run, by its number."""
    return PALETTE[number % len(PALETTE)]


def draw(lines: Sequence[Line], bands: Sequence[Band] = ()) -> str:
    """A figure of these lines over these bands, as JSON."""
    figure = go.Figure(layout={"template": None, "hovermode": "x unified", "showlegend": False})
    for band in bands:
        # The upper edge, then the lower edge backwards, encloses the area.
        steps = np.concatenate([band.steps, band.steps[::-1]])
        edge = Curve(steps, np.concatenate([band.high, band.low[::-1]]))
        fill: dict = {"fill": "toself", "fillcolor": BAND_COLOUR, "line": {"width": 0}}
        _add(figure, edge, **fill, hoverinfo="skip", name="expected")
    most = max(FEWEST_POINTS, POINTS_PER_METRIC // len(lines))
    for line in lines:
        raw, smoothed, label = line.curve.thinned(most), line.smoothed, escape(line.label)
        style = {"color": colour_of(line.run), "width": 2, "dash": line.dash}
        _add(
            figure,
            raw,
            name=label,
            hovertemplate=f"%{{y:.4g}}<extra>{label}</extra>",
            line={**style, "width": 1} if smoothed else style,
            opacity=RAW_OPACITY if smoothed else 1,
            mode="lines+markers" if len(raw.steps) < MARKED_POINTS and not smoothed else "lines",
            marker={"size": 4},
        )
        if smoothed:
            thick = {"name": f"{label}, smoothed", "hoverinfo": "skip", "line": style}
            _add(figure, smoothed.thinned(most), **thick)
    values = np.concatenate([line.curve.values for line in lines])
    if not bands and np.ptp(values) == 0:
        # Plotly's own axis would reach from -1 to 1.
        figure.update_yaxes(range=sorted([0, 2 * values[0]]))
    return figure.to_json().replace("<", "\\u003c")  # it stands inside a <script>


def _add(figure: go.Figure, curve: Curve, **style: object) -> None:
    """Add a line, as float32 to halve its bytes."""
    values = np.where(np.isfinite(curve.values), curve.values, np.nan)  # a gap
    x, y = curve.steps.astype(np.int32), values.astype(np.float32)
    figure.add_trace(go.Scatter(x=x, y=y, **{"mode": "lines", **style}))
