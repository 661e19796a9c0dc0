"""The interface of a network F: DiT and UNet implement it."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Self

from torch import nn

# B samples, C channels, H = W side


class NetworkRequest(NamedTuple):
    """Which network to build, for which data."""

    model_type: str
    data_size: int
    data_channels: int
    num_classes: int
    null_class: bool  # whether labels may be dropped
    dropout: float


class Backbone(nn.Module):
    """A network F(x, t, s): `network(x, t, gap, labels=.., augment_labels=.., dropout_seed=..)`.

    x is [B, C, H, W], t and gap = t - s are [B] in 0..1, and the output has the shape of x. The
    three conditions are passed only where they exist: labels [B] int64, augment_labels [B, 6], and
    dropout_seed, an integer scalar tensor on the CPU.

    A new backbone defines `forward` and `build`, overrides the attributes below where it differs,
    and gets an entry in `models.BACKBONES`.
    """

    # The pattern of its model_types and some examples, for error messages.
    written: str
    examples: Sequence[str]
    # Whether it takes labels.
    is_conditional: bool = True
    # The name of the parameter with a row for each class, if it has one.
    label_table: str = ""
    # The null label, which labels=None stands for; None without one.
    null_label: int | None = None
    # Whether dropout masks come from dropout_seed while training: equal seeds give equal masks and
    # touch no other random state. Without a seed masks come from the global generator.
    uses_dropout_seed: bool = False
    # Set from outside: recompute activations in the backward pass instead of storing them. This
    # must not change any gradient.
    activation_checkpointing: bool = False

    def parts_to_compile(self) -> Iterable[nn.Module]:
        """The parts to compile one by one: equal blocks share a graph."""
        return (self,)

    @classmethod
    def recognises(cls, model_type: str) -> bool:
        """Whether `model_type` names such a network; the default knows the examples alone."""
        return model_type in cls.examples

    @classmethod
    def misfit(cls, model_type: str, data_size: int) -> tuple[str, str] | None:
        """The key to change and the reason, if this network does not suit data of this size."""
        return None

    @classmethod
    def build(cls, request: NetworkRequest) -> Self:
        """Build the requested network; its model_type is recognised and fits the data."""
        raise NotImplementedError
