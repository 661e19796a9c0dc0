"""The cost of a step of each objective, seconds in turns and FLOPs; started by arena/run.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import support  # noqa: F401  # before torch: tells its threads how to wait

# isort: split
import dataclasses
import json
from collections.abc import Callable
from typing import Any

import torch

import arena.objectives  # noqa: F401  # lets configs name them
from arena.plan import Job, Plan
from benchmarks.measuring import count_flops, in_turns, machine
from config import load_config
from support.data.batches import build_loader
from support.system.processes import Processes
from training.run import build_run, draw_batches

TURNS = 15
MOST_STEPS = 1 + 1 + TURNS  # one counted, one to warm up, then the timed ones
SCALE = 2.0  # of guidance; every scale costs the same


def build(job: Job, plan: Plan) -> tuple[Callable[[], None], Callable[[], None]]:
    """Functions that make a run's next step, and a forward of as many samples."""
    settings = {**job.settings, "method": job.objective, "working_dir": "unused", "device": "cpu"}
    config = load_config(plan.config, [f"{key}={value}" for key, value in settings.items()])
    run = build_run(config, Processes(0, 0, 1, torch.device("cpu")))
    loader = build_loader(run.data, run.learner.plan, 0, range(MOST_STEPS), seed=1)

    def step() -> None:
        run.learner.step(draw_batches(run, loader))

    x, t = torch.randn(config.batch_size, *run.data.spec.shape), torch.ones(config.batch_size)
    labels = torch.arange(config.batch_size) % run.data.spec.num_classes

    @torch.inference_mode()
    def forward() -> None:
        run.learner.state.ema_model.network(x, t, t, labels=labels)

    return step, forward


def measure(plan: Plan) -> list[dict[str, Any]]:
    """A row for each objective, with and without guidance."""
    plan = dataclasses.replace(plan, best=dict.fromkeys(plan.values["guided"], SCALE))
    jobs = [job for job in plan.jobs("objectives") if job.seed == plan.values["seeds"][0]]
    built = {job.file_name: build(job, plan) for job in jobs}
    works: dict[str, Callable[[], object]] = {"forward": built[jobs[0].file_name][1]}
    works |= {name: step for name, (step, _) in built.items()}
    flops = {name: count_flops(work) for name, work in works.items()}
    turns = in_turns(works, TURNS)
    seconds = {name: [round(taken, 5) for taken in of] for name, of in turns.items()}
    return [
        {
            "name": job.name,
            "guided": job.guided,
            "forwards": round(flops[job.file_name] / flops["forward"], 3),
            "seconds": seconds[job.file_name],
            "forward_seconds": seconds["forward"],
            "machine": machine(),
        }
        for job in jobs
    ]


if __name__ == "__main__":
    print(json.dumps(measure(Plan(json.loads(sys.argv[1])))))
