"""A network as a graph for onnxruntime (ONNX), which has to give what torch gives."""

import contextlib
import importlib.util
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from support.system.files import UserError, shorten

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
TOLERANCE = 1e-4
TRIED_BATCH_SIZES = (1, 3, 8)

Inputs = Mapping[str, Tensor]  # by name, [B, ...] each


def missing_packages() -> list[str]:
    """Which of the packages that graphs need are not installed."""
    return [name for name in PACKAGES if importlib.util.find_spec(name) is None]


@torch.no_grad()
def write_graph(
    path: Path, module: nn.Module, output: str, make_inputs: Callable[[int], Inputs]
) -> None:
    """Write `module`, called with inputs in their order, as a graph that takes any batch size.

    `make_inputs` makes B samples to try it with. The weights of a graph above 2 GB lie beside it,
    in a .data file. UserError where torch cannot export the module, or onnxruntime gives another
    output; then the file is not to be used.
    """
    inputs = make_inputs(2)
    batch = torch.export.Dim("batch", min=1)
    try:
        with _quiet():
            program = torch.onnx.export(
                module,
                tuple(inputs.values()),
                dynamo=True,
                input_names=list(inputs),
                output_names=[output],
                dynamic_shapes=tuple({0: batch} for _ in inputs),
            )
            assert program is not None
            program.save(path)
        differences = [_difference(path, module, make_inputs(n)) for n in TRIED_BATCH_SIZES]
    except OSError:
        raise
    except Exception as error:  # the exporter and onnxruntime raise many kinds
        raise UserError(
            f"{path.name}: cannot be made of this network ({shorten(error)})"
        ) from error
    if not max(differences) <= TOLERANCE:  # which not-a-number is not, either
        raise UserError(
            f"{path.name}: gives by onnxruntime other values than torch, by up to "
            f"{max(differences):.2g}; {TOLERANCE:g} would do"
        )


def _difference(path: Path, module: nn.Module, inputs: Inputs) -> float:
    """The largest difference between a graph's output and torch's."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {name: value.numpy() for name, value in inputs.items()})
    return (torch.from_numpy(found) - module(*inputs.values())).abs().max().item()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """A block in which the exporter's talk of its own work does not reach the user."""
    before = logging.root.manager.disable
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(None),
        contextlib.redirect_stderr(None),
    ):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)
