"""From noise to images: the one sampler, which training and inference both call."""

import contextlib
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from config import Config, config_from_dict
from models import Method, build_model
from support.data import vae
from support.data.datasets import DATASETS
from support.data.images import ImageBatch, to_pixels
from support.runs.budget import count_parameters
from support.runs.checkpoint import check_weights
from support.runs.counting import most_bytes
from support.runs.stored import StoredModel, read_stored
from support.scores.npz import write_images
from support.system.files import UserError, shorten
from support.system.hardware import allow_tf32
from support.system.processes import Processes, choose_device
from support.system.randomness import PerImageStream, SamplingStream
from support.system.settings import suggest

IMAGES_AT_ONCE = 8  # turned into pixels
SECONDS_BEFORE_BAR = 5

# B images of a batch, C channels, H = W side; images are float -1..1, pixels uint8 [B, H, W, C]


def even_times(steps: int) -> tuple[float, ...]:
    """t_0 = 1, ..., t_n = 0 for n jumps, evenly apart."""
    return (*(1 - jump / steps for jump in range(steps)), 0.0)


def renoise(
    model: Method, noises: Sequence[Tensor], labels: Tensor | None, times: Sequence[float]
) -> Tensor:
    """The published sampler: every jump ends at 0, and a fresh noise brings x back to the next t.

    Takes a noise for each jump.
    """
    x = noises[0]
    zeros = x.new_zeros(len(x))
    for jump, (t, noise) in enumerate(zip(times[:-1], noises, strict=True)):
        starts = torch.full_like(zeros, t)
        if jump > 0:
            x, _ = model.interpolate(x, noise, starts)
        x = model.jump(x, starts, zeros, labels)
    return x


def chain(
    model: Method, noises: Sequence[Tensor], labels: Tensor | None, times: Sequence[float]
) -> Tensor:
    """Each jump starts where the last one ended: x_0 is a function of the one noise it takes."""
    x = noises[0]
    ones = x.new_ones(len(x))
    for t, s in itertools.pairwise(times):
        x = model.jump(x, t * ones, s * ones, labels)
    return x


class Sampler(NamedTuple):
    """A way through the times, and whether it takes a fresh noise for each jump, or one in all."""

    run: Callable[[Method, Sequence[Tensor], Tensor | None, Sequence[float]], Tensor]
    takes_fresh_noise: bool

    def num_noises(self, jumps: int) -> int:
        return jumps if self.takes_fresh_noise else 1


SAMPLERS = {"renoise": Sampler(renoise, True), "chain": Sampler(chain, False)}


@torch.inference_mode()
def sample(
    model: Method,
    noises: Sequence[Tensor],
    labels: Tensor | None = None,
    times: Sequence[float] | None = None,
    sampler: str = "renoise",
) -> Tensor:
    """x_0, [B, C, H, W], of noises, [B, C, H, W] each, by jumps from `times[0]` = 1 down to 0.

    The times are evenly apart, a jump for each noise, where none are given. The labels are [B], or
    None for the null class.
    """
    return SAMPLERS[sampler].run(model, noises, labels, times or even_times(len(noises)))


