"""Diagnosis of a non-finite step: when it happens, and in a replay afterwards.

A step is a function of the weights and of its draws, which follow from the seed and the step. So it
can be computed again, to look at every sample's error and every block's norms.
"""

import contextlib
import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from config import Config, config_from_dict
from models import Batch
from support.data.batches import BatchPlan
from support.runs.checkpoint import check_weights
from support.runs.guard import NonFiniteStep
from support.system.files import UserError, atomic_write, shorten
from training.draws import draw_batch
from training.identity import refuse_another_experiment
from training.run import Run


def explain(run: Run, error: NonFiniteStep) -> UserError:
    """The error with its diagnosis; saves the step's batch and weights for a replay.

    All processes must call this. If the diagnosis fails, the message adds why.
    """
    try:
        return UserError(f"{error}; {'; '.join(find_out(run, error))}")
    except (UserError, RuntimeError) as failure:  # a full disk, too little memory
        return UserError(f"{error}; the diagnosis failed ({shorten(failure)})")


def find_out(run: Run, error: NonFiniteStep) -> list[str]:
    """The diagnosis: broken samples, the largest gradient, the norms before, how to replay."""
    record = run.results.folder / f"broken_step_{error.step}.json"
    learner, indices = run.learner, run.order.global_batch(error.step - 1).tolist()
    broken = broken_samples(run, error.step, indices)
    learner.accumulate_gradients(microbatches(run, error.step, indices))
    gradients = {name: p.grad for name, p in learner.state.model.named_parameters()}
    found = in_words(broken) or ["every sample's error is finite"]
    found.append(f"largest gradient: {largest(gradients)}")
    if norms := learner.guard.last_norms():
        found.append(f"gradient norms before: {', '.join(f'{norm:.3g}' for norm in norms)}")
    if run.processes.is_main:
        save(run, record, error.step, indices, broken)
    return [*found, f"to look closer, add --replay {record} to the command"]


def in_words(broken: Mapping[str, list[float]]) -> list[str]:
    """A line for each loss with broken samples."""
    return [
        f"{len(times)} samples of the {name} loss broke, "
        f"t from {min(times):.3f} to {max(times):.3f}"
        for name, times in broken.items()
    ]


def largest(gradients: Mapping[str, Tensor | None]) -> str:
    """The name of the parameter with the largest gradient; a non-finite one counts as largest."""
    norms = {name: float(g.norm()) for name, g in gradients.items() if g is not None}
    return max(norms, key=lambda name: norms[name] if norms[name] == norms[name] else float("inf"))


# The step, computed again


def microbatches(run: Run, step: int, indices: list[int]) -> Iterator[Batch]:
    """This process's microbatches of the step, with the draws they had."""
    plan, device = run.learner.plan, run.processes.device
    for microbatch in plan.microbatches_of(run.processes.rank):
        raw = run.data[[indices[place] for place in plan.samples(microbatch)]]
        yield draw_batch(run.config, plan, run.data, raw, step - 1, microbatch, device)


@torch.no_grad()
def broken_samples(run: Run, step: int, indices: list[int]) -> dict[str, list[float]]:
    """The times t of the samples with a non-finite error, in any process, by loss."""
    model = run.learner.state.model
    mine: dict[str, list[float]] = {}
    for batch in microbatches(run, step, indices):
        V = batch.flow_matching_rows
        times = {"velocity": batch.t[:V], "consistency": batch.t[V:]}
        errors = model.squared_errors(batch) if model.error_names else {}
        for name in errors.keys() & times.keys():
            broken = times[name][~errors[name].isfinite()].tolist()
            mine[name] = mine.get(name, []) + broken
    shares = run.processes.gather(mine)
    found = {name: [t for s in shares for t in s.get(name, [])] for name in model.error_names}
    return {name: times for name, times in found.items() if times}


# For a replay


