"""A graph with its weights stored as fp16, in half the bytes. It still computes in fp32."""

from pathlib import Path

import numpy as np

from support.data.images import to_pixels

MIN_VALUES = 256  # smaller tensors stay fp32: they save nothing


def store_halves(path: Path) -> None:
    """Replace the graph's weights by fp16 ones, each followed by a cast to fp32."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    model = onnx.load(path)
    limits = np.finfo(np.float16)
    casts = []
    for weight in model.graph.initializer:
        if weight.data_type != TensorProto.FLOAT or np.prod(weight.dims) < MIN_VALUES:
            continue
        values = numpy_helper.to_array(weight).clip(limits.min, limits.max)
        name = f"{weight.name}.half"
        casts.append(helper.make_node("Cast", [name], [weight.name], to=TensorProto.FLOAT))
        weight.CopyFrom(numpy_helper.from_array(values.astype(np.float16), name))
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    del model.graph.value_info[:]  # the types of inner values, some of which changed
    onnx.save(model, path)


def compare(first: Path, second: Path, inputs: dict[str, np.ndarray]) -> np.ndarray:
    """The differences between two graphs' images for the same inputs, in steps of 1/255."""
    import onnxruntime

    pixels = []
    for path in (first, second):
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        pixels.append(to_pixels(session.run(None, inputs)[0]).astype(int))
    return np.abs(pixels[0] - pixels[1])
