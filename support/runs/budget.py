"""What a run takes, worked out before it starts: parameters, memory, disk."""

from torch import nn

from support.data.batches import BatchPlan
from support.runs.results import ResultSchedule


def count_parameters(model: nn.Module) -> str:
    """The model's size in words."""
    count = sum(parameter.numel() for parameter in model.parameters())
    return f"{count:,} parameters"


def describe_needs(
    model: nn.Module,
    plan: BatchPlan,
    schedule: ResultSchedule,
    eval_bytes: int,
    num_averages: int = 1,
    snapshot_averages: int = 0,
) -> list[str]:
    """Lines on the batch, memory per process and disk for the whole run; eval_bytes are of one.

    The model may be on the meta device. Two moments are counted for the optimizer.
    """
    weights, gradients = weight_bytes(model), gradient_bytes(model)
    average = "their average" if num_averages == 1 else f"their {num_averages} averages"
    kept = {
        "checkpoints": (len(schedule.steps("ckpts")), checkpoint_bytes(model, num_averages)),
        "evals": (len(schedule.steps("evals")), eval_bytes),
    }
    if snapshots := len(schedule.steps("averages")):
        kept["snapshots"] = (snapshots, snapshot_averages * weights)
    return [
        f"batch: {plan}",
        f"memory: weights {size(weights)}, {average} {size(num_averages * weights)}, gradients "
        f"{size(gradients)}, optimizer state {size(2 * gradients)}, together "
        f"{size(state_bytes(model, num_averages))}; activations come on top",
        f"disk: {', '.join(f'{n} {kind} of {size(each)}' for kind, (n, each) in kept.items())}, "
        f"together {size(sum(n * each for n, each in kept.values()))}",
    ]


def state_bytes(model: nn.Module, num_averages: int = 1) -> int:
    """Bytes of weights, their averages, gradients and an optimizer's two moments."""
    return (1 + num_averages) * weight_bytes(model) + 3 * gradient_bytes(model)


def checkpoint_bytes(model: nn.Module, num_averages: int = 1) -> int:
    """Bytes of a checkpoint: all of these but the gradients."""
    return state_bytes(model, num_averages) - gradient_bytes(model)


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all that the model is."""
    return sum(tensor.nbytes for tensor in model.state_dict().values())


def gradient_bytes(model: nn.Module) -> int:
    """Bytes of the gradients of all that is trained."""
    return sum(p.nbytes for p in model.parameters() if p.requires_grad)


def size(num_bytes: float) -> str:
    """A number of bytes for people, in decimal units."""
    for unit in ("B", "kB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.4g} GB"
