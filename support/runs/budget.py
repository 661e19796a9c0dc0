"""What a run takes, worked out before it starts: parameters, memory, disk."""

from torch import nn

from config import Config, due_steps
from support.data.batches import BatchPlan
from support.data.vae import PIXELS_PER_LATENT


def describe_model(config: Config, model: nn.Module) -> str:
    """The model's type and size in words."""
    count = sum(parameter.numel() for parameter in model.parameters())
    return f"{config.model_type}, {count:,} parameters"


def describe_needs(
    config: Config, model: nn.Module, plan: BatchPlan, data_channels: int
) -> list[str]:
    """Lines on the model, the batch, memory per process and disk for the whole run.

    The model may be on the meta device. Two moments are counted for the optimizer.
    """
    weights = sum(tensor.nbytes for tensor in model.state_dict().values())
    gradients = gradient_bytes(model)
    steps, every = config.total_steps, config.ckpt_saving_steps
    # Besides those that are due: the untrained model, and the last step where it is not due.
    saves = len(due_steps(steps, every)) + 1 + (not every or steps % every != 0)
    checkpoint = 2 * weights + 2 * gradients
    evals = len(due_steps(steps, config.eval_steps))
    eval_bytes = config.eval_num_samples * pixel_bytes(config, data_channels)
    return [
        f"model: {describe_model(config, model)}",
        f"batch: {plan}",
        f"memory: weights {size(weights)}, their average {size(weights)}, gradients "
        f"{size(gradients)}, optimizer state {size(2 * gradients)}, together "
        f"{size(state_bytes(model))}; activations come on top",
        f"disk: {saves} checkpoints of {size(checkpoint)}, {evals} evals of {size(eval_bytes)}, "
        f"together {size(saves * checkpoint + evals * eval_bytes)}",
    ]


def state_bytes(model: nn.Module) -> int:
    """Bytes of weights, their average, gradients and an optimizer's two moments."""
    weights = sum(tensor.nbytes for tensor in model.state_dict().values())
    return 2 * weights + 3 * gradient_bytes(model)


def gradient_bytes(model: nn.Module) -> int:
    """Bytes of the gradients of all that is trained."""
    return sum(p.nbytes for p in model.parameters() if p.requires_grad)


def pixel_bytes(config: Config, data_channels: int) -> int:
    """Bytes of one sampled image."""
    if config.is_latent:
        return 3 * (PIXELS_PER_LATENT * config.data_size) ** 2
    return data_channels * config.data_size**2


def size(num_bytes: float) -> str:
    """A number of bytes for people, in decimal units."""
    for unit in ("B", "kB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.4g} GB"
