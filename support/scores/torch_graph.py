"""Run a frozen TensorFlow graph with torch: each operation by a function in a table.

Layouts are TensorFlow's, [N, H, W, C] for images and [H, W, in, out] for filters. In memory such
images are what torch calls channels_last, so that the views of them that torch's convolutions take
cost no copy.
"""

import graphlib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from support.scores.graph_def import GraphDef, Node, constant

Operation = Callable[..., Tensor]  # (node, *inputs)
OPERATIONS: dict[str, Operation] = {}


def operation(*names: str) -> Callable[[Operation], Operation]:
    """Enter a function in the table, under TensorFlow's names of the operation."""

    def enter(function: Operation) -> Operation:
        OPERATIONS.update(dict.fromkeys(names, function))
        return function

    return enter


class TorchGraph:
    """A graph's path from its tensor `image` to the tensors `outputs`.

    What does not depend on the image is computed once, here. Raises ValueError, naming the node,
    for what cannot be run.
    """

    name, version = "torch", str(torch.__version__)

    def __init__(
        self, graph: GraphDef, image: str, outputs: Sequence[str], device: str | None = None
    ):
        self._device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._nodes, self._image, self._outputs = graph.nodes, image, outputs
        self._constants: dict[str, Tensor] = {}
        self._steps: dict[str, Node] = {}  # by name of the result, in order
        same: dict[str, str] = {}  # a node that passes on its source -> that source
        order = self._in_order(outputs, given=image)
        for node in (self._nodes[name] for name in order if name != image):
            sources = tuple(same.get(source, source) for source in _sources(node))
            if all(source in self._constants for source in sources):
                self._constants[node.name] = self._compute(node, self._constants)
            elif OPERATIONS.get(node.op) is _identity and node.name not in outputs:
                same[node.name] = sources[0]
            else:
                self._steps[node.name] = replace(node, inputs=sources)
        self._fold_into_convolutions()
        # Results are freed once nobody needs them: for 64 images, one takes up to 180 MB.
        last_user = {source: node.name for node in self._steps.values() for source in node.inputs}
        self._spent: dict[str, list[str]] = {name: [] for name in self._steps}
        for source, user in last_user.items():
            if source in self._steps and source not in outputs:
                self._spent[user].append(source)

    @property
    def device(self) -> str:
        """The device that runs the graph, in words."""
        if self._device.type == "cuda":
            return torch.cuda.get_device_name(self._device)
        return f"CPU ({torch.get_num_threads()} threads)"

    @torch.inference_mode()
    def run(self, images: np.ndarray) -> list[np.ndarray]:
        """The outputs for `images`, which are the float32 value of the tensor `image`."""
        values = self._constants | {self._image: torch.from_numpy(images).to(self._device)}
        with torch.backends.cudnn.flags(allow_tf32=False):  # TF32 changes a feature's third digit
            for name, node in self._steps.items():
                values[name] = self._compute(node, values)
                for spent in self._spent[name]:
                    del values[spent]
        return [values[name].cpu().numpy() for name in self._outputs]

    def constant(self, name: str) -> np.ndarray:
        """The value of a node that depends on constants alone."""
        values: dict[str, Tensor] = {}
        for each in self._in_order([name]):
            values[each] = self._compute(self._nodes[each], values)
        return values[name].cpu().numpy()

    def _in_order(self, outputs: Iterable[str], given: str | None = None) -> list[str]:
        """All nodes that `outputs` depend on, each after its own sources; `given` needs none."""
        found: dict[str, list[str]] = {}
        waiting = list(outputs)
        while waiting:
            name = waiting.pop()
            if name in found:
                continue
            if name not in self._nodes:
                raise ValueError(f"node {name} is missing")
            found[name] = [] if name == given else _sources(self._nodes[name])
            waiting += found[name]
        try:
            return list(graphlib.TopologicalSorter(found).static_order())
        except graphlib.CycleError as error:
            raise ValueError(f"node {error.args[1][0]} depends on itself") from None

    def _compute(self, node: Node, values: Mapping[str, Tensor]) -> Tensor:
        where = f"operation {node.op} ({node.name})"
        if node.op not in OPERATIONS:
            raise ValueError(f"{where} is not supported by the torch backend")
        try:
            result = OPERATIONS[node.op](node, *(values[name] for name in _sources(node)))
            return result.to(self._device)  # a constant is made in host memory
        except (RuntimeError, TypeError, ValueError, KeyError, IndexError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise ValueError(f"{where}: {error}") from error

    def _fold_into_convolutions(self) -> None:
        """Let convolutions do the batch normalisation and the ReLU after them, in fewer passes."""
        uses = Counter(source for node in self._steps.values() for source in node.inputs)
        for name, node in list(self._steps.items()):
            source, *parameters = node.inputs
            conv = self._steps.get(source)
            if not conv or conv.op != "Conv2D" or uses[source] > 1 or source in self._outputs:
                continue
            image, filters, *offset = conv.inputs
            if node.op == "Relu":
                folded = replace(conv, name=name, attributes={**conv.attributes, "relu": True})
            elif node.op in BATCH_NORMS and not offset and "relu" not in conv.attributes:
                if not self._constants.keys() >= {filters, *parameters}:
                    continue
                values = (self._constants[key] for key in parameters)
                scale, shift = BATCH_NORMS[node.op](node, *values)
                inputs = (image, f"{name} filters", f"{name} offset")
                self._constants[inputs[1]] = self._constants[filters] * scale
                self._constants[inputs[2]] = shift
                folded = replace(conv, name=name, inputs=inputs)
            else:
                continue
            del self._steps[source]
            self._steps[name] = folded


def _sources(node: Node) -> list[str]:
    """The names of the nodes whose values `node` takes."""
    names = [name for name in node.inputs if not name.startswith("^")]
    for name in names:
        if ":" in name and not name.endswith(":0"):
            raise ValueError(f"operation {node.op} ({node.name}): takes {name}, a second result")
    return [name.removesuffix(":0") for name in names]


# The operations. B images, H height, W width, C channels; `x` is the node's first input.


@operation("Const")
def _constant(node: Node) -> Tensor:
    value = torch.tensor(constant(node))
    if value.ndim == 4:  # so that torch's convolutions need no copy of filters either
        value = value.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0)
    return value


