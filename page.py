"""Turn a small trained model into one HTML file that samples from it in a browser, offline.

    python page.py runs/digits digits.html
    python page.py runs/fashion clothes.html --fp16 --title "Clothes"
    python page.py runs/digits digits.html --ort onnxruntime-web

For images of pixels up to 64x64 and 40 MB of weights; demo.py serves any other model. The page
holds the model's graph and onnxruntime-web. npm fetches onnxruntime-web once, unless --ort names
its folder.
"""

from support.system.command import command_parser, run_command  # isort: skip - must be first

import argparse
import shlex
import shutil
import tempfile
from collections.abc import Sequence
from os.path import expanduser
from pathlib import Path
from typing import Any

import numpy as np
import torch

from export import write_solution
from models import SoFlow
from sampling import LoadedModel, even_times, load
from support.page.assembly import assemble_page, name_of
from support.page.halves import compare, store_halves
from support.page.runtime import read_runtime
from support.runs.budget import count_parameters, weight_bytes
from support.runs.graphs import missing_packages
from support.runs.stored import add_model_options
from support.system.files import PAGE_MARK, UserError, atomic_write, check_writable, refuse_foreign

MAX_PIXELS, MAX_MEGABYTES = 64, 40
STEPS = (1, 2, 4)
SAMPLERS = {"renoise": "fresh noise at each step", "chain": "no new noise"}
COMPARED_IMAGES = 64  # of fp16 and fp32


def write_page(arguments: argparse.Namespace) -> None:
    """Write the page of the model that the command line names."""
    output = Path(arguments.output)
    refuse_foreign(output, PAGE_MARK, "name another file")
    loaded = load(arguments.source, arguments.subfolder, device="cpu", ema=arguments.ema)
    if reason := unfit(loaded, arguments.fp16):
        options = {"--subfolder": arguments.subfolder, "--ema": arguments.ema}
        given = [f"{name}={value}" for name, value in options.items() if value]
        command = shlex.join(["python", "demo.py", arguments.source, *given])
        raise UserError(f"{arguments.source}: {reason}; `{command}` serves it to a browser")
    runtime = read_runtime(Path(arguments.ort) if arguments.ort else None)
    with tempfile.TemporaryDirectory() as place:
        path = Path(place, "model.onnx")
        write_solution(loaded, path)
        stored = store_as_fp16(path, loaded) if arguments.fp16 else "Weights are stored as fp32."
        graph = path.read_bytes()
    size = loaded.shape[-1]
    made = f"{loaded.config.model_type}, {count_parameters(loaded.model)}, {size}x{size} pixels."
    title = arguments.title or name_of(arguments.source, arguments.subfolder)
    page = assemble_page(title, [made, stored], describe_model(loaded), graph, runtime)
    with atomic_write(output) as file:
        file.write(page.encode())
    print(stored, f"{output}: {len(page) / 1e6:.1f} MB, opens in any browser", sep="\n")


def unfit(loaded: LoadedModel, is_fp16: bool) -> str | None:
    """Why a page cannot hold the model, or None."""
    size = loaded.shape[-1]
    if loaded.config.is_latent:
        return "makes latents, and their decoder is too large for a page"
    if size > MAX_PIXELS:
        return f"makes images of {size}x{size}; a page takes up to {MAX_PIXELS}x{MAX_PIXELS}"
    if not isinstance(loaded.model, SoFlow):
        return f"is of the method {loaded.config.method}, which has no graph"
    megabytes = weight_bytes(loaded.model) / 1e6 / (2 if is_fp16 else 1)
    if megabytes > MAX_MEGABYTES:
        half = "" if is_fp16 else " (--fp16 halves them)"
        return f"has {megabytes:.0f} MB of weights{half}; a page takes up to {MAX_MEGABYTES} MB"
    return None


def store_as_fp16(path: Path, loaded: LoadedModel) -> str:
    """Store the graph's weights as fp16; returns what that costs, in a sentence."""
    whole = shutil.copyfile(path, path.with_name("whole.onnx"))
    store_halves(path)
    noise = np.random.default_rng(0).standard_normal((COMPARED_IMAGES, *loaded.shape), np.float32)
    ones = np.ones(COMPARED_IMAGES, np.float32)
    inputs: dict[str, np.ndarray] = {"noise": noise, "t": ones, "s": 0 * ones}
    if loaded.config.is_conditional:
        inputs["label"] = np.arange(COMPARED_IMAGES) % loaded.num_classes
    differences = compare(whole, path, inputs)
    return (
        f"Weights are stored as fp16. In {COMPARED_IMAGES} images, pixels differ from fp32 by at "
        f"most {differences.max()}/255, and by {differences.mean():.2g}/255 on average."
    )


def describe_model(loaded: LoadedModel) -> dict[str, Any]:
    """The description of the model that the page's scripts read."""
    is_conditional = loaded.config.is_conditional
    labels = range(loaded.num_classes if is_conditional else 0)
    return {
        "shape": loaded.shape,
        "isConditional": is_conditional,
        "numClasses": loaded.num_classes,
        "classes": [loaded.class_names[n] if loaded.class_names else str(n) for n in labels],
        "labels": [repr(loaded.word_of(n)) for n in labels],  # as written in Python
        "samplers": SAMPLERS,
        "steps": {steps: times_of(loaded, steps) for steps in STEPS},
    }


def times_of(loaded: LoadedModel, steps: int) -> dict[str, Sequence[float]]:
    """The times of so many steps, and the path's alpha and beta at them."""
    times = even_times(steps)
    point = loaded.model.path(torch.tensor(times))
    return {"times": times, "alpha": point.alpha.tolist(), "beta": point.beta.tolist()}


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line's options."""
    parser = command_parser(__doc__)
    add: Any = parser.add_argument
    add_model_options(parser)
    add("output", type=expanduser, metavar="FILE", help="the page, such as digits.html")
    add("--title", metavar="TEXT", help="the page's title (the model's name)")
    add("--fp16", action="store_true", help="store the weights in half the bytes, and say the cost")
    add("--ort", type=expanduser, metavar="FOLDER", help="the unpacked npm package onnxruntime-web")
    arguments = parser.parse_args(argv)
    if not arguments.output.endswith((".html", ".htm")):
        parser.error(f"{arguments.output}: name an .html file for the page")
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    arguments = parse_arguments(argv)
    if missing := missing_packages():
        raise UserError(f"packages are missing: pip install {' '.join(missing)}")
    check_writable(arguments.output)
    write_page(arguments)


if __name__ == "__main__":
    run_command(main)
