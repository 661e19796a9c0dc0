"""A tiny frozen graph with the tensor names of the Inception graph; its weights come from seeds."""

from pathlib import Path

import numpy as np


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

    `layers` more convolutions make it as slow as needed; `of_2015` puts the old batch normalisation
    and a check of numbers between the layers, in the old GraphDef version.
    """
    import tensorflow as tf

    ops = tf.raw_ops

    def weights(number: int, shape: list[int], scale: float):
        normal = np.random.RandomState([seed, number]).standard_normal(shape)
        return tf.constant(normal * scale, tf.float32)

    def conv(of, number: int, shape: list[int], scale: float, stride: int = 1, name=None):
        strides, kernel = [1, stride, stride, 1], weights(number, shape, scale)
        return ops.Conv2D(input=of, filter=kernel, strides=strides, padding="SAME", name=name)

    graph = tf.Graph()
    with graph.as_default():
        image = tf.compat.v1.placeholder(tf.float32, [None, None, 3], name="image")
        batch = ops.ExpandDims(input=image, axis=0, name="ExpandDims")
        hidden, channels = ops.Mul(x=ops.Sub(x=batch, y=128.0), y=1 / 128), 3
        for layer in range(layers):
            scale = (2 / 9 / channels) ** 0.5
            hidden = ops.Relu(features=conv(hidden, 10 + layer, [3, 3, channels, 32], scale))
            channels = 32
        spatial = conv(hidden, 1, [3, 3, channels, 9], 0.3, stride, "mixed_6/conv")
        checked = ops.CheckNumerics(tensor=spatial, message="") if of_2015 else spatial
        wide = conv(ops.Identity(input=checked, name="between"), 2, [1, 1, 9, features], 0.5)
        pool = ops.Mean(input=ops.Relu(features=wide), axis=[1, 2], keep_dims=True, name="pool_3")
        flat, kernel = ops.Reshape(tensor=pool, shape=[-1, features]), [features, classes]
        logits = ops.MatMul(a=flat, b=weights(3, kernel, 2.0), name="softmax/logits/MatMul")
        ops.Softmax(logits=logits, name="softmax")
        for name, value in {"mean": 0.1, "beta": 0.1, "variance": 0.5, "gamma": 0.5}.items():
            tf.constant([value] * 9, name=name)
    graph_def = graph.as_graph_def()
    if of_2015:
        node = next(node for node in graph_def.node if node.name == "between")
        node.op = "BatchNormWithGlobalNormalization"  # gone since GraphDef version 9
        node.input.extend(["mean", "variance", "beta", "gamma"])
        node.attr["variance_epsilon"].f = 0.001
        node.attr["scale_after_normalization"].b = True
        graph_def.versions.producer = 8
    path.write_bytes(graph_def.SerializeToString())
    return path
