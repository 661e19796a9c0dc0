"""The slot for backbones: what a network F has to be, and what DiT and UNet are."""

from collections.abc import Sequence
from typing import Self

from torch import nn

# B samples, C channels, H = W side


class Backbone(nn.Module):
    """A network F(x, t, s): `network(x, t, gap, labels=.., augment_labels=.., dropout_seed=..)`.

    x is [B, C, H, W], t and gap = t - s are [B] in 0..1, and the output is shaped like x. Of the
    three conditions it is given only those that there are: labels [B] int64, augment_labels
    [B, 6], and dropout_seed, a whole number as a scalar tensor on the CPU.

    A new one defines `forward` and the three class methods, says what is other than below, and
    stands in `models.BACKBONES`.
    """

    # How its model_types are written, and some of them, for those who misspell one.
    written: str
    examples: Sequence[str] = ()
    # Whether it takes labels.
    is_conditional: bool = True
    # The label of the null class, which labels=None stands for; None where there is none.
    null_label: int | None = None
    # Whether dropout takes its masks from dropout_seed while training: equal seeds, equal masks,
    # and no other random state is touched. Without a seed they come from the global generator.
    uses_dropout_seed: bool = False
    # Set from outside: compute activations again in the backward pass instead of keeping them. To
    # be obeyed where memory matters; it changes no gradient.
    activation_checkpointing: bool = False

    @classmethod
    def recognises(cls, model_type: str) -> bool:
        """Whether `model_type` names such a network."""
        raise NotImplementedError

    @classmethod
    def misfit(cls, model_type: str, data_size: int) -> tuple[str, str] | None:
        """Why this network does not suit data of this side: the key to change, and the reason."""
        return None

    @classmethod
    def build(
        cls,
        model_type: str,
        data_size: int,
        data_channels: int,
        num_classes: int,
        null_class: bool,
        dropout: float,
    ) -> Self:
        """The network that `model_type` names, for data [data_channels, data_size, data_size].

        null_class: whether labels may be dropped. ValueError where the data do not fit.
        """
        raise NotImplementedError
