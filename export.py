"""Export a trained model to a folder: averaged weights, their description and a model card.

    python export.py runs/digits exported/digits
    python export.py runs/digits/ckpts/1000.pt exported/digits-1000 --onnx
    python export.py runs/digits exported/digits --space
    python export.py exported/digits --push owner/digits --private

The folder holds model.safetensors (the averaged weights, bit for bit), config.json (the config and
all records), README.md (a model card made from these) and a picture of samples. `sampling.load`
reads it. Edit the card as you like: --overwrite keeps what you wrote. --push uploads an exported
folder to the Hugging Face Hub as it is; fill in the licence first.
"""

from support.system.command import command_parser, run_command  # isort: skip - must be first

import argparse
import dataclasses
import os
import shutil
from collections.abc import Callable, Sequence
from os.path import expanduser
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from config import config_from_dict
from models import SoFlow, solution_of
from sampler import find_decoder
from sampling import LoadedModel, assemble
from support.data import vae
from support.data.autoencoders import LatentForm, kind_of
from support.data.grids import save_grid
from support.export.card import Card, Facts, keep_written, lacks_licence, split_card, write_card
from support.export.records import add_records
from support.page.space import APP_FILE, CODE_FOLDER, REQUIREMENTS_FILE, card_lines, write_space
from support.runs.budget import count_parameters
from support.runs.checkpoint import run_of_checkpoint
from support.runs.graphs import missing_packages, write_graph
from support.runs.stored import (
    CARD_FILE,
    CONFIG_FILE,
    WEIGHTS_FILE,
    StoredModel,
    add_model_options,
    read_stored,
    write_stored,
)
from support.scores.table import read_record
from support.system import hub
from support.system.digests import weights_digest
from support.system.files import UserError
from support.system.folders import atomic_folder

GRID_FILE = "samples.png"
ONNX_FILE, DECODER_FILE = "model.onnx", "decoder.onnx"
# The files that an export may write or replace. A graph above 2 GB keeps its weights in .data.
FILES = {
    WEIGHTS_FILE: "the averaged weights",
    CONFIG_FILE: "the config, and all records of the model",
    CARD_FILE: "this card",
    GRID_FILE: "samples",
    ONNX_FILE: "f(noise, t, s), and label if there are classes, for onnxruntime: x_s in any batch "
    "size; t = 1, s = 0 makes an image",
    DECODER_FILE: "the decoder for onnxruntime: images, -1..1, of latents in any batch size",
    f"{ONNX_FILE}.data": "its weights",
    f"{DECODER_FILE}.data": "its weights",
    APP_FILE: "serves the model to a browser, also as a Hugging Face Space",
    REQUIREMENTS_FILE: "the packages that this needs",
    CODE_FOLDER: "the code that this runs",
}
GRID_ROWS, GRID_COLUMNS, GRID_BATCH = 4, 8, 4

CPU = torch.device("cpu")


def export(arguments: argparse.Namespace) -> None:
    """Make the folder, whole or not at all."""
    stored = read_stored(arguments.source, arguments.subfolder, arguments.ema)
    stored, loaded = prepare_export(stored, arguments.vae)
    if arguments.vae_onnx and not loaded.config.is_latent:
        raise UserError(f"--vae-onnx: {stored.path} makes pixels and has no decoder")

    def write_more(place: Path) -> None:
        if arguments.onnx:
            write_solution(loaded, place / ONNX_FILE)
        if arguments.vae_onnx:
            write_decoder(loaded, place / DECODER_FILE)
        if arguments.space:
            write_space(place)

    entries = card_lines() if arguments.space else ""
    made = write_folder(Path(arguments.folder), stored, loaded, arguments.push, write_more, entries)
    print(f"{stored.path} exported to {arguments.folder}: {', '.join(made)}")


def prepare_export(stored: StoredModel, vae_name: str | None) -> tuple[StoredModel, LoadedModel]:
    """The stored model with its run's records and without paths of this machine; and loaded."""
    config = config_from_dict(stored.config, str(stored.path), (), print)
    if vae_name is None and config.is_latent and is_path(config.vae):
        raise UserError(
            f"{stored.path}: its decoder is {config.vae}, a folder of this machine; say --vae NAME "
            "for where others find it: on the Hugging Face Hub or in a folder"
        )
    loaded = assemble(config, stored, CPU, shares_memory=True)
    # In the model's order, as in all records: files have others.
    digest = weights_digest(loaded.model.state_dict())
    settings = {"working_dir": "exported", "dataset_path": None, "vae": vae_name or config.vae}
    data, started_from = dict(stored.data), dict(stored.started_from)
    if config.init_from and is_path(config.init_from):
        settings["init_from"] = Path(config.init_from).name
    for record, key in ((data, "vae"), (started_from, "source")):
        if key in record and is_path(record[key]):
            record[key] = Path(record[key]).name
    values = config.to_dict() | settings
    described = dataclasses.replace(stored, config=values, data=data, started_from=started_from)
    return add_records(described, digest), dataclasses.replace(loaded, weights_sha256=digest)


