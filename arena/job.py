"""One job of the arena, started by arena/run.py: train, then sample from every checkpoint."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import support  # noqa: F401  # before torch: tells its threads how to wait

# isort: split
import json
import shutil

import numpy as np

import arena.objectives  # noqa: F401  # lets configs name them
import train
from arena.plan import Job
from arena.records import sources, write_record
from sampling import load
from support.system.files import atomic_write

BATCH = 200  # images sampled at a time


def run_job(job: Job, config: str, folder: Path) -> None:
    """Train in the job's folder, write its samples there by step and NFE, then what made them."""
    place = folder / job.file_name
    objective_file = job.objective.rpartition(":")[0]
    at_start = sources(config, objective_file)  # later changes of a file do not count
    settings = {**job.settings, "method": job.objective, "seed": job.seed, "device": "cpu"}
    settings |= {"working_dir": place, "ckpt_saving_steps": job.steps[0]}
    (place / "samples").mkdir()
    train.main(["--config", config, *(f"--set={key}={value}" for key, value in settings.items())])
    for (step, nfe), path in job.samples(folder).items():
        model = load(place / "ckpts" / f"{step}.pt", device="cpu", report=None)
        labels = [label % model.num_classes for label in range(job.images)]
        sampler = model.model.sampler
        images = model.sample(labels, range(job.images), nfe, sampler=sampler, batch_size=BATCH)
        with atomic_write(path) as file:
            np.savez(file, arr_0=images.numpy(), arr_1=np.array(labels))
    shutil.rmtree(place / "ckpts")
    write_record(folder, job, "job.json", sources() | at_start)


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    run_job(Job(**given["job"]), given["config"], Path(given["folder"]))
