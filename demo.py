"""Serve a trained model of any size to a browser.

    python demo.py runs/digits
    python demo.py SoFlow --subfolder XL-2-cond --port 8000
    python demo.py exported/digits --host 0.0.0.0

Needs requirements_soflow_demo.txt. Only this machine can open the page, unless --host says
otherwise. Requests wait in a queue for the one model, and their size is bounded. page.py turns a
small model into one file that needs no server.
"""

from support.system.command import ROOT, command_parser, run_command  # isort: skip - must be first

import argparse
import ipaddress
import logging
import os
import socket
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from PIL import Image

from sampling import SAMPLERS, LoadedModel, load
from support.page.assembly import name_of
from support.runs.stored import add_model_options
from support.system.files import UserError

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is imported

import gradio as gr
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse

STYLE = ROOT / "support" / "page" / "demo.css"
LOCALHOST = "127.0.0.1"
# A Hugging Face Space sets these.
HOST = os.environ.get("GRADIO_SERVER_NAME", LOCALHOST)
PORT = int(os.environ.get("GRADIO_SERVER_PORT", "7860"))
STEPS = (1, 2, 4)
MAX_IMAGES, MAX_SEED = 16, 10**12
MAX_WAITING = 32  # requests
MAX_BODY_BYTES = 16_000  # of a request; the page sends a few hundred
SECONDS_KEPT = 600  # of the picture files that were shown
MIN_SHOWN_PIXELS = 128
ANY_CLASS = ("any", "")  # its name and value: each seed draws a class for itself
POSTS = ("/gradio_api/queue/join", "/gradio_api/cancel")  # all that the page posts to
INTRODUCTION = """# {title}
Each image starts as noise. The network turns noise into an image in one step, or in a few. The
seed chooses the noise: the same seed gives the same image, here and in Python."""


class Page(gr.Blocks):
    """Blocks that answer wrong input with a message, and not with a traceback in the log."""

    async def preprocess_data(self, *args: Any, **kwargs: Any) -> list[Any]:
        """The inputs, each checked by its component."""
        try:
            inputs = await super().preprocess_data(*args, **kwargs)
            if None in inputs:
                raise ValueError("a value is missing")
        except Exception as error:
            raise gr.Error(str(error), print_exception=False) from error
        return inputs


def build_page(title: str, loaded: LoadedModel) -> gr.Blocks:
    """The page: what to draw, and the images."""
    is_conditional = loaded.config.is_conditional
    numbers = map(str, range(loaded.num_classes if is_conditional else 0))
    classes = [ANY_CLASS, *(loaded.class_names or numbers)]
    with Page(title=title, delete_cache=(SECONDS_KEPT, SECONDS_KEPT)) as page:
        gr.Markdown(INTRODUCTION.format(title=title))
        with gr.Row():
            label = gr.Dropdown(classes, value="", label="Class", visible=is_conditional)
            seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=MAX_SEED)
            count = gr.Slider(1, MAX_IMAGES, value=8, step=1, precision=0, label="Images")
        with gr.Row():
            steps = gr.Radio(list(STEPS), value=STEPS[0], label="Steps per image")
            sampler = gr.Radio(list(SAMPLERS), value=next(iter(SAMPLERS)), label="Sampler")
        button = gr.Button("Draw", variant="primary")
        images = gr.Gallery(
            format="png",
            show_label=False,
            buttons=["download", "fullscreen"],  # and none that sends images to the hub
            elem_id="images",
        )
        speed = gr.Markdown(elem_id="speed")
        inputs = [label, seed, count, steps, sampler]
        draw = partial(draw_images, loaded)
        gr.on([button.click, page.load], draw, inputs, [images, speed], api_name="draw")
    return page.queue(max_size=MAX_WAITING, default_concurrency_limit=1, api_open=False)


