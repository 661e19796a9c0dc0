"""The page of a report: one HTML file that needs nothing beside it."""

import base64
import functools
import gzip
import html
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
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
from support.scores.table import COLUMNS

TEMPLATE = Path(__file__).with_name("page.html")
DASHES = ("solid", "dash", "dot", "dashdot")


@dataclass(frozen=True)
class Meaning:
    """What a reader is told of a metric."""

    sentence: str
    better: str = ""  # "lower" or "higher", where a number alone says which run is better
    section: str = ""  # where its curve stands, if not with those of training


@dataclass
class Report:
    """Runs, and what is known of their metrics and of the curves expected of them."""

    runs: Sequence[RecordedRun]
    meanings: Mapping[str, Meaning]
    expected: Sequence[Expected | None]  # of each run
    passed_over: Sequence[str] = ()  # keys of a config in which runs differ by nature

    def __post_init__(self) -> None:
        self.verdicts = [
            expected.judge(run) if expected else {}
            for run, expected in zip(self.runs, self.expected, strict=True)
        ]

    def results(self) -> Table:
        """The table of results."""
        better = {name: meaning.better for name, meaning in self.meanings.items() if meaning.better}
        return comparison.results(self.runs, better)

    def sentence(self, name: str) -> str:
        return self.meanings[name].sentence if name in self.meanings else ""


def render(report: Report, made_at: str) -> str:
    """The page's text."""
    runs = report.runs
    names = ", ".join(run.name for run in runs)
    body = [
        _cards(report),
        _comparison(report),
        _pictures(report),
        _section("Scores over training", SCORES_INTRO, _score_panels(report)),
        _section("Held-out loss", HELD_OUT_INTRO, _held_out_panels(report), "small"),
        *_metric_sections(report),
        _checkpoints(runs),
    ]
    legend = "".join(
        f"<span>{_swatch(i)}{html.escape(run.name)}</span>" for i, run in enumerate(runs)
    )
    return Template(TEMPLATE.read_text()).substitute(
        title=html.escape(f"Run {names}" if len(runs) == 1 else f"Runs {names}"),
        subtitle=html.escape(f"made {made_at}"),
        legend=legend,
        body="\n".join(part for part in body if part),
        footer="Drag over a curve to look closer, double-click to come back. Curves are thinned; "
        "the lowest and highest values are kept.",
        plotly=packed_plotly(),
    )


@functools.cache
def packed_plotly() -> str:
    """Plotly's script in a third of its size, which leaves room for pictures."""
    return base64.b64encode(gzip.compress(get_plotlyjs().encode(), 9, mtime=0)).decode()


def _swatch(number: int) -> str:
    return f'<span class="swatch" style="background:{colour_of(number)}"></span>'


def _section(title: str, intro: str, panels: Sequence[Panel], size: str = "") -> str:
    """A heading with figures; nothing where there is no figure."""
    if not panels:
        return ""
    figures = "".join(map(_panel, panels))
    head = f'<h2>{html.escape(title)}</h2><p class="intro">{html.escape(intro)}</p>'
    return f'<section>{head}<div class="panels {size}">{figures}</div></section>'


def _panel(panel: Panel) -> str:
    verdicts = "".join(map(_verdict, panel.verdicts))
    data = panel.figure.replace("<", "\\u003c")
    return (
        f'<div class="panel"><h3>{html.escape(panel.title)}</h3>'
        f"<p>{html.escape(panel.sentence)}</p>{verdicts}"
        f'<script type="application/json">{data}</script><div class="plot"></div></div>'
    )


def _verdict(text: str) -> str:
    kind = "outside" if "outside" in text else "inside" if "inside" in text else ""
    return f'<div class="verdict {kind}">{html.escape(text)}</div>'


# What made each run


def _cards(report: Report) -> str:
    cards = "".join(_card(report, i, run) for i, run in enumerate(report.runs))
    return f'<div class="cards">{cards}</div>'


