"""What inference.py's loop adds to the network's forward, and the memory that 50,000 images take.

    python benchmarks/bench_sampling.py

Speed: one-step images per second of the loop (draws, network, pixels, archive) over those of the
bare forward, timed in turns. Memory: the growth of a process that writes 1,000 images of 256x256 by
the loop around a network that does nothing, and of one that writes 50,000. On the CPU; needs Linux,
and 10 GB of disk in the folder for temporary files.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from measuring import (
    NUM_CLASSES,
    bench_config,
    bench_learner,
    forward_of,
    in_turns,
    judge,
    machine,
    median_ratio,
    memory_mb,
)

# isort: split
from torch import Tensor, nn

from models import Method
from sampler import SampleRequest, sample_pixels, write_samples
from support.system.processes import Processes, connected
from support.system.randomness import PerImageStream

MODEL, BATCH, BATCHES, TRIES = "DiT-B-4", 32, 4, 5


def as_pictures(x_0: Tensor) -> Tensor:
    """In place of the VAE: latents [B, 4, 32, 32] enlarged to pictures [B, 3, 256, 256]."""
    return x_0[:, :3].repeat_interleave(8, 2).repeat_interleave(8, 3)


def write(model: Method, num_images: int, processes: Processes, decode=as_pictures) -> None:
    """Sample and write so many images, as inference.py does."""
    stream = PerImageStream(42, NUM_CLASSES, (4, 32, 32))
    batches = sample_pixels(model, SampleRequest(num_images, BATCH, 1, stream), processes, decode)
    with tempfile.TemporaryDirectory() as folder:
        write_samples(Path(folder, "samples.npz"), batches, num_images, True, lambda: None)


def bench_speed() -> None:
    with connected("cpu", timeout_minutes=10) as processes:
        learner = bench_learner(bench_config(MODEL, BATCH), processes)
        one_forward, model = forward_of(learner), learner.state.ema_model

        def forward() -> None:
            for _ in range(BATCHES):
                one_forward()

        def loop() -> None:
            write(model, BATCH * BATCHES, processes, decode=lambda x_0: x_0[:, :3])

        seconds = in_turns({"forward": forward, "loop": loop}, TRIES)
    ratio = median_ratio(seconds["forward"], seconds["loop"])
    judge(f"{MODEL}, batch {BATCH}: loop over forward", ratio, "of its images/s", least=0.95)


class Still(nn.Module):
    """A model that does nothing."""

    def jump(self, x_t: Tensor, t: Tensor, s: Tensor, labels: Tensor | None) -> Tensor:
        return x_t

    def interpolate(self, x_0: Tensor, x_1: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return x_0, x_0


def print_growth(num_images: int) -> None:
    """Write so many images and print this process's growth in MB."""
    with connected("cpu", timeout_minutes=10) as processes:
        before = memory_mb("VmRSS")
        write(Still(), num_images, processes)
        print(memory_mb("VmHWM") - before)


def main() -> None:
    if len(sys.argv) == 2 and sys.argv[1].isdecimal():
        print_growth(int(sys.argv[1]))
        return
    print(machine())
    bench_speed()
    few, many = (
        float(subprocess.check_output([sys.executable, __file__, count], text=True))
        for count in ("1000", "50000")
    )
    judge("memory of 50,000 images more than of 1,000", many - few, "MB", most=50)


if __name__ == "__main__":
    main()