def draw_images(
    loaded: LoadedModel, label: str, seed: int, count: int, steps: int, sampler: str
) -> tuple[list[tuple[Image.Image, str]], str]:
    """The images of `count` consecutive seeds with their captions, and how long they took."""
    seeds = range(seed, seed + count)
    start = time.perf_counter()
    try:
        images = loaded.sample(label or None, seeds, steps, sampler=sampler, batch_size=count)
    except UserError as error:
        raise gr.Error(str(error), print_exception=False) from error
    milliseconds = 1000 * (time.perf_counter() - start) / count
    pictures = [(enlarge(image), f"seed {n}") for image, n in zip(images, seeds, strict=True)]
    return pictures, f"{milliseconds:.3g} ms per image"


def enlarge(image: Image.Image) -> Image.Image:
    """A small image enlarged by a whole factor, so that the browser does not blur it."""
    scale = max(1, MIN_SHOWN_PIXELS // image.width)
    return image.resize((scale * image.width, scale * image.height), Image.Resampling.NEAREST)


class Gate:
    """Refuses requests that the page never makes: uploads, and bodies that are too large.

    Gradio bounds uploaded files, but not JSON, and it has no switch for its other endpoints.
    """

    def __init__(self, app: Any):
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        app = self.app
        if scope["type"] == "http" and scope["method"] not in ("GET", "HEAD"):
            headers = Headers(scope=scope)
            length = headers.get("content-length", "")
            is_known = length.isdigit() and "transfer-encoding" not in headers
            if not scope["path"].endswith(POSTS):
                app = PlainTextResponse("there is no such endpoint", 404)
            elif not is_known or int(length) > MAX_BODY_BYTES:
                app = PlainTextResponse(f"more than {MAX_BODY_BYTES} bytes", 413)
        await app(scope, receive, send)


def serve(page: gr.Blocks, host: str, port: int, address: str) -> None:
    """Serve the page until Ctrl-C."""
    page.launch(
        server_name=in_url(host),
        server_port=port,
        share=False,
        quiet=True,
        ssr_mode=False,
        prevent_thread_lock=True,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        css_paths=STYLE,
        theme=gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
        app_kwargs={"middleware": [Middleware(Gate)]},
    )
    # Gradio's endpoints raise on a wrong request, and uvicorn would log each traceback.
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
    print(f"{address} (Ctrl-C stops it)", flush=True)
    try:
        threading.Event().wait()
    finally:
        page.close(verbose=False)


def find_address(host: str, port: int) -> str:
    """The address to open, and who can open it. UserError if nothing can listen there."""
    try:
        family, *_, (ip, *_) = socket.getaddrinfo(host, port)[0]
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        raise UserError(f"--host {host} --port {port}: {error.strerror}") from error
    address = ipaddress.ip_address(ip)
    who = "everyone who can reach this machine, without a password"
    if address.is_loopback:
        who = "this machine only"
    if address.is_unspecified:
        host = socket.gethostname()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, suppress(OSError):
            probe.connect(("192.0.2.1", 9))  # sends nothing, only finds our address on the way
            host = probe.getsockname()[0]
    return f"http://{in_url(host)}:{port} for {who}"


def in_url(host: str) -> str:
    """The host as URLs have it."""
    return f"[{host}]" if ":" in host else host


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line's options."""
    parser = command_parser(__doc__)
    add = parser.add_argument
    add_model_options(parser)
    host_help = f"the address to listen at ({LOCALHOST}: this machine only; 0.0.0.0: everyone)"
    add("--host", default=HOST, metavar="ADDRESS", help=host_help)
    add("--port", type=int, default=PORT, metavar="N", help=f"({PORT})")
    arguments = parser.parse_args(argv)
    if not 0 < arguments.port < 2**16:
        parser.error(f"--port: must be from 1 to {2**16 - 1}, not {arguments.port}")
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    arguments = parse_arguments(argv)
    address = find_address(arguments.host, arguments.port)
    loaded = load(arguments.source, arguments.subfolder, ema=arguments.ema)
    loaded.sample(seeds=0)  # a model that cannot draw is found before anyone visits
    title = name_of(arguments.source, arguments.subfolder)
    serve(build_page(title, loaded), arguments.host, arguments.port, address)


if __name__ == "__main__":
    run_command(main)
