"""Make a page from one run or several: curves, scores, samples over training, differences.

    python report.py runs/digits
    python report.py runs/digits runs/digits-1 --table results.md
    python report.py runs/digits runs/digits-1 --group seed --figures figures
    python report.py runs/digits --watch
    python report.py --band docs/expected/digits.json runs/digits runs/digits-1 runs/digits-2

One HTML file that needs no network: RUN/report.html for one run, report.html for several. --band
writes the curves to expect of an experiment, from its runs with different seeds.
"""

from support.system.command import command_parser, run_command  # isort: skip - must be first

import argparse
import contextlib
import os
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from config import FIELDS, config_from_dict
from support.report.comparison import missing_metrics
from support.report.expected import Expected, read_expected
from support.report.groups import groups_of
from support.report.page import Report, panels_of, render
from support.report.paper import write_figures
from support.report.runs import RecordedRun, read_runs
from support.report.tables import check_place, write_table
from support.scores.table import SCORES, Meaning
from support.system.digests import settings_digest
from support.system.files import PAGE_MARK, UserError, atomic_write, refuse_foreign
from support.system.settings import may_change

EXPECTED = Path(__file__).resolve().parent / "docs" / "expected"
SCHEDULES, MACHINE = "Schedules", "Machine"  # sections of the page

# What each metric means. Metrics that are not listed get a curve too.
MEANINGS = {
    "Vel_MSE": Meaning(
        "Squared error of the velocity against its target: falls fast, then slowly, never to 0, "
        "because noise cannot be foreseen. With mix_ratio m the target of a labelled sample has a "
        "share 1 - m of the model's own velocity: the number is m² times the error against the "
        "guided velocity.",
        better="lower",
    ),
    "Vel_Weight": Meaning("Mean weight 1 / (error + eps)^p of Vel_MSE: rises as the errors fall."),
    "Con_MSE": Meaning(
        "How far two solutions disagree, per time between them: may rise late, as the gap shrinks."
    ),
    "Con_Weight": Meaning("Mean weight of Con_MSE: settles."),
    "Grad_Norm": Meaning("Norm of the gradient before clipping: settles; steady growth is bad."),
    "Gap_Fraction": Meaning(
        "r, where l lies between t (0) and s (1): falls by l_schedule.", section=SCHEDULES
    ),
    "Learning_Rate": Meaning("Of the step just done.", section=SCHEDULES),
    "Memory_GB": Meaning("Most memory held so far.", section=MACHINE),
    "Seconds": Meaning("Since the line before, including samples made meanwhile.", section=MACHINE),
    "Images_Per_Second": Meaning(
        "Where it drops, data come too slowly or others use the machine.", section=MACHINE
    ),
    "held-out velocity": Meaning(
        "Error of the velocity on images that training does not see: a rise is overfitting.",
        better="lower",
    ),
    "held-out consistency": Meaning(
        "How far two solutions disagree on these images, at the final gap. It does not rank runs."
    ),
    **SCORES,
}
# Keys of a config that decide what the velocity is compared with, and on which data.
TARGET = (
    *("method", "noising_type", "cfg_scale", "mix_ratio", "cfg_drop_rate", "cfg_decay_time"),
    *("time_mean", "time_std", "dataset_type", "dataset_path", "data_size", "held_out", "vae"),
    *("augment_probability", "horizontal_flips", "unet_dropout"),
)
# Keys that may change when a run continues, and yet decide what it learns.
ALSO_DECIDE = (
    *("dataset_path", "vae", "learning_rate", "betas", "weight_decay", "warmup_steps"),
    *("gradient_clip", "precision"),
)
# Keys of a config that make the experiment.
FIXED = [name for name, field in FIELDS.items() if name != "seed" and not may_change(field)]
EXPERIMENT = (*FIXED, *ALSO_DECIDE)
# Bands leave out what a schedule or the machine decides.
NOT_EXPECTED = {name for name, meaning in MEANINGS.items() if meaning.section}


def experiment_of(run: RecordedRun) -> str | None:
    """A digest of what makes a run's experiment, without the seed; None if it is unknown.

    Keys at their defaults are left out, so that a new key does not change the digest.
    """
    try:
        config = config_from_dict(run.settings, "config.yaml", pass_over=lambda line: None)
    except UserError:
        return None
    names = [name for name in EXPERIMENT if getattr(config, name) != FIELDS[name].default]
    values = config.to_dict()
    return settings_digest({name: values[name] for name in names})


