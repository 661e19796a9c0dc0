"""The page of a report: one HTML file that needs no other file and no network."""

import base64
import functools
import gzip
import itertools
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from plotly.offline import get_plotlyjs

from support.report import comparison
from support.report.curves import Curve
from support.report.expected import Expected
from support.report.figures import Line, Panel, colour_of
from support.report.groups import seed_table
from support.report.pictures import embed
from support.report.runs import HeldOut, RecordedRun
from support.report.tables import Table, text_of
from support.scores.table import COLUMNS, Meaning

TEMPLATE = Path(__file__).with_name("page.html")
TEMPLATES = jinja2.Environment(
    autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
)
TEMPLATES.filters["text_of"] = text_of
DASHES = ("solid", "dash", "dot", "dashdot")


@dataclass
class Report:
    """Runs, and what is known about their metrics and the curves expected of them."""

    runs: Sequence[RecordedRun]
    meanings: Mapping[str, Meaning]
    expected: Sequence[Expected | None]  # for each run
    target: Sequence[str]  # keys of a config that decide what the network learns
    reload_seconds: float = 0  # how often an open page loads itself again; 0 is never
    groups: Sequence[Hashable] = ()  # for each run; the same where the seed alone differs
    swept: Sequence[str] = ()  # keys of a config that may differ between groups

    def __post_init__(self) -> None:
        self.verdicts = [
            expected.judge(run) if expected else {}
            for run, expected in zip(self.runs, self.expected, strict=True)
        ]

    def results(self, over_seeds: bool = False) -> tuple[Table, list[str]]:
        """The table of results, of runs or of groups over seeds, and remarks on it."""
        better = {name: of.better for name, of in self.meanings.items() if of.better}
        measured = comparison.results_of(self.runs, better)
        if over_seeds:
            table = seed_table(measured, self.groups, self.swept)
        else:
            table = comparison.result_table(measured)
        return table, comparison.mark_comparable(table, measured, better, self.target)

    def sentence(self, name: str) -> str:
        return self.meanings[name].sentence if name in self.meanings else ""


def render(report: Report, made_at: str) -> str:
    """The page's text."""
    runs = report.runs
    names = ", ".join(run.name for run in runs)
    results, remarks = report.results()
    picture_notes: list[str] = []
    return TEMPLATES.from_string(TEMPLATE.read_text()).render(
        title=f"Run {names}" if len(runs) == 1 else f"Runs {names}",
        made_at=made_at,
        cards=[_card(report, number) for number in range(len(runs))],
        differing=comparison.differing_settings(runs),
        missing=comparison.missing_metrics(runs),
        results=results,
        remarks=remarks,
        over_seeds=report.results(over_seeds=True)[0] if report.groups else None,
        pictures=embed({i: run.pictures for i, run in enumerate(runs)}, picture_notes),
        picture_notes=picture_notes,
        scores=_score_panels(report),
        held_out=_held_out_panels(report),
        metrics=_metric_panels(report),
        has_bands=any(report.expected),
        checkpoints=_checkpoints(runs),
        reload=f"{report.reload_seconds:g}",
        plotly=packed_plotly(),
    )


@functools.cache
def packed_plotly() -> str:
    """Plotly's script in a third of its size, which leaves room for pictures."""
    return base64.b64encode(gzip.compress(get_plotlyjs().encode(), 9, mtime=0)).decode()


# What made each run


def _card(report: Report, number: int) -> dict[str, Any]:
    run = report.runs[number]
    return {
        "name": run.name,
        "colour": colour_of(number),
        "verdicts": [_state(run), _whole_verdict(report, number)],
        "facts": {name: value for name, value in _facts(run).items() if value},
        "warnings": run.warnings,
        "notes": run.notes,
    }


def _facts(run: RecordedRun) -> dict[str, object]:
    """What a card says about a run; None or "" where it is not known."""
    made_by = run.made_by
    of_all = f" of {run.total_steps:,}" if run.total_steps else ""
    speed, seconds = run.curves.get("Images_Per_Second"), run.curves.get("Seconds")
    versions = [made_by.get("code_version"), "torch" in made_by and f"torch {made_by['torch']}"]
    return {
        "steps": f"{run.last_step:,}{of_all}",
        "model": made_by.get("model", run.settings.get("model_type")),
        "data": run.settings.get("dataset_type"),
        "seed": str(run.settings.get("seed", "")),
        "time": seconds and timedelta(seconds=round(float(seconds.values.sum()))),
        "speed": speed and f"{np.median(speed.values):.4g} images/s",
        "code": ", ".join(str(part) for part in versions if part),
        "device": made_by.get("device"),
        "folder": run.folder,
    }


