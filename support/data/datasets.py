"""The data sets: what each one is made of, and how its examples are read."""

import contextlib
import dataclasses
import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from support.data import cifar10, digits, fashion
from support.data.autoencoders import LatentForm, draw_latents
from support.data.folders import LabelledFiles, in_threads
from support.data.images import LabelledImages, read_image, to_images, why_unreadable
from support.data.latents import LATENT_FILE, LatentInfo, LatentReader
from support.data.sources import count_classes, list_source, shards_of
from support.data.vae import VAE_NAME, find_vae, vae_digest
from support.system.files import UserError, reporting_os_errors
from support.system.processes import Processes

# N examples, B samples of a microbatch, C channels, H = W side

KEPT_BYTES = 1 << 27  # of decoded pictures in each process: 10,000 of 64 pixels a side
CHECKED_AT_ONCE = 256  # latents
VAE_KEYS = ("vae", "vae_revision", "vae_sha256", *(one.name for one in fields(LatentForm)))
ALONE = Processes(0, 0, 1, torch.device("cpu"))


@dataclass(frozen=True)
class DataRequest:
    """The keys of a config that say which data set to load, and the processes that load it."""

    dataset_type: str  # of DATASETS
    data_size: int  # side, in pixels or latents
    dataset_path: str | None = None
    batch_size: int = 1
    vae: str = VAE_NAME  # that made the latents
    skip_bad: bool = False  # leave out pictures that cannot be read
    held_out: int = 0  # number of images that no step trains on
    seed: int = 0  # chooses these images
    working_dir: str | None = None  # keeps the index of tars
    processes: Processes = ALONE

    @property
    def folder(self) -> Path:
        """dataset_path; UserError where it is not set or not a folder that can be read.

        Pictures may also be in a file, or in those of a pattern.
        """
        if not self.dataset_path:
            folder = DATASETS[self.dataset_type].folder
            raise UserError(f"dataset_path: not set; {self.dataset_type} needs {folder}")
        path = Path(os.path.expanduser(self.dataset_path))
        in_file = DATASETS[self.dataset_type].has_files and not os.path.isdir(path)
        if in_file and shards_of(path):
            return path
        with (
            reporting_os_errors(f"dataset_path: {path} cannot be read as a folder"),
            contextlib.suppress(FileNotFoundError),  # some data sets are fetched
        ):
            os.scandir(path).close()
        return path

    @property
    def index_folder(self) -> Path | None:
        return Path(self.working_dir) if self.working_dir else None


@dataclass(frozen=True)
class DataSpec:
    """What a network and a sampler must know about a data set; stored in every checkpoint."""

    channels: int
    size: int
    class_names: tuple[str, ...]
    num_examples: int

    @property
    def num_classes(self) -> int:
        """The number of classes, the null class not counted."""
        return len(self.class_names)

    @property
    def shape(self) -> tuple[int, int, int]:
        """[C, H, W] of one sample."""
        return (self.channels, self.size, self.size)

    def to_dict(self) -> dict[str, int | list[str]]:
        sizes = {"channels": self.channels, "size": self.size, "num_classes": self.num_classes}
        return {**sizes, "class_names": list(self.class_names), "num_examples": self.num_examples}


class RawBatch(NamedTuple):
    """Samples as stored, [B, ...], and their labels, [B] int64; on the CPU."""

    stored: Tensor
    labels: Tensor


class TrainingData(Dataset):
    """A data set: `spec`, `labels` int64 [N], and examples by lists of indices."""

    def __init__(self, spec: DataSpec, labels: Tensor):
        self.spec, self.labels = spec, labels
        self.held_out: TrainingData | None = None  # images that no step trains on, if asked for
        self.notes: list[str] = []  # lines for the start of the log
        self.skipped: list[str] = []  # files left out because they cannot be read

    def __len__(self) -> int:
        return self.spec.num_examples

    def __getitem__(self, indices: list[int]) -> RawBatch:
        return RawBatch(self.stored(indices), self.labels[indices])

    @property
    def class_counts(self) -> list[int]:
        return torch.bincount(self.labels, minlength=self.spec.num_classes).tolist()

    def record(self) -> dict[str, Any]:
        """What a checkpoint stores about the data."""
        return {**self.spec.to_dict(), "class_counts": self.class_counts}

    def refusals(self, share: range) -> Iterator[str]:
        """Why each example of `share` cannot be read; an empty text for one that can."""
        return itertools.repeat("", len(share))

    def file_of(self, index: int) -> str:
        """The file of an example that is refused, below dataset_path."""
        raise NotImplementedError

    def prepare(self, indices: list[int]) -> RawBatch | list[int]:
        """What a loader worker does ahead of time for a batch.

        Returns the batch, or its indices if sending the batch would cost more than reading it.
        """
        return self[indices]

    def deliver(self, prepared: RawBatch | list[int]) -> RawBatch:
        """The batch, in the training process, from what `prepare` returned."""
        return prepared if isinstance(prepared, RawBatch) else self[prepared]

    def stored(self, indices: list[int]) -> Tensor:
        """[B, ...], as `clean` expects it."""
        raise NotImplementedError

    def clean(self, stored: Tensor, source: torch.Generator) -> Tensor:
        """x_0 of `stored`, on any device: float -1..1 of uint8 pixels [B, C, H, W].

        Only latents draw from `source`.
        """
        return to_images(stored)


