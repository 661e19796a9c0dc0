"""The memory that a computation needs, counted on fake tensors: nothing is allocated."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Holding(TorchDispatchMode):
    """Records the most bytes that the tensors made in its block take at the same time."""

    def __init__(self) -> None:
        super().__init__()
        self.most_bytes = 0
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        live = {key: held for key, held in self._live.items() if not held[0].expired()}
        for tensor in tree_leaves(result):
            # A view shares the storage of its base, which may be a weight.
            if isinstance(tensor, Tensor) and not operation.is_view:
                storage = tensor.untyped_storage()
                live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self._live = live
        self.most_bytes = max(self.most_bytes, sum(count for _, count in live.values()))
        return result


def most_bytes(work: Callable[[], object]) -> int:
    """The most bytes that the tensors made by `work` take at the same time.

    Tensors from outside, such as weights, do not count.
    """
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), Holding() as holding:
        work()
    return holding.most_bytes


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
