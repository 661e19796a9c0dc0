"""Tables and a plot of the arena's results: on digits in docs/arena.md, else beside the runs.

    python arena/tables.py --folder runs/arena-digits
    python arena/tables.py --folder runs/arena-fashion    # writes tables.md and fd.svg there
    python arena/tables.py

Results on digits are kept in docs/arena/ first, and the tables go between the marks of
docs/arena.md. Without --folder they are made of what is kept: a test does so, and compares.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from support.system.command import run_command  # isort: skip - first: it attends to the start

import argparse
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from arena.results import FILES, Row, add_rows, read_rows
from support.system.files import UserError, atomic_write

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "arena.md"
KEPT = ROOT / "docs" / "arena"
PLOT = KEPT / "digits.svg"
DATA = "digits"  # what the document is on

Curve = dict[int, list[float]]  # step -> a value of each seed


class Entry(NamedTuple):
    """What is compared: an objective, guided or not."""

    name: str
    guided: bool

    def __str__(self) -> str:
        return f"{self.name}, guided" if self.guided else self.name


def entries_of(rows: Iterable[Row]) -> list[Entry]:
    return list(dict.fromkeys(Entry(row["name"], row["guided"]) for row in rows))


def curves(rows: Sequence[Row], entry: Entry, jumps: int, key: str = "FD") -> Curve:
    """A value by step, of one entry and number of jumps."""
    found: Curve = {}
    for row in rows:
        if (row["name"], row["guided"], row["jumps"]) == (*entry, jumps):
            found.setdefault(row["step"], []).append(row[key])
    return dict(sorted(found.items()))


def spread(values: Sequence[float], digits: int = 1) -> str:
    """The mean of the seeds, the least and the most."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    mean = statistics.mean(values)
    return f"{mean:.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


# The tables


def scales_table(rows: Sequence[Row]) -> str:
    """One-step FD by the scale of guidance; of flow matching that of eight steps."""
    tried = [row for row in rows if row["part"] == "scales"]
    scales = sorted({row["scale"] for row in tried})
    lines = []
    for name in dict.fromkeys(row["name"] for row in tried):
        jumps = 8 if name == "FlowMatching" else 1
        last = max(row["step"] for row in tried)
        fd = {
            row["scale"]: row["FD"]
            for row in tried
            if (row["name"], row["step"], row["jumps"]) == (name, last, jumps)
        }
        lines.append([name, str(jumps), *(f"{fd[scale]:.1f}" for scale in scales)])
    return table(["objective", "jumps", *(f"scale {scale}" for scale in scales)], lines)


def steps_table(rows: Sequence[Row]) -> str:
    """FD after the last step by each number of jumps."""
    compared = [row for row in rows if row["part"] == "objectives"]
    jumps = sorted({row["jumps"] for row in compared})
    last = max(row["step"] for row in compared)
    lines = [
        [
            str(entry),
            *(spread(curves(compared, entry, count)[last]) for count in jumps),
            spread(curves(compared, entry, 1, "class")[last], 3),
        ]
        for entry in entries_of(compared)
    ]
    head = [f"FD, {count} jump{'s' * (count > 1)}" for count in jumps]
    return table([f"after {last} steps", *head, "right class, 1 jump"], lines)


def cost_of(costs: Sequence[Row], entry: Entry) -> Row:
    return next(row for row in costs if (row["name"], row["guided"]) == tuple(entry))


def step_in_forwards(row: Row) -> float:
    """The median over turns of a step's time in forwards of the same turn."""
    pairs = zip(row["seconds"], row["forward_seconds"], strict=True)
    return statistics.median(step / forward for step, forward in pairs)


def costs_table(costs: Sequence[Row]) -> str:
    """What a step takes."""
    lines = [
        [
            str(Entry(row["name"], row["guided"])),
            f"{statistics.median(row['seconds']):.3f}",
            f"{step_in_forwards(row):.2f}",
            f"{row['forwards']:.2f}",
            f"{row['memory_mb']} MB",
        ]
        for row in costs
    ]
    head = ["a step", "seconds", "in forwards", "counted", "memory"]
    return table(head, lines)


