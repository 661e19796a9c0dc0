"""The curves of a report for papers: each panel as an SVG and a PDF, drawn by matplotlib."""

import re
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from support.report.expected import Band
from support.report.figures import MARKED_POINTS, RAW_OPACITY, Line, Panel, colour_of
from support.report.groups import mean_lines
from support.system.files import UserError, atomic_write, make_folder, refuse_foreign

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MATPLOTLIB = "matplotlib==3.11.2"
MARK = "Made by report.py"  # in each SVG
STYLE: dict[Any, Any] = {
    "font.size": 8,
    "lines.linewidth": 1.2,
    "lines.markersize": 2.5,
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
    "text.parse_math": False,  # a $ in a name is a $
    "pdf.fonttype": 42,  # TrueType, which publishers ask for
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": MARK,  # the same curves make the same file
}
SIZE_INCHES = (3.4, 2.2)  # a column of a paper
MOST_POINTS = 1_000  # of a curve
DASHES = {"solid": "-", "dash": "--", "dot": ":", "dashdot": "-."}
MOST_LETTERS = 100  # of a file's name


def write_figures(folder: Path, panels: Sequence[Panel], groups: Sequence[Hashable]) -> None:
    """Write a figure of each panel, with the mean of each group of runs; `groups` has one a run."""
    try:
        import matplotlib
    except ImportError as error:
        raise UserError(f"--figures needs matplotlib: pip install {MATPLOTLIB}") from error
    named: dict[str, Panel] = {}
    for panel in panels:
        name = re.sub(r"[^\w.-]+", "_", panel.title)[:MOST_LETTERS]
        named[name if name not in named else f"{name}_{len(named)}"] = panel
    for name in named:
        svg, pdf = folder / f"{name}.svg", folder / f"{name}.pdf"
        for path in (svg,) if svg.exists() else (pdf,):  # no PDF is ours without its SVG
            refuse_foreign(path, MARK.encode(), "say another --figures")
    make_folder(folder)
    with matplotlib.rc_context(STYLE):
        for name, panel in named.items():
            figure = _drawn(panel, groups)
            for ending, date in (("svg", "Date"), ("pdf", "CreationDate")):
                about: dict[str, Any] = {"Creator": MARK, date: None}
                with atomic_write(folder / f"{name}.{ending}") as file:
                    figure.savefig(file, format=ending, bbox_inches="tight", metadata=about)


def _drawn(panel: Panel, groups: Sequence[Hashable]) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE_INCHES)
    axes = figure.add_subplot(xlabel="step", ylabel=panel.title)
    lines = mean_lines(panel.lines, groups)
    handles = [_add(axes, line, band) for line, band in lines]
    if len(lines) > 1:  # below, where it hides no curve
        labels = [line.label for line, _ in lines]
        axes.legend(handles, labels, loc="upper left", bbox_to_anchor=(0, -0.2))
    return figure


def _add(axes: Any, line: Line, band: Band | None) -> Any:
    """Matplotlib's line for a line, drawn over its band or its raw values if it has either."""
    smoothed, colour = line.smoothed, colour_of(line.run)
    shown = (smoothed or line.curve).thinned(MOST_POINTS)
    if band:
        kept = np.isin(band.steps, shown.steps)
        area = {"color": colour, "alpha": 0.2, "linewidth": 0}
        axes.fill_between(shown.steps, band.low[kept], band.high[kept], **area)
    if smoothed:
        raw = line.curve.thinned(MOST_POINTS)
        axes.plot(raw.steps, raw.values, color=colour, linewidth=0.5, alpha=RAW_OPACITY)
    marker = "o" if len(shown.steps) < MARKED_POINTS and not smoothed else ""
    return axes.plot(shown.steps, shown.values, DASHES[line.dash], color=colour, marker=marker)[0]
