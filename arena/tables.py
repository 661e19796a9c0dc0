"""Print the arena's results as Markdown tables.

python arena/tables.py                      # of runs/arena-digits
python arena/tables.py runs/arena-fashion
python arena/tables.py docs/arena           # the results that docs/arena.md shows
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from support.system.command import command_parser, run_command  # isort: skip - must be first

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from arena.plan import PARTS
from support.report.tables import Table, as_markdown
from support.system.files import UserError

Row = dict[str, Any]
Curve = dict[int, list[float]]  # step -> a value of each seed


def entry_of(row: Row) -> str:
    """What a row is about: an objective, guided or not."""
    return f"{row['name']}, guided" if row["guided"] else row["name"]


def curve_of(rows: Sequence[Row], entry: str, nfe: int, key: str = "FD") -> Curve:
    """A value by step, of one entry at one NFE."""
    found: Curve = {}
    for row in rows:
        if (entry_of(row), row["nfe"]) == (entry, nfe):
            found.setdefault(row["step"], []).append(row[key])
    return dict(sorted(found.items()))


def spread(values: Sequence[float], form: str = ".1f", to: str = "–") -> str:  # noqa: RUF001
    """The mean over seeds, the least and the most."""
    if len(values) == 1:
        return f"{values[0]:{form}}"
    return f"{statistics.mean(values):{form}} ({min(values):{form}}{to}{max(values):{form}})"


def scales_table(rows: Sequence[Row]) -> Table:
    """FD by guidance scale in one step, for flow matching in eight."""
    scales = sorted({row["scale"] for row in rows})
    last = max(row["step"] for row in rows)
    lines = []
    for name in dict.fromkeys(row["name"] for row in rows):
        nfe = 8 if name == "FlowMatching" else 1
        at = (name, last, nfe)
        fd = {r["scale"]: r["FD"] for r in rows if (r["name"], r["step"], r["nfe"]) == at}
        lines.append([name, nfe, *(f"{fd[scale]:.1f}" for scale in scales)])
    return Table(["objective", "steps", *(f"scale {scale}" for scale in scales)], lines)


def steps_table(rows: Sequence[Row]) -> Table:
    """FD after the last training step, by sampling steps."""
    counts = sorted({row["nfe"] for row in rows})
    last = max(row["step"] for row in rows)
    lines = [
        [
            entry,
            *(spread(curve_of(rows, entry, nfe)[last]) for nfe in counts),
            spread(curve_of(rows, entry, 1, "class")[last], ".3f"),
        ]
        for entry in dict.fromkeys(map(entry_of, rows))
    ]
    head = ["FD, 1 step", *(f"{nfe} steps" for nfe in counts[1:])]
    return Table([f"after {last} steps", *head, "right class, 1 step"], lines)


def step_in_forwards(cost: Row) -> float:
    """The median over turns of a step's time in forwards of the same turn."""
    return float(np.median(np.divide(cost["seconds"], cost["forward_seconds"])))


def costs_table(costs: Sequence[Row]) -> Table:
    """Time and FLOPs of a step."""
    lines = []
    for row in costs:
        in_forwards = (f"{count:.2f}" for count in (step_in_forwards(row), row["forwards"]))
        lines.append([entry_of(row), f"{np.median(row['seconds']):.3f}", *in_forwards])
    return Table(["a step", "seconds", "in forwards", "counted"], lines)


def budget_table(rows: Sequence[Row], cost: Mapping[str, float]) -> Table:
    """One-step FD at an equal budget: the cost of all steps of the cheapest objective."""
    last = max(row["step"] for row in rows)
    # Flow matching does not sample in one step.
    entries = dict.fromkeys(entry_of(row) for row in rows if row["name"] != "FlowMatching")
    least = min(cost[entry] for entry in entries)
    lines = []
    for entry in entries:
        curve, steps = curve_of(rows, entry, 1), last * least / cost[entry]
        seeds = zip(*curve.values(), strict=True)
        fd = [float(np.interp(steps, list(curve), seed)) for seed in seeds]
        lines.append([entry, f"{steps:.0f}", spread(fd)])
    return Table(["1 step", "training steps", "FD"], lines)


def ablations_table(rows: Sequence[Row]) -> Table:
    """One-step FD after one change."""
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        found.setdefault(row["name"], {})[row["seed"]] = row["FD"]
    unchanged, *changes = found
    lines = [[unchanged, spread([*found[unchanged].values()]), "", ""]]
    for name in changes:
        # A seed gives all runs the same data, noise and times, so runs are compared seed by seed.
        differences = [fd - found[unchanged][seed] for seed, fd in found[name].items()]
        cells = [spread(differences, "+.1f", " to "), verdict_of(differences)]
        lines.append([name, spread([*found[name].values()]), *cells])
    return Table(["changed", "FD, 1 step", "difference to the same seed", "verdict"], lines)


def verdict_of(differences: Sequence[float]) -> str:
    """The direction of FD, where all seeds agree."""
    if min(differences) > 0:
        return "worse"
    return "better" if max(differences) < 0 else "undecided"


def tables(rows: Sequence[Row], costs: Sequence[Row]) -> Iterator[tuple[str, Table]]:
    """Title and content of each table that there are results for."""
    scales, objectives, ablations = ([row for row in rows if row["part"] == p] for p in PARTS)
    if scales:
        yield "Guidance scales", scales_table(scales)
    if objectives:
        yield "Equal steps", steps_table(objectives)
    if costs:
        yield "Cost of a step", costs_table(costs)
    if objectives and costs:
        time = {entry_of(cost): step_in_forwards(cost) for cost in costs}
        yield "Equal time", budget_table(objectives, time)
        flops = {entry_of(cost): cost["forwards"] for cost in costs}
        yield "Equal FLOPs", budget_table(objectives, flops)
    if ablations:
        yield "Ablations", ablations_table(ablations)


def read_rows(path: Path) -> list[Row]:
    """The rows of a file; none if it does not exist."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = command_parser(__doc__)
    default = Path("runs/arena-digits")
    parser.add_argument("folder", type=Path, nargs="?", default=default, help="of arena/run.py")
    folder = parser.parse_args(argv).folder
    rows, costs = read_rows(folder / "results.jsonl"), read_rows(folder / "costs.jsonl")
    if not rows and not costs:
        raise UserError(f"{folder}: has no results; python arena/run.py makes them")
    for title, table in tables(rows, costs):
        print(f"## {title}\n\n{as_markdown(table)}")


if __name__ == "__main__":
    run_command(main)
