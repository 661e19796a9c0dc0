"""Make of a trained model a folder that travels: weights, what they are of, and a model card.

    python export.py runs/digits exported/digits
    python export.py runs/digits/ckpts/1000.pt exported/digits --onnx
    python export.py runs/digits exported/digits --push owner/digits --private

The folder has model.safetensors (the averaged weights, bit for bit), config.json (network, path,
solution form, decoder, class names), README.md (a model card made from the run's records) and a
picture of samples; `sampling.load` reads it, and export.py sends it to the Hugging Face Hub.
"""

from support.system.command import run_command  # isort: skip - first: it attends to the start

import argparse
import contextlib
import importlib.util
import json
import logging
import shutil
import warnings
from collections.abc import Iterator, Sequence
from os.path import expanduser
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from config import config_from_dict
from models import SoFlow, solution_of
from sampling import LoadedModel, assemble
from support.data.grids import save_grid
from support.runs.budget import count_parameters
from support.runs.checkpoint import run_of_checkpoint
from support.runs.stored import CONFIG_FILE, WEIGHTS_FILE, StoredModel, push, read_stored
from support.scores.table import COLUMNS, origin_of, read_records
from support.system.files import UserError, sha256_of, sync_folder, temporary_path

ONNX_FILE, CARD_FILE, GRID_FILE = "model.onnx", "README.md", "samples.png"
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
ONNX_TOLERANCE = 1e-4
GRID_ROWS, GRID_COLUMNS = 4, 8

CPU = torch.device("cpu")


def export(source: Path, folder: Path, has_onnx: bool) -> None:
    """Make the folder, whole or not at all."""
    stored = read_stored(source)
    config = config_from_dict(stored.config, str(stored.path), (), print)
    loaded = assemble(config, stored, CPU)
    with replacing(folder) as place:
        write_weights(stored, place)
        write_grid(loaded, place / GRID_FILE)
        (place / CARD_FILE).write_text(model_card(stored, loaded, has_onnx))
        if has_onnx:
            write_onnx(loaded, place / ONNX_FILE)
    print(
        f"{stored.path} exported to {folder}: {', '.join(sorted(p.name for p in folder.iterdir()))}"
    )


@contextlib.contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A place that gets the folder's name when the block ends, and is gone where it fails."""
    place = temporary_path(folder)
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    try:
        yield place
        if folder.exists():  # asked for: an export before
            shutil.rmtree(folder)
        place.rename(folder)
        sync_folder(folder.parent)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def write_weights(stored: StoredModel, place: Path) -> None:
    """The averaged weights and what they are of."""
    from safetensors.torch import save_file

    # Each tensor by itself: those of a checkpoint are views of its file.
    save_file({n: t.clone().contiguous() for n, t in stored.weights.items()}, place / WEIGHTS_FILE)
    (place / WEIGHTS_FILE).chmod(0o644)  # the library's are its owner's alone
    # Where a run lay on another machine is nobody's business.
    config = {k: v for k, v in stored.config.items() if k not in ("working_dir", "dataset_path")}
    record = {
        "config": {"working_dir": "exported", **config},
        "data": dict(stored.data),
        "finished_steps": stored.finished_steps,
        "weights_sha256": sha256_of(place / WEIGHTS_FILE),
    }
    (place / CONFIG_FILE).write_text(json.dumps(record, indent=2) + "\n")


def write_grid(loaded: LoadedModel, path: Path) -> None:
    """A picture of samples, classes row by row; none of latents, whose VAE need not be here."""
    if loaded.config.is_latent:
        return
    count = GRID_ROWS * GRID_COLUMNS
    labels = None
    if loaded.config.is_conditional:
        rows = np.linspace(0, loaded.num_classes - 1, GRID_ROWS).round().astype(int)
        labels = rows.repeat(GRID_COLUMNS).tolist()
    save_grid(path, loaded.sample(labels, range(count)).numpy(), GRID_COLUMNS)


# The model card


def model_card(stored: StoredModel, loaded: LoadedModel, has_onnx: bool) -> str:
    """What a reader of the folder wants to know, from the run's records."""
    config, data = loaded.config, stored.data
    size = f"{config.data_size * (8 if config.is_latent else 1)} pixels a side"
    classes = f"{loaded.num_classes} classes" if config.is_conditional else "no classes"
    examples = f"{data['num_examples']:,} images, " if "num_examples" in data else ""
    picture = "" if config.is_latent else f"\n![Samples made in one step]({GRID_FILE})\n"
    network = f"{config.model_type}, {count_parameters(loaded.model)}"
    label = "labels=[0], " if config.is_conditional else ""
    lines = [
        *(
            "---",
            "license: other  # fill in, before others are to use it",
            "tags: [image-generation, one-step, soflow]",
            "---",
            "",
        ),
        f"# {config.model_type} on {config.dataset_type}, trained by {config.method}",
        picture,
        "Makes an image in one step (Solution Flow Models, arXiv 2512.15657).",
        "",
        f"- Network: {network}; {size}, {classes}.",
        f"- Data: {examples}dataset_type {config.dataset_type}.",
        f"- Training: {stored.finished_steps:,} of {config.total_steps:,} steps of "
        f"{config.batch_size} images, {config.optimizer}, learning rate {config.learning_rate:g}; "
        f"averaged weights, decay {config.ema_decay_rate:g}; guidance {config.cfg_scale:g}, "
        "trained in.",
        *([f"- Decoder: {config.vae}."] if config.is_latent else []),
        *(["- `model.onnx`: x at time s of noise, t, s (and label), any batch size."] * has_onnx),
        *("", "## Use", "", "```python", "from sampling import load", ""),
        'model = load("THIS FOLDER, OR ITS NAME ON THE HUB")',
        f"images = model.sample({label}seeds=[0], steps=1)",
        *("```", "", "## Scores", ""),
        *scores_of(stored),
        "",
    ]
    return "\n".join(lines)


