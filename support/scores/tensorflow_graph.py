"""Run a frozen TensorFlow graph with TensorFlow."""

import os
import re
from collections.abc import Sequence

import numpy as np

from support.scores.graph_def import GraphDef
from support.scores.tensorflow_start import import_tensorflow
from support.system.files import shorten

# Operations that read or write files, or run other code, without being marked as stateful.
IMPURE = re.compile("File|Vocab|PyFunc|Dataset|Reader|Debug|Copy|ImmutableConst|Custom")
# Marked as stateful only because it can raise an error. The graph of 2015 is full of it.
HARMLESS = {"CheckNumerics"}


class TensorFlowGraph:
    """A graph's path from its tensor `image` to the tensors `outputs`.

    Raises ValueError, naming the node, for what cannot be run or could reach outside the graph.
    """

    name = "tensorflow"

    def __init__(self, content: bytes, graph: GraphDef, image: str, outputs: Sequence[str]):
        self._tf = import_tensorflow()
        self.version = self._tf.__version__
        self._refuse_impure(graph)
        v1 = self._tf.compat.v1
        loaded = self._tf.Graph()
        with loaded.as_default():
            # The published graph takes one image at a time; every operation after its input takes
            # many.
            self._images = v1.placeholder(self._tf.float32, [None, None, None, 3])
            try:
                definition = v1.GraphDef.FromString(content)
                self._tf.import_graph_def(definition, {f"{image}:0": self._images}, name="")
            except Exception as error:  # the class depends on the operation and the version
                raise ValueError(f"not a usable graph ({shorten(error)})") from error
        config = v1.ConfigProto()
        config.gpu_options.allow_growth = True
        self._session = v1.Session(graph=loaded, config=config)
        self._outputs = [f"{name}:0" for name in outputs]

    @property
    def device(self) -> str:
        """The device that runs the graph, in words."""
        gpus = self._tf.config.list_physical_devices("GPU")
        return f"{len(gpus)} GPU" if gpus else f"CPU ({os.cpu_count()} cores)"

    def run(self, images: np.ndarray) -> list[np.ndarray]:
        """The outputs for `images`, float32 [B, H, W, 3]."""
        try:
            return self._session.run(self._outputs, {self._images: images})
        except self._tf.errors.OpError as error:
            raise ValueError(shorten(error)) from error

    def constant(self, name: str) -> np.ndarray:
        """The value of a node that depends on constants alone."""
        try:
            return self._session.run(f"{name}:0")
        except (ValueError, KeyError, self._tf.errors.OpError) as error:
            raise ValueError(shorten(error)) from error

    def _refuse_impure(self, graph: GraphDef) -> None:
        from tensorflow.python.framework import op_def_registry

        for node in (*graph.nodes.values(), *graph.function_nodes):
            definition = op_def_registry.get(node.op)
            is_stateful = definition and definition.is_stateful and node.op not in HARMLESS
            if IMPURE.search(node.op) or is_stateful:
                raise ValueError(
                    f"operation {node.op} ({node.name}) could reach outside the graph; only pure, "
                    "frozen graphs are run"
                )
