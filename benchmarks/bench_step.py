"""What a training step costs, in forward passes, beside the steps that it replaces; one run.

    python benchmarks/bench_step.py --model DiT-B-4 --batch 16
    python benchmarks/bench_step.py --model UNet --batch 4 --steps SoFlow
    python benchmarks/bench_step.py --model DiT-B-4 --batch 16 --profile

A step is all of it: draws, losses, backward pass, gradient norm, optimizer, average. A forward is
inference on the same batch, timed in turns with the step. Each row has a process of its own, so
that its memory is its own. Counted are the FLOPs of matrix products and convolutions (fused
attention counts for nothing on the CPU, so the plain one is counted), of a batch of 40 with 3 of 30
and 1 of 10 labels dropped. In fp32 on the CPU; needs Linux.
"""

import argparse
import json
import statistics
import subprocess
import sys

from measuring import (
    bench_config,
    bench_learner,
    bench_parser,
    drawn_batches,
    forward_of,
    in_turns,
    machine,
    median_ratio,
    memory_mb,
)

# isort: split
from baselines import STEPS, count_flops
from torch.profiler import ProfilerActivity, profile

from config import Config
from support.system.processes import connected
from training.learner import Learner


def step_of(learner: Learner, name: str):
    """The whole step with that loss, to be called."""
    learner.parallel_model = STEPS[name](learner.state.model)
    return lambda: learner.step(drawn_batches(learner))


def measure(config: Config, name: str, tries: int) -> dict:
    """One row, in this process."""
    with connected("cpu", timeout_minutes=10) as processes:
        learner = bench_learner(config, processes, lambda note: print(note, file=sys.stderr))
        step, forward = step_of(learner, name), forward_of(learner)
        before = memory_mb("VmRSS")
        seconds = in_turns({"forward": forward, "step": step}, tries)
        memory = memory_mb("VmHWM") - before
        flops = count_flops(config, name)
        return {
            "machine": machine(),
            "forward": statistics.median(seconds["forward"]),
            "step": statistics.median(seconds["step"]),
            "ratio": median_ratio(seconds["step"], seconds["forward"]),
            "memory": memory,
            "flops": flops.step / flops.forward,
        }


def print_profile(config: Config) -> None:
    """Where the time of SoFlow's step goes, by operator."""
    with connected("cpu", timeout_minutes=10) as processes:
        learner = bench_learner(config, processes)
        step = step_of(learner, "SoFlow")
        step()
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            step()
        print(profiled.key_averages().table(sort_by="self_cpu_time_total", row_limit=20))


def print_table(arguments: argparse.Namespace, names: list[str]) -> None:
    """A row for each step, measured in processes of their own."""
    rows = {}
    for name in names:
        command = [sys.executable, __file__, *sys.argv[1:], "--row", name]
        finished = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        rows[name] = json.loads(finished.stdout.splitlines()[-1])
    first = rows[names[0]]
    print(f"{first['machine']}; {' '.join(sys.argv[1:])}")
    print(f"{'':<16} {'seconds':>8} {'forwards':>9} {'FLOPs':>6} {'memory':>9} {'of SoFlow':>10}")
    print(f"{'forward':<16} {first['forward']:8.2f} {1:9.2f} {1:6.2f}")
    for name, row in rows.items():
        of_first = f"{row['ratio'] / first['ratio']:10.2f}" if names[0] == "SoFlow" else ""
        print(
            f"{name:<16} {row['step']:8.2f} {row['ratio']:9.2f} {row['flops']:6.3f} "
            f"{row['memory']:6.0f} MB {of_first}"
        )


def main() -> None:
    parser = bench_parser(__doc__)
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of config")
    parser.add_argument("--profile", action="store_true", help="print where the time goes instead")
    parser.add_argument("--row", choices=STEPS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    config = bench_config(arguments.model, arguments.batch, *arguments.set)
    if arguments.profile:
        print_profile(config)
    elif arguments.row:
        print(json.dumps(measure(config, arguments.row, arguments.tries)))
    else:
        print_table(arguments, arguments.steps)


if __name__ == "__main__":
    main()
