"""The data sets: what each is made of, and how it is loaded and checked."""

import dataclasses
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info
from tqdm import tqdm

from support.data import cifar10, fashion
from support.data.folders import (
    MOST_NAMED,
    LabelledFiles,
    class_folders,
    class_names,
    describe_classes,
    in_threads,
    printable,
    sizes_of_pictures,
)
from support.data.images import SKIPPED_FILE, read_image, to_images, why_unreadable
from support.data.latents import LATENT_FILE, MOMENT_CHANNELS, LatentInfo, LatentReader
from support.data.vae import LATENT_CHANNELS, VAE_NAME, draw_latents, find_vae, vae_digest
from support.system.files import UserError, shorten
from support.system.processes import Processes
from support.system.randomness import generator

# N examples, B samples of a microbatch, C channels, H = W side

DIGITS_TRAINING_COUNT = 1_197
DIGITS_LEVELS = 16
KEPT_BYTES = 1 << 27  # of decoded pictures in each process: 10,000 of 64 pixels a side
CHECKED_AT_ONCE = 256  # latents
VAE_KEYS = ("vae", "vae_revision", "vae_sha256", "latent_scale")  # as of LatentInfo
NAMES_OF_VAE = ("vae", "vae_revision")  # its weights are known by their digest
ALONE = Processes(0, 0, 1, torch.device("cpu"))


@dataclass(frozen=True)
class DataRequest:
    """What is asked for of a data set, by keys of the config."""

    dataset_type: str  # of DATASETS
    data_size: int  # side, in pixels or latents
    dataset_path: str | None = None
    batch_size: int = 1
    vae: str = VAE_NAME  # that made the latents
    skip_bad: bool = False  # leave out pictures that cannot be read
    held_out: int = 0  # images that no step is to train on
    seed: int = 0  # of which ones these are

    @property
    def folder(self) -> Path:
        """dataset_path; UserError where it is not set, or no folder."""
        if not self.dataset_path:
            folder = DATASETS[self.dataset_type].folder
            raise UserError(f"dataset_path: not set; {self.dataset_type} needs {folder}")
        path = Path(os.path.expanduser(self.dataset_path))
        try:
            os.scandir(path).close()
        except FileNotFoundError:
            pass  # some data sets are fetched
        except NotADirectoryError as error:
            raise UserError(f"dataset_path: {path} is a file; name the folder it is in") from error
        except OSError as error:
            raise UserError(f"dataset_path: {path} cannot be read ({error.strerror})") from error
        return path


@dataclass(frozen=True)
class SharedRequest(DataRequest):
    """A request of processes that load the data together."""

    processes: Processes = ALONE


@dataclass(frozen=True)
class DataSpec:
    """What a network and a sampler must know of a data set; recorded in every checkpoint."""

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
        return {
            "channels": self.channels,
            "size": self.size,
            "num_classes": self.num_classes,
            "class_names": list(self.class_names),
            "num_examples": self.num_examples,
        }


class RawBatch(NamedTuple):
    """Samples as stored, [B, ...], and their labels, [B] int64; on the CPU."""

    stored: Tensor
    labels: Tensor


class TrainingData(Dataset):
    """A data set: `spec`, and examples by lists of indices; `labels` is int64 [N]."""

    def __init__(self, spec: DataSpec, labels: Tensor):
        self.spec, self.labels = spec, labels
        self.held_out: TrainingData | None = None  # images that no step trains on, if asked for
        self.notes: list[str] = []  # what is to be said of it at the start
        self.skipped: list[str] = []  # files left out because they cannot be read

    def __len__(self) -> int:
        return self.spec.num_examples

    def __getitem__(self, indices: list[int]) -> RawBatch:
        return RawBatch(self.stored(indices), self.labels[indices])

    @property
    def class_counts(self) -> list[int]:
        return torch.bincount(self.labels, minlength=self.spec.num_classes).tolist()

    def record(self) -> dict[str, int | list[str] | list[int]]:
        """What a checkpoint says of the data that it was trained on."""
        return {**self.spec.to_dict(), "class_counts": self.class_counts}

    def find_bad(self, share: range, advance: Callable[[], object]) -> dict[int, str]:
        """Which examples of `share` cannot be read, and why; what is in memory has been."""
        return {}

    def leave_out(self, bad: list[int]) -> None:
        """Go on without these examples."""
        raise NotImplementedError

    def prepare(self, indices: list[int]) -> RawBatch | list[int]:
        """What is done of a batch ahead, where there are loader workers in one of them.

        The batch itself, or its indices where handing it over costs more than reading it again.
        """
        return self[indices]

    def deliver(self, prepared: RawBatch | list[int]) -> RawBatch:
        """The batch, in the training process, of what `prepare` handed over."""
        return prepared if isinstance(prepared, RawBatch) else self[prepared]

    def stored(self, indices: list[int]) -> Tensor:
        """[B, ...], as `clean` takes it."""
        raise NotImplementedError

    def clean(self, stored: Tensor, source: torch.Generator) -> Tensor:
        """x_0, float -1..1, of uint8 pixels [B, C, H, W] on any device; pixels draw nothing."""
        return to_images(stored)