def _card(report: Report, number: int, run: RecordedRun) -> str:
    facts = "".join(
        f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd></div>"
        for name, value in _facts(run).items()
    )
    warnings = "".join(f"<li>{html.escape(line)}</li>" for line in run.warnings)
    listed = f'<ul class="warnings">{warnings}</ul>' if warnings else ""
    notes = "".join(f'<p class="quiet notes">{html.escape(note)}</p>' for note in run.notes)
    return (
        f'<article class="card"><h3>{_swatch(number)}{html.escape(run.name)}</h3>'
        f"{_verdict(_whole_verdict(report, number))}<dl>{facts}</dl>{listed}{notes}</article>"
    )


def _facts(run: RecordedRun) -> dict[str, str]:
    """What a card says of a run, as far as it is known."""
    made_by, steps = run.made_by, f"{run.last_step:,}"
    of_all = f" of {run.total_steps:,}" if run.total_steps else ""
    speed = run.curves.get("Images_Per_Second")
    versions = [made_by.get("code_version"), "torch" in made_by and f"torch {made_by['torch']}"]
    facts = {
        "steps": steps + of_all,
        "model": made_by.get("model", run.settings.get("model_type")),
        "data": run.settings.get("dataset_type"),
        "seed": run.settings.get("seed"),
        "time": run.seconds and str(timedelta(seconds=round(run.seconds))),
        "speed": speed and f"{float(sorted(speed.values)[len(speed.values) // 2]):.4g} images/s",
        "code": ", ".join(str(part) for part in versions if part),
        "device": made_by.get("device"),
        "folder": run.folder,
    }
    return {name: str(value) for name, value in facts.items() if value not in (None, "")}


def _whole_verdict(report: Report, number: int) -> str:
    """Whether a run does as expected, in a line; nothing where nothing is expected."""
    verdicts, expected = report.verdicts[number], report.expected[number]
    if not verdicts or expected is None:
        return ""
    outside = [f"{name} {text}" for name, text in verdicts.items() if text.startswith("outside")]
    if outside:
        return f"Not as expected: {'; '.join(outside)}"
    unusual = [f"{name}: {text}" for name, text in verdicts.items() if text != "inside"]
    if unusual:
        return "; ".join(unusual)
    return f"As expected: inside the bands of {len(expected.made_from)} runs"


# Side by side


def _comparison(report: Report) -> str:
    """The tables: what differs, and what came of it."""
    parts = []
    if len(report.runs) > 1:
        missing = comparison.missing_metrics(report.runs)
        differing = comparison.differing_settings(report.runs, report.passed_over)
        none = '<p class="intro">The configs are the same.</p>'
        parts += ["<h2>What differs</h2>", as_html(differing) if differing.rows else none]
        parts += [f'<p class="quiet">{html.escape(line)}</p>' for line in missing]
    intro = "Of the last scored step of each run, or its last step. NFE: steps taken for an image."
    if not comparison.alike(report.runs):
        intro += (
            " Scores here are of different numbers of images, references, graphs or distances: "
            "they cannot be compared, and none is marked as best."
        )
    parts += ["<h2>Results</h2>", f'<p class="intro">{html.escape(intro)}</p>']
    return "".join([*parts, as_html(report.results())])


def _pictures(report: Report) -> str:
    """The sample pictures of all runs, moved by one slider."""
    having = [(i, run) for i, run in enumerate(report.runs) if run.pictures]
    notes: list[str] = []
    embedded = embed([run.pictures for _, run in having], notes) if having else []
    shown = [(i, run, found) for (i, run), found in zip(having, embedded, strict=True) if found]
    said = "".join(f'<p class="quiet">{html.escape(note)}</p>' for note in notes)
    if not shown:
        return said
    figures = "".join(
        f'<figure class="card"><figcaption>{_swatch(i)}{html.escape(run.name)} <span></span>'
        '</figcaption><img alt=""></figure>'
        for i, run, _ in shown
    )
    data = json.dumps([[picture._asdict() for picture in found] for _, _, found in shown])
    return (
        '<section><h2>Samples over training</h2><p class="intro">Made by the averaged weights.</p>'
        '<div class="slider"><label for="step" id="chosen"></label><br>'
        '<input type="range" id="step" min="0" value="0"></div>'
        f'<div class="pictures">{figures}</div>{said}'
        f'<script type="application/json" id="pictures">{data}</script></section>'
    )


