"""The page of a report: one HTML file that needs no other file and no network."""

import base64
import functools
import gzip
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from html import escape
from pathlib import Path
from string import Template

from plotly.offline import get_plotlyjs

from support.report import comparison
from support.report.curves import Curve
from support.report.expected import Expected
from support.report.figures import Line, Panel, colour_of, draw
from support.report.pictures import embed
from support.report.runs import HeldOut, RecordedRun
from support.report.tables import Table, as_html
from support.scores.table import COLUMNS, Meaning

TEMPLATE = Path(__file__).with_name("page.html")
DASHES = ("solid", "dash", "dot", "dashdot")


@dataclass
class Report:
    """Runs, and what is known about their metrics and the curves expected of them."""

    runs: Sequence[RecordedRun]
    meanings: Mapping[str, Meaning]
    expected: Sequence[Expected | None]  # for each run
    target: Sequence[str]  # keys of a config that decide what the network learns
    passed_over: Sequence[str] = ()  # keys of a config in which runs always differ
    reload_seconds: float = 0  # how often an open page loads itself again; 0 is never

    def __post_init__(self) -> None:
        self.verdicts = [
            expected.judge(run) if expected else {}
            for run, expected in zip(self.runs, self.expected, strict=True)
        ]

    def results(self) -> tuple[Table, list[str]]:
        """The table of results, and remarks on it."""
        better = {name: meaning.better for name, meaning in self.meanings.items() if meaning.better}
        return comparison.results(self.runs, better, self.target)

    def sentence(self, name: str) -> str:
        return self.meanings[name].sentence if name in self.meanings else ""


def render(report: Report, made_at: str) -> str:
    """The page's text."""
    runs = report.runs
    names = ", ".join(run.name for run in runs)
    body = [
        f'<div class="cards">{"".join(_card(report, i, run) for i, run in enumerate(runs))}</div>',
        _comparison(report),
        _pictures(runs),
        _section("Scores over training", SCORES_INTRO, _score_panels(report)),
        _section("Held-out loss", HELD_OUT_INTRO, _held_out_panels(report), "small"),
        *_metric_sections(report),
        _checkpoints(runs),
    ]
    return Template(TEMPLATE.read_text()).substitute(
        title=escape(f"Run {names}" if len(runs) == 1 else f"Runs {names}"),
        subtitle=escape(f"made {made_at}"),
        legend="".join(f"<span>{_named(i, run)}</span>" for i, run in enumerate(runs)),
        body="\n".join(part for part in body if part),
        reload=f"{report.reload_seconds:g}",
        plotly=packed_plotly(),
    )


@functools.cache
def packed_plotly() -> str:
    """Plotly's script in a third of its size, which leaves room for pictures."""
    return base64.b64encode(gzip.compress(get_plotlyjs().encode(), 9, mtime=0)).decode()


def _named(number: int, run: RecordedRun) -> str:
    swatch = f'<span class="swatch" style="background:{colour_of(number)}"></span>'
    return f"{swatch}{escape(run.name)}"


def _lines(texts: Sequence[str], kind: str = "quiet") -> str:
    return "".join(f'<p class="{kind}">{escape(text)}</p>' for text in texts)


def _section(title: str, intro: str, panels: Sequence[Panel], size: str = "") -> str:
    """A heading with figures; nothing if there is no figure."""
    if not panels:
        return ""
    figures = "".join(map(_panel, panels))
    head = f'<h2>{escape(title)}</h2><p class="intro">{escape(intro)}</p>'
    return f'<section>{head}<div class="panels {size}">{figures}</div></section>'


def _panel(panel: Panel) -> str:
    verdicts = "".join(map(_verdict, panel.verdicts))
    data = panel.figure.replace("<", "\\u003c")
    return (
        f'<div class="panel"><h3>{escape(panel.title)}</h3>'
        f"<p>{escape(panel.sentence)}</p>{verdicts}"
        f'<script type="application/json">{data}</script><div class="plot"></div></div>'
    )


