"""Compare SoFlow with MeanFlow, Shortcut models, consistency training and flow matching.

    python arena/run.py
    python arena/run.py --parts ablations
    python arena/run.py --data fashion
    python arena/run.py --objective my_objective.py:MyObjective

Trains the runs that arena/digits.yaml lists, one per core, each with one thread; samples from every
checkpoint; scores all samples. Parts: `scales` chooses the guidance scale of each objective,
`objectives` compares them, `ablations` changes one setting of SoFlow at a time, `costs` times a
step of each in turns. A run in --folder is made again when its job, its config or any source file
that it used has changed. Objectives given once stay in the comparison. arena/tables.py prints the
results, FOLDER/results.jsonl and FOLDER/costs.jsonl, as tables.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from support.system.command import command_parser, run_command  # isort: skip - must be first

import dataclasses
import json
import os
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from os.path import expanduser

from tqdm import tqdm

from arena.plan import FOLDER, PARTS, Job, Plan, read_plan
from arena.records import Record, read_record, sources, write_record
from support.system.files import UserError, atomic_write
from support.system.processes import usable_cores

SCORES = ("FD", "prec", "recall", "class")


def train_all(jobs: Sequence[Job], plan: Plan, folder: Path) -> None:
    """Run the jobs that are not done; UserError names the log of one that failed."""
    waiting = [job for job in jobs if not read_record(folder, job, "job.json")]
    with ThreadPoolExecutor(len(usable_cores())) as pool:
        runs = pool.map(lambda job: train_one(job, plan, folder), waiting)
        for _ in tqdm(runs, total=len(waiting), unit="run", desc="training"):
            pass


def train_one(job: Job, plan: Plan, folder: Path) -> None:
    """Train and sample in a process of its own, with one thread."""
    place = folder / job.file_name
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    given = {"folder": str(folder), "config": plan.config, "job": dataclasses.asdict(job)}
    with open(place / "output.txt", "wb") as output:
        finished = subprocess.run(
            [sys.executable, FOLDER / "job.py", json.dumps(given)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    if finished.returncode:
        last = (place / "output.txt").read_text(errors="replace").strip().rpartition("\n")[2]
        raise UserError(f"{place / 'output.txt'}: the run of {job.name} failed: {last}")


def score_all(jobs: Iterable[Job], plan: Plan, folder: Path) -> None:
    """Score the samples that have no current scores, in one run of the evaluator."""
    waiting = {job.file_name: job for job in jobs if not read_record(folder, job, "scores.json")}
    if not waiting:
        return
    # Imported late, because only scoring needs TensorFlow.
    from quickstart.score import score
    from quickstart.small_sets import DEFAULT_FOLDER, SMALL_SETS, read_samples

    samples = {name: job.samples(folder) for name, job in waiting.items()}
    images = {str(path): read_samples(path) for of in samples.values() for path in of.values()}
    print(f"scoring {len(images)} archives", file=sys.stderr)
    small = SMALL_SETS[plan.values["scored_as"]]
    scores = score(images, small.load(DEFAULT_FOLDER).held_out.pixels, small.graph)
    for name, job in waiting.items():
        rows = []
        for (step, nfe), path in samples[name].items():
            found = {key: round(scores[str(path)][key], 4) for key in SCORES}
            rows.append({"step": step, "nfe": nfe, **found})
        write_record(folder, job, "scores.json", sources(small.graph), rows=rows)


def rows_of(jobs: Iterable[Job], folder: Path) -> list[Record]:
    """The results of the jobs that are done, one for each checkpoint and NFE."""
    rows = []
    for job in jobs:
        scored = read_record(folder, job, "scores.json")
        if scored and read_record(folder, job, "job.json"):
            described = {"part": job.part, "name": job.name, "guided": job.guided}
            described |= {"scale": job.settings.get("cfg_scale"), "seed": job.seed}
            rows += [described | row for row in scored["rows"]]
    return rows


def with_best_scales(plan: Plan, folder: Path) -> Plan:
    """The plan with each objective's best scale by FD after the last step; none without results."""
    found: dict[str, list[tuple[float, float]]] = {}
    for job in plan.jobs("scales"):
        for row in rows_of([job], folder):
            if (row["step"], row["nfe"]) == (job.steps[-1], job.chosen_by):
                found.setdefault(job.name, []).append((row["FD"], row["scale"]))
    return dataclasses.replace(plan, best={name: min(pairs)[1] for name, pairs in found.items()})


def known_plan(data: str, given: Sequence[str], folder: Path) -> Plan:
    """The plan with the users' objectives: those given, and those with runs in the folder."""
    plan = read_plan(data)
    for text in given:
        plan = plan.with_objective(text)
    for path in sorted(folder.glob("plain-*/job.json")):
        text = json.loads(path.read_bytes())["job"]["objective"]
        if ":" in text and text.rpartition(":")[2] not in plan.values["unguided"]:
            try:
                plan = plan.with_objective(text)
            except UserError as error:
                print(f"left out: {error}", file=sys.stderr)
    return plan


def write_rows(path: Path, rows: list[Record]) -> None:
    """Write a JSON object per line."""
    with atomic_write(path) as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows).encode())
    print(f"{len(rows)} results in {path}")


def write_results(plan: Plan, folder: Path) -> None:
    """Write all results that the folder's runs have now."""
    rows = [row for part in PARTS for row in rows_of(plan.jobs(part), folder)]
    write_rows(folder / "results.jsonl", rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("--data", default="digits", help="digits (default), or fashion, which takes hours")
    add("--folder", type=expanduser, help="for the runs (default runs/arena-DATA)")
    choices = (*PARTS, "costs")
    add("--parts", default="scales,objectives,costs", help=f"of {', '.join(choices)}")
    help_text = "also compare this one, a class derived from models.Method"
    add("--objective", action="append", default=[], metavar="FILE.py:NAME", help=help_text)
    arguments = parser.parse_args(argv)
    parts = arguments.parts.split(",")
    if wrong := [part for part in parts if part not in choices]:
        raise UserError(f"--parts {wrong[0]}: is not one of {', '.join(choices)}")
    folder = Path(arguments.folder or f"runs/arena-{arguments.data}").resolve()
    plan = known_plan(arguments.data, arguments.objective, folder)
    if "objectives" in parts:
        parts = ["scales", *parts]
    for part in PARTS:
        if part in parts:
            jobs = list(plan.jobs(part))
            train_all(jobs, plan, folder)
            score_all(jobs, plan, folder)
        if part == "scales":
            plan = with_best_scales(plan, folder)
    if set(parts) & set(PARTS):
        write_results(plan, folder)
    if "costs" in parts:
        # In a process of its own: FLOPs cannot be counted where TensorFlow is loaded.
        command = [sys.executable, str(FOLDER / "costs.py"), json.dumps(plan.values)]
        printed = subprocess.check_output(command, text=True)
        write_rows(folder / "costs.jsonl", json.loads(printed.splitlines()[-1]))


if __name__ == "__main__":
    run_command(main)