def at_budget(curve: Curve, steps: float) -> list[float]:
    """The FD of each seed after so many steps, between the checkpoints around."""
    at = list(curve)
    return [float(np.interp(steps, at, values)) for values in zip(*curve.values(), strict=True)]


def budget_table(rows: Sequence[Row], costs: Sequence[Row]) -> str:
    """FD at equal wall-clock and at equal forwards: as much as the cheapest takes for all steps."""
    compared = [row for row in rows if row["part"] == "objectives"]
    entries = entries_of(compared)
    last = max(row["step"] for row in compared)
    seconds = {entry: step_in_forwards(cost_of(costs, entry)) for entry in entries}
    forwards = {entry: cost_of(costs, entry)["forwards"] for entry in entries}
    # Of those that are to sample in one jump; flow matching is not.
    able = [entry for entry in entries if entry.name != "FlowMatching"]
    lines = []
    for entry in able:
        cells = []
        for cost in (seconds, forwards):
            steps = last * min(cost[one] for one in able) / cost[entry]
            found = at_budget(curves(compared, entry, 1), steps)
            cells += [f"{steps:.0f}", spread(found)]
        lines.append([str(entry), *cells])
    head = ["one jump", "steps in equal time", "FD", "steps in equal forwards", "FD"]
    return table(head, lines)


# What the paper says of a change beside its own choice, on ImageNet with DiT-B/4, as far as that
# could be looked up: docs/arena.md tells where.
REPORTED = {
    "velocity_loss_ratio 0": "worse",
    "velocity_loss_ratio 0.25": "worse",
    "p 0": "worse",
    "mix_ratio 0.5": "worse",
    "mix_ratio 1": "worse",
    "no guidance": "worse",
}


def ablations_table(rows: Sequence[Row]) -> str:
    """One-step FD with one key changed, and whether the paper reports the same direction."""
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        if row["part"] == "ablations":
            found.setdefault(row["name"], {})[row["seed"]] = row["FD"]
    unchanged, *changes = found
    lines = [[unchanged, spread([*found[unchanged].values()]), "", "", "", ""]]
    for name in changes:
        # Seeds give the same data, noise and times to all: each is compared with itself.
        beside = [fd - found[unchanged][seed] for seed, fd in found[name].items()]
        direction, reported = direction_of(beside), REPORTED.get(name, "")
        lines.append(
            [
                name,
                spread([*found[name].values()]),
                signed_spread(beside),
                direction,
                reported,
                agreement(direction, reported),
            ]
        )
    head = ["changed", "FD, 1 jump", "beside the same seed", "that is", "in the paper", ""]
    return table(head, lines)


def signed_spread(values: Sequence[float]) -> str:
    mean = statistics.mean(values)
    return f"{mean:+.1f} ({min(values):+.1f} to {max(values):+.1f})"


def direction_of(differences: Sequence[float]) -> str:
    """What all seeds say of a change of FD."""
    if min(differences) > 0:
        return "worse"
    return "better" if max(differences) < 0 else "undecided"


def agreement(direction: str, reported: str) -> str:
    if not reported or direction == "undecided":
        return ""
    return "agrees" if direction == reported else "**does not agree**"


# The plot