def scores_of(stored: StoredModel) -> list[str]:
    """A table of the run's scores of this step, with what they were measured by."""
    run = run_of_checkpoint(stored.path)
    rows = []
    for name, record in (read_records(run / "evals") if run else {}).items():
        origin = origin_of(run / "evals" / name, record.get("num_images")) if run else {}
        if record.get("step", origin.get("step")) == stored.finished_steps:
            scores = record["scores"]
            columns = [c for c in COLUMNS if c in scores]
            named = ", ".join(f"{c} {scores[c]:.4g}" for c in columns)
            reference = str(record.get("reference", {}).get("sha256", "unknown"))[:12]
            rows.append(
                f"| {record.get('NFE', origin.get('NFE', '?'))} | {record.get('num_images')} | "
                f"{named} | reference {reference}, {record.get('distances', 'exact')} distances |"
            )
    if not rows:
        return ["None was measured."]
    return ["| steps | images | scores | measured by |", "| --- | --- | --- | --- |", *rows]


# ONNX


class Solution(nn.Module):
    """f(x, t, s) as one graph: the network, and the solution formula around it."""

    def __init__(self, model: SoFlow):
        super().__init__()
        self.model = model

    def forward(self, noise: Tensor, t: Tensor, s: Tensor, label: Tensor | None = None) -> Tensor:
        form = self.model.solution_form(t, s)
        given = {} if label is None else {"labels": label}
        return solution_of(noise, self.model.network(noise, t, t - s, **given), form.a, form.b)


def write_onnx(loaded: LoadedModel, path: Path) -> None:
    """The graph, once onnxruntime gives with it what torch gives."""
    solution = Solution(loaded.model).eval()  # type: ignore[arg-type]
    names = ["noise", "t", "s", *(["label"] if loaded.config.is_conditional else [])]
    batch = torch.export.Dim("batch", min=1)
    inputs = some_inputs(loaded, 2)
    with quiet():
        program = torch.onnx.export(
            solution,
            inputs,
            dynamo=True,
            input_names=names,
            output_names=["x_s"],
            dynamic_shapes=tuple({0: batch} for _ in inputs),
        )
        assert program is not None
        program.save(path)
    check_onnx(loaded, solution, path, names)


def check_onnx(loaded: LoadedModel, solution: nn.Module, path: Path, names: list[str]) -> None:
    """UserError where the graph gives other images than torch, in any of some batch sizes."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path))
    for count in (1, 3, 8):
        inputs = some_inputs(loaded, count)
        with torch.no_grad():
            expected = solution(*inputs)
        fed = {name: value.numpy() for name, value in zip(names, inputs, strict=True)}
        off = (torch.from_numpy(session.run(None, fed)[0]) - expected).abs().max()
        if off > ONNX_TOLERANCE:
            raise UserError(f"--onnx: the graph's images are off by {off:.2g}; nothing is exported")


def some_inputs(loaded: LoadedModel, count: int) -> tuple[Tensor, ...]:
    """Noise, t, s and labels for a try."""
    source = torch.Generator().manual_seed(count)
    noise = torch.randn(count, *loaded.shape, generator=source)
    t = 0.5 + 0.5 * torch.rand(count, generator=source)
    inputs: tuple[Tensor, ...] = (noise, t, 0.5 * t)
    if loaded.config.is_conditional:
        inputs += (torch.arange(count) % loaded.num_classes,)
    return inputs


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """A block in which the exporter's talk of its own work does not reach the user."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(None):
        warnings.simplefilter("ignore")
        before = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)


# The command


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("source", type=expanduser, metavar="RUN_OR_CKPT", help="a run's folder, or a checkpoint")
    add("folder", type=expanduser, metavar="FOLDER", help="what is to be made")
    add("--onnx", action="store_true", help="also one graph for onnxruntime, checked against torch")
    add("--overwrite", action="store_true", help="replace a folder that is there")
    add("--push", metavar="OWNER/NAME", help="then upload it to this repository of the hub")
    add("--private", action="store_true", help="with --push: which is made a private one")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    arguments = parse_arguments(argv)
    folder = Path(arguments.folder)
    if arguments.private and not arguments.push:
        raise UserError("--private: goes with --push")
    if folder.exists() and not arguments.overwrite:
        raise UserError(f"{folder}: exists; say --overwrite to replace it")
    missing = [name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if arguments.onnx and missing:
        raise UserError(f"--onnx: not installed: pip install {' '.join(missing)}")
    export(Path(arguments.source), folder, arguments.onnx)
    if arguments.push:
        print(push(folder, arguments.push, arguments.private))


if __name__ == "__main__":
    run_command(main)