class PixelData(TrainingData):
    """Images in memory: uint8 [N, C, H, W]."""

    def __init__(self, pixels: Tensor, labels: Tensor, class_names: tuple[str, ...]):
        spec = DataSpec(pixels.shape[1], pixels.shape[2], class_names, len(pixels))
        super().__init__(spec, labels)
        self.pixels = pixels

    def stored(self, indices: list[int]) -> Tensor:
        return self.pixels[indices]


class FolderData(TrainingData):
    """Pictures of a source, RGB, decoded and cropped to `size` when they are asked for.

    A small data set stays decoded in memory: decoding a phone's photograph takes as long as
    training a small network on it.
    """

    def __init__(self, files: LabelledFiles, files_sha256: str, size: int):
        """`files_sha256` is the digest of `files`, which one process computes."""
        spec = DataSpec(3, size, tuple(files.class_names), len(files))
        super().__init__(spec, torch.from_numpy(files.labels))
        self.files, self.files_sha256 = files, files_sha256
        self._kept: dict[int, np.ndarray] = {}
        self._keeps_pictures = spec.num_examples * 3 * size**2 <= KEPT_BYTES
        self.notes += files.notes

    def stored(self, indices: list[int]) -> Tensor:
        """uint8 [B, 3, H, W]; UserError names a file that cannot be decoded."""
        return channels_first(np.stack([self._picture(index) for index in indices]))

    def _picture(self, index: int) -> np.ndarray:
        if index in self._kept:
            return self._kept[index]
        try:
            pixels = read_image(self.files[index], self.spec.size)
        except UserError as error:
            raise UserError(
                f"{error}; replace it with a whole picture, or leave out such files: "
                "--set skip_bad=true --allow-changed data"
            ) from error
        if self._keeps_pictures:
            self._kept[index] = pixels.copy()  # not a view, which would keep the whole picture
        return pixels

    def record(self) -> dict[str, Any]:
        """Also the pictures' digest (of the whole folder), and that EXIF rotation is applied."""
        return {**super().record(), "files_sha256": self.files_sha256, "exif": "apply"}

    def refusals(self, share: range) -> Iterator[str]:
        """Decodes every picture of `share`."""

        def refusal(index: int) -> str:
            return why_unreadable(self.files[index], self.spec.size)

        # More threads than cores, because some wait for the disk. Decoders release the GIL.
        return in_threads(refusal, share, 2 * torch.get_num_threads(), at_once=16)

    def file_of(self, index: int) -> str:
        return self.files.name_of(index)


class LatentData(TrainingData):
    """Pictures encoded by a VAE, read from a latent file when they are asked for."""

    def __init__(self, reader: LatentReader):
        channels = reader.form.latent_channels
        spec = DataSpec(channels, reader.size, reader.class_names, len(reader))
        super().__init__(spec, reader.labels)
        self.reader = reader

    def record(self) -> dict[str, Any]:
        """Also the VAE that made the latents, if the file says which."""
        info = self.reader.info
        made_by = {key: getattr(info, key) for key in VAE_KEYS} if info else {}
        return {**super().record(), **made_by}

    def prepare(self, indices: list[int]) -> RawBatch | list[int]:
        """The batch; in a loader worker, its indices once its values are in the system's cache.

        The training process reads them from there much faster than a worker can send them.
        """
        if get_worker_info() and self.reader.is_plain:
            self.reader.fetch(indices)
            return indices
        return self[indices]

    def stored(self, indices: list[int]) -> Tensor:
        """Latents as stored: [B, 2C, H, W], mean and standard deviation, or [B, C, H, W]."""
        return self.reader.read(indices)

    def refusals(self, share: range) -> Iterator[str]:
        """Reads every row of `share`; UserError at the first bad one, for none can be left out."""
        for start in range(0, len(share), CHECKED_AT_ONCE):
            rows = share[start : start + CHECKED_AT_ONCE]
            self.reader.read(rows)
            yield from itertools.repeat("", len(rows))

    def clean(self, stored: Tensor, source: torch.Generator) -> Tensor:
        """x_0, drawn from the posterior with `source`."""
        return draw_latents(stored, source, self.reader.form)


