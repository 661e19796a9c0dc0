"""Frozen TensorFlow graphs that turn pixels into features: find, download, check, run.

TensorFlow runs them, or torch without TensorFlow.

Any graph will do that has the tensors of the 2015 Inception graph: input `ExpandDims:0` (NHWC float
0..255, RGB), `pool_3:0`, `mixed_6/conv:0`, and class weights as second input of
`softmax/logits/MatMul`.
"""

import contextlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, NoReturn, Protocol

import numpy as np

from support.scores.graph_def import GraphDef, parse_graph
from support.system.command import ROOT
from support.system.files import UserError, download, reporting_os_errors, sha256_of

DEFAULT_NAME = "classify_image_graph_def.pb"
URL = f"https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/{DEFAULT_NAME}"

INPUT, POOL, SPATIAL, LOGITS = "ExpandDims", "pool_3", "mixed_6/conv", "softmax/logits/MatMul"
SPATIAL_CHANNELS = 7

# Numbers of features, spatial features and classes of the Inception graph, and its size in bytes.
# Its digest is not published, so this decides whether distances may be called FID.
INCEPTION_WIDTHS = (2048, 7 * 17 * 17, 1008)
INCEPTION_BYTES = range(80_000_000, 110_000_000)


class Features(NamedTuple):
    """Of a batch: `pool` [B, D] and `spatial` [B, 7 h w] (as NHWC), float32."""

    pool: np.ndarray
    spatial: np.ndarray


def local_graph(beside: Path = ROOT) -> Path | None:
    """The Inception graph that lies here or in `beside`, if one does."""
    places = (Path(DEFAULT_NAME), beside / DEFAULT_NAME)
    return next((place for place in places if place.is_file()), None)


def find_graph(path: str | Path | None, beside: Path = ROOT, option: str = "--inception") -> Path:
    """The graph's file: `path`, or the default name here or in `beside`, or downloaded to here.

    Raises UserError if it is absent and cannot be downloaded.
    """
    if path is None:
        path = local_graph(beside)
        if path is None:
            path = Path(DEFAULT_NAME)
            try:
                download(URL, path)
            except UserError as error:
                raise UserError(
                    f"no Inception graph: {error}; download {URL} yourself and put it here as "
                    f"{DEFAULT_NAME}, or name another with {option}"
                ) from error
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such graph; {option} takes a frozen graph, a .pb file")
    return path