def places_of(rank: int, num_images: int, world_size: int, batch_size: int) -> Iterator[range]:
    """Which images process `rank` makes, at most batch_size in each round of all processes.

    In a round rank r's come after those of the ranks below it. All make equally many: the last
    places may lie beyond num_images, by less than world_size, and are to be cut.
    """
    per_process = -(-num_images // world_size)
    for start in range(0, per_process, batch_size):
        count = min(batch_size, per_process - start)
        first = start * world_size + rank * count
        yield range(first, first + count)


class SampleRequest(NamedTuple):
    """How many images, in batches of how many per process, in how many jumps, from which draws."""

    num_images: int
    batch_size: int
    num_jumps: int
    stream: SamplingStream
    times: tuple[float, ...] | None = None  # None: evenly apart
    sampler: str = "renoise"  # of SAMPLERS


def find_decoder(config: Config) -> vae.FoundVae | None:
    """What the config's x_0 are decoded by, for `decoding`; None where they are images already.

    Quick where the VAE is on this machine, so that its absence is noticed before the work.
    """
    return vae.find_vae(config.vae) if config.is_latent else None


def decoder_record(config: Config) -> dict[str, str | float]:
    """What a result's record says of the decoder; nothing where there is none."""
    found = find_decoder(config)
    if found is None:
        return {}
    return {
        "vae": found.name,
        "vae_revision": found.revision,
        "latent_scale": vae.LATENT_SCALE,
    }


@contextlib.contextmanager
def decoding(config: Config, device: torch.device) -> Iterator[Callable[[Tensor], Tensor]]:
    """The function from x_0 to images, float -1..1; a VAE is on the device for the block alone."""
    found = find_decoder(config)
    if found is None:
        yield lambda x_0: x_0
        return
    with vae.on_device(vae.load_on_host(found), device) as loaded:
        yield lambda x_0: vae.decode(loaded, x_0, config.vae_batch_size)


def refuse_non_finite(images: Tensor) -> Tensor:
    """The images, [B, C, H, W]; UserError where one is not of numbers, which would be black."""
    broken = int((~images.flatten(1).sum(1).isfinite()).sum())
    if broken:
        raise UserError(
            f"{broken} of {len(images)} images come out as nan or inf: the noise or the weights "
            "have such, or a type too narrow for this model"
        )
    return images


def sample_pixels(
    model: Method,
    request: SampleRequest,
    processes: Processes,
    decode: Callable[[Tensor], Tensor],
) -> Iterator[ImageBatch]:
    """Images in output order, on the main process; the others yield nothing.

    All processes have to iterate to the end. `decode` turns x_0 into images.
    """
    rank, world_size = processes.rank, processes.world_size
    for places in places_of(rank, request.num_images, world_size, request.batch_size):
        num_noises = SAMPLERS[request.sampler].num_noises(request.num_jumps)
        draws = request.stream.draw(places, num_noises)
        noises = [noise.to(processes.device) for noise in draws.noises]
        labels = None if draws.labels is None else draws.labels.to(processes.device)
        times = request.times or even_times(request.num_jumps)
        images = decode(sample(model, noises, labels, times, request.sampler))
        pixels = pixels_of(images)
        wanted = request.num_images - places.start  # on the main process, the first of all
        all_pixels = _gather(pixels, wanted, processes)
        all_labels = None if labels is None else _gather(labels, wanted, processes)
        if all_pixels is not None:  # on the main process
            yield ImageBatch(all_pixels, all_labels)


def pixels_of(images: Tensor) -> Tensor:
    """uint8 [B, H, W, C] of float images [B, C, H, W], a few at a time.

    What that takes meanwhile is small beside the images: large blocks that come and go leave gaps
    in the heap, and a process that grows by them for its first thousands of images.
    """
    parts = images.split(IMAGES_AT_ONCE)
    return torch.cat([to_pixels(part.float()).permute(0, 2, 3, 1) for part in parts])


def _gather(values: Tensor, wanted: int, processes: Processes) -> np.ndarray | None:
    """The processes' values in rank order, at most `wanted` of them, on the main process."""
    gathered = processes.gather_on_main(values)
    return None if gathered is None else torch.cat(gathered)[:wanted].cpu().numpy()


def write_samples(
    path: Path,
    batches: Iterator[ImageBatch],
    num_images: int,
    is_main: bool,
    write_its_record: Callable[[], None],
    report: Callable[[ImageBatch], None] = lambda batch: None,
) -> None:
    """Stream `sample_pixels` to an .npz, which appears only when all images are in it.

    The images are `arr_0`; their labels, where there are classes, follow as `arr_1`, int64 [N].
    Every process calls this; the main one writes, and tells `report` of every batch written. The
    record is written just before, so that a kill leaves no archive without one.
    """
    if not is_main:
        for _ in batches:
            raise AssertionError("only the main process gets images")
        return
    # In one piece from the start: small arrays that stay, between batches that come and go, would
    # leave the heap no gap for the next batch, and it would grow by each.
    labels = np.empty(num_images, np.int64)
    done = 0
    with write_images(path, num_images) as writer:
        for batch in batches:
            writer.append(batch.pixels)
            if batch.labels is not None:
                labels[done : done + len(batch.labels)] = batch.labels
                writer.further_arrays["arr_1"] = labels
            done += len(batch.pixels)
            report(batch)
        write_its_record()


# A model in three lines


class Images(list[Image.Image]):
    """Sampled images, as PIL knows them; `latents` is what the network made, x_0 [N, C, H, W]."""

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
    """A trained model, ready to sample from, and what it makes."""

    model: Method
    config: Config
    shape: tuple[int, int, int]  # of x_0, [C, H, W]
    num_classes: int
    class_names: Sequence[str] = ()  # none where nothing says them
    weights_sha256: str = ""  # of the averaged weights, where it was asked for
    average: str = ""  # their name, where they are not the average that the reference keeps

    def sample(
        self,
        labels: int | str | Sequence[int | str] | None = None,
        seeds: int | Sequence[int] | None = None,
        steps: int = 1,
        *,
        times: Sequence[float] | None = None,
        sampler: str = "renoise",
        noise: Tensor | None = None,
        batch_size: int = 32,
        memory_gb: float | None = None,
    ) -> Images:
        """An image for each seed, the same one in any batch and by any number of processes.

        Labels are classes by number or name, one for all or one for each; without, each seed draws
        its own. `times` go from 1 down to 0 instead of `steps` that are evenly apart; `sampler` is
        one of SAMPLERS; `noise`, [N, C, H, W], replaces what the seeds draw first. The image of a
        seed is the first one that `inference.py --seed` makes. The network gets `batch_size`
        images at a time, or fewer where no more fit into `memory_gb`, its weights not counted; a
        decoder has the config's vae_batch_size. UserError says what cannot be.
        """
        steps, batch_size = _count(steps, "steps"), _count(batch_size, "batch_size")
        if memory_gb is not None:
            batch_size = min(batch_size, self.images_within(memory_gb))
        if times is not None and steps != 1:
            raise UserError("steps: goes without times, which say how many there are")
        times = check_times(times, "times") if times is not None else even_times(steps)
        if sampler not in list(SAMPLERS):
            raise UserError(f"sampler: {shorten(sampler)} is not one of {', '.join(SAMPLERS)}")
        given = None if labels is None else self.labels_of(_listed(labels), "labels")
        seeds = self._seeds(given, None if seeds is None else _listed(seeds), noise)
        if given is not None and len(given) not in (1, len(seeds)):
            raise UserError(f"labels: {len(given)} for {len(seeds)} images; give one, or as many")
        weights = next(self.model.parameters())
        num_noises = SAMPLERS[sampler].num_noises(len(times) - 1)
        found = []
        bar = tqdm(total=len(seeds), unit="image", disable=None, delay=SECONDS_BEFORE_BAR)
        with bar, decoding(self.config, weights.device) as decode:
            for start in range(0, len(seeds), batch_size):
                places = range(start, min(start + batch_size, len(seeds)))
                noises, drawn = self._draw(seeds[start : places.stop], num_noises)
                if noise is not None:
                    noises[0] = noise[start : places.stop]
                if given is not None:
                    drawn = torch.tensor([given[place % len(given)] for place in places])
                noises = [one.to(weights) for one in noises]
                given_labels = None if drawn is None else drawn.to(weights.device)
                x_0 = sample(self.model, noises, given_labels, times, sampler).float()
                images = refuse_non_finite(decode(x_0))
                found.append((pixels_of(images).cpu().numpy(), x_0.cpu()))
                bar.update(len(places))
        pixels, latents = zip(*found, strict=True)
        return Images(np.concatenate(pixels), torch.cat(latents))

    def images_within(self, memory_gb: float) -> int:
        """How many images the network can make at a time in so much memory, without its weights'.

        UserError where one takes more.
        """
        if not (isinstance(memory_gb, int | float) and 0 < memory_gb < float("inf")):
            raise UserError(f"memory_gb: {shorten(memory_gb)} is not a number above 0")
        weights = next(self.model.parameters())

        def jump() -> None:
            x = torch.empty(1, *self.shape, dtype=weights.dtype, device=weights.device)
            t = torch.ones(1, dtype=weights.dtype, device=weights.device)
            labels = torch.zeros(1, dtype=torch.int64, device=weights.device)
            self.model.jump(x, t, 0 * t, labels if self.config.is_conditional else None)

        each = most_bytes(jump) / 1e9
        if each > memory_gb:
            raise UserError(f"memory_gb: an image of {self.config.model_type} takes {each:.2g} GB")
        return int(memory_gb / each)

    def _draw(self, seeds: Sequence[int], num_noises: int) -> tuple[list[Tensor], Tensor | None]:
        """Noises, [B, C, H, W] each, and labels, [B], of images that have a seed each."""
        num_classes = self.num_classes if self.config.is_conditional else None
        draws = [
            PerImageStream(seed, num_classes, self.shape).draw([0], num_noises) for seed in seeds
        ]
        noises = [torch.cat(together) for together in zip(*(d.noises for d in draws), strict=True)]
        labels = [d.labels for d in draws if d.labels is not None]
        return noises, torch.cat(labels) if labels else None

    def _seeds(
        self, labels: Sequence[int] | None, seeds: Sequence[Any] | None, noise: Tensor | None
    ) -> list[int]:
        """A seed for each image; UserError where counts or shapes do not fit."""
        if noise is not None and not (
            isinstance(noise, Tensor) and len(noise) and noise.shape[1:] == self.shape
        ):
            wanted = f"a tensor [N, {', '.join(map(str, self.shape))}]"
            raise UserError(f"noise: must be {wanted}, not {_shape_of(noise)}")
        if seeds is None:
            count = len(noise) if noise is not None else len(labels or [0])
            return list(range(count))
        if not seeds or not all(isinstance(seed, Integral) and int(seed) >= 0 for seed in seeds):
            raise UserError(f"seeds: {shorten(seeds)} are not whole numbers of 0 or more")
        if noise is not None and len(noise) != len(seeds):
            raise UserError(f"noise: {len(noise)} for {len(seeds)} seeds")
        return list(map(int, seeds))

    def labels_of(self, words: Sequence[int | str], place: str) -> list[int]:
        """The classes that words stand for, by number or name; UserError, at `place`, else."""
        if not self.config.is_conditional:
            raise UserError(f"{place}: {self.config.model_type} is unconditional and takes none")
        meanings = meanings_of(self.num_classes, self.class_names)
        spelled = [name for name in self.class_names if not name.isdecimal()]
        for word in map(str, words):
            if word not in meanings:
                raise UserError(
                    f"{place}: {shorten(word)} is not a class; those are "
                    f"{self._described(meanings)}{suggest(word, spelled)}"
                )
        return [meanings[str(word)] for word in words]

    def word_of(self, label: int) -> int | str:
        """What `labels` takes for a class: its name where it has one other than its number."""
        name = self.class_names[label] if self.class_names else str(label)
        return int(label) if name == str(label) else name

    def _described(self, meanings: Mapping[str, int]) -> str:
        """The words for classes."""
        numbers = f"0 to {self.num_classes - 1}"
        named = ", ".join(self.class_names)
        named = named if len(named) <= 80 else f"{named[:60]}..."
        if not self.class_names or named == ", ".join(map(str, range(self.num_classes))):
            return numbers
        if len(meanings) == len(self.class_names):
            return f"{named} (by name alone, since some names are other classes' numbers)"
        return f"{numbers}, or by name {named}"


def meanings_of(num_classes: int, names: Sequence[str]) -> dict[str, int]:
    """The class that each word stands for: its name or number.

    Names alone, where one of them is another class's number: of folders 1, 2, 10 the class called 1
    is number 0, and nobody should have to guess which 1 is meant.
    """
    numbers = {str(label): label for label in range(num_classes)}
    named = {name: label for label, name in enumerate(names)}
    is_ambiguous = any(numbers.get(name, label) != label for name, label in named.items())
    return named if is_ambiguous else numbers | named


def load(
    source: str | Path,
    subfolder: str = "",
    *,
    device: str = "auto",
    dtype: torch.dtype = torch.float32,
    ema: float | str = "",
    report: Callable[[str], None] | None = lambda line: print(line, file=sys.stderr),
) -> LoadedModel:
    """The averaged model of a run (its newest checkpoint), a checkpoint, an exported folder, or a
    name on the Hugging Face Hub; what it is goes to `report`.

    `ema` names one of several averages: 0.999, or power-0.05. UserError where there is none, or it
    cannot be read.
    """
    report = report or (lambda line: None)
    place = choose_device(device)
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise UserError(f"dtype: {shorten(dtype)} is not one for weights, such as torch.bfloat16")
    stored = read_stored(source, subfolder, str(ema))
    config = config_from_dict(stored.config, str(stored.path), (), report)
    allow_tf32(place, config.precision != "fp32")
    loaded = assemble(config, stored, place)
    loaded.model.to(dtype)
    classes = f", {loaded.num_classes} classes" if config.is_conditional else ""
    which = f"({stored.average}) " if stored.average else ""
    report(
        f"{stored.path}: {config.model_type}, {count_parameters(loaded.model)}, averaged "
        f"{which}over {stored.finished_steps} steps{classes}, on {place}"
    )
    return loaded


def assemble(config: Config, stored: StoredModel, device: torch.device) -> LoadedModel:
    """The config's model with stored weights; channels and classes come with these."""
    channels, num_classes = _counts(config, stored)
    with torch.device("meta"):
        model = build_model(**config.model_arguments(channels, num_classes))
    model.configure(config.to_dict())
    check_weights(model, stored.weights, str(stored.path))
    model.to_empty(device=device).eval().requires_grad_(False)
    model.load_state_dict(dict(stored.weights))
    shape = (channels, config.data_size, config.data_size)
    names = stored.data.get("class_names", ())
    return LoadedModel(model, config, shape, num_classes, names, average=stored.average)


def _counts(config: Config, stored: StoredModel) -> tuple[int, int]:
    """Channels and classes of the data that a model was trained on."""
    if stored.data:
        return stored.data["channels"], stored.data["num_classes"]
    source = DATASETS[config.dataset_type]
    if source.num_classes is None:
        raise UserError(
            f"{stored.path}: does not say how many classes its {config.dataset_type} had"
        )
    return source.channels, source.num_classes


def check_times(times: Sequence[float], place: str) -> tuple[float, ...]:
    """The times of jumps, if they are some; UserError, at `place`, else."""
    try:
        values = tuple(map(float, times))
    except (TypeError, ValueError):
        raise UserError(f"{place}: {shorten(times)} is not a list of numbers") from None
    falls = all(t > s for t, s in itertools.pairwise(values))
    if len(values) < 2 or values[0] != 1 or values[-1] != 0 or not falls:
        raise UserError(f"{place}: {shorten(list(times))} do not fall from 1 to 0, as 1,0.6,0 does")
    return values


def _count(value: Any, place: str) -> int:
    if not isinstance(value, Integral) or isinstance(value, bool) or int(value) < 1:
        raise UserError(f"{place}: {shorten(value)} is not a whole number of 1 or more")
    return int(value)


def _listed(value: Any) -> list[Any]:
    """The values of a sequence; one that stands alone is a list of one."""
    if isinstance(value, Tensor | np.ndarray):
        value = value.tolist()
    return list(value) if isinstance(value, Sequence | range) and value != str(value) else [value]


def _shape_of(value: Any) -> str:
    shape = getattr(value, "shape", None)
    return f"a {type(value).__name__}" + (f" {list(shape)}" if shape is not None else "")
