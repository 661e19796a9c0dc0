"""Make of a small trained model one HTML file that samples from it, in a browser, offline.

    python page.py runs/digits digits.html
    python page.py runs/fashion clothes.html --fp16 --title "Clothes"
    python page.py runs/digits digits.html --ort onnxruntime-web

For pixels up to 64x64 and 40 MB of weights; demo.py serves any other model. The page holds the
model's graph and onnxruntime-web, which npm fetches once, unless --ort names its folder.
"""

from support.system.command import run_command  # isort: skip - first: it attends to the start

import argparse
import shlex
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from os.path import expanduser
from pathlib import Path
from typing import Any

import numpy as np
import torch

from export import write_solution
from models import Method, SoFlow
from sampling import LoadedModel, even_times, load
from support.page.assembly import PagedModel, assemble_page, name_of
from support.page.halves import Difference, compare, store_halves
from support.page.runtime import read_runtime
from support.runs.budget import count_parameters, weight_bytes
from support.runs.graphs import missing_packages
from support.system.files import (
    PAGE_MARK,
    UserError,
    atomic_write,
    check_writable,
    refuse_foreign,
)

MOST_PIXELS, MOST_MEGABYTES = 64, 40
STEPS = (1, 2, 4)
SAMPLERS = {"renoise": "fresh noise between", "chain": "no new noise"}
COMPARED_IMAGES = 64  # of fp16 and fp32


def make_page(arguments: argparse.Namespace) -> list[str]:
    """Write the page; what is to be said of it."""
    refuse_foreign(arguments.output, PAGE_MARK, "name another file")
    loaded = load(arguments.source, arguments.subfolder, device="cpu")
    check_fits(loaded, arguments)
    runtime = read_runtime(arguments.ort)
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "model.onnx"
        write_solution(loaded, path)
        stored = "Weights are stored as they are, in fp32."
        if arguments.fp16:
            whole = shutil.copyfile(path, Path(place) / "whole.onnx")
            store_halves(path)
            stored = describe(compare(whole, path, some_inputs(loaded)))
        graph = path.read_bytes()
    title = arguments.title or name_of(arguments.source, arguments.subfolder)
    page = assemble_page(paged(loaded, title, [stored]), graph, runtime)
    with atomic_write(arguments.output) as file:
        file.write(page.encode())
    return [stored, f"{arguments.output}: {len(page) / 1e6:.1f} MB, opens in any browser"]


def check_fits(loaded: LoadedModel, arguments: argparse.Namespace) -> None:
    """UserError, with the command that serves the model instead, where a page cannot hold it."""
    channels, size = loaded.shape[0], loaded.shape[-1]
    megabytes = weight_bytes(loaded.model) / 1e6 / (2 if arguments.fp16 else 1)
    reason = None
    if loaded.config.is_latent:
        reason = "makes latents, whose decoder is too large for a page"
    elif size > MOST_PIXELS:
        reason = f"makes images of {size}x{size}; a page takes up to {MOST_PIXELS}x{MOST_PIXELS}"
    elif channels not in (1, 3):
        reason = f"makes images of {channels} channels; a page shows 1, grey, or 3, colours"
    elif not isinstance(loaded.model, SoFlow):
        reason = f"is of the method {loaded.config.method}, of which no graph can be made"
    elif megabytes > MOST_MEGABYTES:
        instead = (
            "" if arguments.fp16 or megabytes > 2 * MOST_MEGABYTES else ", or half with --fp16"
        )
        reason = f"has {megabytes:.0f} MB of weights{instead}; a page takes up to {MOST_MEGABYTES}"
    if reason:
        where = ["--subfolder", arguments.subfolder] if arguments.subfolder else []
        command = shlex.join(["python", "demo.py", arguments.source, *where])
        raise UserError(f"{arguments.source}: {reason}; `{command}` serves it to a browser")


def some_inputs(loaded: LoadedModel) -> dict[str, np.ndarray]:
    """Inputs of the graph: noise for some images in one jump."""
    source, count = np.random.default_rng(0), COMPARED_IMAGES
    noise = source.standard_normal((count, *loaded.shape), np.float32)
    found: dict[str, np.ndarray] = {
        "noise": noise,
        "t": np.ones(count, np.float32),
        "s": np.zeros(count, np.float32),
    }
    if loaded.config.is_conditional:
        found["label"] = np.arange(count) % loaded.num_classes
    return found


def describe(difference: Difference) -> str:
    return (
        f"Weights are stored as fp16; of {COMPARED_IMAGES} images, pixels differ from fp32 by at "
        f"most {difference.largest}/255, by {difference.mean:.2g}/255 on average."
    )


def paged(loaded: LoadedModel, title: str, further: Sequence[str]) -> PagedModel:
    """What a page has to know of a model."""
    config = loaded.config
    classes: list[str] = []
    if config.is_conditional:
        classes = list(loaded.class_names or map(str, range(loaded.num_classes)))
    size = loaded.shape[-1]
    facts = f"{config.model_type}, {count_parameters(loaded.model)}, {size}x{size} pixels."
    return PagedModel(
        title=title,
        facts=[facts, *further],
        shape=loaded.shape,
        classes=classes,
        labels=[repr(loaded.word_of(label)) for label in range(len(classes))],
        num_classes=loaded.num_classes,
        steps={steps: times_of(loaded.model, steps) for steps in STEPS},
        samplers=SAMPLERS,
    )


def times_of(model: Method, steps: int) -> Mapping[str, Sequence[float]]:
    """The times of that many jumps, and the path's alpha and beta at them."""
    times = even_times(steps)
    point = model.path(torch.tensor(times))
    return {"times": times, "alpha": point.alpha.tolist(), "beta": point.beta.tolist()}


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add: Any = parser.add_argument
    source_help = "a run's folder, a checkpoint, an exported folder, or a name on the hub"
    add("source", type=expanduser, metavar="RUN_OR_EXPORT", help=source_help)
    add("output", type=path, metavar="FILE", help="the page, such as digits.html")
    add("--subfolder", default="", metavar="DIR", help="where in RUN_OR_EXPORT the model is")
    add("--title", metavar="TEXT", help="the page's title (the folder's name)")
    add("--fp16", action="store_true", help="store weights in half the bytes; says what that costs")
    add("--ort", type=path, metavar="FOLDER", help="the npm package onnxruntime-web, unpacked")
    arguments = parser.parse_args(argv)
    if arguments.output.suffix not in (".html", ".htm"):
        parser.error(f"{arguments.output}: name an .html file for the page")
    return arguments


def path(text: str) -> Path:
    """A path of the command line."""
    return Path(expanduser(text))


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    arguments = parse_arguments(argv)
    if missing := missing_packages():
        raise UserError(f"a page needs what is not installed: pip install {' '.join(missing)}")
    check_writable(arguments.output)
    print(*make_page(arguments), sep="\n")


if __name__ == "__main__":
    run_command(main)
