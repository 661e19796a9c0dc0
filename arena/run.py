"""SoFlow beside MeanFlow, Shortcut models, consistency training and flow matching, on a laptop.

    python arena/run.py
    python arena/run.py --parts ablations
    python arena/run.py --data fashion
    python arena/run.py --objective my_objective.py:MyObjective

Trains what arena/digits.yaml lists, each run with one thread, as many side by side as there are
cores; samples from every checkpoint; scores all. Parts: `scales` chooses the guidance of each
objective, `objectives` compares them, `ablations` changes one thing of SoFlow at a time, `costs`
times a step of each in turns. Runs that are done stay in --folder and are not done again. The
results go to FOLDER/results.jsonl and costs.jsonl; arena/tables.py makes tables and a plot of them.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from support.system.command import run_command  # isort: skip - first: it attends to the start

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from os.path import expanduser

from tqdm import tqdm

from arena.plan import PARTS, Job, Plan, read_plan
from arena.results import COSTS_FILE, RESULTS_FILE, Row, add_rows
from support.system.files import UserError, atomic_write
from support.system.processes import usable_cores

HERE = Path(__file__).resolve().parent
SCORES = ("FD", "prec", "recall", "class")
SCORED = "scores.json"


def train_all(jobs: Sequence[Job], plan: Plan, folder: Path, methods: Sequence[str]) -> None:
    """Run the jobs that are not done yet; UserError names the log of one that failed."""
    waiting = [job for job in jobs if not is_done(folder / job.file_name, job)]
    with (
        ThreadPoolExecutor(usable_cores()) as pool,
        tqdm(total=len(jobs), initial=len(jobs) - len(waiting), unit="run", desc="training") as bar,
    ):
        for _ in pool.map(lambda job: train_one(job, plan, folder, methods), waiting):
            bar.update()


def is_done(place: Path, job: Job) -> bool:
    """Whether the job's samples are there, and were made as the job says."""
    try:
        recorded = json.loads((place / "job.json").read_bytes())
    except (OSError, ValueError):
        return False
    return recorded == recorded_of(job)


def recorded_of(job: Job) -> dict:
    """What makes a job's samples what they are; parts may share them."""
    described = json.loads(json.dumps(dataclasses.asdict(job)))
    return {key: value for key, value in described.items() if key not in ("part", "chosen_by")}


