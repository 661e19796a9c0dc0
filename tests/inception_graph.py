"""A frozen graph of the 2015 Inception's structure: all its layers and names, random weights."""

from pathlib import Path

import numpy as np

# A convolution: (channels, height and width of its window, stride, padding). A block is a list of
# branches, which are concatenated; a branch is a chain of layers, in which a nested list of
# branches may stand last. "max" and "avg" are 3 x 3 windows, "max/2" has stride 2.
STEM = [
    ((32, 3, 3, 2, "VALID"), (32, 3, 3, 1, "VALID"), (64, 3, 3, 1, "SAME"), "max/2"),
    ((80, 1, 1, 1, "VALID"), (192, 3, 3, 1, "VALID"), "max/2"),
]


def _same(channels: int, height: int, width: int) -> tuple:
    return (channels, height, width, 1, "SAME")


def _wide(pool: int) -> list:
    """35 x 35: mixed, mixed_1, mixed_2."""
    return [
        [_same(64, 1, 1)],
        [_same(48, 1, 1), _same(64, 5, 5)],
        [_same(64, 1, 1), _same(96, 3, 3), _same(96, 3, 3)],
        ["avg", _same(pool, 1, 1)],
    ]


def _factorised(c: int) -> list:
    """17 x 17: mixed_4 to mixed_7."""
    return [
        [_same(192, 1, 1)],
        [_same(c, 1, 1), _same(c, 1, 7), _same(192, 7, 1)],
        [_same(c, 1, 1), _same(c, 7, 1), _same(c, 1, 7), _same(c, 7, 1), _same(192, 1, 7)],
        ["avg", _same(192, 1, 1)],
    ]


def _expanded(pool: str) -> list:
    """8 x 8: mixed_9 and mixed_10."""
    split = [[_same(384, 1, 3)], [_same(384, 3, 1)]]
    return [
        [_same(320, 1, 1)],
        [_same(384, 1, 1), split],
        [_same(448, 1, 1), _same(384, 3, 3), split],
        [pool, _same(192, 1, 1)],
    ]


BLOCKS = {
    "mixed": _wide(32),
    "mixed_1": _wide(64),
    "mixed_2": _wide(64),
    "mixed_3": [
        [(384, 3, 3, 2, "VALID")],
        [_same(64, 1, 1), _same(96, 3, 3), (96, 3, 3, 2, "VALID")],
        ["max/2"],
    ],
    "mixed_4": _factorised(128),
    "mixed_5": _factorised(160),
    "mixed_6": _factorised(160),
    "mixed_7": _factorised(192),
    "mixed_8": [
        [_same(192, 1, 1), (320, 3, 3, 2, "VALID")],
        [_same(192, 1, 1), _same(192, 1, 7), _same(192, 7, 1), (192, 3, 3, 2, "VALID")],
        ["max/2"],
    ],
    "mixed_9": _expanded("avg"),
    "mixed_10": _expanded("max"),
}
CLASSES = 1008


