"""A graph whose weights are stored in half the bytes, as fp16; it computes in fp32 as before."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from support.data.images import to_pixels

SMALLEST = 256  # values: what is smaller than this saves nothing


class Difference(NamedTuple):
    """Between two graphs' images, in steps of 1/255."""

    largest: int
    mean: float


def store_halves(path: Path) -> None:
    """Replace the graph's weights by fp16 ones, each behind a cast to fp32."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    model = onnx.load(path)
    weights = [
        one
        for one in model.graph.initializer
        if one.data_type == TensorProto.FLOAT and np.prod(one.dims) >= SMALLEST
    ]
    limits = np.finfo(np.float16)
    casts = []
    for weight in weights:
        values = numpy_helper.to_array(weight).clip(limits.min, limits.max)
        name = f"{weight.name}.half"
        casts.append(helper.make_node("Cast", [name], [weight.name], to=TensorProto.FLOAT))
        weight.CopyFrom(numpy_helper.from_array(values.astype(np.float16), name))
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    del model.graph.value_info[:]  # types of what is within, of which some have changed
    onnx.save(model, path)


def compare(first: Path, second: Path, inputs: dict[str, np.ndarray]) -> Difference:
    """How the images of two graphs of f(noise, t, s) differ, for the same inputs."""
    import onnxruntime

    pixels = []
    for path in (first, second):
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        pixels.append(to_pixels(session.run(None, inputs)[0]).astype(int))
    differences = np.abs(pixels[0] - pixels[1])
    return Difference(int(differences.max()), float(differences.mean()))