def save(
    run: Run, path: Path, step: int, indices: list[int], broken: Mapping[str, list[float]]
) -> None:
    """Save the step's batch and the weights it was computed with."""
    weights = path.with_suffix(".pt")
    with atomic_write(weights) as file:
        torch.save(run.learner.state.model.state_dict(), file)
    record = {
        "step": step,
        "indices": indices,
        "weights": weights.name,
        "broken": broken,
        "parts": run.learner.plan.record(),
        "config": run.config.to_dict(),
    }
    with atomic_write(path) as file:
        file.write(json.dumps(record, indent=1).encode() + b"\n")


def replay(run: Run, path: Path) -> None:
    """Compute a broken step again, in one process, and print the norms of every block."""
    record = read(path)
    refuse_another_experiment(record.config, run.config, [], str(path))
    step, indices, plan = record.step, record.indices, record.plan
    model = run.learner.state.model
    if run.processes.world_size > 1 or max(indices) >= len(run.data):
        raise UserError(f"--replay {path}: needs one process, and the data of that run")
    # Each microbatch has its own draws, so keep their number, even if there were several processes.
    run.learner.plan = dataclasses.replace(
        plan, world_size=1, accumulation_steps=plan.num_microbatches
    )
    check_weights(model, record.weights, str(path))
    model.load_state_dict(record.weights)
    for line in in_words(broken_samples(run, step, indices)):
        print(line)
    blocks = dict(blocks_of(model.network))
    with watching(model.network, blocks) as outputs:
        metrics = run.learner.accumulate_gradients(microbatches(run, step, indices))
    print(f"step {step}: " + ", ".join(f"{n} {float(value):.4g}" for n, value in metrics.items()))
    print(f"{'norms of':<28}{'weights':>12}{'outputs':>12}{'gradients':>12}")
    for name, block in blocks.items():
        weights = nn.utils.get_total_norm(block.parameters())
        gradients = nn.utils.get_total_norm(
            [p.grad for p in block.parameters() if p.grad is not None]
        )
        norms = (float(weights), outputs[name], float(gradients))
        print(f"{name:<28}" + "".join(f"{norm:>12.4g}" for norm in norms))


class BrokenStep(NamedTuple):
    """A saved step: what a replay needs."""

    step: int
    indices: list[int]
    plan: BatchPlan
    config: Config
    weights: dict[str, Tensor]


def read(path: Path) -> BrokenStep:
    """Read a saved step; UserError if the file is no such record or its weights are damaged."""
    found = str(path)
    try:
        record = json.loads(path.read_bytes())
        weights = path.parent / record["weights"]
        found = f"{path}, {weights.name}"
        return BrokenStep(
            int(record["step"]),
            list(map(int, record["indices"])),
            BatchPlan.from_record(record["parts"]),
            config_from_dict(record["config"], str(path)),
            torch.load(weights, weights_only=True, map_location="cpu"),
        )
    except UserError:
        raise
    except Exception as error:  # torch raises many kinds for damaged files
        raise UserError(
            f"--replay {found}: not the record of a broken step ({shorten(error)})"
        ) from error


def blocks_of(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The network's blocks that have parameters, by name; each entry of a list of blocks."""
    for name, module in network.named_children():
        if isinstance(module, nn.ModuleList | nn.ModuleDict):
            for place, block in module.named_children():
                yield f"{name}.{place}", block
        elif [*module.parameters()]:
            yield name, module


@contextlib.contextmanager
def watching(network: nn.Module, blocks: Mapping[str, nn.Module]) -> Iterator[dict[str, float]]:
    """Record the norm of each block's output while the context lasts.

    The norms are of the first call with a non-finite one, because later calls inherit it, and
    otherwise of the last call.
    """
    norms: dict[str, float] = {}

    def begin(module: nn.Module, inputs: object) -> None:
        if all(map(math.isfinite, norms.values())):
            norms.clear()

    def note(module: nn.Module, inputs: object, output: Tensor) -> None:
        norms.setdefault(names[module], float(output.detach().float().norm()))

    names = {block: name for name, block in blocks.items()}
    handles = [network.register_forward_pre_hook(begin)]
    handles += [block.register_forward_hook(note) for block in names]
    try:
        yield norms
    finally:
        for handle in handles:
            handle.remove()