@operation("Identity", "CheckNumerics", "StopGradient")
def _identity(node: Node, x: Tensor) -> Tensor:
    return x


@operation("Add", "AddV2", "BiasAdd")
def _add(node: Node, x: Tensor, y: Tensor) -> Tensor:
    return x + y


@operation("Sub")
def _subtract(node: Node, x: Tensor, y: Tensor) -> Tensor:
    return x - y


@operation("Mul")
def _multiply(node: Node, x: Tensor, y: Tensor) -> Tensor:
    return x * y


@operation("RealDiv")
def _divide(node: Node, x: Tensor, y: Tensor) -> Tensor:
    return x / y


@operation("Relu")
def _relu(node: Node, x: Tensor) -> Tensor:
    return x.relu()


@operation("Softmax")
def _softmax(node: Node, x: Tensor) -> Tensor:
    return x.softmax(-1)


@operation("MatMul")
def _matmul(node: Node, a: Tensor, b: Tensor) -> Tensor:
    a = a.T if node.attributes.get("transpose_a") else a
    return a @ (b.T if node.attributes.get("transpose_b") else b)


@operation("Reshape")
def _reshape(node: Node, x: Tensor, shape: Tensor) -> Tensor:
    return x.reshape(shape.tolist())


@operation("ExpandDims")
def _expand_dims(node: Node, x: Tensor, axis: Tensor) -> Tensor:
    return x.unsqueeze(int(axis))


@operation("Squeeze")
def _squeeze(node: Node, x: Tensor) -> Tensor:
    axes = node.attributes.get("squeeze_dims")
    return x.squeeze(tuple(axes)) if axes else x.squeeze()


@operation("Mean")
def _mean(node: Node, x: Tensor, axes: Tensor) -> Tensor:
    return x.mean(axes.flatten().tolist(), keepdim=bool(node.attributes.get("keep_dims")))


@operation("Concat")
def _concat(node: Node, axis: Tensor, *parts: Tensor) -> Tensor:
    return torch.cat(parts, int(axis))


@operation("ConcatV2")
def _concat_v2(node: Node, *parts_and_axis: Tensor) -> Tensor:
    *parts, axis = parts_and_axis
    return torch.cat(parts, int(axis))


def _scale_and_offset(
    node: Node, mean: Tensor, variance: Tensor, beta: Tensor, gamma: Tensor
) -> tuple[Tensor, Tensor]:
    scale = (variance + node.attributes["variance_epsilon"]).rsqrt()
    if node.attributes["scale_after_normalization"]:
        scale = scale * gamma
    return scale, beta - mean * scale


