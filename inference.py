"""Sample images from a checkpoint into an .npz (`arr_0`, uint8 [N, H, W, C]; `arr_1`, labels [N]).

    python inference.py --config configs/digits.yaml --ckpt-steps 1000 --num-samples 1000
    python inference.py --ckpt shared/ckpts/1000.pt --num-samples 32 --labels cat,dog --grid g.png
    torchrun --nproc-per-node=8 inference.py --config SoFlow/XL-2-cond/config.yaml \\
        --ckpt-steps 1200000 --eval-batch-size 128 --eval-NFE 2
    python inference.py --config configs/digits.yaml --ckpt-steps 1000 --num-samples 100 \\
        --labels 0,1,2,3,4,5,6,7,8,9 --grid digits.png

The images come from the averaged weights of ckpts/{steps}.pt in the run's folder and go to
evals/{steps}_{NFE}NFE_{seed}.npz there. That folder is the one that the config lies in, beside
ckpts/, or else its working_dir. Guidance was trained in: there is no scale to choose.
"""

from support.system.command import run_command  # isort: skip - first: it attends to the start

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from os.path import expanduser
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from config import Config, add_options, config_from_dict, load_config, shorten, suggest
from models import Method, build_model
from sampling import (
    SampleRequest,
    decoder_record,
    decoding,
    find_decoder,
    sample_pixels,
    write_samples,
)
from support.data.datasets import DATASETS
from support.data.grids import Grid, GridImages, save_grid
from support.data.images import ImageBatch
from support.runs.checkpoint import (
    check_weights,
    checkpoint_path,
    read_checkpoint,
    run_of_checkpoint,
    run_of_config,
)
from support.runs.logbook import record_of, weights_digest, write_record
from support.system.files import UserError, check_writable, make_folder
from support.system.hardware import allow_tf32
from support.system.processes import Processes, connected
from support.system.randomness import GivenLabels, PerImageStream, ReferenceStream, SamplingStream

# Entries of a record, or of the config in it, that decide the images.
DECISIVE = (
    *("weights_sha256", "noising_type", "coefficient_type", "model_type", "dataset_type"),
    *("num_images", "NFE", "seed", "labels", "noise_stream"),
    *("vae", "vae_revision", "latent_scale"),
)
DECISIVE_IN_REFERENCE_STREAM = ("eval_batch_size", "processes", "device")
# The reference's of this command, which differ from those of its configs.
DEFAULTS = ("eval_batch_size=32", "eval_NFE=1", "seed=42")


class Sources(NamedTuple):
    """What is sampled from, and the folder that its samples go to."""

    config: Config
    checkpoint: Path
    results: Path


def find_sources(arguments: argparse.Namespace, report: Callable[[str], None]) -> Sources:
    """The checkpoint that the command line asks for, with its config; `report` takes notes.

    A --set working_dir is the folder of the run without question. Otherwise that is where the
    config lies, or where the checkpoint does that --ckpt names.
    """
    settings = settings_of(arguments)
    chosen = next((text for text in settings if text.startswith("working_dir=")), None)
    if arguments.ckpt is None:
        if arguments.config is None:
            raise UserError("--config: needed with --ckpt-steps; --ckpt FILE does without")
        config = load_config(arguments.config, settings, report)
        folder = find_run(config, Path(arguments.config), is_chosen=chosen is not None)
        checkpoint = checkpoint_path(folder / "ckpts", arguments.ckpt_steps)
        return Sources(config, checkpoint, folder / "evals")
    checkpoint = Path(arguments.ckpt)
    config = (
        load_config(arguments.config, settings, report)
        if arguments.config
        else config_of_checkpoint(checkpoint, settings, report)
    )
    run = Path(config.working_dir) if chosen else run_of_checkpoint(checkpoint)
    return Sources(config, checkpoint, run / "evals" if run else checkpoint.parent)


def find_run(config: Config, config_path: Path, is_chosen: bool) -> Path:
    """The folder of the run that a config stands for: the one it lies in, else its working_dir.

    UserError where there is none, or where each is the folder of another run and the user has not
    chosen.
    """
    named, beside = Path(config.working_dir), run_of_config(config_path)
    if beside and not is_chosen and named.resolve() != beside.resolve():
        if not (named / "ckpts").is_dir():
            return beside
        choices = [f"--set working_dir={shlex.quote(str(folder))}" for folder in (beside, named)]
        raise UserError(
            f"{config_path}: lies beside {beside / 'ckpts'}, and its working_dir {named} has "
            f"checkpoints too; say {' or '.join(choices)}"
        )
    if not named.is_dir():
        hint = "start where it is relative to, or say --set working_dir=FOLDER"
        if beside:
            hint = f"leave out --set working_dir to sample from {beside}"
        raise UserError(f"{config_path}: working_dir: {named} does not exist; {hint}")
    return named


