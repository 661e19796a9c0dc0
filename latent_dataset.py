"""Turn pictures into imagenet_latent.hdf5, which dataset_type Imagenet trains on.

    python latent_dataset.py --data-path photos --save-path data/photos --image-size 256
    torchrun --nproc-per-node=8 latent_dataset.py --data-path imagenet/train \\
        --save-path data/imagenet-latents --image-size 256 --exif ignore
    python latent_dataset.py --data-path ILSVRC2012_img_train.tar --save-path data/latents \\
        --image-size 256 --exif ignore
    python latent_dataset.py --data-path photos --save-path data/photos --image-size 256 \\
        --vae folders/sd-vae-ft-mse --dtype float16 --skip-bad

--vae takes any image autoencoder of diffusers: a name on the Hugging Face Hub, or a folder.
If it is stopped, at any moment, the same command continues. --data-path is a folder of class
folders, a tar of these or of a tar per class, or a folder of WebDataset's shards or of parquet or
arrow files. Nothing is unpacked. Classes have the numbers that their source gives them. Folders and
tars come in the order of their numbers if all names are numbers, else in alphabetical order.
"""

from support.system.command import command_parser, run_command  # isort: skip - must be first

import argparse
import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from os.path import expanduser
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from support.data import autoencoders
from support.data.autoencoders import LatentForm, default_encode_batch, encode
from support.data.datasets import channels_first, list_pictures
from support.data.folders import LabelledFiles, describe_classes
from support.data.images import read_image, to_images
from support.data.latent_parts import PART_IMAGES, SKIPPED_FILE, Part, PartsFolder, Plan
from support.data.latents import USUAL_DEVIATIONS, LatentInfo
from support.data.vae import CONFIG_FILE, VAE_NAME, FoundVae, find_vae, load_vae
from support.runs.logbook import code_version, duration
from support.system.digests import weights_digest
from support.system.files import UserError
from support.system.hardware import allow_tf32, time_convolutions
from support.system.processes import Processes, connected

SECONDS_BETWEEN_LINES = 10
TIMEOUT_MINUTES = 120.0  # how long a process that is done waits for the slowest

# B images of a batch


def say(processes: Processes, text: str) -> None:
    """Print a line at once, from the main process alone."""
    if processes.is_main:
        print(text, flush=True)


# Reading pictures


class LoadedPictures(NamedTuple):
    """A batch's readable pictures, uint8 [B, 3, H, W], with their labels; and the others.

    Without any readable picture, `pixels` is empty.
    """

    pixels: torch.Tensor
    labels: list[int]
    unreadable: list[tuple[str, str]]  # path below the data folder, and why


class Pictures(Dataset):
    """Batches of pictures, cropped to size, by lists of their indices."""

    def __init__(self, files: LabelledFiles, plan: Plan):
        self.files, self.size = files, plan.image_size
        self.apply_exif = plan.exif == "apply"

    def __getitem__(self, indices: Sequence[int]) -> LoadedPictures:
        pixels, labels, unreadable = [], [], []
        for index in indices:
            try:
                pixels.append(read_image(self.files[index], self.size, self.apply_exif))
                labels.append(int(self.files.labels[index]))
            except UserError as error:  # raised in a worker, it would be more than a line
                unreadable.append((self.files.name_of(index), str(error)))
        readable = channels_first(np.stack(pixels)) if pixels else torch.empty(0)
        return LoadedPictures(readable, labels, unreadable)


def batches_of(images: range, batch_size: int) -> list[range]:
    return [images[start : start + batch_size] for start in range(0, len(images), batch_size)]


# Making parts


