"""Asking the network: which samples share a call, in which precision, with which dropout masks.

A loss asks the network more than once, and a step has more than one loss. Each loss is written as a
generator that yields the passes it needs next and is sent their outputs,

    (F_t,) = yield (Pass(x_t, t, s, labels),)

so that it reads from top to bottom, and `run_together` lets the passes of all losses share calls.
"""

import contextlib
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from backbone import Backbone
from support.system.hardware import (
    allow_tf32,
    obstacle_to_bf16,
    obstacle_to_compiling,
    time_convolutions,
)

# B samples of a pass, K of them wanted, C channels, H = W side

Result = TypeVar("Result")

GRAPHS_AT_MOST = 128  # of the compiler; a UNet has 14 kinds of blocks and up to 4 of passes


@dataclass(frozen=True)
class Pass:
    """One evaluation of the network, F(x, t, s), and how it may run."""

    x: Tensor  # [B, C, H, W]
    t: Tensor  # [B]
    s: Tensor  # [B]
    labels: Tensor | None = None  # [B] int64; None: the null class for all
    augment_labels: Tensor | None = None  # [B, 6]
    dropout_seed: int | None = None
    wanted: Tensor | None = None  # [K] places of the samples whose output is needed; None: all
    needs_gradient: bool = True
    may_be_coarse: bool = False  # whether a lower precision will do


PER_SAMPLE = ("x", "t", "s", "labels", "augment_labels")  # what a pass has of each sample

Passes = Generator[tuple[Pass, ...], list[Tensor], Result]  # what a loss is


@dataclass(frozen=True)
class Execution:
    """How passes run: their cost and their rounding depend on it, and nothing else."""

    # Of passes that may be coarse; None: these too keep the precision of the weights.
    coarse_dtype: torch.dtype | None = None
    # Compute all samples of a pass, also those that are not wanted, so that shapes never change.
    fixed_shapes: bool = False


def run_together(network: nn.Module, execution: Execution, *losses: Passes[Result]) -> list[Result]:
    """The results of all losses. What they ask for at the same time shares calls where it can."""
    results: dict[int, Result] = {}
    answers: dict[int, list[Tensor] | None] = dict.fromkeys(range(len(losses)))
    while answers:
        asked = {}
        for index, answer in answers.items():
            try:
                # The first send, of None, starts the loss.
                asked[index] = losses[index].send(answer)  # type: ignore[arg-type]
            except StopIteration as end:
                results[index] = end.value
        outputs = iter(run_passes(network, execution, [p for ps in asked.values() for p in ps]))
        answers = {index: [next(outputs) for _ in passes] for index, passes in asked.items()}
    return [results[index] for index in range(len(losses))]


def run_passes(network: nn.Module, execution: Execution, passes: Sequence[Pass]) -> list[Tensor]:
    """The output of each pass, [K, C, H, W], in as few calls of the network as they allow."""
    passes = [_chosen(one, execution) for one in passes]
    outputs = [one.x[:0] for one in passes]  # what stays for a pass without samples
    alike: dict[tuple, list[int]] = {}
    for index, one in enumerate(passes):
        if len(one.x) > 0:
            alike.setdefault(_way_of_running(one, network, execution), []).append(index)
    for indices in alike.values():
        joined = _join([passes[index] for index in indices])
        sizes = [len(passes[index].x) for index in indices]
        parts = _call(joined, network, execution).split(sizes)
        for index, output in zip(indices, parts, strict=True):
            wanted = passes[index].wanted
            outputs[index] = output if wanted is None else output[wanted]
    return outputs


def _chosen(one: Pass, execution: Execution) -> Pass:
    """The pass with the wanted samples alone, unless shapes are to stay fixed."""
    wanted = one.wanted
    if wanted is None or execution.fixed_shapes:
        return one
    chosen: dict[str, Any] = {
        name: values[wanted] for name in PER_SAMPLE if (values := getattr(one, name)) is not None
    }
    return replace(one, **chosen, wanted=None)


