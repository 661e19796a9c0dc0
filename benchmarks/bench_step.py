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
    NUM_CLASSES,
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
import torch
from baselines import FlowMatching, MeanFlow
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from config import Config
from models import Batch, Samples, build_model
from schedules import consistency_times
from support.system.processes import connected
from train import Learner

STEPS = {"SoFlow": lambda model: model, "flow matching": FlowMatching, "MeanFlow": MeanFlow}


def exact_batch(config: Config, count: int, device: str) -> Batch:
    """Samples on `device`, of which exactly a tenth have dropped labels where there are labels."""
    V = int(count * config.velocity_loss_ratio)

    def samples(count: int) -> Samples:
        shape = (count, 4 if config.is_latent else 3, config.data_size, config.data_size)
        x_0, x_1 = torch.empty(shape, device=device), torch.empty(shape, device=device)
        if not config.is_conditional:
            return Samples(x_0, x_1, dropout_seed=1)
        null_mask = torch.arange(count) < count // 10  # on the CPU, as always
        labels = torch.empty(count, dtype=torch.int64, device=device)
        return Samples(x_0, x_1, labels, null_mask)

    t = torch.empty(count, device=device)
    times = consistency_times(t[V:], t[V:], 0.1)
    return Batch(samples(V), t[:V], samples(count - V), times, V, count - V)


def count_flops(config: Config, name: str) -> float:
    """FLOPs of a step over those of a forward."""
    # The UNet's dropout needs a device; its FLOPs are the same for every sample.
    device, count = ("meta", 40) if config.is_conditional else ("cpu", 2)
    with torch.device(device):
        channels = 4 if config.is_latent else 3
        model = build_model(**config.model_arguments(channels, NUM_CLASSES))
    model.configure(config.to_dict())
    batch = exact_batch(config, count, device)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as of_step:
        STEPS[name](model)(batch).loss.backward()
    parts = (batch.flow_matching, batch.consistency)
    x = torch.cat([part.x_0 for part in parts])
    labels = torch.cat([part.labels for part in parts]) if config.is_conditional else None
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as of_forward:
        model.eval().solution(x, x[:, 0, 0, 0], x[:, 0, 0, 0], labels)
    return of_step.get_total_flops() / of_forward.get_total_flops()


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
        return {
            "machine": machine(),
            "forward": statistics.median(seconds["forward"]),
            "step": statistics.median(seconds["step"]),
            "ratio": median_ratio(seconds["step"], seconds["forward"]),
            "memory": memory_mb("VmHWM") - before,
            "flops": count_flops(config, name),
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