@dataclass
class Progress:
    """What this process has done; the main process prints it from time to time."""

    processes: Processes
    total_images: int  # of this process
    done_images: int = 0
    vae_seconds: float = 0.0
    started: float = field(default_factory=time.monotonic)
    printed: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def add(self, num_images: int) -> None:
        """Count images; print an estimate for all processes if it is time for one."""
        self.done_images += num_images
        if time.monotonic() - self.printed > SECONDS_BETWEEN_LINES:
            self.printed = time.monotonic()
            # All processes have about as many parts, and are about as far.
            count = self.processes.world_size
            rate = self.done_images / self.seconds
            left = self.total_images - self.done_images
            say(
                self.processes,
                f"about {self.done_images * count} of {self.total_images * count} images, "
                f"{rate * count:.1f} images/s, ETA {duration(left / rate)}",
            )

    def summary(self) -> str:
        """What all processes did; every one of them has to call this."""
        counts = torch.tensor([self.done_images, self.vae_seconds, self.seconds])
        summed = self.processes.sum_over_ranks(counts.to(self.processes.device))
        images, vae_seconds, seconds = summed.tolist()
        return (
            f"{images:.0f} images in {duration(self.seconds)}, {images / self.seconds:.1f} "
            f"images/s; the VAE took {vae_seconds / seconds:.0%} of the time"
        )


@dataclass
class PartMaker:
    """Makes parts of what a loader gives, with a VAE."""

    plan: Plan
    arguments: argparse.Namespace
    loader: Iterator[LoadedPictures]  # the batches of the parts to be made, in order
    vae: Any
    form: LatentForm
    progress: Progress
    is_compared: bool = False  # with the same in fp32

    def make(self, index: int) -> Part:
        """The next part."""
        images = self.plan.images_of(index)
        side = self.plan.image_size // self.form.pixels_per_latent
        moments = [np.empty((0, self.form.stored_channels, side, side), self.plan.dtype)]
        labels: list[int] = []
        skipped: list[str] = []
        for batch in batches_of(images, self.arguments.device_batch_size):
            loaded = next(self.loader)
            for path, reason in loaded.unreadable:
                if not self.arguments.skip_bad:
                    raise UserError(f"{reason}; --skip-bad leaves out such files")
                skipped.append(path)
            if loaded.labels:
                moments.append(self.encode(loaded.pixels))
            labels += loaded.labels
            self.progress.add(len(batch))
        latents = np.concatenate(moments)
        if not np.isfinite(latents).all():
            raise UserError(
                f"vae: {self.arguments.vae}: gives values that are not finite in {latents.dtype} "
                f"for pictures {images.start} to {images.stop - 1}"
            )
        return Part(latents, np.array(labels, np.int64), tuple(skipped))

    def encode(self, pixels: torch.Tensor) -> np.ndarray:
        """Latents as stored, of uint8 [B, 3, H, W]; the time it takes counts as the VAE's."""
        started = time.monotonic()
        images = to_images(pixels.to(self.progress.processes.device))
        size = self.arguments.encode_batch_size or default_encode_batch(self.plan.image_size)
        moments = encode(self.vae, images, size, self.plan.precision == "bf16")
        if self.plan.precision != "fp32" and not self.is_compared:
            self.is_compared = True
            self.compare(images[:size], moments[:size])
        with np.errstate(over="ignore"):  # `make` refuses what float16 cannot hold
            values = moments.cpu().numpy().astype(self.plan.dtype)  # waits for the device
        self.progress.vae_seconds += time.monotonic() - started
        return values

    def compare(self, images: torch.Tensor, moments: torch.Tensor) -> None:
        """Print how far the first moments are from those in fp32."""
        processes = self.progress.processes
        allow_tf32(processes.device, False)
        exact = encode(self.vae, images, len(images))
        allow_tf32(processes.device, True)
        errors = (moments - exact).abs()
        say(
            processes,
            f"precision {self.plan.precision}: the first {len(images)} pictures' latents are "
            f"off by {errors.mean():.2g} on average and {errors.max():.2g} at most; the standard "
            f"deviation of their means is {exact[:, : self.form.latent_channels].std():.2g}",
        )


# The command