def _verdict(text: str) -> str:
    is_bad = "outside" in text or text.startswith("Stopped")
    kind = "outside" if is_bad else "inside" if "inside" in text else ""
    return f'<div class="verdict {kind}">{escape(text)}</div>'


# What made each run


def _card(report: Report, number: int, run: RecordedRun) -> str:
    facts = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(str(value))}</dd></div>"
        for name, value in _facts(run).items()
        if value not in (None, "")
    )
    warnings = "".join(f"<li>{escape(line)}</li>" for line in run.warnings)
    listed = f'<ul class="warnings">{warnings}</ul>' if warnings else ""
    return (
        f'<article class="card"><h3>{_named(number, run)}</h3>'
        f"{_verdict(_state(run))}{_verdict(_whole_verdict(report, number))}<dl>{facts}</dl>{listed}"
        f"{_lines(run.notes, 'quiet notes')}</article>"
    )


def _facts(run: RecordedRun) -> dict[str, object]:
    """What a card says about a run; None or "" where it is not known."""
    made_by = run.made_by
    of_all = f" of {run.total_steps:,}" if run.total_steps else ""
    speed = run.curves.get("Images_Per_Second")
    versions = [made_by.get("code_version"), "torch" in made_by and f"torch {made_by['torch']}"]
    return {
        "steps": f"{run.last_step:,}{of_all}",
        "model": made_by.get("model", run.settings.get("model_type")),
        "data": run.settings.get("dataset_type"),
        "seed": run.settings.get("seed"),
        "time": run.seconds and timedelta(seconds=round(run.seconds)),
        "speed": speed and f"{float(sorted(speed.values)[len(speed.values) // 2]):.4g} images/s",
        "code": ", ".join(str(part) for part in versions if part),
        "device": made_by.get("device"),
        "folder": run.folder,
    }


def _state(run: RecordedRun) -> str:
    """Whether a run still trains, as far as can be told, and when it wrote its last line."""
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
    outside = [text for text in unusual if " outside since " in text]
    if outside:
        return f"Not as expected: {'; '.join(outside)}"
    inside = f"As expected: inside the bands of {len(expected.made_from)} runs"
    return "; ".join(unusual) or inside


# Side by side


def _comparison(report: Report) -> str:
    """The tables: how the configs differ, and the results."""
    parts = []
    if len(report.runs) > 1:
        differing = comparison.differing_settings(report.runs, report.passed_over)
        same = '<p class="intro">The configs are the same.</p>'
        parts += ["<h2>What differs</h2>", as_html(differing) if differing.rows else same]
        parts.append(_lines(comparison.missing_metrics(report.runs)))
    table, remarks = report.results()
    intro = "At the last scored step of each run, or its last step. NFE: sampling steps per image."
    parts += ["<h2>Results</h2>", f'<p class="intro">{escape(" ".join([intro, *remarks]))}</p>']
    return "".join([*parts, as_html(table)])


def _pictures(runs: Sequence[RecordedRun]) -> str:
    """The sample pictures of all runs, moved by one slider."""
    having = [(i, run) for i, run in enumerate(runs) if run.pictures]
    notes: list[str] = []
    embedded = embed([run.pictures for _, run in having], notes) if having else []
    shown = [(i, run, found) for (i, run), found in zip(having, embedded, strict=True) if found]
    if not shown:
        return _lines(notes)
    figures = "".join(
        f'<figure class="card"><figcaption>{_named(i, run)} <span></span>'
        '</figcaption><img alt=""></figure>'
        for i, run, _ in shown
    )
    data = json.dumps([[picture._asdict() for picture in found] for _, _, found in shown])
    return (
        '<section><h2>Samples over training</h2><p class="intro">Made with the averaged weights.'
        '</p><div class="slider"><label for="step" id="chosen"></label><br>'
        '<input type="range" id="step" min="0" value="0"></div>'
        f'<div class="pictures">{figures}</div>{_lines(notes)}'
        f'<script type="application/json" id="pictures">{data}</script></section>'
    )