class PixelData(TrainingData):
    """Images in memory: uint8 [N, C, H, W]."""

    def __init__(self, pixels: Tensor, labels: Tensor, class_names: tuple[str, ...]):
        super().__init__(
            DataSpec(pixels.shape[1], pixels.shape[2], class_names, len(pixels)), labels
        )
        self.pixels = pixels

    def stored(self, indices: list[int]) -> Tensor:
        return self.pixels[indices]


class FolderData(TrainingData):
    """Pictures in class folders, RGB, decoded and cropped to `size` when they are asked for.

    Where all of them together take little memory they are kept: a photograph of a phone takes as
    long to decode as a small network to train on.
    """

    def __init__(self, files: LabelledFiles, files_sha256: str, size: int):
        """`files_sha256` is the digest of `files`: to be taken once, by one process."""
        spec = DataSpec(3, size, tuple(files.class_names), len(files))
        super().__init__(spec, torch.from_numpy(files.labels))
        self.files, self.files_sha256 = files, files_sha256
        self._kept: dict[int, np.ndarray] | None = None
        if spec.num_examples * 3 * size**2 <= KEPT_BYTES:
            self._kept = {}
        self.notes += files.notes

    def stored(self, indices: list[int]) -> Tensor:
        """uint8 [B, 3, H, W]; UserError names a file that cannot be decoded."""
        return channels_first(np.stack([self._picture(index) for index in indices]))

    def _picture(self, index: int) -> np.ndarray:
        if self._kept is not None and index in self._kept:
            return self._kept[index]
        try:
            pixels = read_image(self.files[index], self.spec.size)
        except UserError as error:
            raise UserError(
                f"{error}; put a whole picture in its place, or go on without such files: "
                "--set skip_bad=true --allow-changed data"
            ) from error
        if self._kept is not None:
            self._kept[index] = pixels.copy()  # the crop alone, not what it was cut from
        return pixels

    def record(self) -> dict[str, Any]:
        """As for any data set, and which pictures; that they are turned upright they once were not.

        Of the whole folder, with those that are left out: one that was mended is another picture.
        """
        return {**super().record(), "files_sha256": self.files_sha256, "exif": "apply"}

    def find_bad(self, share: range, advance: Callable[[], object]) -> dict[int, str]:
        """Which pictures of `share` cannot be decoded, each of them tried."""
        bad = {}
        # More threads than cores: some of them wait for the disk. Decoders let others run.
        refusals = in_threads(
            lambda index: why_unreadable(self.files[index], self.spec.size),
            share,
            num_threads=2 * torch.get_num_threads(),
        )
        for index, refusal in zip(share, refusals, strict=True):
            advance()
            if refusal:
                bad[index] = refusal
        return bad

    def leave_out(self, bad: list[int]) -> None:
        """Go on without these; UserError where a class loses all of its pictures."""
        self.skipped = [os.fsdecode(name) for name in self.files.names[bad]]
        kept = np.delete(np.arange(len(self)), bad)
        names, labels = self.files.names[kept], self.files.labels[kept]
        self.files = dataclasses.replace(self.files, names=names, labels=labels)
        self.labels = torch.from_numpy(labels)
        self.spec = dataclasses.replace(self.spec, num_examples=len(kept))
        for name, count in zip(self.spec.class_names, self.class_counts, strict=True):
            if count == 0:
                raise UserError(f"{self.files.folder / name}: none of its pictures can be read")


