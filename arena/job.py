"""One job of the arena: train, then sample from every checkpoint; started by arena/run.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import support  # noqa: F401  # before torch: tells its threads how to wait

# isort: split
import json

import numpy as np

import train
from arena.objectives import make_known
from arena.plan import Job
from sampling import load
from support.system.files import atomic_write

BATCH = 200  # images made at a time


def run_job(job: Job, config: str, folder: Path) -> None:
    """Train the job's run in `folder`, and write its samples there, by step and jumps."""
    settings = {
        **job.settings,
        "method": job.objective,
        "working_dir": folder,
        "seed": job.seed,
        "ckpt_saving_steps": job.steps[0],
        "device": "cpu",
    }
    train.main(["--config", config, *(f"--set={key}={value}" for key, value in settings.items())])
    for step in job.steps:
        model = load(folder / "ckpts" / f"{step}.pt", device="cpu", report=None)
        labels = [label % model.num_classes for label in range(job.images)]
        for jumps in job.jumps:
            images = model.sample(
                labels, range(job.images), jumps, sampler=job.sampler, batch_size=BATCH
            )
            with atomic_write(folder / "samples" / f"{step}_{jumps}.npz") as file:
                np.savez(file, arr_0=images.numpy(), arr_1=np.array(labels))


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    folder = Path(given["folder"])
    make_known(given["methods"])
    (folder / "samples").mkdir(parents=True, exist_ok=True)
    run_job(Job(**given["job"]), given["config"], folder)
