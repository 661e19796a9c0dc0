"""What a training step costs, in forward passes, beside other steps and other revisions.

    python benchmarks/bench_step.py --model DiT-B-4 --batch 16
    python benchmarks/bench_step.py --model UNet --batch 4 --steps SoFlow --against HEAD~1

A step is all of it: draws, losses, backward pass, gradient norm, optimizer, average. Each row is a
process, and the processes take turns: a step, then an inference forward on as many samples.
--against adds the step of another commit of this repository, measured by that commit's own
bench_step.py. FLOPs are those of one step's matrix products and convolutions, with attention in its
plain form, in forwards. In fp32 on the CPU; needs Linux.
"""

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from measuring import (
    ROOT,
    bench_config,
    bench_learner,
    count_flops,
    forward_of,
    machine,
    median_ratio,
    memory_mb,
    seconds_of,
    step_of,
)

# isort: split
from baselines import STEPS

from support.system.command import command_parser
from support.system.processes import connected


def serve(arguments: argparse.Namespace) -> None:
    """A row's process: time a step and a forward for each line of input, then report the rest."""
    config = bench_config(arguments.model, arguments.batch, *arguments.set)
    with connected("cpu", timeout_minutes=10) as processes:
        learner = bench_learner(config, processes, lambda note: print(note, file=sys.stderr))
        learner.parallel_model = STEPS[arguments.row](learner.state.model)
        step, forward = step_of(learner), forward_of(learner)
        before = memory_mb("VmRSS")
        for _ in sys.stdin:
            print(json.dumps([seconds_of(step), seconds_of(forward)]), flush=True)
        memory = memory_mb("VmHWM") - before
        flops = count_flops(step) / count_flops(forward)
    print(json.dumps([memory, flops]))


@contextlib.contextmanager
def checkout(revision: str) -> Iterator[Path]:
    """A folder with that commit of this repository."""
    with tempfile.TemporaryDirectory() as folder:
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", folder, revision], check=True)
        try:
            yield Path(folder)
        finally:
            subprocess.run([*git, "remove", "--force", folder], check=True)


def row_of(name: str, root: Path) -> subprocess.Popen:
    """The process of a row, by that checkout's code. It ends when its input ends."""
    command = [sys.executable, root / "benchmarks" / "bench_step.py", *sys.argv[1:], "--row", name]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def ask(process: subprocess.Popen, line: str) -> list[float]:
    """A process's next line of output."""
    if line:
        print(line, file=process.stdin, flush=True)
    else:
        process.stdin.close()
    return json.loads(process.stdout.readline())


def compare(rows: dict[str, tuple[str, Path]], tries: int) -> None:
    """Take the turns and print the table."""
    turns: dict[str, list[list[float]]] = {label: [] for label in rows}
    with contextlib.ExitStack() as stack:
        processes = {label: stack.enter_context(row_of(*row)) for label, row in rows.items()}
        for _ in range(tries + 1):
            for label, process in processes.items():
                turns[label].append(ask(process, "next"))
        rest = {label: ask(process, "") for label, process in processes.items()}
    # The first turn is to warm up.
    steps = {label: [step for step, _ in counted] for label, (_, *counted) in turns.items()}
    forwards = {label: [taken for _, taken in counted] for label, (_, *counted) in turns.items()}
    first = next(iter(rows))
    print(f"{machine()}; {' '.join(sys.argv[1:])}")
    print(f"{'step of':<18} {'seconds':>8} {'forwards':>9} {'FLOPs':>6} {'memory':>9} {first:>12}")
    for label, (memory, flops) in rest.items():
        print(
            f"{label:<18} {statistics.median(steps[label]):8.2f} "
            f"{median_ratio(steps[label], forwards[label]):9.2f} {flops:6.3f} "
            f"{memory:6.0f} MB {median_ratio(steps[label], steps[first]):11.3f}x"
        )


def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("--model", default="DiT-B-4")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--tries", type=int, default=5, help="turns that count")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--against", metavar="REVISION", help="also the SoFlow step of this commit")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of config")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.row:
        serve(arguments)
        return
    rows = {name: (name, ROOT) for name in arguments.steps}
    with contextlib.ExitStack() as stack:
        if arguments.against:
            other = stack.enter_context(checkout(arguments.against))
            rows[arguments.against] = ("SoFlow", other)
        compare(rows, arguments.tries)


if __name__ == "__main__":
    main()
