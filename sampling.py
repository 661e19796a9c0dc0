"""A trained model in three lines: load it, sample from it, get images.

from sampling import load
model = load("runs/digits")
images = model.sample(labels=[3, 3, 7], seeds=[0, 1, 2], steps=1)
"""

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from config import Config, config_from_dict
from models import Method, build_model
from sampler import (
    SAMPLERS,
    SampleRequest,
    check_times,
    decoding,
    even_times,
    find_decoder,
    sample,
    sample_batches,
)
from support import hide_triton_from_torch
from support.data import classes, vae
from support.data.datasets import DATASETS
from support.runs.budget import count_parameters
from support.runs.checkpoint import check_weights
from support.runs.stored import StoredModel, read_stored
from support.system.files import UserError, shorten
from support.system.hardware import allow_tf32
from support.system.processes import Processes, choose_device
from support.system.randomness import GivenLabels, GivenNoise, PerSeedStream, SamplingStream

__all__ = ["SAMPLERS", "Images", "LoadedModel", "even_times", "load", "sample"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MOST_STEPS, MOST_IMAGES = 1000, 10**8
SECONDS_BEFORE_BAR = 5


def _print_to_stderr(line: str) -> None:
    print(line, file=sys.stderr)


class Images(list[Image.Image]):
    """Sampled images as PIL images; `latents` is the network's output x_0, [N, C, H, W]."""

    def __init__(self, pixels: np.ndarray, latents: Tensor):
        super().__init__(
            Image.fromarray(one.squeeze(-1) if one.shape[-1] == 1 else one) for one in pixels
        )
        self._pixels, self.latents = pixels, latents

    def numpy(self) -> np.ndarray:
        """uint8 [N, H, W, C]; grey images have one channel."""
        return self._pixels


@dataclass(frozen=True)
class LoadedModel:
    """A trained model, ready to sample from, with what is known of it."""

    model: Method
    config: Config
    shape: tuple[int, int, int]  # of x_0, [C, H, W]
    num_classes: int
    average: str = ""  # its name, if it is not the one of ema_decay_rate
    data: Mapping[str, Any] = field(default_factory=dict)  # the training data's record
    weights_sha256: str = ""  # of the averaged weights, if computed
    report: Callable[[str], None] = _print_to_stderr
    _checked: set[vae.FoundVae] = field(default_factory=set)  # decoders

    @property
    def class_names(self) -> Sequence[str]:
        """The names of the classes; empty if unknown."""
        return self.data.get("class_names", ())

    def sample(
        self,
        labels: int | str | Sequence[int | str] | None = None,
        seeds: int | Sequence[int] | None = None,
        steps: int = 1,
        *,
        times: Sequence[float] | None = None,
        sampler: str | None = None,
        noise: Tensor | None = None,
        batch_size: int = 32,
    ) -> Images:
        """One image per seed: the same one in any batch, and the first of `inference.py --seed`.

        Labels are classes by number or name, one for all images or one for each; by default each
        seed draws its own. `times` fall from 1 to 0 and replace the evenly spaced `steps`.
        `sampler` is one of SAMPLERS. `noise`, [N, C, H, W], replaces the first noise of each seed.
        The network gets `batch_size` images at a time. Invalid arguments raise a one-line
        `UserError`, a `ValueError`.
        """
        if times is None:
            times = even_times(_whole(steps, "steps", 1, MOST_STEPS))
        elif steps != 1:
            raise UserError("steps: leave it out with times, which give the number of steps")
        times = check_times(times, "times")
        sampler = self.model.sampler if sampler is None else sampler
        if sampler not in list(SAMPLERS):
            raise UserError(f"sampler: {shorten(sampler)} is not one of {', '.join(SAMPLERS)}")
        batch_size = _whole(batch_size, "batch_size", 1, MOST_IMAGES)
        seeds, stream = self._stream(labels, seeds, noise)
        request = SampleRequest(len(seeds), batch_size, len(times) - 1, stream, times, sampler)
        alone = Processes(0, 0, 1, next(self.model.parameters()).device)
        pixels, latents = [], []
        bar = tqdm(total=len(seeds), unit="image", disable=None, delay=SECONDS_BEFORE_BAR)
        with bar, self.decoding() as decode:
            for batch in sample_batches(self.model, request, alone, decode):
                pixels.append(batch.pixels.cpu().numpy())
                latents.append(batch.x_0.cpu())
                bar.update(len(batch.pixels))
        return Images(np.concatenate(pixels), torch.cat(latents))

    def _stream(self, labels: Any, seeds: Any, noise: Any) -> tuple[list[int], SamplingStream]:
        """The seed of each image, and the draws; UserError if the arguments do not fit."""
        given = None if labels is None else self.labels_of(_listed(labels, "labels"), "labels")
        if noise is not None:
            is_tensor = isinstance(noise, Tensor)
            fits = is_tensor and noise.is_floating_point() and noise.shape[1:] == self.shape
            if not fits or not len(noise):
                wanted = f"a tensor of floats [N, {', '.join(map(str, self.shape))}]"
                what = f"{list(noise.shape)} of {noise.dtype}" if is_tensor else shorten(noise)
                raise UserError(f"noise: must be {wanted}, not {what}")
        if seeds is None:
            seeds = range(len(given or [0]) if noise is None else len(noise))
        seeds = [_whole(seed, "seeds", 0) for seed in _listed(seeds, "seeds")]
        if noise is not None and len(noise) != len(seeds):
            raise UserError(f"noise: {len(noise)} for {len(seeds)} images")
        if given is not None and len(given) not in (1, len(seeds)):
            raise UserError(f"labels: {len(given)} for {len(seeds)} images")
        num_classes = self.num_classes if self.config.is_conditional else None
        stream: SamplingStream = PerSeedStream(seeds, num_classes, self.shape)
        stream = stream if noise is None else GivenNoise(stream, noise)
        return seeds, stream if given is None else GivenLabels(stream, given)

    @contextlib.contextmanager
    def decoding(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """The function from x_0 to images, during the block.

        Reports once if its VAE is not the one that made the training data.
        """
        found = find_decoder(self.config)
        if found and found not in self._checked:
            for note in vae.decoder_notes(found, self.data, self.shape):
                self.report(note)
            self._checked.add(found)
        device = next(self.model.parameters()).device
        with decoding(self.config, self.data, device) as decode:
            yield decode

    def labels_of(self, words: Sequence[int | str], place: str) -> list[int]:
        """The classes that words mean, by number or name; else a UserError that names `place`."""
        if not self.config.is_conditional:
            raise UserError(f"{place}: {self.config.model_type} is unconditional and takes none")
        return classes.labels_of(words, self.num_classes, self.class_names, place)

    def word_of(self, label: int) -> int | str:
        """The word for a class: its name if that is not just its number."""
        return classes.word_of(label, self.class_names)


# Loading


def load(
    source: str | Path,
    subfolder: str = "",
    *,
    device: str | torch.device = "auto",
    dtype: torch.dtype = torch.float32,
    ema: float | str | None = None,
    report: Callable[[str], None] | None = _print_to_stderr,
) -> LoadedModel:
    """The averaged model of a run, a checkpoint, an exported folder, or a name on the hub.

    `ema` names one of several averages, such as 0.999 or power-0.05. `report` gets a line on what
    was loaded. Invalid arguments raise a one-line `UserError`, a `ValueError`.
    """
    report = report or (lambda line: None)
    if not callable(report):
        raise UserError(f"report: {shorten(report)} is not a function that takes a line")
    place = _device(device)
    if dtype not in DTYPES:
        raise UserError(f"dtype: {shorten(dtype)} is not one of {', '.join(map(str, DTYPES))}")
    stored = read_stored(source, subfolder, "" if ema is None else str(ema))
    config = config_from_dict(stored.config, str(stored.path), (), report)
    allow_tf32(place, config.precision != "fp32")
    loaded = assemble(config, stored, place, report=report)
    loaded.model.to(dtype)
    classes = f", {loaded.num_classes} classes" if config.is_conditional else ""
    which = f"({stored.average}) " if stored.average else ""
    report(
        f"{stored.path}: {config.model_type}, {count_parameters(loaded.model)}, averaged "
        f"{which}over {stored.finished_steps} steps{classes}, on {place}"
    )
    return loaded


def assemble(
    config: Config,
    stored: StoredModel,
    device: torch.device,
    shares_memory: bool = False,
    **further: Any,
) -> LoadedModel:
    """The config's model with stored weights.

    With `shares_memory` it uses the stored tensors themselves, which may be mapped from their file.
    """
    channels, num_classes = _counts(config, stored)
    hide_triton_from_torch()
    with torch.device("meta"):
        model = build_model(**config.model_arguments(channels, num_classes))
    model.configure(config.to_dict())
    check_weights(model, stored.weights, str(stored.path))
    if not shares_memory:
        model.to_empty(device=device)
    model.load_state_dict(dict(stored.weights), assign=shares_memory)
    model.eval().requires_grad_(False)
    shape = (channels, config.data_size, config.data_size)
    return LoadedModel(model, config, shape, num_classes, stored.average, stored.data, **further)


def _counts(config: Config, stored: StoredModel) -> tuple[int, int]:
    """Channels and classes of the training data."""
    source = DATASETS[config.dataset_type]
    num_classes = stored.data.get("num_classes", source.num_classes)
    if num_classes is None:
        raise UserError(
            f"{stored.path}: does not record how many classes its {config.dataset_type} had"
        )
    return stored.data.get("channels", source.channels), num_classes


# Checks of arguments


def _device(device: str | torch.device) -> torch.device:
    """The device by its name, such as auto, cpu or cuda:1, or a torch.device."""
    kind, _, index = str(device).partition(":")
    chosen = choose_device(kind)
    count = torch.cuda.device_count() if kind == "cuda" else 1
    if index and index not in map(str, range(count)):
        raise UserError(f"device: {shorten(str(device))}: there are {count} of this kind, from 0")
    return torch.device(kind, int(index)) if index else chosen


def _whole(value: Any, place: str, least: int, most: int | None = None) -> int:
    is_whole = isinstance(value, Integral) and not isinstance(value, bool)
    if not is_whole or int(value) < least or (most is not None and int(value) > most):
        limits = f"of {least} or more" if most is None else f"from {least} to {most:,}"
        raise UserError(f"{place}: {shorten(value)} is not a whole number {limits}")
    return int(value)


def _listed(value: Any, place: str) -> list[Any]:
    """The values of a sequence; a single value is a list of one."""
    if isinstance(value, Tensor | np.ndarray):
        value = value.tolist()
    values = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    if not values:
        raise UserError(f"{place}: is empty; leave it out, or give at least one")
    return values
