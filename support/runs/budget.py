"""What a run needs, estimated before it starts: parameters, memory, disk."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from support.runs.results import ResultSchedule


def count_parameters(model: nn.Module) -> str:
    """The model's size in words."""
    count = sum(parameter.numel() for parameter in model.parameters())
    return f"{count:,} parameters"


def describe_memory(
    model: nn.Module, num_averages: int, microbatch: int, kept_bytes: float
) -> list[str]:
    """Lines on the memory of each process; autograd keeps `kept_bytes` of one microbatch.

    The model may be on the meta device. The optimizer is taken to keep two moments.
    """
    weights, gradients = weight_bytes(model), gradient_bytes(model)
    average = "its average" if num_averages == 1 else f"its {num_averages} averages"
    total = state_bytes(model, num_averages) + kept_bytes
    return [
        f"memory per process: about {size(total)}: model {size(weights)}, {average} "
        f"{size(num_averages * weights)}, gradients {size(gradients)}, optimizer "
        f"{size(2 * gradients)}, activations {size(kept_bytes)} ({microbatch:,} images)",
        f"host memory, first process: another {size(checkpoint_bytes(model, num_averages))} while "
        "a checkpoint is written",
    ]


def describe_disk(
    model: nn.Module, schedule: ResultSchedule, eval_bytes: int, averages: int, power_averages: int
) -> str:
    """A line on the disk space that the whole run fills; eval_bytes is the size of one eval."""
    written = {
        "checkpoints": (len(schedule.steps("ckpts")), checkpoint_bytes(model, averages)),
        "evals": (len(schedule.steps("evals")), eval_bytes),
    }
    if snapshots := len(schedule.steps("averages")):
        written["snapshots"] = (snapshots, power_averages * weight_bytes(model))
    listed = ", ".join(f"{n} {kind} of {size(each)}" for kind, (n, each) in written.items())
    return f"disk: {listed}, together {size(sum(n * each for n, each in written.values()))}"


def state_bytes(model: nn.Module, num_averages: int = 1) -> int:
    """Bytes of weights, their averages, gradients and an optimizer's two moments."""
    return (1 + num_averages) * weight_bytes(model) + 3 * gradient_bytes(model)


def checkpoint_bytes(model: nn.Module, num_averages: int = 1) -> int:
    """Bytes of a checkpoint: the state without the gradients."""
    return state_bytes(model, num_averages) - gradient_bytes(model)


def weight_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers."""
    return sum(tensor.nbytes for tensor in model.state_dict().values())


def gradient_bytes(model: nn.Module) -> int:
    """Bytes of the gradients of all trained parameters."""
    return sum(p.nbytes for p in model.parameters() if p.requires_grad)


def activation_bytes(loss_of: Callable[[], Tensor], weights: Iterable[nn.Parameter]) -> int:
    """Bytes that autograd keeps of a loss for its backward pass, without the weights.

    On fake tensors this counts without allocating anything.
    """
    of_weights = {weight.untyped_storage()._cdata for weight in weights}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in of_weights:
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss_of()
    return sum(storage.nbytes() for storage in kept.values())


def size(num_bytes: float) -> str:
    """A number of bytes for people, in decimal units."""
    for unit in ("B", "kB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.4g} GB"
