"""Sample images from a trained model into an .npz: `arr_0`, uint8 [N, H, W, C], labels as `arr_1`.

    python inference.py --config configs/digits.yaml --ckpt-steps 1000 --num-samples 1000
    python inference.py --ckpt runs/digits --num-samples 32 --labels 3,7 --grid digits.png
    torchrun --nproc-per-node=8 inference.py --config SoFlow/XL-2-cond/config.yaml \\
        --ckpt-steps 1200000 --eval-batch-size 128 --eval-NFE 2
    python inference.py --ckpt zlab-princeton/SoFlow/XL-2-cond --num-samples 32 --grid xl2.png

--ckpt-steps K samples the averaged weights of ckpts/K.pt in the run's folder: the folder of the
config if it has ckpts/, else the config's working_dir. The images go to
evals/K_{NFE}NFE_{seed}.npz there. Guidance was trained in: there is no scale to choose.
"""

from support.system.command import command_parser, run_command  # isort: skip - must be first

import argparse
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
from sampler import (
    SAMPLERS,
    SampleRequest,
    check_times,
    decoder_record,
    find_decoder,
    sample_pixels,
    write_samples,
)
from sampling import LoadedModel, assemble
from support.data.grids import Grid, GridImages, save_grid
from support.data.images import PNG_MARK, ImageBatch
from support.runs.checkpoint import run_of_checkpoint, run_of_config
from support.runs.logbook import record_of, write_record
from support.runs.sample_records import refuse_other_samples
from support.runs.stored import MODEL_HELP, WEIGHTS_FILE, find_file, read_file, read_stored
from support.system.digests import weights_digest
from support.system.files import UserError, check_writable, make_folder, refuse_foreign
from support.system.hardware import allow_tf32
from support.system.processes import Processes, connected
from support.system.randomness import GivenLabels, PerImageStream, ReferenceStream, SamplingStream

# This command's defaults in the reference; its configs have others.
DEFAULTS = ("eval_batch_size=32", "eval_NFE=1", "seed=42")


class Sources(NamedTuple):
    """The model to sample from, and the place of its samples."""

    config: Config
    checkpoint: Path
    start: Path  # of the samples' names, with their folder


def find_sources(arguments: argparse.Namespace, report: Callable[[str], None]) -> Sources:
    """The checkpoint and config that the command line names; `report` takes notes.

    `--set working_dir` settles which run is meant.
    """
    settings = settings_of(arguments)
    is_chosen = any(text.startswith("working_dir=") for text in settings)
    config = load_config(arguments.config, settings, report) if arguments.config else None
    if arguments.ckpt is None:
        if config is None:
            raise UserError("--config: needed with --ckpt-steps; --ckpt MODEL does without")
        run = find_run(config, Path(arguments.config), is_chosen)
        path = run / "ckpts" / f"{arguments.ckpt_steps}.pt"
        return Sources(config, path, run / "evals" / path.stem)
    path = find_file(arguments.ckpt)
    start = start_of_names(arguments.ckpt, path)
    if config is None:
        # The recorded working_dir may be a place on another machine.
        place = {"working_dir": str(run_of_checkpoint(path) or path.parent)}
        recorded = read_stored(path, is_verified=True).config
        config = config_from_dict({**recorded, **place}, str(path), settings, report)
    if is_chosen:
        start = Path(config.working_dir) / "evals" / start.name
    return Sources(config, path, start)


def start_of_names(source: str, path: Path) -> Path:
    """The start of the names of a model's samples, with their folder.

    Those of a run go to its evals/. Others go beside the checkpoint or the exported folder, and
    those of a model from the hub to the current folder.
    """
    if not Path(source).exists():
        return Path(Path(source).name)
    if run := run_of_checkpoint(path):
        return run / "evals" / path.stem
    return path.absolute().parent if path.name == WEIGHTS_FILE else path.with_suffix("")


