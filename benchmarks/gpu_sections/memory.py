"""Memory: of the training state, of a step's activations, and how many images a step can take."""

import functools
import itertools
from collections.abc import Callable, Iterator

from bench_memory import saved_bytes

# isort: split
import torch

from gpu_sections.bench import (
    LEAST_BATCH,
    Bench,
    Task,
    Value,
    free_memory,
    plural,
    training_step,
)
from support.system.hardware import is_out_of_memory
from training.learner import Learner

MOST_STEPS = 300
MOST_BATCH = 4096


def tasks(bench: Bench) -> list[Task]:
    """Each model, with and without activation checkpointing."""
    kinds = list(itertools.product(bench.batches, (False, True)))
    return [
        *(Task(named(*kind), functools.partial(memory_values, bench, *kind)) for kind in kinds),
        *(
            Task(named(*kind, "largest batch"), functools.partial(largest_batch, bench, *kind))
            for kind in kinds
        ),
    ]


def named(model_type: str, is_checkpointed: bool, what: str = "activations") -> str:
    """A row's name."""
    return f"{model_type} {what}" + (" checkpointed" if is_checkpointed else "")


def learner_of(bench: Bench, model_type: str, is_checkpointed: bool, batch: int) -> Learner:
    """A learner that keeps all activations, or each block's input alone."""
    option = f"activation_checkpointing={str(is_checkpointed).lower()}"
    return bench.learner(model_type, batch, option)


def memory_values(bench: Bench, model_type: str, is_checkpointed: bool) -> Iterator[Value]:
    """Bytes of the state, of activations by image, and what is held after many steps."""
    small, large = (LEAST_BATCH, 2 * LEAST_BATCH)
    learner = learner_of(bench, model_type, is_checkpointed, large)
    step = training_step(learner)
    step()
    if not is_checkpointed:
        yield Value(f"{model_type} state", state_bytes(learner), "bytes")
    if bench.device.type == "cuda":
        other = training_step(learner_of(bench, model_type, is_checkpointed, small))
        other()
        # The difference is of images alone: gradients are in both.
        an_image = (bytes_of(step) - bytes_of(other)) / (large - small)
        del other
        free_memory()
    else:
        an_image = saved_bytes(learner) / large
    yield Value(named(model_type, is_checkpointed), an_image, "bytes/image")
    done = 1
    for _ in bench.repeats(2 if bench.is_tiny else MOST_STEPS):
        step()
        done += 1
    after = f"after {plural(done, 'step')} of {large} images"
    for what, held in (
        ("allocated", torch.cuda.memory_allocated),
        ("reserved", torch.cuda.memory_reserved),
    ):
        yield bench.on_cuda(named(model_type, is_checkpointed, f"{what} {after}"), held, "bytes")


def state_bytes(learner: Learner) -> int:
    """Bytes of weights, their average, gradients and the optimizer's state, after a step."""
    state = learner.state
    moments = [value for values in state.optimizer.state.values() for value in values.values()]
    tensors = [
        *state.model.state_dict().values(),
        *state.ema_model.state_dict().values(),
        *(moment for moment in moments if isinstance(moment, torch.Tensor)),
    ]
    gradients = sum(p.nbytes for p in state.model.parameters() if p.requires_grad)
    return sum(tensor.nbytes for tensor in tensors) + gradients


def bytes_of(step: Callable[[], object]) -> int:
    """The most memory that a step takes on a GPU besides what is held anyway."""
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated() - held


def largest_batch(bench: Bench, model_type: str, is_checkpointed: bool) -> Iterator[Value]:
    """The largest batch that two steps fit with: a power of two, or half as much again."""
    bench.need_cuda()

    def fits(batch: int) -> bool:
        try:
            step = training_step(learner_of(bench, model_type, is_checkpointed, batch))
            step()
            step()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return False
        return True

    largest = 0
    for batch in itertools.takewhile(lambda batch: batch <= MOST_BATCH, doubling(LEAST_BATCH)):
        is_fitting = fits(batch)
        free_memory()
        if not is_fitting:
            break
        largest = batch
    if largest and fits(largest * 3 // 2):
        largest = largest * 3 // 2
    name = named(model_type, is_checkpointed, "largest batch")
    yield Value(name, largest, "images")


def doubling(first: int) -> Iterator[int]:
    """first, twice that, ..."""
    return (first << power for power in itertools.count())