def train_one(job: Job, plan: Plan, folder: Path, methods: Sequence[str]) -> None:
    """Train and sample in a process of its own, with one thread."""
    place = folder / job.file_name
    # Done, but otherwise than is asked for now; or stopped before it was begun.
    if (place / "job.json").exists() or not (place / "config.yaml").exists():
        shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True, exist_ok=True)
    given = {
        "folder": str(place),
        "config": plan.config,
        "methods": list(methods),
        "job": dataclasses.asdict(job),
    }
    with open(place / "output.txt", "wb") as output:
        finished = subprocess.run(
            [sys.executable, HERE / "job.py", json.dumps(given)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    if finished.returncode:
        last = (place / "output.txt").read_text(errors="replace").strip().rpartition("\n")[2]
        raise UserError(f"{place / 'output.txt'}: the run of {job.name} failed: {last}")
    shutil.rmtree(place / "ckpts")
    with atomic_write(place / "job.json") as file:
        file.write(json.dumps(recorded_of(job), indent=1).encode())


def score_all(jobs: Iterable[Job], plan: Plan, folder: Path) -> None:
    """Score the samples of jobs that have no scores yet, by one run of the evaluator."""
    waiting = [job for job in jobs if not (folder / job.file_name / SCORED).exists()]
    places = list(dict.fromkeys(folder / job.file_name for job in waiting))
    if not places:
        return
    # Together with TensorFlow, and after the trainings, which do without.
    from quickstart.score import score
    from quickstart.small_sets import DEFAULT_FOLDER, SMALL_SETS, read_samples

    archives = {str(path): path for place in places for path in sorted(place.glob("samples/*.npz"))}
    small = SMALL_SETS[plan.values["scored_as"]]
    images = {name: read_samples(path) for name, path in archives.items()}
    print(f"scoring {len(archives)} archives", file=sys.stderr)
    held_out = small.load(DEFAULT_FOLDER).held_out
    scores = score(images, held_out.pixels, small.graph)
    for place in places:
        rows = []
        for name, path in archives.items():
            if path.parent.parent == place:
                step, jumps = map(int, path.stem.split("_"))
                found = {key: round(scores[name][key], 4) for key in SCORES}
                rows.append({"step": step, "jumps": jumps, **found})
        with atomic_write(place / SCORED) as file:
            file.write(
                json.dumps(sorted(rows, key=lambda row: (row["step"], row["jumps"]))).encode()
            )


def rows_of(job: Job, data: str, folder: Path) -> list[Row]:
    """The results of a job, one for each checkpoint and number of jumps."""
    described = {
        "data": data,
        "part": job.part,
        "name": job.name,
        "guided": job.guided,
        "scale": job.settings.get("cfg_scale"),
        "seed": job.seed,
    }
    scores = json.loads((folder / job.file_name / SCORED).read_bytes())
    return [{**described, **row} for row in scores]


def best_scales(rows: Iterable[Row], jobs: Iterable[Job]) -> dict[str, float]:
    """Of each guided objective the scale with the lowest FD, at its last step."""
    last = {(job.name, job.settings["cfg_scale"]): (job.steps[-1], job.chosen_by) for job in jobs}
    found = {
        (row["name"], row["scale"]): row["FD"]
        for row in rows
        if (row["step"], row["jumps"]) == last[row["name"], row["scale"]]
    }
    names = dict.fromkeys(name for name, _ in found)
    return {
        name: min((fd, scale) for (of, scale), fd in found.items() if of == name)[1]
        for name in names
    }


def run_part(part: str, plan: Plan, folder: Path, methods: Sequence[str]) -> list[Row]:
    """Do what a part still lacks; gives its results."""
    jobs = list(plan.jobs(part))
    train_all(jobs, plan, folder, methods)
    score_all(jobs, plan, folder)
    rows = [row for job in jobs for row in rows_of(job, plan.data, folder)]
    add_rows(folder / RESULTS_FILE, rows)
    print(f"{part}: {len(rows)} results in {folder / RESULTS_FILE}")
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--data",
        default="digits",
        help="which of arena/*.yaml: digits (default), or fashion, the long form",
    )
    add("--folder", type=expanduser, help="of the runs (default runs/arena-DATA)")
    add(
        "--parts",
        default="scales,objectives,costs",
        help=f"of {', '.join(PARTS)}, costs (default: %(default)s)",
    )
    add(
        "--objective",
        action="append",
        default=[],
        metavar="FILE.py:NAME",
        help="compare this one, too: a class that derives from models.Method",
    )
    arguments = parser.parse_args(argv)
    plan = read_plan(arguments.data)
    for text in arguments.objective:
        plan = plan.with_objective(text)
    folder = Path(arguments.folder or f"runs/arena-{arguments.data}").resolve()
    parts = arguments.parts.split(",")
    if wrong := [part for part in parts if part not in (*PARTS, "costs")]:
        raise UserError(f"--parts {wrong[0]}: there are {', '.join(PARTS)} and costs")
    if "scales" in parts or "objectives" in parts:
        rows = run_part("scales", plan, folder, arguments.objective)
        plan = dataclasses.replace(plan, best=best_scales(rows, plan.jobs("scales")))
        print(f"guidance: {plan.best}", file=sys.stderr)
    for part in ("objectives", "ablations"):
        if part in parts:
            run_part(part, plan, folder, arguments.objective)
    if "costs" in parts:
        command = [sys.executable, HERE / "costs.py", arguments.data, folder / COSTS_FILE]
        subprocess.run([*command, *arguments.objective], check=True)
        print(f"costs: in {folder / COSTS_FILE}")


if __name__ == "__main__":
    run_command(main)