def draw(rows: Sequence[Row], costs: Sequence[Row], path: Path) -> None:
    """One-step FD against steps, time, forwards, and memory."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "arena"
    from matplotlib import pyplot

    compared = [row for row in rows if row["part"] == "objectives"]
    figure, axes = pyplot.subplots(1, 4, figsize=(15, 4), sharey=True, layout="constrained")
    names = list(dict.fromkeys(entry.name for entry in entries_of(compared)))
    for entry in entries_of(compared):
        cost, curve = cost_of(costs, entry), curves(compared, entry, 1)
        steps = np.array(list(curve))
        low, mean, high = (
            [of(values) for values in curve.values()] for of in (min, statistics.mean, max)
        )
        style = {"color": f"C{names.index(entry.name)}", "linestyle": "-" if entry.guided else "--"}
        scales = (steps, steps * step_in_forwards(cost), steps * cost["forwards"])
        for axis, x in zip(axes, scales, strict=False):
            axis.plot(x, mean, label=str(entry), **style)
            axis.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)
        marker = "o" if entry.guided else "s"
        axes[3].plot(cost["memory_mb"], mean[-1], marker=marker, color=style["color"])
    titles = ("steps", "time, in forwards", "forwards, counted", "memory of a step, MB")
    for axis, title in zip(axes, titles, strict=True):
        axis.set(xlabel=title, yscale="log")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("FD of samples in one jump")
    axes[0].legend(fontsize=7)
    with atomic_write(path) as file:
        figure.savefig(file, format="svg", metadata={"Date": None})
    pyplot.close(figure)


# The document


class Table(NamedTuple):
    """A table of the document, and the parts of an arena that it is made of."""

    of: frozenset[str]
    make: Callable[[list[Row], list[Row]], str]


TABLES = {
    "scales": Table(frozenset({"scales"}), lambda rows, costs: scales_table(rows)),
    "steps": Table(frozenset({"objectives"}), lambda rows, costs: steps_table(rows)),
    "costs": Table(frozenset({"costs"}), lambda rows, costs: costs_table(costs)),
    "budgets": Table(frozenset({"objectives", "costs"}), budget_table),
    "ablations": Table(frozenset({"ablations"}), lambda rows, costs: ablations_table(rows)),
}


def parts_of(rows: list[Row], costs: list[Row]) -> set[str]:
    """The parts of an arena that there are results of."""
    return {row["part"] for row in rows} | ({"costs"} if costs else set())


def with_tables(text: str, rows: list[Row], costs: list[Row]) -> str:
    """The document with each table between its marks made anew."""
    there = parts_of(rows, costs)
    for name, one in TABLES.items():
        found = re.search(rf"<!-- {name} -->\n(.*?)<!-- end -->", text, re.DOTALL)
        if not found:
            raise UserError(f"{DOCUMENT}: has no <!-- {name} --> ... <!-- end -->")
        made = one.make(rows, costs) if one.of <= there else "Not run yet."
        text = text[: found.start(1)] + made + "\n" + text[found.end(1) :]
    return text


def write_beside(folder: Path, rows: list[Row], costs: list[Row]) -> None:
    """Write what tables and plot there are results for into the folder of the runs."""
    there = parts_of(rows, costs)
    made = [
        f"## {name}\n\n{one.make(rows, costs)}\n" for name, one in TABLES.items() if one.of <= there
    ]
    with atomic_write(folder / "tables.md") as file:
        file.write("\n".join(made).encode())
    if TABLES["budgets"].of <= there:
        draw(rows, costs, folder / "fd.svg")
    print(f"{len(made)} tables in {folder / 'tables.md'}")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, help="of the runs of arena/run.py")
    arguments = parser.parse_args(argv)
    KEPT.mkdir(exist_ok=True)
    if arguments.folder:
        rows, costs = (read_rows(arguments.folder / name) for name in FILES)
        if not rows and not costs:
            raise UserError(f"{arguments.folder}: no results; python arena/run.py makes them")
        sets = sorted({row["data"] for row in [*rows, *costs]})
        if len(sets) > 1:
            raise UserError(f"{arguments.folder}: results on {' and '.join(sets)}; one folder each")
        if sets != [DATA]:
            write_beside(arguments.folder, rows, costs)
            return
        for name, found in zip(FILES, (rows, costs), strict=True):
            add_rows(KEPT / name, found)
    rows, costs = (read_rows(KEPT / name) for name in FILES)
    DOCUMENT.write_text(with_tables(DOCUMENT.read_text(), rows, costs))
    draw(rows, costs, PLOT)
    print(f"{len(rows)} results in {DOCUMENT} and {PLOT}")


if __name__ == "__main__":
    run_command(main)
