"""How fast latents are read, and how much memory a merge takes; one run, on this machine.

    python benchmarks/bench_latents.py

Reading: batches of 256 in random order as training loads them, over the plain way, rows one by one
through h5py with as many loader workers. Every time is the best of a few tries, taken in turns; the
file is in the system's cache. Needs Linux, and 3 GB of disk in the folder for temporary files.
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import h5py
import numpy as np
import torch
from measuring import memory_mb
from torch.utils.data import DataLoader, Dataset

# isort: split
from config import config_from_dict
from support.data.batches import BatchPlan, DataOrder, build_loader
from support.data.build import build_data
from support.data.latent_parts import Part, PartsFolder, Plan
from support.data.latents import LATENT_FILE, LatentInfo

NUM_LATENTS, BATCH_SIZE, TRIES = 20_000, 256, 3
ROW = (8, 32, 32)
# Memory mapped onto the file read twice as fast from the cache as the system's read calls do, but a
# file cut short while training then ended the process without a word.
LEAST_RATIO = 2
PART_IMAGES = 256
MERGED_IMAGES = 65_536  # 2.1 GB
MOST_MEMORY_MB = 100


def write_file(folder: Path) -> None:
    """A latent file as the published code writes it."""
    source = np.random.default_rng(0)
    with h5py.File(folder / LATENT_FILE, "w") as file:
        latents = file.create_dataset("latents", (NUM_LATENTS, *ROW), "f4")
        for start in range(0, NUM_LATENTS, 1000):
            latents[start : start + 1000] = 20 * source.random((1000, *ROW), np.float32)
        file["labels"] = source.integers(0, 1000, NUM_LATENTS)
        file["amount"], file["latent_size"] = np.int64(NUM_LATENTS), np.int64(ROW[1])


class OneByOne(Dataset):
    """The plain way: a latent and a label at a time, from a file that each worker opens once."""

    def __init__(self, path: Path):
        self.path, self.latents, self.labels = path, None, None

    def __len__(self) -> int:
        return NUM_LATENTS

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if self.latents is None:
            file = h5py.File(self.path, "r")
            self.latents, self.labels = file["latents"], file["labels"]
        return torch.from_numpy(self.latents[index]), int(self.labels[index])


def one_by_one(folder: Path, num_workers: int) -> Iterable:
    """An epoch in random order, read one by one."""
    order = DataOrder(NUM_LATENTS, BATCH_SIZE, seed=0)
    rows = torch.cat([order.global_batch(step) for step in range(order.steps_per_epoch)]).tolist()
    data = OneByOne(folder / LATENT_FILE)
    return DataLoader(data, batch_size=BATCH_SIZE, sampler=rows, num_workers=num_workers)


def as_training(folder: Path, num_workers: int) -> Iterable:
    """The same epoch, as training reads it."""
    values = {
        "working_dir": "unused",
        "dataset_path": str(folder),
        "batch_size": BATCH_SIZE,
        "total_steps": NUM_LATENTS // BATCH_SIZE,
        "num_workers": num_workers,
        "prefetch_factor": 2,
    }
    config = config_from_dict(values, "benchmark")
    plan = BatchPlan(BATCH_SIZE, config.flow_matching_count, 1, 1)
    data = build_data(config.data_request())
    steps = range(config.total_steps)
    workers = (config.num_workers, config.prefetch_factor)
    return build_loader(data, plan, 0, steps, config.seed, *workers)


def items_per_second(loader: Iterable) -> float:
    """From the first batch's coming to the last's: what starts and ends workers is not counted."""
    times, counts = [], []
    for _, labels in loader:
        times.append(time.perf_counter())
        counts.append(len(labels))
    return sum(counts[1:]) / (times[-1] - times[0])


def bench_reading(folder: Path) -> None:
    write_file(folder)
    print(f"reading {NUM_LATENTS} latents 8x32x32, batches of {BATCH_SIZE} in random order")
    print(f"{'workers':>7} {'one by one':>14} {'as training':>14} {'ratio':>6}")
    for num_workers in (0, 2):
        plain, ours = 0.0, 0.0
        for _ in range(TRIES):
            plain = max(plain, items_per_second(one_by_one(folder, num_workers)))
            ours = max(ours, items_per_second(as_training(folder, num_workers)))
        verdict = "ok" if ours >= LEAST_RATIO * plain else "TOO SLOW"
        print(
            f"{num_workers:7} {plain:12.0f}/s {ours:12.0f}/s {ours / plain:6.1f}  "
            f"(>= {LEAST_RATIO}) {verdict}"
        )


def merging_plan() -> Plan:
    return Plan(MERGED_IMAGES, "", 8 * ROW[1], "", "float32", 42, PART_IMAGES)


def write_parts(folder: Path) -> None:
    """Parts of random latents, which no compression on the way makes smaller."""
    source = np.random.default_rng(0)
    parts, plan = PartsFolder(folder), merging_plan()
    parts.folder.mkdir(parents=True)
    labels = np.zeros(PART_IMAGES, np.int64)
    for index in range(plan.num_parts):
        parts.write_part(index, Part(source.random((PART_IMAGES, *ROW), np.float32), labels, ()))


def merge(folder: Path) -> None:
    """Merge, in a process of its own, and print its memory."""
    plan = merging_plan()

    def describe(labels: np.ndarray) -> LatentInfo:
        return LatentInfo(
            vae="benchmark",
            vae_revision="",
            vae_sha256="",
            latent_scale=0.18215,
            image_size=plan.image_size,
            dtype=plan.dtype,
            seed=plan.seed,
            images_sha256="",
            class_names=("one",),
            class_counts=(len(labels),),
            code_version="benchmark",
        )

    before = memory_mb("VmRSS")
    started = time.perf_counter()
    PartsFolder(folder).merge(plan, describe, lambda *said: None)
    seconds, memory = time.perf_counter() - started, memory_mb("VmHWM") - before
    num_bytes = (folder / LATENT_FILE).stat().st_size
    verdict = "ok" if memory <= MOST_MEMORY_MB else "TOO MUCH"
    print(
        f"merging {num_bytes / 1e9:.2f} GB of {plan.num_parts} parts: {seconds:.1f} s, at most "
        f"{memory:.1f} MB above the {before:.0f} MB of the process before it "
        f"(<= {MOST_MEMORY_MB}) {verdict}"
    )


def main() -> None:
    if len(sys.argv) == 3 and sys.argv[1] == "merge":
        merge(Path(sys.argv[2]))
        return
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        bench_reading(Path(folder))
    with tempfile.TemporaryDirectory() as folder:
        write_parts(Path(folder))
        subprocess.run([sys.executable, __file__, "merge", folder], check=True)


if __name__ == "__main__":
    main()
