"""Frozen TensorFlow graphs that turn pixels into features: find, download, check, run.

Any graph will do that has the tensors of the 2015 Inception graph: input `ExpandDims:0` (NHWC float
0..255, RGB), `pool_3:0`, `mixed_6/conv:0`, and class weights as second input of
`softmax/logits/MatMul`. TensorFlow is imported only when a graph is loaded.
"""

import itertools
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np

from support.scores.tensorflow_start import import_tensorflow
from support.system.command import ROOT
from support.system.files import UserError, download, sha256_of, shorten

DEFAULT_NAME = "classify_image_graph_def.pb"
URL = f"https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/{DEFAULT_NAME}"

INPUT, POOL, SPATIAL, LOGITS = "ExpandDims", "pool_3", "mixed_6/conv", "softmax/logits/MatMul"
SPATIAL_CHANNELS = 7

# Numbers of features, spatial features and classes of the Inception graph, and its size in bytes.
# Its digest is not published, so this decides whether distances may be called FID.
INCEPTION_WIDTHS = (2048, 7 * 17 * 17, 1008)
INCEPTION_BYTES = range(80_000_000, 110_000_000)

# Operations that read or write files, or run other code, without being marked as stateful.
IMPURE = re.compile("File|Vocab|PyFunc|Dataset|Reader|Debug|Copy|ImmutableConst|Custom")
# Marked as stateful only because it can raise an error. The graph of 2015 is full of it.
HARMLESS = {"CheckNumerics"}


class Features(NamedTuple):
    """Of a batch: `pool` [B, D] and `spatial` [B, 7 h w] (as NHWC), float32."""

    pool: np.ndarray
    spatial: np.ndarray


def find_graph(path: str | Path | None, beside: Path = ROOT) -> Path:
    """The graph's file: `path`, or the default name here or in `beside`, or downloaded to here.

    Raises UserError if it is absent and cannot be downloaded.
    """
    if path is None:
        places = [Path(DEFAULT_NAME), beside / DEFAULT_NAME]
        path = next((place for place in places if place.is_file()), None)
        if path is None:
            path = places[0]
            try:
                download(URL, path)
            except UserError as error:
                raise UserError(
                    f"no Inception graph: {error}; download {URL} yourself and put it here as "
                    f"{DEFAULT_NAME}, or name another with --inception"
                ) from error
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such graph; --inception takes a frozen graph, a .pb file")
    return path