def is_path(name: str) -> bool:
    """Whether a name is a path of this machine, and not one on the hub."""
    return os.path.exists(expanduser(name)) or os.path.isabs(expanduser(name))


def write_folder(
    folder: Path,
    stored: StoredModel,
    loaded: LoadedModel,
    title: str | None = None,
    write_more: Callable[[Path], None] = lambda place: None,
    entries: str = "",
) -> list[str]:
    """Make an exported folder, whole or not at all; returns the names of its files.

    `write_more` adds files to it. `entries` are lines for the head of its card.
    """
    with atomic_folder(folder) as place:
        write_grid(stored, loaded, place / GRID_FILE)
        write_more(place)
        made = [WEIGHTS_FILE, CONFIG_FILE, CARD_FILE, *(path.name for path in place.iterdir())]
        files = {name: text for name, text in FILES.items() if name in made}
        facts = facts_of(title or folder.resolve().name, loaded, stored.config["vae"], files)
        card = write_card(stored, facts, entries)
        text = keep_persons_parts(card, folder, stored).text()
        # Class names may hold bytes that are not text.
        (place / CARD_FILE).write_bytes(text.encode(errors="replace"))
        write_stored(dataclasses.replace(stored, card=card.digests()), place)
    return sorted(made)


def facts_of(title: str, loaded: LoadedModel, vae_name: str, files: dict[str, str]) -> Facts:
    """What the card tells of the model itself."""
    config, num_classes = loaded.config, loaded.num_classes
    form = LatentForm.of_record(loaded.data)
    side = config.data_size * (form.pixels_per_latent if config.is_latent else 1)
    model = {
        "network": f"{config.model_type}, {count_parameters(loaded.model)}",
        "images": f"{side} x {side} pixels",
        "method": f"{config.method}; path {config.noising_type}, solution form "
        f"{config.coefficient_type}",
    }
    if config.is_latent:
        model["decoder"] = f"{vae_name}, {form.vae_class}, of latents {list(loaded.shape)}"
    if not config.is_conditional:
        return Facts(title, model, 0, (), files)
    labels = [loaded.word_of(label) for label in (0, 0, num_classes - 1)]
    return Facts(title, model, num_classes, labels, files)


def keep_persons_parts(card: Card, folder: Path, stored: StoredModel) -> Card:
    """The card with what a person wrote into the one it replaces, or else into the source's."""
    for place in (folder, stored.path.parent):
        if (place / WEIGHTS_FILE).exists() and (place / CARD_FILE).exists():
            old = split_card((place / CARD_FILE).read_text(errors="replace"))
            card, kept = keep_written(card, old, read_record(place / CONFIG_FILE).get("card", {}))
            if kept:
                print(f"{CARD_FILE}: keeps your {', '.join(name or 'opening' for name in kept)}")
            break
    return card


def write_grid(stored: StoredModel, loaded: LoadedModel, path: Path) -> None:
    """A picture of samples: the run's own of this step, else a new one.

    There is none of latents if their VAE is not available.
    """
    run = run_of_checkpoint(stored.path)
    drawn = run / "figs" / f"{stored.finished_steps}.png" if run else None
    if drawn and not stored.average and drawn.exists():
        shutil.copyfile(drawn, path)
        return
    try:
        find_decoder(loaded.config)
    except UserError as error:
        print(f"no picture of samples: {error}")
        return
    labels = None
    if loaded.config.is_conditional:
        rows = np.linspace(0, loaded.num_classes - 1, GRID_ROWS).round().astype(int)
        labels = [loaded.word_of(label) for label in rows.repeat(GRID_COLUMNS)]
    images = loaded.sample(labels, range(GRID_ROWS * GRID_COLUMNS), batch_size=GRID_BATCH)
    save_grid(path, images.numpy(), GRID_COLUMNS)


# Graphs


class Solution(nn.Module):
    """f(x, t, s) as one graph: the network inside the solution formula."""

    def __init__(self, model: SoFlow):
        super().__init__()
        self.model = model

    def forward(self, noise: Tensor, t: Tensor, s: Tensor, label: Tensor | None = None) -> Tensor:
        form = self.model.solution_form(t, s)
        given = {} if label is None else {"labels": label}
        return solution_of(noise, self.model.network(noise, t, t - s, **given), form.a, form.b)