class Extraction(NamedTuple):
    """What was extracted, and from what."""

    files: LabelledFiles
    found: FoundVae
    form: LatentForm
    plan: Plan
    folder: PartsFolder

    def describe(self, labels: np.ndarray, rows: np.ndarray) -> LatentInfo:
        """The attributes of a file with these labels; prints what x_0 is like, by some rows."""
        names, form = self.files.class_names, self.form
        side = self.plan.image_size // form.pixels_per_latent
        stored = torch.from_numpy(rows.reshape(-1, form.stored_channels, side, side))
        source = torch.Generator().manual_seed(self.plan.seed)
        as_made = replace(form, latent_scale=1.0, latent_shift=0.0)
        z, by = autoencoders.draw_latents(stored, source, as_made), "the VAE's statistics"
        if not form.latent_scale:
            form, by = autoencoders.normalised_by(form, z), "statistics measured on these latents"
        deviation, mean = (value.item() for value in torch.std_mean(form.normalise(z)))
        print(f"x_0, normalised by {by}: mean {mean:.2g}, standard deviation {deviation:.2g}")
        if not USUAL_DEVIATIONS[0] <= deviation <= USUAL_DEVIATIONS[1]:
            print(
                f"a deviation near 1 is usual; with null as scaling_factor in its {CONFIG_FILE}, "
                f"statistics are measured when {self.folder.target} is made anew"
            )
        return LatentInfo(
            vae=self.found.name,
            vae_revision=self.found.revision,
            **vars(form),
            class_names=tuple(names),
            class_counts=tuple(np.bincount(labels, minlength=len(names)).tolist()),
            code_version=code_version(),
            **self.plan.recipe(),
        )


def run_extraction(
    arguments: argparse.Namespace, processes: Processes, until_end: contextlib.ExitStack
) -> Extraction | None:
    """Make the missing parts, all processes together; None if the file is already there.

    The main process owns the parts' folder until the end.
    """
    files = list_pictures(Path(arguments.data_path), processes, Path(arguments.save_path))
    say(processes, describe_classes(files.class_names, np.bincount(files.labels).tolist()))
    found = find_vae(arguments.vae)
    for line in (*files.notes, f"loading the VAE {found.name}, {found.vae_class}"):
        say(processes, line)
    vae = load_vae(found, processes.device)
    plan = Plan(
        num_images=len(files),
        images_sha256=processes.on_rank0(files.digest),
        image_size=arguments.image_size,
        vae_sha256=weights_digest(vae.state_dict()),
        dtype=arguments.dtype,
        seed=arguments.seed,
        part_images=max(PART_IMAGES, arguments.device_batch_size),
        exif=arguments.exif,
        precision=arguments.precision,
    )
    folder = PartsFolder(Path(arguments.save_path))
    if processes.on_rank0(lambda: folder.is_made(plan)):
        say(processes, f"{folder.target} was made before")
        return None
    form = autoencoders.measure_form(vae, plan.image_size)
    side = plan.image_size // form.pixels_per_latent
    say(processes, f"data_size {side}: latents have side {side}, {form.latent_channels} channels")
    processes.on_rank0(lambda: until_end.enter_context(folder.owned()))
    plan = processes.on_rank0(lambda: folder.begin(plan))
    if not arguments.skip_bad:
        processes.on_rank0(lambda: refuse_skipped(folder, plan, arguments.data_path))
    missing = processes.on_rank0(lambda: folder.missing_parts(plan))
    say(processes, f"pictures in {plan.num_parts} parts; {len(missing)} of them are to be made")
    parts = missing[processes.rank :: processes.world_size]
    progress = Progress(processes, sum(len(plan.images_of(part)) for part in parts))
    batches = [
        batch
        for part in parts
        for batch in batches_of(plan.images_of(part), arguments.device_batch_size)
    ]
    loader = DataLoader(
        Pictures(files, plan), sampler=batches, batch_size=None, num_workers=arguments.num_workers
    )
    maker = PartMaker(plan, arguments, iter(loader), vae, form, progress)
    for index in parts:
        folder.write_part(index, maker.make(index))
    summary = progress.summary()
    if missing:
        say(processes, summary)
    return Extraction(files, found, form, plan, folder)