def config_of_checkpoint(
    path: Path, settings: Sequence[str], report: Callable[[str], None]
) -> Config:
    """The config that a checkpoint holds; of one that holds none, the one of its run."""
    folder = run_of_checkpoint(path)
    content = read_checkpoint(path, is_verified=True)  # that is left to whoever reads its weights
    if "config" in content:
        # Its own working_dir may be a place on another machine.
        values = {**content["config"], "working_dir": str(folder or path.parent)}
        return config_from_dict(values, str(path), settings, report)
    if folder and (folder / "config.yaml").exists():
        return load_config(folder / "config.yaml", settings, report)
    raise UserError(f"{path}: holds no config, as published checkpoints do not; say --config FILE")


class LoadedModel(NamedTuple):
    """A model ready to sample from, and what it makes."""

    model: Method
    shape: tuple[int, int, int]  # [C, H, W]
    num_classes: int
    class_names: Sequence[str]  # none where the checkpoint has none
    weights_sha256: str  # empty on all but the main process, which alone writes it down


def load_model(
    config: Config, path: Path, device: torch.device, is_main: bool = True
) -> LoadedModel:
    """The averaged model of a checkpoint; channels and classes come from it, not from the data.

    The main process checks it and sums it up for all: where it refuses, nothing is sampled.
    """
    content = read_checkpoint(path, is_verified=not is_main)
    refuse_other_model(config, content.get("config", {}), path)
    channels, num_classes = data_of(config, content, path)
    with torch.device("meta"):
        model = build_model(**config.model_arguments(channels, num_classes))
    check_weights(model, content["ema_model"], str(path))
    model.to_empty(device=device).eval().requires_grad_(False)
    model.load_state_dict(content["ema_model"])
    shape = (channels, config.data_size, config.data_size)
    names = content.get("data", {}).get("class_names", [])
    digest = weights_digest(content["ema_model"]) if is_main else ""
    return LoadedModel(model, shape, num_classes, names, digest)


def refuse_other_model(config: Config, recorded: Mapping[str, Any], path: Path) -> None:
    """UserError where the config describes another model than the one that was trained.

    A different path or solution form would load, and sample noise.
    """
    asked = {**config.model_arguments(0, 0), "dataset_type": config.dataset_type}
    differing = [
        f"{key} {recorded[key]!r} in the checkpoint, {value!r} in the config"
        for key, value in asked.items()
        if key in recorded and recorded[key] != value
    ]
    if differing:
        raise UserError(f"{path}: trained with another config: {'; '.join(differing)}")


def data_of(config: Config, content: Mapping[str, Any], path: Path) -> tuple[int, int]:
    """Channels and classes that a checkpoint was trained on."""
    if "data" in content:
        return content["data"]["channels"], content["data"]["num_classes"]
    source = DATASETS[config.dataset_type]
    if source.num_classes is None:
        raise UserError(f"{path}: does not say how many classes its {config.dataset_type} had")
    return source.channels, source.num_classes


