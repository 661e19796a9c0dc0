"""The memory that a computation needs, counted on fake tensors: nothing is allocated."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn


def activation_bytes(loss_of: Callable[[], Tensor], weights: Iterable[nn.Parameter]) -> int:
    """Bytes that autograd keeps of a loss for its backward pass, without the weights."""
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
