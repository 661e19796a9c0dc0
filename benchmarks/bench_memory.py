"""What activation checkpointing saves, and what it costs; one run, on this machine.

    python benchmarks/bench_memory.py
    python benchmarks/bench_memory.py --model UNet --batch 4

Counted are the bytes of what a step keeps for its backward pass, weights left out and each tensor
once. Whole steps with and without checkpointing are timed in turns. In fp32 on the CPU.
"""

import statistics

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
import torch
from torch import Tensor

from support.system.processes import connected
from training.learner import Learner

MOST_BYTES, MOST_TIME = 0.35, 1.4


def saved_bytes(learner: Learner) -> int:
    """Bytes that the forward passes of a step keep for its backward pass."""
    weights = {p.untyped_storage().data_ptr() for p in learner.state.model.parameters()}
    sizes: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        terms = [learner.parallel_model(b) for b in drawn_batches(learner)]
    assert terms  # alive until here, so that no storage was counted in another's place
    return sum(sizes.values())


def main() -> None:
    parser = bench_parser(__doc__)
    arguments = parser.parse_args()
    with connected("cpu", timeout_minutes=10) as processes:
        learner = bench_learner(bench_config(arguments.model, arguments.batch), processes)
        network = learner.state.model.network

        def step(is_on: bool) -> None:
            network.activation_checkpointing = is_on
            learner.step(drawn_batches(learner))

        sizes = []
        for network.activation_checkpointing in (False, True):
            sizes.append(saved_bytes(learner))
        seconds = in_turns(
            {"plain": lambda: step(False), "on": lambda: step(True)}, arguments.tries
        )
    time = median_ratio(seconds["on"], seconds["plain"])
    print(f"{machine()}; {arguments.model}, batch {arguments.batch}")
    print(f"{'':<14} {'kept':>8} {'step':>9}")
    for name, size, row in zip(("plain", "checkpointing"), sizes, seconds.values(), strict=True):
        print(f"{name:<14} {size / 1e6:5.0f} MB {statistics.median(row):7.2f} s")
    verdict = "ok" if sizes[1] <= MOST_BYTES * sizes[0] and time <= MOST_TIME else "TOO MUCH"
    print(
        f"{'ratio':<14} {sizes[1] / sizes[0]:8.3f} {time:9.2f}  "
        f"(<= {MOST_BYTES}, <= {MOST_TIME}) {verdict}"
    )


if __name__ == "__main__":
    main()