def write_solution(loaded: LoadedModel, path: Path) -> None:
    """Write the model's graph."""
    if not isinstance(loaded.model, SoFlow):
        raise UserError(f"--onnx: works for the method SoFlow, not for {loaded.config.method}")

    def inputs(count: int) -> dict[str, Tensor]:
        source = torch.Generator().manual_seed(count)
        noise = torch.randn(count, *loaded.shape, generator=source)
        t = 0.5 + 0.5 * torch.rand(count, generator=source)
        found = {"noise": noise, "t": t, "s": t * torch.rand(count, generator=source)}
        if loaded.config.is_conditional:
            found["label"] = torch.arange(count) % loaded.num_classes
        return found

    write_graph(path, Solution(loaded.model), "x_s", inputs)


class Decoder(nn.Module):
    """Images, about -1..1, of latents x_0, as one graph."""

    def __init__(self, decoder: nn.Module, form: LatentForm):
        super().__init__()
        self.decoder, self.form = decoder, form

    def forward(self, latents: Tensor) -> Tensor:
        return kind_of(self.decoder).decode(self.decoder, self.form.denormalise(latents))


def write_decoder(loaded: LoadedModel, path: Path) -> None:
    """Write the graph of the VAE's decoder."""

    def inputs(count: int) -> dict[str, Tensor]:
        source = torch.Generator().manual_seed(count)
        return {"latents": torch.randn(count, *loaded.shape, generator=source)}

    found, form = vae.find_vae(loaded.config.vae), LatentForm.of_record(loaded.data)
    vae.refuse_misfit(found, form, loaded.shape)
    write_graph(path, Decoder(vae.load_vae(found, CPU), form), "image", inputs)


# The command


def check_target(folder: Path, may_replace: bool) -> None:
    """UserError if `folder` holds anything but an export, or one that must not be replaced."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file; name a folder")
    there = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    if foreign := [name for name in there if name not in FILES]:
        raise UserError(f"{folder}: holds {foreign[0]}, which is no export's; name another folder")
    if there and not {WEIGHTS_FILE, CONFIG_FILE} <= set(there):
        raise UserError(f"{folder}: is not empty and holds no export; name another folder")
    if there and not may_replace:
        raise UserError(f"{folder}: exists; say --overwrite to replace it, or name another folder")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line's options."""
    parser = command_parser(__doc__)
    add_model_options(parser)
    add = parser.add_argument
    folder_help = "the folder to make; without it, --push uploads the exported folder MODEL"
    add("folder", type=expanduser, nargs="?", metavar="FOLDER", help=folder_help)
    add("--onnx", action="store_true", help="add a graph for onnxruntime, checked against torch")
    add("--vae-onnx", action="store_true", help="add a graph of the decoder of latents")
    vae_help = "record this decoder of latents instead of a folder of this machine"
    add("--vae", metavar="NAME", help=vae_help)
    add("--space", action="store_true", help="add app.py, a server of the model, and its code")
    add("--overwrite", action="store_true", help="replace an existing export")
    add("--push", metavar="OWNER/NAME", help="upload to this repository of the hub")
    add("--private", action="store_true", help="with --push: only to a private repository")
    arguments = parser.parse_args(argv)
    if not (arguments.folder or arguments.push):
        parser.error("give a FOLDER to export to, or --push OWNER/NAME to upload one")
    if arguments.private and not arguments.push:
        parser.error("--private: goes with --push")
    making = ("subfolder", "ema", "onnx", "vae_onnx", "vae", "space", "overwrite")
    if not arguments.folder and (given := [name for name in making if getattr(arguments, name)]):
        parser.error(f"--{given[0].replace('_', '-')}: needs a FOLDER to export to")
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    arguments = parse_arguments(argv)
    if (arguments.onnx or arguments.vae_onnx) and (missing := missing_packages()):
        raise UserError(f"--onnx: not installed: pip install {' '.join(missing)}")
    if arguments.push:
        hub.check_push(arguments.push)
    if arguments.folder:
        check_target(Path(arguments.folder), arguments.overwrite)
        export(arguments)
    if arguments.push:
        folder = Path(arguments.folder or arguments.source)
        if not (folder / WEIGHTS_FILE).is_file():
            raise UserError(f"{folder}: not an exported folder; name a FOLDER to export it to")
        read_stored(folder)  # refuses a damaged one
        print(hub.push(folder, arguments.push, arguments.private))
        card = folder / CARD_FILE
        if card.exists() and lacks_licence(card.read_text(errors="replace")):
            print(f"{card}: names no licence yet; fill it in, and push again")


if __name__ == "__main__":
    run_command(main)