class LatentData(TrainingData):
    """What a VAE makes of pictures, read from a latent file when it is asked for."""

    def __init__(self, reader: LatentReader):
        spec = DataSpec(LATENT_CHANNELS, reader.size, reader.class_names, len(reader))
        super().__init__(spec, reader.labels)
        self.reader = reader

    def record(self) -> dict[str, Any]:
        """As for any data set, with the VAE that made the latents if the file says which."""
        info = self.reader.info
        made_by = {key: getattr(info, key) for key in VAE_KEYS} if info else {}
        return {**super().record(), **made_by}

    def prepare(self, indices: list[int]) -> RawBatch | list[int]:
        """The batch; from a loader worker its indices, its values being in the system's cache.

        From there the training process has them in a fraction of the time that a worker takes to
        hand them over: the worker waits for the disk, and no more.
        """
        if get_worker_info() and self.reader.is_plain:
            self.reader.fetch(indices)
            return indices
        return self[indices]

    def stored(self, indices: list[int]) -> Tensor:
        """[B, 8, H, W]: the posterior's mean and then its standard deviation."""
        return self.reader.read(indices)

    def find_bad(self, share: range, advance: Callable[[], object]) -> dict[int, str]:
        """Reads every row of `share`; UserError at the first that is bad, for none is left out."""
        for start in range(0, len(share), CHECKED_AT_ONCE):
            rows = share[start : start + CHECKED_AT_ONCE]
            self.reader.read(rows)
            for _ in rows:
                advance()
        return {}

    def clean(self, stored: Tensor, source: torch.Generator) -> Tensor:
        """x_0 = (mean + std N) 0.18215, with N from `source`."""
        return draw_latents(stored, source)


def channels_first(pixels: np.ndarray) -> Tensor:
    """[N, C, H, W] of [N, H, W, C], contiguous."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


class Selection(TrainingData):
    """Some of a data set's examples, under numbers of their own."""

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


class DigitsSplit(NamedTuple):
    """Pixels uint8 [N, 8, 8, 1] and labels int64 [N] of the two halves."""

    training_pixels: np.ndarray
    training_labels: np.ndarray
    held_out_pixels: np.ndarray
    held_out_labels: np.ndarray


def digits_split() -> DigitsSplit:
    """scikit-learn's 1,797 digits: 1,197 to train on and 600 held out, by a fixed permutation."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.round(digits.images * (255 / DIGITS_LEVELS)).astype(np.uint8)[..., None]
    labels = digits.target.astype(np.int64)
    # RandomState's stream is frozen: the split is the same with every version of NumPy.
    order = np.random.RandomState(0).permutation(len(pixels))
    training, held_out = np.split(order, [DIGITS_TRAINING_COUNT])
    return DigitsSplit(pixels[training], labels[training], pixels[held_out], labels[held_out])


def load_digits_data(request: DataRequest) -> TrainingData:
    split = digits_split()
    return _digits(split.training_pixels, split.training_labels)


def load_held_out_digits(request: DataRequest) -> TrainingData:
    split = digits_split()
    return _digits(split.held_out_pixels, split.held_out_labels)


def _digits(pixels: np.ndarray, labels: np.ndarray) -> TrainingData:
    names = tuple(str(digit) for digit in range(10))
    return PixelData(channels_first(pixels), torch.from_numpy(labels), names)


def load_cifar10_data(request: DataRequest) -> TrainingData:
    return _whole_set(cifar10.load_training_set(request.folder))


def load_cifar10_test(request: DataRequest) -> TrainingData:
    return _whole_set(cifar10.load_test_set(request.folder))


def load_fashion_data(request: DataRequest) -> TrainingData:
    return _whole_set(fashion.load_training_set(request.folder))


def load_fashion_test(request: DataRequest) -> TrainingData:
    return _whole_set(fashion.load_test_set(request.folder))


def _whole_set(images: cifar10.Cifar10Images | fashion.FashionImages) -> TrainingData:
    labels = torch.from_numpy(images.labels)
    return PixelData(channels_first(images.pixels), labels, images.class_names)


def load_folder_data(request: SharedRequest) -> TrainingData:
    files = list_pictures(request.folder, request.processes)

    def digest() -> str:
        # With skip_bad, `check_examples` finds what is missing or no picture.
        return files.digest(files.sizes(-1) if request.skip_bad else sizes_of_pictures(files))

    return FolderData(files, request.processes.on_rank0(digest), request.data_size)


def list_pictures(folder: Path, processes: Processes) -> LabelledFiles:
    """`class_folders`, listed by the main process; UserError where another sees other pictures."""
    files = processes.on_rank0(lambda: class_folders(folder))
    sizes = processes.gather(files.some_sizes())
    for rank, seen in enumerate(sizes):
        if seen != sizes[0]:
            raise UserError(f"{folder}: process {rank} sees other pictures there than process 0")
    return files


def load_latents_data(request: DataRequest) -> TrainingData:
    """The latents in dataset_path; UserError where they are not what the config describes."""
    reader = LatentReader(request.folder / LATENT_FILE)
    if reader.size != request.data_size:
        raise UserError(
            f"data_size: {request.data_size}, and the latents in {reader.path} have side "
            f"{reader.size}"
        )
    if reader.info:
        refuse_other_vae(request.vae, reader.path, reader.info)
    data = LatentData(reader)
    data.notes += reader.check_values()
    return data


def refuse_other_vae(vae_name: str, path: Path, info: LatentInfo) -> None:
    """UserError if the VAE `vae_name` is not the one that made the latents.

    Under another name it may have the same weights, which are then read to find out.
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
    """A kind of data set: what it is made of, how to load it, and how it is usually trained on."""

    channels: int
    num_classes: int | None  # None: known only from the data themselves
    load: Callable[[SharedRequest], TrainingData]
    folder: str = ""  # what dataset_path holds; nothing where there is none
    size: int | None = None  # side, where there is but one
    is_latent: bool = False  # made by a VAE, to be decoded by it
    has_files: bool = False  # a file for each picture, which may be damaged or mirrored
    load_test: Callable[[DataRequest], TrainingData] | None = None  # what is not trained on anyway
    # What the config leaves open.
    optimizer: str = "AdamW"
    ema_every_steps: int = 1
    unet_augment_probability: float = 0.0  # with an unconditional backbone; else there is none