def _checkpoints(runs: Sequence[RecordedRun]) -> str:
    rows = []
    for run in runs:
        if sizes := run.checkpoint_bytes:
            each = ", ".join(f"{step:,} ({size / 1e6:.1f} MB)" for step, size in sizes.items())
            rows.append([run.name, len(sizes), f"{sum(sizes.values()) / 1e6:,.1f} MB", each])
    if not rows:
        return ""
    table = as_html(Table(["run", "checkpoints", "together", "step (size)"], rows))
    return f"<section><h2>Checkpoints</h2>{table}</section>"


# Curves


SCORES_INTRO = (
    "Against the evaluator's reference. The fewer images, the larger the distances. "
    "Solid: one step per image; dashed: two."
)
HELD_OUT_INTRO = (
    "Mean squared errors on fixed images, noise and times, by intervals of t. Solid: the averaged "
    "weights; dashed: the weights themselves."
)


def _score_panels(report: Report) -> list[Panel]:
    """A figure for each score, with a line for each run, NFE and number of images."""
    panels = []
    for name in COLUMNS:
        lines = []
        for i, run in enumerate(report.runs):
            points: dict[tuple[int | None, int | None], dict[int, float]] = {}
            for score in run.scores:
                if name in score.values:
                    key = (score.nfe, score.num_images)
                    points.setdefault(key, {})[score.step] = score.values[name]
            for (nfe, num_images), values in points.items():
                label = escape(f"{run.name}, NFE {nfe}, {num_images:,} images")
                dash = DASHES[((nfe or 1) - 1) % len(DASHES)]
                lines.append(Line(Curve.of(values), label, colour_of(i), dash))
        if lines:
            panels.append(Panel(name, report.sentence(name), draw(lines)))
    return panels


def _held_out_panels(report: Report) -> list[Panel]:
    """A figure for each loss and bin of t, with a line for each run and kind of weights."""
    keys = {key._replace(whose=""): None for run in report.runs for key in run.held_out}
    panels = []
    for key in sorted(keys, key=lambda key: (key.loss != "velocity", key)):
        start, end = key.bin / key.num_bins, (key.bin + 1) / key.num_bins
        title = f"{key.loss}, t from {start:g} to {end:g}"
        figure = draw([*_held_out_lines(report, key)])
        panels.append(Panel(title, report.sentence(f"held-out {key.loss}"), figure))
    return panels


def _held_out_lines(report: Report, wanted: HeldOut) -> Iterator[Line]:
    for i, run in enumerate(report.runs):
        for key, curve in run.held_out.items():
            if key._replace(whose="") == wanted:
                dash = "solid" if key.whose == "average" else "dash"
                yield Line(curve, escape(f"{run.name}, {key.whose}"), colour_of(i), dash)


def _metric_sections(report: Report) -> list[str]:
    """All metrics of the log: first those of training, then the other sections."""
    names = {name: None for run in report.runs for name in run.curves}
    sections: dict[str, list[Panel]] = {"": []}
    for name in names:
        meaning = report.meanings.get(name, Meaning(""))
        sections.setdefault(meaning.section, []).append(_metric_panel(report, name))
    intro = "Means between two lines of the log; thin: as logged, thick: smoothed."
    if any(report.expected):
        intro += " Grey: where runs of this config are expected, with any seed."
    return [
        _section(title or "Training", "" if title else intro, panels)
        for title, panels in sections.items()
    ]


def _metric_panel(report: Report, name: str) -> Panel:
    lines, verdicts = [], []
    for i, run in enumerate(report.runs):
        if name in run.curves:
            line = Line(run.curves[name], escape(run.name), colour_of(i), is_smoothed=True)
            lines.append(line)
            if text := report.verdicts[i].get(name):
                verdicts.append(text if len(report.runs) == 1 else f"{run.name}: {text}")
    expected = {e.experiment: e for e in report.expected if e and name in e.bands}
    bands = [known.bands[name] for known in expected.values()]
    return Panel(name, report.sentence(name), draw(lines, bands, len(report.runs)), verdicts)