def run_inference(arguments: argparse.Namespace, sources: Sources, processes: Processes) -> None:
    """Sample what the command line asks for; all processes take part."""
    config = sources.config
    output = choose_output(arguments, sources)
    find_decoder(config)
    allow_tf32(processes.device, config.precision != "fp32")
    loaded = load_model(config, sources.checkpoint, processes.device, processes.is_main)
    labels = choose_labels(arguments.labels, config, loaded)
    stream = choose_stream(arguments.noise_stream, labels, config, loaded, processes)
    request = SampleRequest(
        config.eval_num_samples, config.eval_batch_size, config.eval_NFE, stream
    )

    def its_record() -> dict[str, Any]:
        return record_of(
            output,
            config.to_dict(),
            processes,
            config.seed,
            num_images=request.num_images,
            NFE=request.num_jumps,
            labels=labels or ("uniform" if config.is_conditional else None),
            noise_stream=arguments.noise_stream,
            checkpoint=str(sources.checkpoint),
            weights_sha256=loaded.weights_sha256,
            **decoder_record(config),
        )

    def write_its_record() -> None:
        if arguments.overwrite:  # a kill must not leave old samples beside a record of the new
            output.unlink(missing_ok=True)
        write_record(output, its_record())

    if processes.is_main:
        make_folder(output.parent)
        if arguments.grid:
            check_writable(Path(arguments.grid))
        if not arguments.overwrite:
            refuse_to_replace(output, its_record())
    shown = GridImages(config.eval_demo_shape, loaded.num_classes, labels)
    with (
        decoding(config, processes.device) as decode,
        tqdm(
            total=request.num_images, unit="image", disable=None if processes.is_main else True
        ) as bar,
    ):

        def report(batch: ImageBatch) -> None:
            shown.add(batch)
            bar.update(len(batch.pixels))

        batches = sample_pixels(loaded.model, request, processes, decode)
        write_samples(
            output, batches, request.num_images, processes.is_main, write_its_record, report
        )
    if processes.is_main:
        print(f"{request.num_images} images in {output}")
        if arguments.grid:
            draw(shown.arranged(), Path(arguments.grid), loaded.class_names)


def draw(grid: Grid, path: Path, class_names: Sequence[str]) -> None:
    """Write the picture and say what is in it."""
    save_grid(path, grid.pixels, grid.columns)
    names = [class_names[label] if class_names else str(label) for label in grid.classes]
    rows = f", one class a row ({', '.join(names)})" if names else ", the first ones"
    print(f"{len(grid.pixels) // grid.columns} x {grid.columns} of them{rows}, in {path}")


# What is there already


def choose_output(arguments: argparse.Namespace, sources: Sources) -> Path:
    """Where the samples go."""
    for flag, suffix in (("output", ".npz"), ("grid", ".png")):
        name = getattr(arguments, flag)
        if name and Path(name).suffix.lower() != suffix:
            raise UserError(f"--{flag} {name}: must be the name of a {suffix} file")
    if arguments.output:
        return Path(arguments.output)
    config = sources.config
    name = f"{sources.checkpoint.stem}_{config.eval_NFE}NFE_{config.seed}.npz"
    return sources.results / name


def refuse_to_replace(output: Path, record: Mapping[str, Any]) -> None:
    """UserError where samples of another request than the record's are in the way."""
    in_the_way = [path for path in (output, output.with_suffix(".json")) if path.exists()]
    instead = "say --output FILE for another, or --overwrite"
    there = read_record(output)
    if there is None:
        if not in_the_way:
            return
        raise UserError(f"{in_the_way[0]}: exists, and no record says of which samples; {instead}")
    if not output.exists():
        return  # at most a record, whose samples a kill has kept from appearing
    before, now = decisive(there), decisive(record)
    differing = [
        f"{key} {in_short(before.get(key))} there, {in_short(now.get(key))} asked for"
        for key in before | now
        if before.get(key) != now.get(key)
    ]
    if differing:
        raise UserError(f"{output}: exists, with other samples: {'; '.join(differing)}; {instead}")


def read_record(output: Path) -> dict[str, Any] | None:
    """The record beside a file of samples, if there is one."""
    try:
        record = json.loads(output.with_suffix(".json").read_bytes())
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and isinstance(record.get("config"), dict) else None


def decisive(record: Mapping[str, Any]) -> dict[str, Any]:
    """What of a record decides the images, but for rounding."""
    known = {**record["config"], **record}
    is_reference = known.get("noise_stream") == "reference"
    keys = DECISIVE + (DECISIVE_IN_REFERENCE_STREAM if is_reference else ())
    return {key: known.get(key) for key in keys}


def in_short(value: Any) -> str:
    """A value of a record in bearable length."""
    text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 40 else f"{text[:12]}..."


# Labels and noise


def choose_stream(
    name: str, labels: Sequence[int], config: Config, loaded: LoadedModel, processes: Processes
) -> SamplingStream:
    """The source of noise and labels that the command line asks for."""
    seed, is_conditional = config.seed, config.is_conditional
    num_classes, shape = loaded.num_classes, loaded.shape
    stream: SamplingStream = PerImageStream(seed, num_classes if is_conditional else None, shape)
    if name == "reference":
        stream = ReferenceStream(
            seed, processes.rank, num_classes, shape, is_conditional, processes.device
        )
    return GivenLabels(stream, labels) if labels else stream