def _fused_scale_and_offset(
    node: Node, gamma: Tensor, beta: Tensor, mean: Tensor, variance: Tensor
) -> tuple[Tensor, Tensor]:
    if node.attributes.get("is_training", True):
        raise ValueError("the graph is one for training")
    scale = (variance + node.attributes.get("epsilon", 1e-4)).rsqrt() * gamma
    return scale, beta - mean * scale


BATCH_NORMS = {"BatchNormWithGlobalNormalization": _scale_and_offset} | dict.fromkeys(
    ("FusedBatchNorm", "FusedBatchNormV2", "FusedBatchNormV3"), _fused_scale_and_offset
)


@operation(*BATCH_NORMS)
def _batch_norm(node: Node, x: Tensor, *parameters: Tensor) -> Tensor:
    scale, offset = BATCH_NORMS[node.op](node, *parameters)
    return torch.addcmul(offset, x, scale)


@operation("Conv2D")
def _conv2d(node: Node, x: Tensor, filters: Tensor, bias: Tensor | None = None) -> Tensor:
    strides, dilation = _spatial(node, "strides"), _spatial(node, "dilations")
    x, padding = _pad(node, x, filters.shape[:2], 0.0, dilation)
    weights = filters.permute(3, 2, 0, 1)
    groups = x.shape[3] // filters.shape[2]
    result = _nhwc(F.conv2d(_nchw(x), weights, bias, strides, padding, dilation, groups))
    return result.relu_() if "relu" in node.attributes else result


@operation("MaxPool")
def _max_pool(node: Node, x: Tensor) -> Tensor:
    window, strides = _spatial(node, "ksize"), _spatial(node, "strides")
    x, padding = _pad(node, x, window, -math.inf)
    return _nhwc(F.max_pool2d(_nchw(x), window, strides, padding))


@operation("AvgPool")
def _average_pool(node: Node, x: Tensor) -> Tensor:
    """Means over what a window sees of the image, without the padding."""
    window, strides = _spatial(node, "ksize"), _spatial(node, "strides")

    def sums(of: Tensor) -> Tensor:
        of, padding = _pad(node, of, window, 0.0)
        return _nhwc(F.avg_pool2d(_nchw(of), window, strides, padding, divisor_override=1))

    return sums(x) / sums(torch.ones_like(x[:1, :, :, :1]))


@operation("ResizeBilinear")
def _resize(node: Node, x: Tensor, size: Tensor) -> Tensor:
    for axis, wanted in zip((1, 2), size.tolist(), strict=True):
        there = x.shape[axis]
        place = torch.arange(wanted, dtype=torch.float32, device=x.device)
        if node.attributes.get("align_corners") and wanted > 1:
            place = place * ((there - 1) / (wanted - 1))
        elif node.attributes.get("half_pixel_centers"):
            place = (place + 0.5) * (there / wanted) - 0.5
        else:
            place = place * (there / wanted)  # of 2015: pixels are points, the first at 0
        before = place.floor().long()
        after = (before + 1).clamp(0, there - 1)
        share = (place - before).reshape([-1] + [1] * (3 - axis))
        first, second = x.index_select(axis, before.clamp(0)), x.index_select(axis, after)
        x = first + (second - first) * share
    return x


def _nchw(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)


def _nhwc(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1)


def _spatial(node: Node, attribute: str) -> list[int]:
    """The values for height and width of an attribute that has four; ones by default."""
    if node.attributes.get("data_format", b"NHWC") != b"NHWC":
        raise ValueError(f"its data_format is {node.attributes['data_format'].decode()}")
    _, height, width, _ = node.attributes.get(attribute) or [1] * 4
    return [height, width]


def _pad(
    node: Node, x: Tensor, window: Iterable[int], value: float, dilation: Iterable[int] = (1, 1)
) -> tuple[Tensor, tuple[int, int]]:
    """What the node's padding leaves to do: `x` and symmetric padding for height and width.

    SAME puts an odd pixel on the far side; then `x` comes padded.
    """
    kind = node.attributes["padding"]
    pads: list[int] = [0, 0, 0, 0]
    if kind == b"EXPLICIT":
        pads = node.attributes["explicit_paddings"][2:6]
    elif kind == b"SAME":
        pads = []
        strides = _spatial(node, "strides")
        for side, size, stride, step in zip(x.shape[1:3], window, strides, dilation, strict=True):
            total = max(0, (math.ceil(side / stride) - 1) * stride + (size - 1) * step + 1 - side)
            pads += [total // 2, total - total // 2]
    top, bottom, left, right = pads
    if top == bottom and left == right:
        return x, (top, left)
    return F.pad(x, (0, 0, left, right, top, bottom), value=value), (0, 0)
