"""Score the evals of a run while it trains: evaluator.py's scores, by torch on the run's device."""

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from config import Config
from support.data.datasets import outline
from support.runs.logbook import duration
from support.scores.graph import DEFAULT_NAME, FeatureGraph, find_graph, local_graph
from support.scores.image_sets import ImageSet, archive_images
from support.scores.measures import NEIGHBOUR
from support.scores.references import load_reference, reference_images
from support.scores.scoring import score_samples
from support.scores.table import Results, line_of
from support.system.files import UserError, sha256_of, shorten


@dataclass(frozen=True)
class Scorer:
    """The files that evals are scored with."""

    reference: Path
    graph: Path

    def load_graph(self, image_shape: tuple[int, ...], device: torch.device) -> FeatureGraph:
        """The graph, on the run's device."""
        return FeatureGraph(self.graph, image_shape, backend="torch", device=str(device))

    def score(self, path: Path, device: torch.device) -> dict:
        """Score the samples at `path`; the record is also added to those of their folder.

        UserError where that fails, too little memory included.
        """
        try:
            return self._score(path, device)
        except (MemoryError, torch.OutOfMemoryError) as error:
            raise UserError(f"{path}: too little memory to score it ({shorten(error)})") from error

    def _score(self, path: Path, device: torch.device) -> dict:
        samples = archive_images(path)
        graph = self.load_graph(samples.image_shape, device)
        images, digest = reference_images(self.reference), sha256_of(self.reference)
        reference = load_reference(self.reference, images, digest, graph)
        record = score_samples(path, samples, reference, graph)
        Results.open(path.parent).add(record)
        return record


def find_scorer(config: Config) -> Scorer | None:
    """What `eval_score` asks for, checked before the run starts; None without it."""
    if not config.eval_score:
        return None
    reference, _ = check_reference(config)
    return Scorer(reference, find_graph(config.eval_graph, option="eval_graph"))


def check_reference(config: Config) -> tuple[Path, ImageSet | None]:
    """The reference, and its images if it has some; UserError where it does not fit the run."""
    assert config.eval_reference is not None  # the config refuses that
    if config.eval_num_samples <= NEIGHBOUR:
        least = NEIGHBOUR + 1
        raise UserError(f"eval_num_samples {config.eval_num_samples}: eval_score needs {least}")
    path = Path(config.eval_reference)
    images = reference_images(path)
    side = outline(config.data_request()).image_shape[-1]
    if images and images.image_shape[:2] != (side, side):
        found = " x ".join(map(str, images.image_shape[:2]))
        raise UserError(f"eval_reference {path}: its images are {found}, the run's {side} x {side}")
    return path, images


def describe(config: Config) -> list[str]:
    """Lines on what scoring will cost; none without it. Fetches nothing."""
    if not config.eval_score:
        return []
    _, references = check_reference(config)
    count = config.total_steps // config.eval_steps if config.eval_steps else 0
    line = f"scoring: {count} evals of {config.eval_num_samples:,} images"
    if references:
        line += f", and once the {references.num_images:,} of the reference"
    return [f"{line}, go through {config.eval_graph or DEFAULT_NAME}"]


def time_scoring(config: Config, device: torch.device) -> list[str]:
    """A line on how long the images of an eval take to go through the graph.

    None without scoring, or without the graph: a rehearsal fetches nothing.
    """
    if not config.eval_score or not (config.eval_graph or local_graph()):
        return []
    scorer = find_scorer(config)
    assert scorer
    side = outline(config.data_request()).image_shape[-1]
    graph = scorer.load_graph((side, side, 3), device)
    pixels = np.zeros((graph.batch_images, side, side, 3), np.uint8)
    list(graph.features(pixels))
    started = time.monotonic()
    list(graph.features(pixels))
    rate = len(pixels) / (time.monotonic() - started)
    eval_time = duration(config.eval_num_samples / rate)
    return [f"scoring: {rate:.1f} images/s, {eval_time} an eval, while training waits"]


def log_line(record: dict) -> str:
    """What the log says of a score."""
    return f"scored in {record['seconds']:.1f} s: {line_of(record)}"