class _Writer:
    """Adds nodes to a GraphDef; a name that is taken gets a number, as TensorFlow's names do."""

    def __init__(self, seed: int):
        import tensorflow as tf

        self._tf = tf
        self.graph = tf.compat.v1.GraphDef()
        self.graph.versions.producer = 8  # the last with the old batch normalisation
        self._random = np.random.RandomState(seed)
        self._taken: dict[str, int] = {}

    def unique(self, name: str) -> str:
        number = self._taken[name] = self._taken.get(name, -1) + 1
        return f"{name}_{number}" if number else name

    def node(self, name: str, op: str, *inputs: str, **attributes) -> str:
        node = self.graph.node.add(name=name, op=op, input=inputs)
        for key, value in attributes.items():
            attribute = node.attr[key]
            if isinstance(value, bool):
                attribute.b = value
            elif isinstance(value, list):
                attribute.list.i.extend(value)
            elif isinstance(value, bytes):
                attribute.s = value
            elif isinstance(value, float):
                attribute.f = value
            else:
                attribute.type = value.as_datatype_enum
        return name

    def constant(self, name: str, value) -> str:
        node = self.graph.node.add(name=name, op="Const")
        tensor = self._tf.make_tensor_proto(value)
        node.attr["value"].tensor.CopyFrom(tensor)
        node.attr["dtype"].type = tensor.dtype
        return name

    def operation(self, name: str, op: str, *inputs: str, **attributes) -> str:
        return self.node(name, op, *inputs, T=self._tf.float32, **attributes)

    def weights(self, name: str, *shape: int, scale: float) -> str:
        values = self._random.standard_normal(shape).astype(np.float32) * np.float32(scale)
        return self.constant(name, values)

    def convolution(self, scope: str, of: str, channels_in: int, layer: tuple) -> str:
        channels, height, width, stride, padding = layer
        fan_in = height * width * channels_in
        kernel = self.weights(
            f"{scope}/conv2d_params",
            height,
            width,
            channels_in,
            channels,
            scale=(2 / fan_in) ** 0.5,
        )
        strides, pad = [1, stride, stride, 1], padding.encode()
        conv = self.operation(f"{scope}/Conv2D", "Conv2D", of, kernel, strides=strides, padding=pad)
        numbers = {
            "moving_mean": 0.1 * self._random.standard_normal(channels),
            "moving_variance": self._random.uniform(0.5, 1.5, channels),
            "beta": 0.2 * self._random.standard_normal(channels),
            "gamma": self._random.uniform(0.8, 1.2, channels),
        }
        names = [
            self.constant(f"{scope}/batchnorm/{key}", value.astype(np.float32))
            for key, value in numbers.items()
        ]
        normal = self.operation(
            f"{scope}/batchnorm",
            "BatchNormWithGlobalNormalization",
            *(conv, *names),
            variance_epsilon=0.001,
            scale_after_normalization=True,
        )
        checked = self.operation(f"{scope}/CheckNumerics", "CheckNumerics", normal, message=b"")
        after = self.operation(f"{scope}/control_dependency", "Identity", normal, f"^{checked}")
        return self.operation(scope, "Relu", after)

    def pool(self, scope: str, of: str, kind: str) -> str:
        stride = 2 if kind.endswith("/2") else 1
        op = "AvgPool" if kind == "avg" else "MaxPool"
        padding = b"VALID" if stride == 2 else b"SAME"
        strides, window = [1, stride, stride, 1], [1, 3, 3, 1]
        return self.operation(scope, op, of, ksize=window, strides=strides, padding=padding)

    def branches(self, scope: str, of: str, channels: int, branches: list) -> list[tuple[str, int]]:
        ends = []
        for number, branch in enumerate(branches):
            prefix = f"{scope}/tower" if number else scope
            ends += self.chain(prefix, of, channels, branch)
        return ends

    def chain(self, scope: str, of: str, channels: int, layers) -> list[tuple[str, int]]:
        for layer in layers:
            if isinstance(layer, list):
                return self.branches(scope, of, channels, layer)
            if isinstance(layer, str):
                of = self.pool(self.unique(f"{scope}/pool".removeprefix("/")), of, layer)
            else:
                of = self.convolution(
                    self.unique(f"{scope}/conv".removeprefix("/")), of, channels, layer
                )
                channels = layer[0]
        return [(of, channels)]


def write_inception_graph(path: Path, seed: int = 0, side: int = 299) -> Path:
    """Write the graph; images are resized to `side`, 299 in the original (at least 75)."""
    writer = _Writer(seed)
    tf = writer._tf
    writer.node("image", "Placeholder", dtype=tf.float32)
    writer.constant("ExpandDims/dim", np.int32(0))
    writer.operation("ExpandDims", "ExpandDims", "image", "ExpandDims/dim")
    writer.constant("ResizeBilinear/size", np.array([side, side], np.int32))
    writer.operation("ResizeBilinear", "ResizeBilinear", "ExpandDims", "ResizeBilinear/size")
    writer.constant("Sub/y", np.float32(128))
    writer.operation("Sub", "Sub", "ResizeBilinear", "Sub/y")
    writer.constant("Mul/y", np.float32(1 / 128))
    of, channels = writer.operation("Mul", "Mul", "Sub", "Mul/y"), 3
    for layers in STEM:
        ((of, channels),) = writer.chain("", of, channels, layers)
    for block, branches in BLOCKS.items():
        ends = writer.branches(block, of, channels, branches)
        axis = writer.constant(f"{block}/join/concat_dim", np.int32(3))
        names = [name for name, _ in ends]
        of = writer.operation(f"{block}/join", "Concat", axis, *names)
        writer.graph.node[-1].attr["N"].i = len(names)
        channels = sum(count for _, count in ends)
    last = (side - 75) // 32 + 1
    window, ones = [1, last, last, 1], [1, 1, 1, 1]
    writer.operation("pool_3", "AvgPool", of, ksize=window, strides=ones, padding=b"VALID")
    writer.constant("pool_3/_reshape/shape", np.array([-1, channels], np.int32))
    writer.operation("pool_3/_reshape", "Reshape", "pool_3", "pool_3/_reshape/shape")
    writer.weights("softmax/weights", channels, CLASSES, scale=0.02)
    writer.weights("softmax/biases", CLASSES, scale=0.1)
    writer.operation("softmax/logits/MatMul", "MatMul", "pool_3/_reshape", "softmax/weights")
    writer.operation("softmax/logits", "BiasAdd", "softmax/logits/MatMul", "softmax/biases")
    writer.operation("softmax", "Softmax", "softmax/logits")
    path.write_bytes(writer.graph.SerializeToString())
    return path