def make(
    runs: Sequence[RecordedRun], reload_seconds: float = 0, is_grouped: bool = False
) -> Report:
    """A report of these runs, with a table over seeds if they are grouped."""
    known = read_expected(EXPECTED)
    experiments = [experiment_of(run) for run in runs]
    expected = [known.get(experiment or "") for experiment in experiments]
    groups = groups_of(runs, experiments) if is_grouped else []
    return Report(runs, MEANINGS, expected, TARGET, reload_seconds, groups, EXPERIMENT)


def write_report(arguments: argparse.Namespace) -> list[str]:
    """Write the page, and the table and figures if asked for; returns notes for the user."""
    runs = read_runs(arguments.runs)
    report = make(runs, arguments.every if arguments.watch else 0, bool(arguments.group))
    refuse_foreign(arguments.output, PAGE_MARK, "say another --output")
    if arguments.figures:
        write_figures(arguments.figures, panels_of(report), report.groups or range(len(runs)))
    table, _ = report.results(over_seeds=bool(report.groups))
    page = render(report, f"{datetime.now().astimezone():%Y-%m-%d %H:%M %Z}")
    with atomic_write(arguments.output) as file:
        file.write(page.encode(errors="replace"))
    if arguments.table:
        write_table(arguments.table, table)
    return [*(note for run in runs for note in run.notes), *missing_metrics(runs), *table.notes]


def make_band(path: Path, folders: Sequence[Path]) -> None:
    """Write the bands of the metrics that these runs of one experiment have in common."""
    runs = read_runs(folders)
    experiments = {experiment_of(run) for run in runs}
    if len(experiments) > 1 or None in experiments:
        raise UserError(f"--band {path}: the configs of these runs differ in more than the seed")
    shared = [name for name in runs[0].curves if all(name in run.curves for run in runs)]
    names = [name for name in shared if name not in NOT_EXPECTED]
    Expected.of(str(experiments.pop()), runs, names).write(path)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line's options."""
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("runs", nargs="+", type=path, metavar="RUN", help="folder of a run (its working_dir)")
    add("--output", type=path, metavar="FILE", help="the page (RUN/report.html, or report.html)")
    add("--table", type=path, metavar="FILE", help="also the results, as .md, .csv or .tex")
    group_help = "also mean and deviation over runs that differ in the seed alone"
    add("--group", choices=["seed"], help=f"{group_help}; in --table and --figures, these alone")
    figures_help = "also each curve as .svg and .pdf; needs matplotlib"
    add("--figures", type=path, metavar="FOLDER", help=figures_help)
    watch_help = "make the page again and again until Ctrl-C; an open page follows"
    add("--watch", action="store_true", help=watch_help)
    add("--every", type=positive, metavar="SECONDS", default=60, help="between two pages (60)")
    add("--band", type=path, metavar="FILE", help="write the runs' expected curves, and no page")
    arguments = parser.parse_args(argv)
    page_options = ("output", "table", "watch", "group", "figures")
    if arguments.band and any(getattr(arguments, name) for name in page_options):
        parser.error("--band: makes no page, so it takes no other option")
    if arguments.table:
        check_place(arguments.table)
    if arguments.output and arguments.output.suffix != ".html":
        parser.error(f"--output {arguments.output}: must be the name of a .html file")
    if arguments.output is None:
        is_one = len(arguments.runs) == 1
        arguments.output = (arguments.runs[0] if is_one else Path()) / "report.html"
    return arguments


def path(text: str) -> Path:
    """A path of the command line; shells do not expand ~ after an equals sign."""
    return Path(os.path.expanduser(text))


def positive(text: str) -> float:
    """A number above zero; argparse words the error."""
    number = float(text)
    if not 0 < number < float("inf"):
        raise ValueError
    return number


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    arguments = parse_arguments(argv)
    if arguments.band:
        make_band(arguments.band, arguments.runs)
        print(arguments.band)
        return
    said = write_report(arguments)
    places = (arguments.table, arguments.figures)
    print(*said, arguments.output, *filter(None, places), sep="\n", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        while arguments.watch:
            time.sleep(arguments.every)
            for line in write_report(arguments):
                if line not in said:
                    print(line, flush=True)
                    said.append(line)


if __name__ == "__main__":
    run_command(main)
