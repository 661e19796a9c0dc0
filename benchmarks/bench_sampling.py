"""What inference.py's loop adds to the network's forward.

    python benchmarks/bench_sampling.py

One-step images per second of the loop (draws, network, pixels, archive) over those of the bare
forward, timed in turns on the CPU.
"""

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
)

# isort: split
from sampler import SampleRequest, sample_pixels, write_samples
from support.system.processes import connected
from support.system.randomness import PerImageStream

MODEL, BATCH, BATCHES, TRIES = "DiT-B-4", 32, 4, 5


def main() -> None:
    with connected("cpu", timeout_minutes=10) as processes, tempfile.TemporaryDirectory() as folder:
        learner = bench_learner(bench_config(MODEL, BATCH), processes)
        one_forward, count = forward_of(learner), BATCH * BATCHES
        request = SampleRequest(count, BATCH, 1, PerImageStream(42, NUM_CLASSES, (4, 32, 32)))

        def forward() -> None:
            for _ in range(BATCHES):
                one_forward()

        def loop() -> None:
            # Three channels of the latents in place of pictures.
            model = learner.state.ema_model
            batches = sample_pixels(model, request, processes, lambda x_0: x_0[:, :3])
            write_samples(Path(folder, "samples.npz"), batches, count, True, lambda: None)

        seconds = in_turns({"forward": forward, "loop": loop}, TRIES)
    print(machine())
    ratio = median_ratio(seconds["forward"], seconds["loop"])
    judge(f"{MODEL}, batch {BATCH}: loop / forward", ratio, "of its images/s", least=0.95)


if __name__ == "__main__":
    main()