DATASETS = {
    "Imagenet": DataSet(
        LATENT_CHANNELS,
        1000,
        load_latents_data,
        "the folder of imagenet_latent.hdf5",
        is_latent=True,
    ),
    "CIFAR10": DataSet(
        3,
        10,
        load_cifar10_data,
        "a folder for torchvision's CIFAR-10, which is fetched if need be",
        size=32,
        optimizer="RAdam",
        ema_every_steps=16,
        unet_augment_probability=0.12,
        load_test=load_cifar10_test,
    ),
    "FashionMNIST": DataSet(
        1,
        10,
        load_fashion_data,
        "a folder for torchvision's Fashion-MNIST, which is fetched if need be",
        size=fashion.SIDE,
        load_test=load_fashion_test,
    ),
    "ImageFolder": DataSet(
        3,
        None,
        load_folder_data,
        "a folder in which each class has a folder of pictures",
        has_files=True,
    ),
    "Digits": DataSet(1, 10, load_digits_data, size=8, load_test=load_held_out_digits),
}


def count_classes(request: DataRequest) -> int:
    """How many classes a data set has, by a look at its folder where need be."""
    dataset = DATASETS[request.dataset_type]
    if dataset.is_latent and request.dataset_path:
        path = request.folder / LATENT_FILE
        if path.exists():
            return len(LatentReader(path).class_names)
    if dataset.num_classes is None:
        return len(class_names(request.folder))
    return dataset.num_classes


class MadeUpData(TrainingData):
    """Grey samples in the shapes of a data set, to time steps on."""

    def __init__(self, request: DataRequest, num_examples: int):
        dataset = DATASETS[request.dataset_type]
        names = tuple(map(str, range(count_classes(request))))
        spec = DataSpec(dataset.channels, request.data_size, names, num_examples)
        super().__init__(spec, torch.arange(num_examples) % len(names))
        self.is_latent = dataset.is_latent

    def stored(self, indices: list[int]) -> Tensor:
        """Zeros, [B, ...], as the data set itself is stored."""
        side = (self.spec.size, self.spec.size)
        if self.is_latent:
            return torch.zeros(len(indices), MOMENT_CHANNELS, *side)
        return torch.zeros(len(indices), self.spec.channels, *side, dtype=torch.uint8)

    def clean(self, stored: Tensor, source: torch.Generator) -> Tensor:
        """x_0, made of it by the same work."""
        return draw_latents(stored, source) if self.is_latent else super().clean(stored, source)

    def whole(self) -> RawBatch:
        return self[list(range(len(self)))]


def build_data(
    request: DataRequest, processes: Processes = ALONE, check_data: bool = False
) -> TrainingData:
    """The data set that is asked for; UserError where it is missing, damaged or too small.

    With `check_data` or `skip_bad` every example is read, by all processes together.
    """
    shared = SharedRequest(**vars(request), processes=processes)
    data = DATASETS[request.dataset_type].load(shared)
    if check_data or request.skip_bad:
        check_examples(data, processes, request.skip_bad)
    where = request.dataset_path or request.dataset_type
    if request.held_out:
        data = hold_out(data, request, where)
    if len(data) < request.batch_size:
        raise UserError(
            f"batch_size: {request.batch_size} is more than the {len(data)} examples of {where}; "
            f"lower it: --set batch_size={len(data)} at most"
        )
    # Here and not on the device, where a wrong label ends the process without saying so.
    for label in data.labels.aminmax():
        if not 0 <= label < data.spec.num_classes:
            raise UserError(
                f"{where}: has a label {label}; its {data.spec.num_classes} classes go from 0 to "
                f"{data.spec.num_classes - 1}"
            )
    data.notes.insert(0, describe_classes(data.spec.class_names, data.class_counts))
    return data