def choose_labels(text: str | None, config: Config, loaded: LoadedModel) -> list[int]:
    """The classes of a list of names and numbers, such as cat,dog,3; none for None."""
    if text is None:
        return []
    if not config.is_conditional:
        raise UserError(f"--labels: {config.model_type} is unconditional and takes none")
    names = loaded.class_names
    meanings = meanings_of(loaded.num_classes, names)
    spelled = [name for name in names if not name.isdecimal()]
    labels = []
    for word in text.split(","):
        if word.strip() not in meanings:
            raise UserError(
                f"--labels: {shorten(word.strip())} is not a class; those are "
                f"{describe_classes(meanings, loaded)}{suggest(word.strip(), spelled)}"
            )
        labels.append(meanings[word.strip()])
    return labels


def meanings_of(num_classes: int, names: Sequence[str]) -> dict[str, int]:
    """The class that each word stands for: its name or number.

    Names alone, where one of them is another class's number: of folders 1, 2, 10 the class called 1
    is number 0, and nobody should have to guess which 1 is meant.
    """
    numbers = {str(label): label for label in range(num_classes)}
    named = {name: label for label, name in enumerate(names)}
    is_ambiguous = any(numbers.get(name, label) != label for name, label in named.items())
    return named if is_ambiguous else numbers | named


def describe_classes(meanings: Mapping[str, int], loaded: LoadedModel) -> str:
    """The words that --labels takes."""
    numbers = f"0 to {loaded.num_classes - 1}"
    named = ", ".join(loaded.class_names)
    named = named if len(named) <= 80 else f"{named[:60]}..."
    if not loaded.class_names or named == ", ".join(map(str, range(loaded.num_classes))):
        return numbers
    if len(meanings) == len(loaded.class_names):
        return f"{named} (by name alone, since some names are other classes' numbers)"
    return f"{numbers}, or by name {named}"


# The command


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser, needs_config=False)
    add = parser.add_argument
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument(
        "--ckpt-steps", type=int, metavar="K", help="sample from ckpts/K.pt of the working_dir"
    )
    which.add_argument(
        "--ckpt", type=expanduser, metavar="FILE", help="sample from this checkpoint instead"
    )
    add("--eval-batch-size", metavar="B", help="images at a time, per process (default 32)")
    add("--eval-NFE", metavar="N", help="jumps per image (default 1)")
    add("--seed", metavar="S", help="of labels and noise (default 42)")
    add("--num-samples", metavar="N", help="images (default: eval_num_samples, 50000)")
    add(
        "--noise-stream",
        choices=("image", "reference"),
        default="image",
        help="image (default): each image's draws depend on seed and index alone; "
        "reference: as the published code draws, by process and batch",
    )
    add(
        "--labels",
        metavar="cat,dog,3",
        help="classes by name or number, in turn, repeated to fill; without, all are as likely",
    )
    add(
        "--output",
        type=expanduser,
        metavar="FILE.npz",
        help="where the images go, instead of evals/",
    )
    add(
        "--overwrite",
        action="store_true",
        help="replace a file of other samples; the same samples are replaced without it",
    )
    add(
        "--grid",
        type=expanduser,
        metavar="FILE.png",
        help="also draw some of them, one class a row where there are enough (eval_demo_shape)",
    )
    add("--cfg-scale", "--guidance-scale", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def settings_of(arguments: argparse.Namespace) -> list[str]:
    """The command line's values of the config's keys, the last one of a key being the one meant."""
    given = {
        "eval_batch_size": arguments.eval_batch_size,
        "eval_NFE": arguments.eval_NFE,
        "eval_num_samples": arguments.num_samples,
        "seed": arguments.seed,
    }
    flags = [f"{key}={value}" for key, value in given.items() if value is not None]
    return [*DEFAULTS, *arguments.set, *flags]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    arguments = parse_arguments(argv)
    if arguments.cfg_scale is not None:
        raise UserError("there is no guidance scale when sampling: guidance was trained in")
    notes: list[str] = []
    sources = find_sources(arguments, notes.append)
    with connected(sources.config.device, sources.config.timeout_minutes) as processes:
        for note in notes if processes.is_main else []:
            print(note, file=sys.stderr)
        run_inference(arguments, sources, processes)


if __name__ == "__main__":
    run_command(main)
