"""A network that is known exactly: it pins signs, the direction of time, losses and sampler."""

import torch
from torch import nn


class ExactNetwork(nn.Module):
    """F of the data set that is one image c, for Linear and Euler: (x - c) / t."""

    def __init__(self, c: torch.Tensor):
        super().__init__()
        self.c = c

    def forward(self, x, t, gap, labels=None):
        return (x - self.c) / t.view(-1, 1, 1, 1)
