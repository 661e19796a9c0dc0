"""Make of a trained model a folder that travels: weights, what they are of, and a model card.

    python export.py runs/digits exported/digits
    python export.py runs/digits/ckpts/1000.pt exported/digits-1000 --onnx
    python export.py runs/digits exported/digits --space
    python export.py exported/digits --push owner/digits --private

The folder has model.safetensors (the averaged weights, bit for bit), config.json (network, path,
solution form, decoder, class names), README.md (a model card made from the run's records) and a
picture of samples; `sampling.load` reads it. --push sends a folder that is there to the Hugging
Face Hub, as it is: fill in the licence in its README.md first.
"""

from support.system.command import run_command  # isort: skip - first: it attends to the start

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
from model_card import lacks_licence, model_card
from models import SoFlow, solution_of
from sampler import find_decoder
from sampling import LoadedModel, assemble
from support.data import vae
from support.data.grids import save_grid
from support.page.space import APP_FILE, CODE_FOLDER, REQUIREMENTS_FILE, card_lines, write_space
from support.runs.checkpoint import run_of_checkpoint
from support.runs.graphs import missing_packages, write_graph
from support.runs.stored import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    StoredModel,
    read_stored,
    write_stored,
)
from support.system import hub
from support.system.digests import weights_digest
from support.system.files import UserError
from support.system.folders import atomic_folder

CARD_FILE, GRID_FILE = "README.md", "samples.png"
ONNX_FILE, DECODER_FILE = "model.onnx", "decoder.onnx"
# All that an export writes, and what it may replace; graphs above 2 GB have their weights beside.
FILES = {
    WEIGHTS_FILE: "the averaged weights",
    CONFIG_FILE: "the network, path, solution form, decoder and class names",
    CARD_FILE: "this card",
    GRID_FILE: "samples",
    ONNX_FILE: "f(noise, t, s), and of label where there are classes, for onnxruntime: x_s, of any "
    "batch size; an image is that of t = 1, s = 0",
    DECODER_FILE: "the decoder for onnxruntime: image, -1..1, of latents, of any batch size",
    f"{ONNX_FILE}.data": "its weights",
    f"{DECODER_FILE}.data": "its weights",
    APP_FILE: "serves the model to a browser; as a Hugging Face Space too",
    REQUIREMENTS_FILE: "what that needs",
    CODE_FOLDER: "the code that it runs",
}
GRID_ROWS, GRID_COLUMNS = 4, 8

CPU = torch.device("cpu")


def export(arguments: argparse.Namespace) -> None:
    """Make the folder, whole or not at all."""
    folder = Path(arguments.folder)
    stored = read_stored(arguments.source, arguments.subfolder, arguments.ema)
    stored, loaded = fit_to_travel(stored, arguments.vae)
    if arguments.vae_onnx and not loaded.config.is_latent:
        raise UserError(f"--vae-onnx: {stored.path} makes pixels, which nothing has to decode")
    further: list[Callable[[Path], object]] = []
    if arguments.onnx:
        further.append(lambda place: write_solution(loaded, place / ONNX_FILE))
    if arguments.vae_onnx:
        further.append(lambda place: write_decoder(loaded, place / DECODER_FILE))
    if arguments.space:
        further.append(write_space)
    first_lines = card_lines() if arguments.space else ""
    made = write_folder(folder, stored, loaded, arguments.push, further, first_lines)
    print(f"{stored.path} exported to {folder}: {', '.join(made)}")


def write_folder(
    folder: Path,
    stored: StoredModel,
    loaded: LoadedModel,
    title: str | None = None,
    further: Sequence[Callable[[Path], object]] = (),
    first_lines: str = "",
) -> list[str]:
    """Make an exported folder, whole or not at all; gives the names of its files.

    `further` write more into it; `first_lines` go to the head of the model card.
    """
    with atomic_folder(folder) as place:
        write_stored(stored, place)
        write_grid(stored, loaded, place / GRID_FILE)
        for write in further:
            write(place)
        made = [CARD_FILE, *(path.name for path in place.iterdir())]
        files = {name: text for name, text in FILES.items() if name in made}
        card = model_card(title or folder.resolve().name, stored, loaded, files)
        text = card.replace("---\n", f"---\n{first_lines}", 1)
        # Names of classes may be no text.
        (place / CARD_FILE).write_bytes(text.encode(errors="replace"))
    return sorted(made)


