"""Export of a network as an ONNX graph, checked against torch."""

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
    """The packages that graphs need and that are not installed."""
    return [name for name in PACKAGES if importlib.util.find_spec(name) is None]


@torch.no_grad()
def write_graph(
    path: Path, module: nn.Module, output: str, make_inputs: Callable[[int], Inputs]
) -> None:
    """Write `module`, called with its inputs in order, as a graph for any batch size.

    `make_inputs(B)` makes inputs to check it with. Weights above 2 GB go to a .data file beside the
    graph. UserError where torch cannot export the module, or onnxruntime computes something else;
    then do not use the file.
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
            f"{path.name}: torch cannot export this network ({shorten(error)})"
        ) from error
    if not max(differences) <= TOLERANCE:  # true for NaN, too
        raise UserError(
            f"{path.name}: onnxruntime and torch differ by up to {max(differences):.2g}, more than "
            f"{TOLERANCE:g}"
        )


def _difference(path: Path, module: nn.Module, inputs: Inputs) -> float:
    """The largest difference between a graph's output and torch's."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {name: value.numpy() for name, value in inputs.items()})
    return (torch.from_numpy(found) - module(*inputs.values())).abs().max().item()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """A block that hides the exporter's messages about its own work."""
    with (
        warnings.catch_warnings(action="ignore"),
        contextlib.redirect_stdout(None),
        contextlib.redirect_stderr(None),
    ):
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)
