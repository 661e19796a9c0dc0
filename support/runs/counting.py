"""What a computation takes, counted on tensors without contents: arithmetic, kernels, memory."""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
# Attention as it runs on the CPU is that of GPUs under another name.
FORMULAS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    aten._scaled_dot_product_flash_attention_for_cpu: (
        flop_registry[aten._scaled_dot_product_flash_attention]
    ),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        flop_registry[aten._scaled_dot_product_flash_attention_backward]
    ),
}


class Counting(TorchDispatchMode):
    """A block whose operations are counted."""

    def __init__(self) -> None:
        super().__init__()
        self.flops: Counter[torch.dtype] = Counter()  # of products and convolutions, by their input
        self.kernels = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        # What asks for a tensor's device is no work for one.
        self.kernels += not operation.is_view and operation.namespace != "prim"
        if formula := FORMULAS.get(operation._overloadpacket):
            dtype = next(arg.dtype for arg in args if isinstance(arg, Tensor))
            self.flops[dtype] += formula(*args, **(kwargs or {}), out_val=result)
        return result


class Holding(TorchDispatchMode):
    """A block of which it is known how many bytes its tensors took at most, at the same time."""

    def __init__(self) -> None:
        super().__init__()
        self.most_bytes = 0
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        live = {key: held for key, held in self._live.items() if not held[0].expired()}
        for tensor in tree_leaves(result):
            # A view has the storage of what it is of, perhaps of a weight.
            if isinstance(tensor, Tensor) and not operation.is_view:
                storage = tensor.untyped_storage()
                live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self._live = live
        self.most_bytes = max(self.most_bytes, sum(count for _, count in live.values()))
        return result


def most_bytes(work: Callable[[], object]) -> int:
    """The most bytes that the tensors made by `work` take at the same time; none is filled."""
    # What is given from outside, such as weights, counts nothing.
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), Holding() as holding:
        work()
    return holding.most_bytes


@dataclass(frozen=True)
class Counts:
    """What a loss and its backward pass take."""

    forward_flops: Counter[torch.dtype]
    backward_flops: Counter[torch.dtype]
    kernels: int
    kept_bytes: int  # what the forward pass keeps for the backward pass, weights left out


def count(loss_of: Callable[[], Tensor], weights: Iterable[nn.Parameter]) -> Counts:
    """The counts of a loss of these weights."""
    of_weights = {weight.untyped_storage()._cdata for weight in weights}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in of_weights:
            kept[storage._cdata] = storage
        return tensor

    with Counting() as forward, torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept):
        loss = loss_of()
    kept_bytes = sum(storage.nbytes() for storage in kept.values())
    with Counting() as backward:
        loss.backward()
    kernels = forward.kernels + backward.kernels
    return Counts(forward.flops, backward.flops, kernels, kept_bytes)