def channels_first(pixels: np.ndarray) -> Tensor:
    """[N, C, H, W] of [N, H, W, C], contiguous."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


class Selection(TrainingData):
    """Some of a data set's examples, renumbered from 0."""

    def __init__(self, data: TrainingData, kept: Tensor):
        super().__init__(dataclasses.replace(data.spec, num_examples=len(kept)), data.labels[kept])
        self.data, self.kept = data, kept.numpy()
        self.notes, self.skipped = data.notes, data.skipped

    def __getitem__(self, indices: list[int]) -> RawBatch:
        return self.data[self.kept[indices].tolist()]

    def record(self) -> dict[str, Any]:
        return {**self.data.record(), **super().record()}

    def prepare(self, indices: list[int]) -> RawBatch | list[int]:
        return self.data.prepare(self.kept[indices].tolist())

    def deliver(self, prepared: RawBatch | list[int]) -> RawBatch:
        return self.data.deliver(prepared)

    def clean(self, stored: Tensor, source: torch.Generator) -> Tensor:
        return self.data.clean(stored, source)


def in_memory(images: LabelledImages, class_names: tuple[str, ...]) -> TrainingData:
    labels = torch.from_numpy(images.labels)
    return PixelData(channels_first(images.pixels), labels, class_names)


def load_folder_data(request: DataRequest) -> TrainingData:
    files = list_pictures(request.folder, request.processes, request.index_folder)
    # With skip_bad, `check_examples` finds what is missing or no picture.
    sizes_of = files.sizes if request.skip_bad else files.checked_sizes
    files_sha256 = request.processes.on_rank0(lambda: files.digest(sizes_of()))
    return FolderData(files, files_sha256, request.data_size)


def list_pictures(
    folder: Path, processes: Processes, index_folder: Path | None = None
) -> LabelledFiles:
    """`list_source`, by rank 0; UserError where another process sees other pictures."""
    files = processes.on_rank0(lambda: list_source(folder, index_folder))
    sizes = processes.gather(files.some_sizes())
    for rank, seen in enumerate(sizes):
        if seen != sizes[0]:
            raise UserError(f"{folder}: process {rank} sees other pictures there than process 0")
    return files


def load_latents_data(request: DataRequest) -> TrainingData:
    """The latents in dataset_path; UserError where they are not as the config describes them."""
    reader = LatentReader(request.folder / LATENT_FILE)
    refuse_other_size(request, reader)
    if reader.info:
        refuse_other_vae(request.vae, reader.path, reader.info)
    data = LatentData(reader)
    data.notes += reader.check_values()
    return data


def find_latents(request: DataRequest) -> LatentReader | None:
    """The latent file of the request, if that is of latents and the file is there."""
    if not DATASETS[request.dataset_type].is_latent or not request.dataset_path:
        return None
    path = request.folder / LATENT_FILE
    return LatentReader(path) if path.exists() else None


def refuse_other_size(request: DataRequest, reader: LatentReader) -> None:
    """UserError where the latents have another side than the config says."""
    if reader.size != request.data_size:
        raise UserError(
            f"data_size: {request.data_size}, and the latents in {reader.path} have side "
            f"{reader.size}"
        )


def refuse_other_vae(vae_name: str, path: Path, info: LatentInfo) -> None:
    """UserError if the VAE `vae_name` is not the one that made the latents.

    A VAE of another name may have the same weights, so these are compared.
    """
    if vae_name == info.vae:
        return
    try:
        if vae_digest(find_vae(vae_name)) == info.vae_sha256:
            return
        why = "has other weights"
    except UserError as error:
        why = f"cannot be compared with it ({error})"
    raise UserError(
        f"{path}: made by the VAE {info.vae}, and vae: {vae_name} {why}; say vae: {info.vae}"
    )