def _state(run: RecordedRun) -> str:
    """Whether a run still trains, as far as its folder shows, and when it last logged."""
    state = f"Running on {run.holder}" if run.holder else "Stopped before its last step"
    since = f"; last line of the log {run.last_line}" if run.last_line else ""
    is_finished = run.last_step == run.total_steps and not run.holder
    return f"{'Finished' if is_finished else state}{since}"


def _whole_verdict(report: Report, number: int) -> str:
    """Whether a run does as expected, in a line; "" if nothing is expected."""
    verdicts, expected = report.verdicts[number], report.expected[number]
    if not verdicts or expected is None:
        return ""
    unusual = [f"{name} {text}" for name, text in verdicts.items() if text != "inside"]
    if outside := [text for text in unusual if " outside since " in text]:
        return f"Not as expected: {'; '.join(outside)}"
    inside = f"As expected: inside the bands of {len(expected.made_from)} runs"
    return "; ".join(unusual) or inside


# Side by side


def _checkpoints(runs: Sequence[RecordedRun]) -> Table:
    rows = []
    for run in runs:
        if sizes := run.checkpoint_bytes:
            each = ", ".join(f"{step:,} ({size / 1e6:.1f} MB)" for step, size in sizes.items())
            rows.append([run.name, len(sizes), f"{sum(sizes.values()) / 1e6:,.1f} MB", each])
    return Table(["run", "checkpoints", "together", "step (size)"], rows)


# Curves


def panels_of(report: Report) -> list[Panel]:
    """All of the page's panels."""
    metrics = itertools.chain(*_metric_panels(report).values())
    return [*_score_panels(report), *_held_out_panels(report), *metrics]


def _score_panels(report: Report) -> list[Panel]:
    """A figure for each score, with a line for each run, NFE and number of images."""
    panels = []
    for name in COLUMNS:
        lines = []
        for i, run in enumerate(report.runs):
            points: dict[tuple, dict[int, float]] = {}
            for score in run.scores:
                if name in score.values:
                    key = (score.nfe, score.num_images, score.yardstick)
                    points.setdefault(key, {})[score.step] = score.values[name]
            for (nfe, num_images, yardstick), values in points.items():
                counted = f"{num_images:,}" if num_images else "an unknown number of"
                detail = f"NFE {nfe}, {counted} images"
                dash = DASHES[((nfe or 1) - 1) % len(DASHES)]
                lines.append(Line(Curve.of(values), i, run.name, detail, dash, yardstick=yardstick))
        if lines:
            panels.append(Panel(name, report.sentence(name), lines))
    return panels


def _held_out_panels(report: Report) -> list[Panel]:
    """A figure for each loss and bin of t, with a line for each run and kind of weights."""
    lines: dict[HeldOut, list[Line]] = {}
    for i, run in enumerate(report.runs):
        for key, curve in run.held_out.items():
            dash = "solid" if key.whose == "average" else "dash"
            line = Line(curve, i, run.name, key.whose, dash)
            lines.setdefault(key._replace(whose=""), []).append(line)
    panels = []
    for key in sorted(lines, key=lambda key: (key.loss != "velocity", key)):
        start, end = key.bin / key.num_bins, (key.bin + 1) / key.num_bins
        title = f"{key.loss}, t from {start:g} to {end:g}"
        panels.append(Panel(title, report.sentence(f"held-out {key.loss}"), lines[key]))
    return panels


def _metric_panels(report: Report) -> dict[str, list[Panel]]:
    """All metrics of the log by section: first "" for those of training, then the others."""
    sections: dict[str, list[Panel]] = {"": []}
    for name in dict.fromkeys(name for run in report.runs for name in run.curves):
        section = report.meanings[name].section if name in report.meanings else ""
        sections.setdefault(section, []).append(_metric_panel(report, name))
    return sections


def _metric_panel(report: Report, name: str) -> Panel:
    lines, verdicts = [], []
    for i, run in enumerate(report.runs):
        if name in run.curves:
            lines.append(Line(run.curves[name], i, run.name, is_smoothed=True))
            if text := report.verdicts[i].get(name):
                verdicts.append(text if len(report.runs) == 1 else f"{run.name}: {text}")
    expected = {e.experiment: e for e in report.expected if e and name in e.bands}
    bands = [known.bands[name] for known in expected.values()]
    return Panel(name, report.sentence(name), lines, bands, verdicts)