def refuse_skipped(folder: PartsFolder, plan: Plan, data_path: str) -> None:
    """UserError if finished parts left out pictures, which now is not asked for."""
    if skipped := folder.skipped(plan):
        raise UserError(
            f"{Path(data_path) / skipped[0]}: not a readable picture, as {len(skipped)} in all; "
            "earlier, --skip-bad left them out: give it again, or mend them and delete "
            f"{folder.folder}"
        )


def merge(extraction: Extraction) -> None:
    """Make one file of the parts."""
    target = extraction.folder.target
    print(f"merging {extraction.plan.num_parts} parts into {target}", flush=True)
    ledger = extraction.folder.merge(extraction.plan, extraction.describe)
    print(f"{sum(ledger.rows)} latents in {target}")
    if ledger.skipped:
        listed = target.with_name(SKIPPED_FILE)
        print(f"left out {len(ledger.skipped)} unreadable pictures, listed in {listed}")


def whole_number(least: int) -> Callable[[str], int]:
    """A parser of whole numbers of `least` or more."""

    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of {least} or more")
        return int(text)

    return read


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line's options."""
    parser = command_parser(__doc__)
    add = parser.add_argument
    size_help = "side to crop pictures to, such as 256; data_size, that of the latents, is printed"
    batch_help = "pictures loaded at a time, per process (default 256)"
    encode_help = "pictures encoded at a time (default 32 of 256 pixels, 8 of 512)"
    precision_help = (
        "of the VAE's arithmetic (default fp32, as published); the others are faster on GPUs, and "
        "their error is printed"
    )
    workers_help = "loader processes that decode pictures, per process; 0 for none (default 4)"
    exif_help = (
        "whether to turn pictures upright as their EXIF data say (default apply); ImageNet's "
        "published recipe ignores them"
    )
    data_help = "class folders, or a tar, or a folder or 'pattern*' of shards"
    save_help = "folder for the file: a config's dataset_path"
    add("--data-path", required=True, type=expanduser, metavar="D", help=data_help)
    add("--save-path", required=True, type=expanduser, metavar="S", help=save_help)
    add("--image-size", required=True, type=whole_number(1), metavar="PIXELS", help=size_help)
    add("--device-batch-size", type=whole_number(1), default=256, metavar="B", help=batch_help)
    add("--encode-batch-size", type=whole_number(1), metavar="B", help=encode_help)
    add("--num-workers", type=whole_number(0), default=4, metavar="W", help=workers_help)
    add("--seed", type=whole_number(0), default=42, help="recorded; nothing is random here")
    add("--vae", default=VAE_NAME, metavar="NAME_OR_FOLDER", help=f"(default {VAE_NAME})")
    add("--dtype", choices=("float32", "float16"), default="float32")
    add("--precision", choices=("fp32", "tf32", "bf16"), default="fp32", help=precision_help)
    add("--exif", choices=("apply", "ignore"), default="apply", help=exif_help)
    add("--skip-bad", action="store_true", help="leave out unreadable pictures, and list them")
    add("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    arguments = parse_arguments(argv)
    save_path = arguments.save_path
    if Path(save_path).resolve().is_relative_to(Path(arguments.data_path).resolve()):
        raise UserError(
            f"--save-path {save_path}: is inside --data-path, where every folder may be a class"
        )
    with contextlib.ExitStack() as until_end:
        with connected(arguments.device, TIMEOUT_MINUTES) as processes:
            allow_tf32(processes.device, arguments.precision != "fp32")
            time_convolutions(processes.device)
            extraction = run_extraction(arguments, processes, until_end)
        if processes.is_main and extraction:  # the other processes need not wait for it
            merge(extraction)


if __name__ == "__main__":
    run_command(main)
