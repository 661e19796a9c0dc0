"""What the sampling loop adds to the network's forward, and what memory 50,000 images take.

    python benchmarks/bench_sampling.py

Speed: one-step images per second of the loop of inference.py (draws, network, pixels, archive) over
those of the bare forward, timed in turns, without start-up. Memory: the growth of a process that
writes 1,000 and one that writes 50,000 images of 256x256 by the same loop, around a network that
does nothing. One run, on the CPU; needs Linux, and 10 GB of disk in the folder for temporary files.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measuring import bench_config, bench_learner, in_turns, machine, median_ratio, memory_mb

# isort: split
import torch
from torch import Tensor

from models import Method
from sampler import SampleRequest, sample_pixels, write_samples
from support.data.grids import GridImages
from support.system.processes import Processes, connected
from support.system.randomness import PerImageStream

MODEL, BATCH, BATCHES, TRIES = "DiT-B-4", 32, 4, 5
LEAST_RATIO, MOST_DIFFERENCE_MB = 0.95, 50
NUM_CLASSES = 1000


def to_pictures(x_0: Tensor) -> Tensor:
    """What stands in for the VAE: latents [B, 4, 32, 32] enlarged to pictures [B, 3, 256, 256]."""
    return x_0[:, :3].repeat_interleave(8, 2).repeat_interleave(8, 3)


def write(
    model: Method, num_images: int, processes: Processes, folder: str, decode=to_pictures
) -> None:
    """Sample and write so many images, as inference.py does."""
    request = SampleRequest(num_images, BATCH, 1, PerImageStream(42, NUM_CLASSES, (4, 32, 32)))
    batches = sample_pixels(model, request, processes, decode)
    shown = GridImages((4, 8), NUM_CLASSES)
    path = Path(folder) / "samples.npz"
    write_samples(path, batches, num_images, processes.is_main, lambda: None, shown.add)


def bench_speed() -> None:
    with connected("cpu", timeout_minutes=10) as processes, tempfile.TemporaryDirectory() as folder:
        model = bench_learner(bench_config(MODEL, BATCH), processes).state.ema_model
        x, t = torch.randn(BATCH, 4, 32, 32), torch.ones(BATCH)
        labels = torch.randint(NUM_CLASSES, (BATCH,))

        @torch.inference_mode()
        def forward() -> None:
            for _ in range(BATCHES):
                model.solution(x, t, torch.zeros_like(t), labels)

        def loop() -> None:
            # Latents as they come: a VAE would decode them, at a cost of its own.
            write(model, BATCH * BATCHES, processes, folder, decode=lambda x_0: x_0[:, :3])

        seconds = in_turns({"forward": forward, "loop": loop}, TRIES)
    ratio = median_ratio(seconds["forward"], seconds["loop"])
    print(f"{machine()}; {MODEL}, batch {BATCH}")
    for name, row in seconds.items():
        print(f"{name:<8} {BATCH * BATCHES / statistics.median(row):8.2f} images/s")
    verdict = "ok" if ratio >= LEAST_RATIO else "TOO SLOW"
    print(f"{'ratio':<8} {ratio:8.3f}  (>= {LEAST_RATIO}) {verdict}")


class Still:
    """A model that does nothing, so that writing is what takes time and memory."""

    def jump(self, x_t: Tensor, t: Tensor, s: Tensor, labels: Tensor | None) -> Tensor:
        return x_t

    def interpolate(self, x_0: Tensor, x_1: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return x_0, x_0


def grow(num_images: int) -> None:
    """Write so many images and print this process's growth, and its seconds."""
    with connected("cpu", timeout_minutes=10) as processes, tempfile.TemporaryDirectory() as folder:
        before, started = memory_mb("VmRSS"), time.perf_counter()
        write(Still(), num_images, processes, folder)
        print(json.dumps([memory_mb("VmHWM") - before, time.perf_counter() - started]))


def bench_memory() -> None:
    growths = []
    for num_images in (1_000, 50_000):
        command = [sys.executable, __file__, str(num_images)]
        finished = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        growth, seconds = json.loads(finished.stdout)
        growths.append(growth)
        print(f"{num_images:6} images of 256x256: {growth:6.1f} MB more at most, {seconds:.0f} s")
    difference = abs(growths[1] - growths[0])
    verdict = "ok" if difference <= MOST_DIFFERENCE_MB else "TOO MUCH"
    print(f"difference {difference:.1f} MB  (<= {MOST_DIFFERENCE_MB}) {verdict}")


def main() -> None:
    if len(sys.argv) == 2 and sys.argv[1].isdecimal():
        grow(int(sys.argv[1]))
        return
    bench_speed()
    bench_memory()


if __name__ == "__main__":
    main()
