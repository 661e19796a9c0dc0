"""Curves as Plotly figures, in colours for light and dark pages."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go

from support.report.curves import Curve
from support.report.expected import Band

PALETTE = (
    *("#2f7ed8", "#e07a1f", "#2ca05a", "#b455c8", "#d64550"),
    *("#0fa3a3", "#a07818", "#7a6ff0", "#d0559a", "#788896"),
)
BAND_COLOUR = "rgba(128, 140, 155, 0.22)"
POINTS_PER_METRIC = 4_000  # of all lines, twice: raw and smoothed
FEWEST_POINTS = 100
MARKED_POINTS = 40  # fewer are marked one by one


@dataclass(frozen=True)
class Line:
    """A curve of a figure, and how it is drawn."""

    curve: Curve
    label: str
    colour: str
    dash: str = "solid"
    is_smoothed: bool = False  # a smoothed curve over the raw one


@dataclass(frozen=True)
class Panel:
    """A figure with the text above it."""

    title: str
    sentence: str
    figure: str  # JSON for Plotly's script
    verdicts: Sequence[str] = ()


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
        raw, smoothed = line.curve.thinned(most), line.curve.smoothed().thinned(most)
        is_both = line.is_smoothed and not np.array_equal(line.curve.values, smoothed.values)
        style = {"color": line.colour, "width": 2, "dash": line.dash}
        _add(
            figure,
            raw,
            name=line.label,
            hovertemplate=f"%{{y:.4g}}<extra>{line.label}</extra>",
            line={**style, "width": 1} if is_both else style,
            opacity=0.35 if is_both else 1,
            mode="lines+markers" if len(raw.steps) < MARKED_POINTS and not is_both else "lines",
            marker={"size": 4},
        )
        if is_both:
            _add(figure, smoothed, name=f"{line.label}, smoothed", hoverinfo="skip", line=style)
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