def fit_to_travel(stored: StoredModel, vae_name: str | None) -> tuple[StoredModel, LoadedModel]:
    """The model with nothing of this machine in its config, and ready to sample from."""
    config = config_from_dict(stored.config, str(stored.path), (), print)
    if vae_name is None and config.is_latent and os.path.exists(expanduser(config.vae)):
        raise UserError(
            f"{stored.path}: its decoder is {config.vae}, a folder of this machine; "
            "say --vae NAME: where others find it, on the Hugging Face Hub or in a folder"
        )
    loaded = assemble(config, stored, CPU)
    # By the model's order of the weights, as records have it; files have others.
    digest = weights_digest(loaded.model.state_dict())
    elsewhere = {"working_dir": "exported", "dataset_path": None, "vae": vae_name or config.vae}
    started_from = dict(stored.started_from)
    if config.init_from and os.path.exists(expanduser(config.init_from)):
        elsewhere["init_from"] = Path(config.init_from).name
        started_from["source"] = elsewhere["init_from"]
    described = dataclasses.replace(
        stored, config=config.to_dict() | elsewhere, started_from=started_from
    )
    return described, dataclasses.replace(loaded, weights_sha256=digest)


def write_grid(stored: StoredModel, loaded: LoadedModel, path: Path) -> None:
    """A picture of samples: the run's own of this step, or else one made now.

    Of latents that nothing here can decode there is none.
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
    images = loaded.sample(labels, range(GRID_ROWS * GRID_COLUMNS))
    save_grid(path, images.numpy(), GRID_COLUMNS)


# Graphs


class Solution(nn.Module):
    """f(x, t, s) as one graph: the network, and the solution formula around it."""

    def __init__(self, model: SoFlow):
        super().__init__()
        self.model = model

    def forward(self, noise: Tensor, t: Tensor, s: Tensor, label: Tensor | None = None) -> Tensor:
        form = self.model.solution_form(t, s)
        given = {} if label is None else {"labels": label}
        return solution_of(noise, self.model.network(noise, t, t - s, **given), form.a, form.b)


def write_solution(loaded: LoadedModel, path: Path) -> None:
    """The graph of the model."""
    if not isinstance(loaded.model, SoFlow):
        raise UserError(f"--onnx: for the method SoFlow, not for {loaded.config.method}")

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

    def __init__(self, decoder: nn.Module):
        super().__init__()
        self.decoder = decoder

    def forward(self, latents: Tensor) -> Tensor:
        return self.decoder.decode(latents / vae.LATENT_SCALE).sample  # type: ignore[operator]


def write_decoder(loaded: LoadedModel, path: Path) -> None:
    """The graph of what decodes the model's latents."""

    def inputs(count: int) -> dict[str, Tensor]:
        source = torch.Generator().manual_seed(count)
        return {"latents": torch.randn(count, *loaded.shape, generator=source)}

    found = find_decoder(loaded.config)
    assert found is not None  # the caller has seen to that
    write_graph(path, Decoder(vae.load_vae(found, CPU)), "image", inputs)


# The command


def refuse_to_replace(folder: Path, may_replace: bool) -> None:
    """UserError where something is at `folder` that is not to be replaced, or not an export."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file; name a folder")
    there = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    if foreign := [name for name in there if name not in FILES]:
        raise UserError(
            f"{folder}: holds what an export does not write ({foreign[0]}); name another folder"
        )
    if there and not {WEIGHTS_FILE, CONFIG_FILE} <= set(there):
        raise UserError(f"{folder}: is not empty and holds no export; name another folder")
    if there and not may_replace:
        raise UserError(f"{folder}: exists; say --overwrite to replace it, or name another folder")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "source",
        type=expanduser,
        metavar="RUN_OR_CKPT",
        help="a run's folder, of which it is the newest checkpoint, a checkpoint, an exported "
        "folder, or a name on the hub",
    )
    folder_help = "what is to be made; left out, --push sends the exported folder RUN_OR_CKPT"
    add("folder", type=expanduser, nargs="?", metavar="FOLDER", help=folder_help)
    add("--subfolder", default="", metavar="DIR", help="where in RUN_OR_CKPT the model is")
    add("--ema", default="", metavar="NAME", help="of several averages this one, such as 0.999")
    add("--onnx", action="store_true", help="also one graph for onnxruntime, checked against torch")
    add("--vae-onnx", action="store_true", help="also one of the decoder of latents")
    vae_help = "what to record as the decoder of latents, instead of a folder of this machine"
    add("--vae", metavar="NAME", help=vae_help)
    add("--space", action="store_true", help="also app.py, which serves it, and the code it needs")
    add("--overwrite", action="store_true", help="replace an export that is there")
    add("--push", metavar="OWNER/NAME", help="upload it to this repository of the hub")
    add("--private", action="store_true", help="with --push: which has to be a private one")
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
        refuse_to_replace(Path(arguments.folder), arguments.overwrite)
        export(arguments)
    if arguments.push:
        folder = Path(arguments.folder or arguments.source)
        if not (folder / WEIGHTS_FILE).is_file():
            raise UserError(f"{folder}: not an exported folder; name a FOLDER to export it to")
        read_stored(folder)  # UserError where it is damaged
        print(hub.push(folder, arguments.push, arguments.private))
        if lacks_licence(folder / CARD_FILE):
            print(f"{folder / CARD_FILE}: its licence is still to be filled in, and pushed again")


if __name__ == "__main__":
    run_command(main)