class FeatureGraph:
    """A loaded graph for images [height, width, 3].

    `backend` is a key of BACKENDS, or "auto": TensorFlow where it is installed, otherwise torch.
    `device` is for torch: by default a GPU if there is one. `sha256` and `name` identify the graph;
    `is_inception` says whether its distances are FID. `class_weights` is [D, K]; `widths` are
    (D, spatial width, K).
    """

    def __init__(
        self,
        path: Path,
        image_shape: tuple[int, ...],
        batch_images: int = 64,
        backend: str = "auto",
        device: str | None = None,
    ):
        self.path, self.name, self.sha256 = path, path.name, sha256_of(path)
        self.image_shape, self.batch_images = image_shape, batch_images
        with reporting_os_errors(f"{path}: cannot be read"):
            content = path.read_bytes()
        with self._refusing():
            graph = parse_graph(content)
            missing = [name for name in (INPUT, POOL, SPATIAL, LOGITS) if name not in graph.nodes]
            if missing or len(graph.nodes[LOGITS].inputs) < 2:
                lacking = ", ".join(missing) or f"{LOGITS}'s weights"
                raise ValueError(f"not a graph for scores, it lacks {lacking}")
            load = BACKENDS[choose_backend() if backend == "auto" else backend]
            self.engine = load(content, graph, device)
        with self._refusing(f"{LOGITS} has no constant weights: "):
            weights = graph.nodes[LOGITS].inputs[1]
            self.class_weights = self.engine.constant(weights.removesuffix(":0"))
        if self.class_weights.ndim != 2:
            self._refuse(f"weights of {LOGITS} are {list(self.class_weights.shape)}, not 2-D")
        probe = self._run(np.zeros((1, *image_shape[:2], 3), np.uint8))
        self.widths = (probe.pool.shape[1], probe.spatial.shape[1], self.class_weights.shape[1])
        if self.class_weights.shape[0] != self.widths[0]:
            shape = list(self.class_weights.shape)
            self._refuse(f"{POOL} gives {self.widths[0]} features, {LOGITS} has weights {shape}")
        self.is_inception = self.widths == INCEPTION_WIDTHS and len(content) in INCEPTION_BYTES

    def features(self, pixels: np.ndarray) -> Iterator[Features]:
        """Features of uint8 [N, H, W, 1 or 3] in batches; grey images count as RGB."""
        for start in range(0, len(pixels), self.batch_images):
            yield self._run(pixels[start : start + self.batch_images])

    def _run(self, pixels: np.ndarray) -> Features:
        rgb = np.broadcast_to(pixels, (*pixels.shape[:3], 3))
        with self._refusing(f"cannot run on images {list(rgb.shape[1:])}: "):
            pool, spatial = self.engine.run(rgb.astype(np.float32))
        if pool.size % len(rgb) or spatial.ndim != 4 or len(spatial) != len(rgb):
            self._refuse(
                f"for {len(rgb)} images, {POOL} gives {list(pool.shape)} and {SPATIAL} "
                f"{list(spatial.shape)}, not [N, .., D] and [N, h, w, channels]"
            )
        pool = pool.reshape(len(rgb), -1).astype(np.float32, copy=False)
        spatial = spatial[..., :SPATIAL_CHANNELS].reshape(len(rgb), -1)
        if not (np.isfinite(pool).all() and np.isfinite(spatial).all()):
            self._refuse(
                f"gives features that are not finite by {self.engine.name} on "
                f"{self.engine.device}; try the other --backend, or CUDA_VISIBLE_DEVICES= (empty)"
            )
        return Features(pool, spatial.astype(np.float32, copy=False))

    @contextlib.contextmanager
    def _refusing(self, reason: str = "") -> Iterator[None]:
        """A block whose ValueErrors mean that the graph cannot serve."""
        try:
            yield
        except UserError:
            raise
        except ValueError as error:
            self._refuse(f"{reason}{error}", error)

    def _refuse(self, reason: str, cause: Exception | None = None) -> NoReturn:
        raise UserError(f"{self.path}: {reason}") from cause


# The backends: what runs a graph, from its content and its parsed form.


class Engine(Protocol):
    """A loaded graph, and what runs it."""

    @property
    def name(self) -> str: ...  # a key of BACKENDS

    @property
    def version(self) -> str: ...

    @property
    def device(self) -> str: ...  # in words

    def run(self, images: np.ndarray) -> list[np.ndarray]: ...

    def constant(self, name: str) -> np.ndarray: ...


def _load_tensorflow(content: bytes, graph: GraphDef, device: str | None) -> Engine:
    from support.scores.tensorflow_graph import TensorFlowGraph

    return TensorFlowGraph(content, graph, INPUT, (POOL, SPATIAL))


def _load_torch(content: bytes, graph: GraphDef, device: str | None) -> Engine:
    from support.scores.torch_graph import TorchGraph

    return TorchGraph(graph, INPUT, (POOL, SPATIAL), device)


BACKENDS = {"tensorflow": _load_tensorflow, "torch": _load_torch}


def choose_backend() -> str:
    """The first of the backends that is installed; UserError if none is."""
    for name in BACKENDS:
        with contextlib.suppress(ValueError):  # for a module that is blocked
            if importlib.util.find_spec(name):
                return name
    raise UserError(
        "scoring needs TensorFlow (pip install -r requirements_soflow_eval.txt) or torch "
        "(pip install -r requirements_soflow.txt)"
    )
