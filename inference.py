"""Sample images from a checkpoint into an .npz: `arr_0`, uint8 [N, H, W, C], and labels, `arr_1`.

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
from dataclasses import replace
from os.path import expanduser
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from config import Config, add_options, config_from_dict, load_config, override_by
from sampling import (
    SAMPLERS,
    LoadedModel,
    SampleRequest,
    assemble,
    check_times,
    decoder_record,
    decoding,
    find_decoder,
    refuse_non_finite,
    sample_pixels,
    write_samples,
)
from support.data.grids import Grid, GridImages, save_grid
from support.data.images import PNG_MARK, ImageBatch
from support.runs.checkpoint import (
    checkpoint_path,
    run_of_checkpoint,
    run_of_config,
)
from support.runs.logbook import record_of, write_record
from support.runs.stored import WEIGHTS_FILE, read_file
from support.system.digests import weights_digest
from support.system.files import UserError, check_writable, make_folder, refuse_foreign, shorten
from support.system.hardware import allow_tf32
from support.system.processes import Processes, connected
from support.system.randomness import GivenLabels, PerImageStream, ReferenceStream, SamplingStream

# Entries of a record, or of the config in it, that decide the images.
DECISIVE = (
    *("weights_sha256", "noising_type", "coefficient_type", "model_type", "dataset_type"),
    *("num_images", "NFE", "times", "sampler", "seed", "labels", "noise_stream"),
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
    if (checkpoint / WEIGHTS_FILE).is_file():
        checkpoint /= WEIGHTS_FILE
    config = (
        load_config(arguments.config, settings, report)
        if arguments.config
        else config_of_checkpoint(checkpoint, settings, report)
    )
    run = Path(config.working_dir) if chosen else run_of_checkpoint(checkpoint)
    if run is None and checkpoint.name == WEIGHTS_FILE:
        return Sources(config, checkpoint, checkpoint.absolute().parent.parent)
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
    stored = read_file(path, is_verified=True)  # that is left to whoever reads its weights
    if stored.config:
        # Its own working_dir may be a place on another machine.
        values = {**stored.config, "working_dir": str(folder or path.parent)}
        return config_from_dict(values, str(path), settings, report)
    if folder and (folder / "config.yaml").exists():
        return load_config(folder / "config.yaml", settings, report)
    raise UserError(f"{path}: holds no config, as published checkpoints do not; say --config FILE")


def load_model(
    config: Config, path: Path, device: torch.device, is_main: bool = True, ema: str = ""
) -> LoadedModel:
    """An averaged model of a checkpoint, which must be of the config's kind.

    The main process checks it and sums it up for all: where it refuses, nothing is sampled.
    """
    stored = read_file(path, ema, is_verified=not is_main)
    refuse_other_model(config, stored.config, path)
    loaded = assemble(config, stored, device)
    if not is_main:
        return loaded
    # By the model's order of the weights: that of an exported file is another.
    return replace(loaded, weights_sha256=weights_digest(loaded.model.state_dict()))


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


def run_inference(arguments: argparse.Namespace, sources: Sources, processes: Processes) -> None:
    """Sample what the command line asks for; all processes take part."""
    config = sources.config
    find_decoder(config)
    allow_tf32(processes.device, config.precision != "fp32")
    loaded = load_model(
        config, sources.checkpoint, processes.device, processes.is_main, arguments.ema
    )
    with decoding(config, processes.device) as decode:
        for each in jumps_asked_for(arguments, config):
            make_file(arguments, sources._replace(config=each), loaded, processes, decode)


def jumps_asked_for(arguments: argparse.Namespace, config: Config) -> list[Config]:
    """The config with each number of jumps that is asked for."""
    if arguments.times is not None:
        if arguments.eval_NFE:
            raise UserError("--eval-NFE: goes without --times, which says how many jumps there are")
        return [config.model_copy(update={"eval_NFE": len(arguments.times) - 1})]
    counts = (arguments.eval_NFE or str(config.eval_NFE)).split(",")
    one_file = [flag for flag in ("output", "grid") if getattr(arguments, flag)]
    if len(counts) > 1 and one_file:
        raise UserError(
            f"--{one_file[0]}: names one file, and --eval-NFE {arguments.eval_NFE} asks for "
            f"{len(counts)}"
        )
    values = config.to_dict()
    asked = [override_by("--eval-NFE", "eval_NFE", count) for count in counts]
    return [config_from_dict(values, "--eval-NFE", [override]) for override in asked]


def make_file(
    arguments: argparse.Namespace,
    sources: Sources,
    loaded: LoadedModel,
    processes: Processes,
    decode: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    """Sample one file."""
    config = sources.config
    output = choose_output(arguments, sources, loaded)
    labels = choose_labels(arguments.labels, loaded)
    counts = (config.eval_num_samples, config.eval_batch_size, config.eval_NFE)
    stream = choose_stream(arguments.noise_stream, labels, config, loaded, processes)
    request = SampleRequest(*counts, stream, arguments.times, arguments.sampler)

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
            **another_way(arguments, loaded),
            **decoder_record(config),
        )

    def write_its_record() -> None:
        if arguments.overwrite:  # a kill must not leave old samples beside a record of the new
            output.unlink(missing_ok=True)
        write_record(output, its_record())

    if processes.is_main:
        make_room(output, arguments, its_record)
    shown = GridImages(config.eval_demo_shape, loaded.num_classes, labels)
    quiet = None if processes.is_main else True
    with tqdm(total=request.num_images, unit="image", disable=quiet) as bar:

        def report(batch: ImageBatch) -> None:
            shown.add(batch)
            bar.update(len(batch.pixels))

        batches = sample_pixels(
            loaded.model, request, processes, lambda x_0: refuse_non_finite(decode(x_0))
        )
        write_samples(
            output, batches, request.num_images, processes.is_main, write_its_record, report
        )
    if processes.is_main:
        print(f"{request.num_images} images in {output}")
        if arguments.grid:
            draw(shown.arranged(), Path(arguments.grid), loaded.class_names)


def another_way(arguments: argparse.Namespace, loaded: LoadedModel) -> dict[str, Any]:
    """What a record says of average and jumps, where they are not the published ones."""
    said = {
        "ema": loaded.average or None,
        "sampler": arguments.sampler if arguments.sampler != "renoise" else None,
        "times": list(arguments.times) if arguments.times else None,
    }
    return {name: value for name, value in said.items() if value is not None}


def draw(grid: Grid, path: Path, class_names: Sequence[str]) -> None:
    """Write the picture and say what is in it."""
    save_grid(path, grid.pixels, grid.columns)
    names = [class_names[label] if class_names else str(label) for label in grid.classes]
    rows = f", one class a row ({', '.join(names)})" if names else ", the first ones"
    print(f"{len(grid.pixels) // grid.columns} x {grid.columns} of them{rows}, in {path}")


# What is there already


def choose_output(arguments: argparse.Namespace, sources: Sources, loaded: LoadedModel) -> Path:
    """Where the samples go."""
    for flag, suffix in (("output", ".npz"), ("grid", ".png")):
        name = getattr(arguments, flag)
        if name and Path(name).suffix.lower() != suffix:
            raise UserError(f"--{flag} {name}: must be the name of a {suffix} file")
    if arguments.output:
        return Path(arguments.output)
    config = sources.config
    of_export = sources.checkpoint.name == WEIGHTS_FILE
    stem = sources.checkpoint.absolute().parent.name if of_export else sources.checkpoint.stem
    name = f"{stem}_{config.eval_NFE}NFE_{config.seed}"
    for value in another_way(arguments, loaded).values():
        name += "_" + (value if isinstance(value, str) else "-".join(f"{t:g}" for t in value))
    return sources.results / f"{name}.npz"


def make_room(
    output: Path, arguments: argparse.Namespace, its_record: Callable[[], dict[str, Any]]
) -> None:
    """Make the folders of what is to be written; UserError where something else is there."""
    make_folder(output.parent)
    if arguments.grid:
        check_writable(Path(arguments.grid))
    if not arguments.overwrite:
        refuse_to_replace(output, its_record())
        if arguments.grid:
            refuse_foreign(Path(arguments.grid), PNG_MARK, "say another --grid, or --overwrite")


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
        f"{key} {shorten(before.get(key))} there, {shorten(now.get(key))} asked for"
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


def choose_labels(text: str | None, loaded: LoadedModel) -> list[int]:
    """The classes of a list of names and numbers, such as cat,dog,3; none for None."""
    if text is None:
        return []
    if text in loaded.class_names:
        return loaded.labels_of([text], "--labels")
    return loaded.labels_of([word.strip() for word in text.split(",")], "--labels")


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
        "--ckpt",
        type=expanduser,
        metavar="FILE",
        help="sample from this checkpoint, or exported folder, instead",
    )
    add("--eval-batch-size", metavar="B", help="images at a time, per process (default 32)")
    add("--eval-NFE", metavar="N[,N...]", help="jumps per image (default 1); a file for each")
    times_help = "where the jumps start and end, instead of evenly apart"
    add("--times", type=times_in, metavar="1,...,0", help=times_help)
    add(
        "--sampler",
        choices=tuple(SAMPLERS),
        default="renoise",
        help="renoise (default): as published, every jump ends at 0 and a fresh noise brings it "
        "back; chain: each jump starts where the last one ended",
    )
    add("--ema", default="", metavar="NAME", help="of several averages this one, such as 0.999")
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
    output_help = "where the images go, instead of evals/"
    add("--output", type=expanduser, metavar="FILE.npz", help=output_help)
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


def times_in(text: str) -> tuple[float, ...]:
    """The times of a list such as 1,0.6,0."""
    try:
        return check_times([float(word) for word in text.split(",")], "--times")
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} does not fall from 1 to 0, as 1,0.6,0 does"
        ) from error


def settings_of(arguments: argparse.Namespace) -> list[str]:
    """The command line's values of the config's keys, the last one of a key being the one meant."""
    given = {
        ("--eval-batch-size", "eval_batch_size"): arguments.eval_batch_size,
        ("--num-samples", "eval_num_samples"): arguments.num_samples,
        ("--seed", "seed"): arguments.seed,
    }
    flags = [override_by(*names, text) for names, text in given.items() if text is not None]
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
