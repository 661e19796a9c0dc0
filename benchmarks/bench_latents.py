"""How fast training reads latents, over h5py row by row with as many loader workers.

    python benchmarks/bench_latents.py

Batches of 256 in random order; each time is the best of three in turns, with the file in the
system's cache. Needs 700 MB of disk in the folder for temporary files.
"""

import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import h5py
import numpy as np
import torch
from measuring import bench_config, judge, machine
from torch.utils.data import DataLoader

# isort: split
from support.data.batches import DataOrder, build_loader
from support.data.build import build_data
from support.data.latents import LATENT_FILE

NUM_LATENTS, BATCH_SIZE, TRIES, ROW = 20_000, 256, 3, (8, 32, 32)


def write_file(folder: Path) -> None:
    """A latent file as the published code writes it."""
    source = np.random.default_rng(0)
    with h5py.File(folder / LATENT_FILE, "w") as file:
        latents = file.create_dataset("latents", (NUM_LATENTS, *ROW), "f4")
        for start in range(0, NUM_LATENTS, 1000):
            latents[start : start + 1000] = 20 * source.random((1000, *ROW), np.float32)
        file["labels"] = source.integers(0, 1000, NUM_LATENTS)
        file["amount"], file["latent_size"] = np.int64(NUM_LATENTS), np.int64(ROW[1])


class OneByOne:
    """A latent and a label at a time, from a file that each worker opens once."""

    def __init__(self, path: Path):
        self.path, self.latents, self.labels = path, None, None

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if self.latents is None:
            file = h5py.File(self.path, "r")
            self.latents, self.labels = file["latents"], file["labels"]
        return torch.from_numpy(self.latents[index]), int(self.labels[index])


def one_by_one(folder: Path, num_workers: int) -> Iterable:
    """An epoch in random order, read row by row."""
    order = DataOrder(NUM_LATENTS, BATCH_SIZE, seed=0)
    rows = torch.cat([order.global_batch(step) for step in range(order.steps_per_epoch)]).tolist()
    data = OneByOne(folder / LATENT_FILE)
    return DataLoader(data, batch_size=BATCH_SIZE, sampler=rows, num_workers=num_workers)


def as_training(folder: Path, num_workers: int) -> Iterable:
    """The same epoch as training reads it."""
    config = bench_config("DiT-B-4", BATCH_SIZE, f"dataset_path={folder}")
    data, steps = build_data(config.data_request()), range(NUM_LATENTS // BATCH_SIZE)
    prefetched = 2 if num_workers else None
    return build_loader(data, config.batch_plan(1), 0, steps, config.seed, num_workers, prefetched)


def items_per_second(loader: Iterable) -> float:
    """From the first batch to the last, without the start and the end of workers."""
    times, counts = [], []
    for _, labels in loader:
        times.append(time.perf_counter())
        counts.append(len(labels))
    return sum(counts[1:]) / (times[-1] - times[0])


def main() -> None:
    torch.set_num_threads(1)
    print(machine())
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_file(folder)
        for num_workers in (0, 2):
            plain, ours = 0.0, 0.0
            for _ in range(TRIES):
                plain = max(plain, items_per_second(one_by_one(folder, num_workers)))
                ours = max(ours, items_per_second(as_training(folder, num_workers)))
            judge(f"{ours:.0f}/s with {num_workers} workers", ours / plain, "times h5py", least=2)


if __name__ == "__main__":
    main()
