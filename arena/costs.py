"""The cost of a step of each objective: seconds in turns, FLOPs, memory; started by run.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from measuring import in_turns, machine, memory_mb  # isort: skip - before torch

import dataclasses
import json
import subprocess
from collections.abc import Callable

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import arena.objectives  # noqa: F401  # lets configs name them
from arena.plan import Job, Plan
from config import load_config
from support.data.batches import build_loader
from support.system.files import atomic_write
from support.system.processes import Processes
from training.run import build_run, draw_batches

ALONE = Processes(0, 0, 1, torch.device("cpu"))
TURNS, STEPS_OF_MEMORY = 15, 5
MOST_STEPS = 1 + 1 + TURNS  # one counted, one to warm up, then the timed ones
SCALE = 2.0  # of guidance; every scale costs the same


def first_jobs(plan: Plan) -> list[Job]:
    """A job of each objective, with and without guidance."""
    scaled = dataclasses.replace(plan, best=dict.fromkeys(plan.values["guided"], SCALE))
    seed = plan.values["seeds"][0]
    return [job for job in scaled.jobs("objectives") if job.seed == seed]


def build(job: Job, plan: Plan) -> tuple[Callable[[], None], Callable[[], None]]:
    """Functions that make a run's next step, and a forward of as many samples."""
    settings = {**job.settings, "method": job.objective, "working_dir": "unused", "device": "cpu"}
    config = load_config(plan.config, [f"{key}={value}" for key, value in settings.items()])
    run = build_run(config, ALONE)
    loader = build_loader(
        run.data, run.learner.plan, 0, range(MOST_STEPS), 1, 0, None, pin_memory=False
    )

    def step() -> None:
        run.learner.step(draw_batches(run, loader))

    x, t = torch.randn(config.batch_size, *run.data.spec.shape), torch.ones(config.batch_size)
    labels = torch.arange(config.batch_size) % run.data.spec.num_classes

    def forward() -> None:
        with torch.inference_mode():
            run.learner.state.ema_model.network(x, t, t, labels=labels)

    return step, forward


def count_forwards(step: Callable[[], None], forward: Callable[[], None]) -> float:
    """A step's FLOPs in forwards; the counter sees attention in its plain form alone."""
    counted = []
    for work in (step, forward):
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            work()
        counted.append(counter.get_total_flops())
    return counted[0] / counted[1]


def memory_of(job: Job, plan: Plan) -> float:
    """Growth of this process by a job's steps, in MB."""
    step, _ = build(job, plan)
    before = memory_mb("VmRSS")
    for _ in range(STEPS_OF_MEMORY):
        step()
    return memory_mb("VmHWM") - before


def measure(plan: Plan, given: str) -> list[dict]:
    """A row for each objective, with and without guidance."""
    jobs = first_jobs(plan)
    steps, forwards = zip(*(build(job, plan) for job in jobs), strict=True)
    arithmetic = [count_forwards(*pair) for pair in zip(steps, forwards, strict=True)]
    works = {str(index): step for index, step in enumerate(steps)}
    seconds = in_turns({"forward": forwards[0], **works}, TURNS)
    rows = []
    for index, job in enumerate(jobs):
        command = [sys.executable, __file__, given, str(index)]
        rows.append(
            {
                "data": plan.data,
                "name": job.name,
                "guided": job.guided,
                "forwards": round(arithmetic[index], 3),
                "seconds": [round(taken, 5) for taken in seconds[str(index)]],
                "forward_seconds": [round(taken, 5) for taken in seconds["forward"]],
                "memory_mb": round(float(subprocess.check_output(command, text=True))),
                "machine": machine(),
            }
        )
    return rows


if __name__ == "__main__":
    given, target = sys.argv[1:]
    plan = Plan(**json.loads(given))
    if target.isdecimal():
        print(memory_of(first_jobs(plan)[int(target)], plan))
    else:
        rows = measure(plan, given)
        with atomic_write(target) as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows).encode())