def _checkpoints(runs: Sequence[RecordedRun]) -> str:
    rows = [
        [run.name, len(sizes), f"{sum(sizes.values()) / 1e6:,.1f} MB", _sizes(sizes)]
        for run in runs
        if (sizes := run.checkpoint_bytes)
    ]
    if not rows:
        return ""
    table = as_html(Table(["run", "checkpoints", "together", "step (size)"], rows))
    return f"<section><h2>Checkpoints</h2>{table}</section>"


def _sizes(sizes: Mapping[int, int]) -> str:
    return ", ".join(f"{step:,} ({size / 1e6:.1f} MB)" for step, size in sizes.items())


# Curves


SCORES_INTRO = (
    "Against the evaluator's reference. The fewer images, the larger the distances. "
    "Solid: one step for an image; dashed: two."
)
HELD_OUT_INTRO = (
    "Mean squared errors on images, noise and times that are the same at every step, by stretches "
    "of t. Solid: the averaged weights; dashed: the weights themselves."
)


def _score_panels(report: Report) -> list[Panel]:
    """A figure for each score, a line for each run, number of jumps and number of images."""
    panels = []
    for name in COLUMNS:
        lines = []
        for i, run in enumerate(report.runs):
            having = [score for score in run.scores if name in score.values]
            kinds = {(s.jumps, s.num_images): None for s in having}
            for jumps, num_images in kinds:
                of_kind = [s for s in having if (s.jumps, s.num_images) == (jumps, num_images)]
                curve = Curve.of({s.step: s.values[name] for s in of_kind})
                label = f"{run.name}, NFE {jumps}, {num_images:,} images"
                dash = DASHES[((jumps or 1) - 1) % len(DASHES)]
                lines.append(Line(curve, html.escape(label), colour_of(i), dash))
        if lines:
            panels.append(Panel(name, report.sentence(name), draw(lines)))
    return panels


def _held_out_panels(report: Report) -> list[Panel]:
    """A figure for each loss and bin of t, a line for each run and kind of weights."""
    keys = {key._replace(whose=""): None for run in report.runs for key in run.held_out}
    return [
        Panel(
            f"{key.loss}, t from {key.bin / key.num_bins:g} to {(key.bin + 1) / key.num_bins:g}",
            report.sentence(f"held-out {key.loss}"),
            draw(
                [line for i, run in enumerate(report.runs) for line in _held_out_lines(i, run, key)]
            ),
        )
        for key in sorted(keys, key=lambda key: (key.loss != "velocity", key))
    ]


def _held_out_lines(number: int, run: RecordedRun, wanted: HeldOut) -> Iterable[Line]:
    for key, curve in run.held_out.items():
        if key._replace(whose="") == wanted:
            dash = "solid" if key.whose == "average" else "dash"
            label = html.escape(f"{run.name}, {key.whose}")
            yield Line(curve, label, colour_of(number), dash)


def _metric_sections(report: Report) -> list[str]:
    """All metrics of the log: of training first, then the other sections in their order."""
    names = {name: None for run in report.runs for name in run.curves}
    sections: dict[str, list[Panel]] = {"": []}
    for name in names:
        meaning = report.meanings.get(name, Meaning(""))
        sections.setdefault(meaning.section, []).append(_metric_panel(report, name))
    intro = "Means between two lines of the log; thin: as logged, thick: smoothed."
    if any(report.expected):
        intro += " Grey: where runs of this config are expected, whatever their seed."
    return [
        _section(title or "Training", "" if title else intro, panels)
        for title, panels in sections.items()
    ]


def _metric_panel(report: Report, name: str) -> Panel:
    having = [(i, run) for i, run in enumerate(report.runs) if name in run.curves]
    lines = [
        Line(run.curves[name], html.escape(run.name), colour_of(i), is_smoothed=True)
        for i, run in having
    ]
    expected = {e.experiment: e for e in report.expected if e and name in e.bands}
    bands = [known.bands[name] for known in expected.values()]
    verdicts = [
        text if len(report.runs) == 1 else f"{run.name}: {text}"
        for i, run in having
        if (text := report.verdicts[i].get(name))
    ]
    figure = draw(lines, bands, len(report.runs))
    return Panel(name, report.sentence(name), figure, verdicts)