class FeatureGraph:
    """A loaded graph for images [height, width, 3].

    `sha256` and `name` identify it; `is_inception` says whether its distances are FID.
    `class_weights` is [D, K]; `widths` are (D, spatial width, K).
    """

    def __init__(self, path: Path, image_shape: tuple[int, ...], batch_images: int = 64):
        self._tf = import_tensorflow()
        self.path, self.name, self.sha256 = path, path.name, sha256_of(path)
        self.image_shape, self.batch_images = image_shape, batch_images
        self.tensorflow_version = self._tf.__version__
        graph_def = self._read()
        self._session, self._input = self._load(graph_def)
        self.class_weights = self._class_weights(graph_def)
        probe = self._run(np.zeros((1, *image_shape[:2], 3), np.uint8))
        self.widths = (probe.pool.shape[1], probe.spatial.shape[1], self.class_weights.shape[1])
        if self.class_weights.shape[0] != self.widths[0]:
            shape = list(self.class_weights.shape)
            self._refuse(f"{POOL} gives {self.widths[0]} features, {LOGITS} has weights {shape}")
        self.is_inception = (
            self.widths == INCEPTION_WIDTHS and path.stat().st_size in INCEPTION_BYTES
        )

    @property
    def device(self) -> str:
        """The device that runs the graph, in words."""
        gpus = self._tf.config.list_physical_devices("GPU")
        return f"{len(gpus)} GPU" if gpus else f"CPU ({os.cpu_count()} cores)"

    def features(self, pixels: np.ndarray) -> Iterator[Features]:
        """Features of uint8 [N, H, W, 1 or 3] in batches; grey images count as RGB."""
        for start in range(0, len(pixels), self.batch_images):
            yield self._run(pixels[start : start + self.batch_images])

    def _run(self, pixels: np.ndarray) -> Features:
        rgb = np.broadcast_to(pixels, (*pixels.shape[:3], 3))
        try:
            pool, spatial = self._session.run(
                [f"{POOL}:0", f"{SPATIAL}:0"], {self._input: rgb.astype(np.float32)}
            )
        except self._tf.errors.OpError as error:
            self._refuse(f"cannot run on images {list(rgb.shape[1:])}: {shorten(error)}")
        if pool.size % len(rgb) or spatial.ndim != 4 or len(spatial) != len(rgb):
            self._refuse(
                f"for {len(rgb)} images, {POOL} gives {list(pool.shape)} and {SPATIAL} "
                f"{list(spatial.shape)}, not [N, .., D] and [N, h, w, channels]"
            )
        pool = pool.reshape(len(rgb), -1).astype(np.float32, copy=False)
        spatial = spatial[..., :SPATIAL_CHANNELS].reshape(len(rgb), -1)
        if not (np.isfinite(pool).all() and np.isfinite(spatial).all()):
            self._refuse(
                f"gives features that are not finite on {self.device}; on a GPU, try again with "
                "CUDA_VISIBLE_DEVICES= (empty)"
            )
        return Features(pool, spatial.astype(np.float32, copy=False))

    def _read(self) -> Any:
        """The graph's definition, after checking that nothing in it reaches outside."""
        from tensorflow.python.framework import op_def_registry

        graph_def = self._tf.compat.v1.GraphDef()
        try:
            graph_def.ParseFromString(self.path.read_bytes())
        except Exception as error:  # protobuf's error classes are not public
            self._refuse(f"not a frozen graph ({shorten(error)})", error)
        nodes = {node.name: node for node in graph_def.node}
        missing = [name for name in (INPUT, POOL, SPATIAL, LOGITS) if name not in nodes]
        if missing or len(nodes[LOGITS].input) < 2:
            self._refuse(f"not a graph for scores, it lacks {', '.join(missing) or LOGITS}")
        bodies = [function.node_def for function in graph_def.library.function]
        for node in itertools.chain(graph_def.node, *bodies):
            definition = op_def_registry.get(node.op)
            is_stateful = definition and definition.is_stateful and node.op not in HARMLESS
            if IMPURE.search(node.op) or is_stateful:
                self._refuse(
                    f"operation {node.op} ({node.name}) could reach outside the graph; only "
                    "pure, frozen graphs are run"
                )
        return graph_def

    def _load(self, graph_def: Any) -> tuple[Any, Any]:
        """A session of the graph, and the placeholder that replaces its input.

        The published graph takes one image at a time; every operation after its input takes many.
        """
        v1 = self._tf.compat.v1
        graph = self._tf.Graph()
        with graph.as_default():
            images = v1.placeholder(self._tf.float32, [None, None, None, 3])
            try:
                self._tf.import_graph_def(graph_def, {f"{INPUT}:0": images}, name="")
            except Exception as error:  # the class depends on the operation and the version
                self._refuse(f"not a usable graph ({shorten(error)})", error)
        config = v1.ConfigProto()
        config.gpu_options.allow_growth = True
        return v1.Session(graph=graph, config=config), images

    def _class_weights(self, graph_def: Any) -> np.ndarray:
        logits = next(node for node in graph_def.node if node.name == LOGITS)
        name = logits.input[1]
        try:
            weights = self._session.run(name if ":" in name else f"{name}:0")
        except (ValueError, KeyError, self._tf.errors.OpError) as error:
            self._refuse(f"{LOGITS} has no constant weights ({shorten(error)})", error)
        if weights.ndim != 2:
            self._refuse(f"weights of {LOGITS} are {list(weights.shape)}, not 2-D")
        return weights

    def _refuse(self, reason: str, cause: Exception | None = None) -> NoReturn:
        raise UserError(f"{self.path}: {reason}") from cause
