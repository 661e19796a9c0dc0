"""What a second process brings, and what the exchange of gradients costs; one run, this machine.

    python benchmarks/bench_processes.py

Starts itself by torchrun with one and with two processes on the same cores (gloo). Communication
is what a step takes longer than one that keeps its gradients back, timed in turns. The rows below
the first two are other ways to exchange, with two processes.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys

from measuring import (
    bench_config,
    bench_learner,
    bench_parser,
    drawn_batches,
    in_turns,
    machine,
    median_ratio,
)

# isort: split
from support.system.command import run_command
from support.system.processes import connected, exchanging_gradients

AS_TRAINING = {"gradient_as_bucket_view": True}
WAYS = {
    "as training": AS_TRAINING,
    "static graph": {**AS_TRAINING, "static_graph": True},
    "buckets of 100 MB": {**AS_TRAINING, "bucket_cap_mb": 100},
    "buckets of 5 MB": {**AS_TRAINING, "bucket_cap_mb": 5},
    "buckets copied": {},
}


def measure(model_type: str, batch_size: int, way: str, tries: int) -> None:
    """Print one row, in the processes that torchrun started."""
    with connected("cpu", timeout_minutes=10) as processes:
        learner = bench_learner(bench_config(model_type, batch_size), processes)
        if processes.world_size > 1:
            learner.parallel_model = exchanging_gradients(learner.state.model, **WAYS[way])

        def step() -> None:
            learner.step(drawn_batches(learner))

        def step_alone() -> None:
            parallel, learner.parallel_model = learner.parallel_model, learner.state.model
            step()
            learner.parallel_model = parallel

        seconds = in_turns({"step": step, "alone": step_alone}, tries)
        share = 1 - median_ratio(seconds["alone"], seconds["step"])
        if processes.is_main:
            rate = batch_size / statistics.median(seconds["step"])
            print(json.dumps({"machine": machine(), "rate": rate, "share": share}))


def row(arguments: argparse.Namespace, num_processes: int, way: str) -> dict:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={num_processes}", __file__, *sys.argv[1:], "--way", way]
    finished = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(finished.stdout.splitlines()[-1])


def main() -> None:
    parser = bench_parser(__doc__, model="DiT-S-4", batch=32, tries=7)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        measure(arguments.model, arguments.batch, arguments.way, arguments.tries)
        return
    rows = [(1, "as training"), *((2, way) for way in WAYS)]
    found = [(count, way, row(arguments, count, way)) for count, way in rows]
    print(f"{found[0][2]['machine'].split(',')[0]}; {arguments.model}, batch {arguments.batch}")
    print(f"{'processes':>9}  {'exchange':<18} {'images/s':>9} {'communication':>14}")
    for count, way, result in found:
        share = f"{result['share']:13.1%}" if count > 1 else f"{'-':>13}"
        print(f"{count:9}  {way:<18} {result['rate']:9.1f} {share}")


if __name__ == "__main__":
    run_command(main)