@dataclass(frozen=True)
class DataSet:
    """A kind of data set: what it is made of, how to load it, and its usual training settings."""

    channels: int
    num_classes: int | None  # None: known only from the data themselves
    load: Callable[[DataRequest], TrainingData]
    folder: str = ""  # what dataset_path must hold; empty where there is no dataset_path
    size: int | None = None  # side, where only one is possible
    is_latent: bool = False  # encoded by a VAE, which must decode the samples
    has_files: bool = False  # one file per picture, which may be damaged or mirrored
    load_test: Callable[[DataRequest], TrainingData] | None = None  # images never trained on
    # Defaults of config keys.
    optimizer: str = "AdamW"
    ema_every_steps: int = 1
    unet_augment_probability: float = 0.0  # of an unconditional UNet; 0 for other backbones


DATASETS = {
    "Imagenet": DataSet(4, 1000, load_latents_data, f"the folder of {LATENT_FILE}", is_latent=True),
    "CIFAR10": DataSet(
        3,
        10,
        lambda asked: in_memory(cifar10.load_training_set(asked.folder), cifar10.CLASS_NAMES),
        "a folder for torchvision's CIFAR-10, which is fetched if need be",
        load_test=lambda asked: in_memory(cifar10.load_test_set(asked.folder), cifar10.CLASS_NAMES),
        size=32,
        optimizer="RAdam",
        ema_every_steps=16,
        unet_augment_probability=0.12,
    ),
    "FashionMNIST": DataSet(
        1,
        10,
        lambda asked: in_memory(fashion.load_training_set(asked.folder), fashion.CLASS_NAMES),
        "a folder for torchvision's Fashion-MNIST, which is fetched if need be",
        load_test=lambda asked: in_memory(fashion.load_test_set(asked.folder), fashion.CLASS_NAMES),
        size=fashion.SIDE,
    ),
    "ImageFolder": DataSet(
        3,
        None,
        load_folder_data,
        "a folder with one folder of pictures per class, or a tar",
        has_files=True,
    ),
    "Digits": DataSet(
        1,
        10,
        lambda _: in_memory(digits.load_training_set(), digits.CLASS_NAMES),
        load_test=lambda _: in_memory(digits.load_test_set(), digits.CLASS_NAMES),
        size=8,
    ),
}


class Outline(NamedTuple):
    """What is known of a data set before it is loaded."""

    num_classes: int
    channels: int  # of x_0
    image_shape: tuple[int, int, int]  # [C, H, W] of the pictures, decoded
    form: LatentForm | None  # of latents


def outline(request: DataRequest) -> Outline:
    """What a look at the folder tells; where no latent file is there yet, that of ImageNet."""
    dataset, size = DATASETS[request.dataset_type], request.data_size
    num_classes = dataset.num_classes or count_classes(request.folder, request.index_folder)
    if not dataset.is_latent:
        return Outline(num_classes, dataset.channels, (dataset.channels, size, size), None)
    form = LatentForm()
    if reader := find_latents(request):
        refuse_other_size(request, reader)
        num_classes, form = len(reader.class_names), reader.form
    side = form.pixels_per_latent * size
    return Outline(num_classes, form.latent_channels, (3, side, side), form)


class MadeUpData(TrainingData):
    """Grey samples in the shapes of a data set, for timing steps."""

    def __init__(self, request: DataRequest, num_examples: int):
        seen = outline(request)
        names = tuple(map(str, range(seen.num_classes)))
        spec = DataSpec(seen.channels, request.data_size, names, num_examples)
        super().__init__(spec, torch.arange(num_examples) % len(names))
        self.form = seen.form

    def stored(self, indices: list[int]) -> Tensor:
        """Zeros, [B, ...], as the data set itself is stored."""
        side = (self.spec.size, self.spec.size)
        if self.form:
            return torch.zeros(len(indices), self.form.stored_channels, *side)
        return torch.zeros(len(indices), self.spec.channels, *side, dtype=torch.uint8)

    def clean(self, stored: Tensor, source: torch.Generator) -> Tensor:
        """x_0, by the same computation."""
        if self.form:
            return draw_latents(stored, source, self.form)
        return super().clean(stored, source)

    def whole(self) -> RawBatch:
        return self[list(range(len(self)))]
