"""Preparing a network for a device: precision, compiling, activation checkpointing."""

import torch
from torch import nn

from backbone import Backbone
from models import Execution
from support.system.hardware import (
    allow_tf32,
    obstacle_to_bf16,
    obstacle_to_compiling,
    time_convolutions,
)

MAX_GRAPHS = 128  # of the compiler; a UNet has 14 kinds of blocks and up to 4 kinds of calls


def set_options(
    network: nn.Module,
    device: torch.device,
    precision: str,
    compile: bool,
    activation_checkpointing: bool,
) -> tuple[Execution, list[str]]:
    """How the network runs from now on, and a note for each option that the device cannot take."""
    notes = []
    allow_tf32(device, precision != "fp32")
    autocast_dtype = None
    if precision == "bf16":
        if obstacle := obstacle_to_bf16(device):
            notes.append(f"precision: continues without bf16 ({obstacle})")
        else:
            autocast_dtype = torch.bfloat16
    if compile and (obstacle := obstacle_to_compiling(device)):
        notes.append(f"compile: continues without ({obstacle})")
        compile = False
    if isinstance(network, Backbone):
        network.activation_checkpointing = activation_checkpointing
        if not network.is_conditional:
            # Without guidance every call has the same shape, and timing convolutions pays.
            time_convolutions(device)
        if compile:
            _compile_parts(network)
    return Execution(autocast_dtype, fixed_shapes=compile), notes


def _compile_parts(network: Backbone) -> None:
    """Compile a network part by part, in place, so that parameter names stay the same.

    Equal parts share one graph for each kind of call. That leaves less to compile than the whole
    network, and gradients are exchanged between the parts as they come.
    """
    # A graph for each kind of part and call is expected, and no sign of changing shapes.
    torch._dynamo.config.recompile_limit = MAX_GRAPHS
    # Would split each part's graph where DistributedDataParallel splits the gradients.
    torch._dynamo.config.optimize_ddp = False
    for part in network.parts_to_compile():
        part.compile(dynamic=False)