def _way_of_running(one: Pass, network: nn.Module, execution: Execution) -> tuple:
    """What passes must have in common to share a call."""
    seed = one.dropout_seed if _uses_seeds(network) else None
    conditions = (one.labels is None, one.augment_labels is None)
    return seed, _is_coarse(one, execution), conditions, one.needs_gradient


def _join(passes: Sequence[Pass]) -> Pass:
    """The samples of all in one pass; all have the same conditions, or none has."""
    first = passes[0]
    if len(passes) == 1:
        return first
    joined: dict[str, Any] = {
        name: torch.cat([getattr(one, name) for one in passes])
        for name in PER_SAMPLE
        if getattr(first, name) is not None
    }
    return replace(first, **joined)


def _call(one: Pass, network: nn.Module, execution: Execution) -> Tensor:
    """F(x, t, s) of all samples of a pass, with the conditions that it has."""
    for times in (one.t, one.s):
        check_times(times, one.x)
    has_seed = one.dropout_seed is not None and _uses_seeds(network)
    conditions = {
        "labels": one.labels,
        "augment_labels": one.augment_labels,
        "dropout_seed": torch.tensor(one.dropout_seed) if has_seed else None,
    }
    given = {name: value for name, value in conditions.items() if value is not None}
    with contextlib.ExitStack() as contexts:
        if not one.needs_gradient:
            contexts.enter_context(torch.no_grad())
        if _is_coarse(one, execution):
            contexts.enter_context(torch.autocast(one.x.device.type, execution.coarse_dtype))
        output = network(one.x, one.t, one.t - one.s, **given)
        return output.to(one.x.dtype)


def check_times(times: Tensor, x: Tensor) -> None:
    """ValueError unless `times` are [B], one for each sample of x [B, C, H, W]."""
    if times.shape != x.shape[:1]:
        raise ValueError(f"times must be [{len(x)}], one per sample, not {list(times.shape)}")


def _uses_seeds(network: nn.Module) -> bool:
    """Whether the network drops out now, by a seed that it is given."""
    return network.training and getattr(network, "uses_dropout_seed", False)


def _is_coarse(one: Pass, execution: Execution) -> bool:
    return one.may_be_coarse and execution.coarse_dtype is not None


def set_options(
    network: nn.Module,
    device: torch.device,
    precision: str,
    compile: bool,
    activation_checkpointing: bool,
) -> tuple[Execution, list[str]]:
    """Prepare a network for its passes; gives how they run, and a line where the device cannot."""
    notes = []
    allow_tf32(device, precision != "fp32")
    coarse_dtype = None
    if precision == "bf16":
        if obstacle := obstacle_to_bf16(device):
            notes.append(f"precision: goes on without bf16 ({obstacle})")
        else:
            coarse_dtype = torch.bfloat16
    if compile and (obstacle := obstacle_to_compiling(device)):
        notes.append(f"compile: goes on without ({obstacle})")
        compile = False
    if isinstance(network, Backbone):
        network.activation_checkpointing = activation_checkpointing
        if not network.is_conditional:
            # No labels, no guidance, whose samples are now more, now fewer.
            time_convolutions(device)
        if compile:
            _compile_parts(network)
    return Execution(coarse_dtype, fixed_shapes=compile), notes


def _compile_parts(network: Backbone) -> None:
    """Compile a network part by part, in place: the names in files stay what they are.

    Parts that are alike share a graph for each kind of pass, so that there is less to compile than
    in the whole network, and between the parts gradients are exchanged as they come.
    """
    # A graph for each kind of part and of pass, known beforehand, is no sign of changing shapes.
    torch._dynamo.config.recompile_limit = GRAPHS_AT_MOST
    # Would cut each part's graph where DistributedDataParallel cuts the gradients.
    torch._dynamo.config.optimize_ddp = False
    for part in network.parts_to_compile():
        part.compile(dynamic=False)
