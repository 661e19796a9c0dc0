"""A tiny frozen graph with the tensor names of the Inception graph; its weights come from seeds."""

import functools
from pathlib import Path

BATCH_NORM = "BatchNormWithGlobalNormalization"  # gone since GraphDef version 9


def write_toy_graph(
    path: Path,
    features: int = 16,
    classes: int = 10,
    seed: int = 0,
    stride: int = 2,
    layers: int = 0,
    of_2015: bool = False,
) -> Path:
    """Write the graph; like the published one it is declared for one image at a time.

    `layers` convolutions more make it as slow as wanted; `of_2015` puts the old batch normalisation
    between the layers, in the old GraphDef version.
    """
    import tensorflow as tf

    ops = tf.raw_ops
    weights = functools.partial(_weights, ops, seed)
    graph = tf.Graph()
    with graph.as_default():
        image = tf.compat.v1.placeholder(tf.float32, [None, None, 3], name="image")
        batch = ops.ExpandDims(input=image, axis=0, name="ExpandDims")
        hidden = ops.Mul(x=ops.Sub(x=batch, y=128.0), y=1 / 128)
        channels = 3
        for layer in range(layers):
            hidden = ops.Conv2D(
                input=hidden,
                filter=weights(10 + layer, [3, 3, channels, 32], (2 / 9 / channels) ** 0.5),
                strides=[1, 1, 1, 1],
                padding="SAME",
            )
            hidden, channels = ops.Relu(features=hidden), 32
        conv = ops.Conv2D(
            input=hidden,
            filter=weights(1, [3, 3, channels, 9], 0.3),
            strides=[1, stride, stride, 1],
            padding="SAME",
            name="mixed_6/conv",
        )
        wide = ops.Conv2D(
            input=ops.Identity(input=conv, name="between"),
            filter=weights(2, [1, 1, 9, features], 0.5),
            strides=[1, 1, 1, 1],
            padding="SAME",
        )
        pool = ops.Mean(input=ops.Relu(features=wide), axis=[1, 2], keep_dims=True, name="pool_3")
        flat = ops.Reshape(tensor=pool, shape=[-1, features])
        logits = ops.MatMul(
            a=flat, b=weights(3, [features, classes], 2.0), name="softmax/logits/MatMul"
        )
        ops.Softmax(logits=logits, name="softmax")
        for name in ("mean", "beta"):
            tf.constant([0.1] * 9, name=name)
        for name in ("variance", "gamma"):
            tf.constant([0.5] * 9, name=name)
    graph_def = graph.as_graph_def()
    if of_2015:
        _make_old(graph_def)
    path.write_bytes(graph_def.SerializeToString())
    return path


def _weights(ops, seed: int, number: int, shape: list[int], scale: float):
    normal = ops.StatelessRandomNormal(shape=shape, seed=[seed, number])
    return ops.Mul(x=normal, y=scale)


def _make_old(graph_def) -> None:
    node = next(node for node in graph_def.node if node.name == "between")
    node.op = BATCH_NORM
    node.input.extend(["mean", "variance", "beta", "gamma"])
    node.attr["variance_epsilon"].f = 0.001
    node.attr["scale_after_normalization"].b = True
    graph_def.versions.producer = 8