def hold_out(data: TrainingData, request: DataRequest, where: str) -> TrainingData:
    """The data set without the images of its `held_out`; all of it where those are of its own.

    UserError where there are not as many.
    """
    load_test = DATASETS[request.dataset_type].load_test
    source = load_test(request) if load_test else data
    if request.held_out > len(source) - (0 if load_test else request.batch_size):
        most = len(source) if load_test else max(0, len(source) - request.batch_size)
        whose = (
            "test images" if load_test else f"images, of which a batch needs {request.batch_size}"
        )
        raise UserError(
            f"held_out: {request.held_out} is too many: {where} has {len(source)} {whose}; "
            f"{most} at most"
        )
    order = torch.randperm(len(source), generator=generator(request.seed, "held-out images"))
    chosen, rest = order[: request.held_out].sort().values, order[request.held_out :].sort().values
    training = data if load_test else Selection(data, rest)
    training.held_out = Selection(source, chosen)
    whose = "test images" if load_test else "images, on which no step trains"
    training.notes.append(f"held out: {request.held_out} {whose}")
    names = zip(data.spec.class_names, data.class_counts, training.class_counts, strict=True)
    if emptied := [printable(name) for name, before, left in names if before and not left]:
        training.notes.append(
            f"held out: all images of {', '.join(emptied[:MOST_NAMED])}: no step trains on "
            "what samples of that class are to look like"
        )
    return training


def check_examples(data: TrainingData, processes: Processes, skip_bad: bool) -> None:
    """Read every example; those that cannot be read are left out, or named by a UserError.

    Each process reads its share, and all come to the same list: none waits long for another.
    """
    rank, count = processes.rank, processes.world_size
    share = range(len(data) * rank // count, len(data) * (rank + 1) // count)
    # disable=None: a progress bar on terminals only
    quiet = None if processes.is_main else True
    with tqdm(total=len(share), desc="checking", unit="example", disable=quiet) as bar:
        own = data.find_bad(share, bar.update)
    # Shares are in order, and so are those of all.
    bad = {index: why for found in processes.gather(own) for index, why in found.items()}
    if bad and not skip_bad:
        named = "; ".join(list(bad.values())[:MOST_NAMED])
        more = f"; and {len(bad) - MOST_NAMED} more" if len(bad) > MOST_NAMED else ""
        raise UserError(
            f"{len(bad)} of {len(data)} pictures cannot be read: {named}{more}; mend or delete "
            "them, or leave them out by --set skip_bad=true"
        )
    count = len(data)
    if bad:
        data.leave_out(list(bad))
        data.notes.append(
            f"left out {len(bad)} of {count} pictures, which cannot be read: see {SKIPPED_FILE}"
        )
    data.notes.append(f"checked: {len(data)} examples can be read")


def compare_data(
    before: Mapping[str, Any], now: Mapping[str, Any], source: str, is_allowed: bool
) -> list[str]:
    """A line where a run goes on with other data than before; UserError where it must not.

    Other classes are refused in any case: labels would have another meaning.
    """
    notes = []
    if "exif" in now and "exif" not in before:
        notes.append("pictures are turned upright by their EXIF data from here on")
    # By what was recorded: older checkpoints say less.
    changes = {
        key: value
        for key, value in before.items()
        if now.get(key) != value and key not in NAMES_OF_VAE
    }
    if not changes:
        return notes
    listed = "; ".join(
        "other names or sizes of pictures"
        if key == "files_sha256"
        else f"{key} {shorten(was)} then, {shorten(now.get(key))} now"
        for key, was in changes.items()
    )
    may_go_on = changes.keys() <= {"num_examples", "class_counts", "files_sha256"}
    if may_go_on and is_allowed:
        return [
            *notes,
            f"data changed: {listed}; from here on their order is another, and so are images that "
            "are held out; epochs are counted as if these had been the data from the start",
        ]
    way_out = "these need a run of their own: say another working_dir"
    if may_go_on:
        way_out = "--allow-changed data continues with them, in another order"
    raise UserError(f"{source}: trained on other data: {listed}; {way_out}")
