"""Print the arena's results as Markdown tables.

python arena/tables.py                      # of runs/arena-digits
python arena/tables.py runs/arena-fashion
python arena/tables.py docs/arena           # the results that docs/arena.md shows
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from support.system.command import run_command  # isort: skip - first: it attends to the start

import argparse
import json
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from support.system.files import UserError

Row = dict[str, Any]
Curve = dict[int, list[float]]  # step -> a value of each seed


class Entry(NamedTuple):
    """What is compared: an objective, guided or not."""

    name: str
    guided: bool

    def __str__(self) -> str:
        return f"{self.name}, guided" if self.guided else self.name


def entries_of(rows: Iterable[Row]) -> list[Entry]:
    return list(dict.fromkeys(Entry(row["name"], row["guided"]) for row in rows))


def curve_of(rows: Sequence[Row], entry: Entry, nfe: int, key: str = "FD") -> Curve:
    """A value by step, of one entry at one NFE."""
    found: Curve = {}
    for row in rows:
        if (row["name"], row["guided"], row["nfe"]) == (*entry, nfe):
            found.setdefault(row["step"], []).append(row[key])
    return dict(sorted(found.items()))


def spread(values: Sequence[float], form: str = ".1f", to: str = "–") -> str:  # noqa: RUF001
    """The mean over seeds, the least and the most."""
    if len(values) == 1:
        return f"{values[0]:{form}}"
    return f"{statistics.mean(values):{form}} ({min(values):{form}}{to}{max(values):{form}})"


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def scales_table(rows: Sequence[Row]) -> str:
    """FD by guidance scale in one step, for flow matching in eight."""
    scales = sorted({row["scale"] for row in rows})
    last = max(row["step"] for row in rows)
    lines = []
    for name in dict.fromkeys(row["name"] for row in rows):
        nfe = 8 if name == "FlowMatching" else 1
        at = (name, last, nfe)
        fd = {r["scale"]: r["FD"] for r in rows if (r["name"], r["step"], r["nfe"]) == at}
        lines.append([name, str(nfe), *(f"{fd[scale]:.1f}" for scale in scales)])
    return table(["objective", "steps", *(f"scale {scale}" for scale in scales)], lines)


def steps_table(rows: Sequence[Row]) -> str:
    """FD after the last training step, by sampling steps."""
    counts = sorted({row["nfe"] for row in rows})
    last = max(row["step"] for row in rows)
    lines = [
        [
            str(entry),
            *(spread(curve_of(rows, entry, nfe)[last]) for nfe in counts),
            spread(curve_of(rows, entry, 1, "class")[last], ".3f"),
        ]
        for entry in entries_of(rows)
    ]
    head = ["FD, 1 step", *(f"{nfe} steps" for nfe in counts[1:])]
    return table([f"after {last} steps", *head, "right class, 1 step"], lines)


def step_in_forwards(cost: Row) -> float:
    """The median over turns of a step's time in forwards of the same turn."""
    pairs = zip(cost["seconds"], cost["forward_seconds"], strict=True)
    return statistics.median(step / forward for step, forward in pairs)


def costs_table(costs: Sequence[Row]) -> str:
    """Time and FLOPs of a step."""
    lines = [
        [
            str(Entry(row["name"], row["guided"])),
            f"{statistics.median(row['seconds']):.3f}",
            f"{step_in_forwards(row):.2f}",
            f"{row['forwards']:.2f}",
        ]
        for row in costs
    ]
    return table(["a step", "seconds", "in forwards", "counted"], lines)


def budget_table(rows: Sequence[Row], costs: Sequence[Row], cost_of: Callable[[Row], float]) -> str:
    """One-step FD at an equal budget: that of all steps of the cheapest objective."""
    last = max(row["step"] for row in rows)
    # Flow matching does not sample in one step.
    entries = [entry for entry in entries_of(rows) if entry.name != "FlowMatching"]
    cost = {Entry(row["name"], row["guided"]): cost_of(row) for row in costs}
    least = min(cost[entry] for entry in entries)
    lines = []
    for entry in entries:
        curve, steps = curve_of(rows, entry, 1), last * least / cost[entry]
        seeds = zip(*curve.values(), strict=True)
        fd = [float(np.interp(steps, list(curve), seed)) for seed in seeds]
        lines.append([str(entry), f"{steps:.0f}", spread(fd)])
    return table(["1 step", "training steps", "FD"], lines)


def ablations_table(rows: Sequence[Row]) -> str:
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
    return table(["changed", "FD, 1 step", "difference to the same seed", "verdict"], lines)


def verdict_of(differences: Sequence[float]) -> str:
    """The direction of FD, where all seeds agree."""
    if min(differences) > 0:
        return "worse"
    return "better" if max(differences) < 0 else "undecided"


def tables(rows: Sequence[Row], costs: Sequence[Row]) -> Iterator[tuple[str, str]]:
    """Title and Markdown of each table that there are results for."""
    of = {
        part: [row for row in rows if row["part"] == part] for part in (*{r["part"] for r in rows},)
    }
    if "scales" in of:
        yield "Guidance scales", scales_table(of["scales"])
    if "objectives" in of:
        yield "Equal steps", steps_table(of["objectives"])
    if costs:
        yield "Cost of a step", costs_table(costs)
    if "objectives" in of and costs:
        yield "Equal time", budget_table(of["objectives"], costs, step_in_forwards)
        by_flops = budget_table(of["objectives"], costs, lambda row: row["forwards"])
        yield "Equal FLOPs", by_flops
    if "ablations" in of:
        yield "Ablations", ablations_table(of["ablations"])


def read_rows(path: Path) -> list[Row]:
    """The rows of a file; none if it does not exist."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = Path("runs/arena-digits")
    parser.add_argument("folder", type=Path, nargs="?", default=default, help="of arena/run.py")
    folder = parser.parse_args(argv).folder
    rows, costs = read_rows(folder / "results.jsonl"), read_rows(folder / "costs.jsonl")
    if not rows and not costs:
        raise UserError(f"{folder}: has no results; python arena/run.py makes them")
    for title, text in tables(rows, costs):
        print(f"## {title}\n\n{text}\n")


if __name__ == "__main__":
    run_command(main)
