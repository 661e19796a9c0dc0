"""The slot for backbones: what a network F has to be, and what DiT and UNet are."""

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

    x is [B, C, H, W], t and gap = t - s are [B] in 0..1, and the output is shaped like x. Of the
    three conditions it is given only those that there are: labels [B] int64, augment_labels
    [B, 6], and dropout_seed, a whole number as a scalar tensor on the CPU.

    A new one defines `forward` and `build`, says what is other than below, and stands in
    `models.BACKBONES`.
    """

    # How its model_types are written, for those who misspell one, and some or all of them.
    written: str
    examples: Sequence[str]
    # Whether it takes labels.
    is_conditional: bool = True
    # The name of the parameter that has a row for each class, where there is one.
    label_table: str = ""
    # The label of the null class, which labels=None stands for; None where there is none.
    null_label: int | None = None
    # Whether dropout takes its masks from dropout_seed while training: equal seeds, equal masks,
    # and no other random state is touched. Without a seed they come from the global generator.
    uses_dropout_seed: bool = False
    # Set from outside: compute activations again in the backward pass instead of keeping them. To
    # be obeyed where memory matters; it changes no gradient.
    activation_checkpointing: bool = False

    def parts_to_compile(self) -> Iterable[nn.Module]:
        """What is compiled one by one: blocks that are alike share a graph."""
        return (self,)

    @classmethod
    def recognises(cls, model_type: str) -> bool:
        """Whether `model_type` names such a network; where there are more names than examples."""
        return model_type in cls.examples

    @classmethod
    def misfit(cls, model_type: str, data_size: int) -> tuple[str, str] | None:
        """Why this network does not suit data of this side: the key to change, and the reason."""
        return None

    @classmethod
    def build(cls, request: NetworkRequest) -> Self:
        """The network that is asked for, whose model_type is one of its own and fits the data."""
        raise NotImplementedError