def find_run(config: Config, config_path: Path, is_chosen: bool) -> Path:
    """The folder of a config's run: the one it lies in if that has ckpts/, else its working_dir.

    UserError if there is none, or if both are runs and the user has not chosen one.
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
        raise UserError(
            f"{config_path}: working_dir: {named} does not exist; start where it is relative to, "
            "or say --set working_dir=FOLDER"
        )
    return named


def load_model(
    config: Config, path: Path, device: torch.device, is_main: bool = True, ema: str = ""
) -> LoadedModel:
    """The averaged model of a checkpoint. The main process verifies it for all."""
    stored = read_file(path, ema, is_verified=not is_main)
    refuse_other_model(config, stored.config, path)
    loaded = assemble(config, stored, device)
    if not is_main:
        return replace(loaded, report=lambda line: None)
    # In the model's order: that of an exported file differs.
    return replace(loaded, weights_sha256=weights_digest(loaded.model.state_dict()))


def refuse_other_model(config: Config, recorded: Mapping[str, Any], path: Path) -> None:
    """UserError if the config describes another model than the one that was trained.

    Another path or solution form would load, and sample noise.
    """
    asked = {**config.model_arguments(0, 0), "dataset_type": config.dataset_type}
    differing = [
        f"{key} {recorded[key]!r} in the checkpoint, {value!r} in the config"
        for key, value in asked.items()
        if key in recorded and recorded[key] != value
    ]
    if differing:
        raise UserError(f"{path}: trained with another config: {'; '.join(differing)}")


def configs_per_nfe(arguments: argparse.Namespace, config: Config) -> list[Config]:
    """The config with each requested number of steps."""
    if arguments.times is not None:
        if arguments.eval_NFE:
            raise UserError("--eval-NFE: --times already gives the number of steps")
        return [config.model_copy(update={"eval_NFE": len(arguments.times) - 1})]
    counts = (arguments.eval_NFE or str(config.eval_NFE)).split(",")
    for flag in ("output", "grid") if len(counts) > 1 else ():
        if getattr(arguments, flag):
            raise UserError(f"--{flag}: names one file, but --eval-NFE {','.join(counts)} several")
    overrides = [override_by("--eval-NFE", "eval_NFE", count) for count in counts]
    return [config_from_dict(config.to_dict(), "--eval-NFE", [one]) for one in overrides]


def make_file(
    arguments: argparse.Namespace,
    sources: Sources,
    loaded: LoadedModel,
    processes: Processes,
    decode: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    """Sample one file."""
    config, is_main = sources.config, processes.is_main
    labels = choose_labels(arguments.labels, loaded)
    sampler = arguments.sampler or loaded.model.sampler
    # What differs from the published way is recorded, and part of the file's name.
    nondefault = {
        "ema": loaded.average,
        "sampler": sampler if sampler != "renoise" else "",
        "times": list(arguments.times or ()),
    }
    nondefault = {name: value for name, value in nondefault.items() if value}
    output = choose_output(arguments, sources, nondefault)
    stream = choose_stream(arguments.noise_stream, labels, config, loaded, processes)
    counts = (config.eval_num_samples, config.eval_batch_size, config.eval_NFE)
    request = SampleRequest(*counts, stream, arguments.times, sampler)

    record: dict[str, Any] = {}
    if is_main:
        record = record_of(
            output,
            config.to_dict(),
            processes,
            config.seed,
            num_images=request.num_images,
            NFE=request.num_steps,
            labels=labels or ("uniform" if config.is_conditional else None),
            noise_stream=arguments.noise_stream,
            checkpoint=str(sources.checkpoint),
            weights_sha256=loaded.weights_sha256,
            **nondefault,
            **decoder_record(config, loaded.data),
        )
        check_outputs(arguments, output, record)

    def save_record() -> None:
        if arguments.overwrite:  # a kill must not leave old samples beside the new record
            output.unlink(missing_ok=True)
        write_record(output, record)

    shown = GridImages(config.eval_demo_shape, loaded.num_classes, labels)
    with tqdm(total=request.num_images, unit="image", disable=None if is_main else True) as bar:

        def report(batch: ImageBatch) -> None:
            shown.add(batch)
            bar.update(len(batch.pixels))

        batches = sample_pixels(loaded.model, request, processes, decode)
        write_samples(output, batches, request.num_images, is_main, save_record, report)
    if is_main:
        print(f"{request.num_images} images in {output}")
        if arguments.grid:
            draw(shown.arranged(), Path(arguments.grid), loaded.class_names)


def draw(grid: Grid, path: Path, class_names: Sequence[str]) -> None:
    """Write the picture and print what it shows."""
    save_grid(path, grid.pixels, grid.columns)
    names = [class_names[label] if class_names else str(label) for label in grid.classes]
    rows = f", one class a row ({', '.join(names)})" if names else ", the first ones"
    print(f"{len(grid.pixels) // grid.columns} x {grid.columns} of them{rows}, in {path}")


# Outputs, labels and noise


def choose_output(
    arguments: argparse.Namespace, sources: Sources, nondefault: Mapping[str, Any]
) -> Path:
    """The file of the samples."""
    for flag, suffix in (("output", ".npz"), ("grid", ".png")):
        name = getattr(arguments, flag)
        if name and Path(name).suffix.lower() != suffix:
            raise UserError(f"--{flag} {name}: must be the name of a {suffix} file")
    if arguments.output:
        return Path(arguments.output)
    name = f"{sources.start.name}_{sources.config.eval_NFE}NFE_{sources.config.seed}"
    for value in nondefault.values():
        name += "_" + (value if isinstance(value, str) else "-".join(f"{t:g}" for t in value))
    return sources.start.with_name(f"{name}.npz")


def check_outputs(arguments: argparse.Namespace, output: Path, record: Mapping[str, Any]) -> None:
    """Make the folders of the files to write; UserError if one would replace something else."""
    make_folder(output.parent)
    if not arguments.overwrite:
        refuse_other_samples(output, record)
    if arguments.grid:
        check_writable(Path(arguments.grid))
        if not arguments.overwrite:
            refuse_foreign(Path(arguments.grid), PNG_MARK, "choose another --grid, or --overwrite")


def choose_stream(
    name: str, labels: Sequence[int], config: Config, loaded: LoadedModel, processes: Processes
) -> SamplingStream:
    """The requested source of noise and labels."""
    seed, classes = config.seed, loaded.num_classes if config.is_conditional else None
    stream: SamplingStream = PerImageStream(seed, classes, loaded.shape)
    if name == "reference":
        of_data = (loaded.num_classes, loaded.shape, config.is_conditional)
        stream = ReferenceStream(seed, processes.rank, *of_data, processes.device)
    return GivenLabels(stream, labels) if labels else stream


def choose_labels(text: str | None, loaded: LoadedModel) -> list[int]:
    """The classes in a list of names and numbers, such as cat,dog,3; none for None."""
    if text is None:
        return []
    words = [text] if text in loaded.class_names else map(str.strip, text.split(","))
    return loaded.labels_of([*words], "--labels")


# The command


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line's options."""
    parser = command_parser(__doc__)
    add_options(parser, needs_config=False)
    add = parser.add_argument
    which = parser.add_mutually_exclusive_group(required=True)
    steps_help = "sample ckpts/K.pt of the config's run"
    which.add_argument("--ckpt-steps", type=int, metavar="K", help=steps_help)
    ckpt_help = f"sample this model instead: {MODEL_HELP}"
    which.add_argument("--ckpt", type=expanduser, metavar="MODEL", help=ckpt_help)
    add("--ema", default="", metavar="NAME", help="use this one of several averages, such as 0.999")
    add("--num-samples", metavar="N", help="images (default: eval_num_samples, 50000)")
    add("--seed", metavar="S", help="seed of labels and noise (default 42)")
    add("--eval-batch-size", metavar="B", help="images at a time, per process (default 32)")
    add("--eval-NFE", metavar="N[,N...]", help="steps per image (default 1); one file for each")
    times_help = "where the steps start and end (default: evenly spaced)"
    add("--times", metavar="1,...,0", help=times_help)
    sampler_help = """renoise (SoFlow's default): as published, each step ends at t = 0 and fresh
        noise leads to the next t; chain: each step starts where the last one ended"""
    add("--sampler", choices=tuple(SAMPLERS), help=sampler_help)
    stream_help = """image (default): an image's draws depend on the seed and its index alone;
        reference: draw by process and batch, as the published code does"""
    choices = ("image", "reference")
    add("--noise-stream", choices=choices, default="image", help=stream_help)
    labels_help = "classes by name or number, repeated in turn (default: drawn uniformly)"
    add("--labels", metavar="cat,dog,3", help=labels_help)
    add("--output", type=expanduser, metavar="FILE.npz", help="file of the images")
    add("--overwrite", action="store_true", help="replace other samples that are in the way")
    grid_help = "also draw a picture, one class a row if there are enough images (eval_demo_shape)"
    add("--grid", type=expanduser, metavar="FILE.png", help=grid_help)
    add("--cfg-scale", "--guidance-scale", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.times is not None:
        arguments.times = check_times(arguments.times.split(","), "--times")
    return arguments


def settings_of(arguments: argparse.Namespace) -> list[str]:
    """The command line's KEY=VALUE settings; the last one of a key counts."""
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
        find_decoder(sources.config)
        allow_tf32(processes.device, sources.config.precision != "fp32")
        loaded = load_model(
            sources.config, sources.checkpoint, processes.device, processes.is_main, arguments.ema
        )
        with loaded.decoding() as decode:
            for config in configs_per_nfe(arguments, sources.config):
                each = sources._replace(config=config)
                make_file(arguments, each, loaded, processes, decode)


if __name__ == "__main__":
    run_command(main)
