"""The server of a demo: its page, a queue for the one model, and bounds on what comes in."""

import errno
import os
import socket
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

from PIL import Image

from support.system.files import UserError, one_line

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is loaded

import gradio as gr

MOST_BODY_BYTES = 16_000  # of a request; the page makes none of more than a few hundred
MOST_WAITING = 32  # requests
SECONDS_KEPT = 600  # of pictures that were shown

# One call at a time; what comes in is checked by the functions themselves, in words of theirs.
ONE_MODEL: dict[str, Any] = {
    "concurrency_limit": 1,
    "concurrency_id": "model",
    "preprocess": False,
}
CSS = """
footer { display: none !important; }
.gradio-container { max-width: 1080px !important; margin: 0 auto !important; }
"""


class Shown(NamedTuple):
    """Pictures, with a line each, and what is said of them all."""

    pictures: list[tuple[Image.Image, str]]
    said: str


class Demo(Protocol):
    """What visitors ask for; all may raise UserError, and take nothing for granted."""

    def draw(self, word: Any, seed: Any, count: Any, steps: Any, sampler: Any) -> Shown: ...

    def between(self, word: Any, seed: Any, other: Any, share: Any, steps: Any) -> Image.Image: ...

    def follow(self, word: Any, seed: Any, steps: Any, sampler: Any) -> Shown: ...


class Choices(NamedTuple):
    """What the page offers."""

    classes: Sequence[str]  # the first is chosen; none where the model takes no class
    steps: Sequence[int]
    samplers: Sequence[str]
    most_images: int


def build(title: str, demo: Demo, choices: Choices) -> gr.Blocks:
    """The page."""
    first = choices.classes[0] if choices.classes else None
    with gr.Blocks(
        title=title, analytics_enabled=False, delete_cache=(SECONDS_KEPT, SECONDS_KEPT)
    ) as page:
        gr.Markdown(
            f"# {title}\nEach image begins as noise, and a network takes it to the picture in one "
            "jump, or a few. The seed decides the noise: the same seed gives the same image, here "
            "and in Python. Choose a class, a seed or more jumps, and draw."
        )
        with gr.Row():
            word = gr.Dropdown(
                list(choices.classes), value=first, label="Class", visible=bool(choices.classes)
            )
            seed = gr.Number(0, label="Seed", precision=0, minimum=0)
            steps = gr.Radio(list(choices.steps), value=choices.steps[0], label="Jumps per image")
            sampler = gr.Radio(
                list(choices.samplers), value=choices.samplers[0], label="Between jumps"
            )
        with gr.Tab("Images"):
            count = gr.Slider(
                1, choices.most_images, value=min(8, choices.most_images), step=1, label="Images"
            )
            draw = gr.Button("Draw", variant="primary")
            images = gr.Gallery(format="png", columns=4, show_label=False, elem_id="images")
            said = gr.Markdown(elem_id="said")
        with gr.Tab("From one seed to another"):
            other = gr.Number(100, label="To seed", precision=0, minimum=0)
            share = gr.Slider(0, 1, value=0.5, step=0.01, label="How far along the way")
            middle = gr.Image(format="png", show_label=False, elem_id="between", height=400)
        with gr.Tab("How it gets there"):
            look = gr.Button("Show the first image after each jump, and along s", variant="primary")
            followed = gr.Gallery(format="png", columns=6, show_label=False, elem_id="followed")
        asked = [word, seed, count, steps, sampler]
        gr.on(
            [draw.click, page.load],
            mending(demo.draw),
            asked,
            [images, said],
            api_name="draw",
            **ONE_MODEL,
        )
        asked = [word, seed, other, share, steps]
        gr.on(
            [share.change, other.submit],
            mending(demo.between),
            asked,
            middle,
            api_name="between",
            trigger_mode="always_last",
            show_progress="hidden",
            **ONE_MODEL,
        )
        asked = [word, seed, steps, sampler]
        pictures = mending(lambda *given: demo.follow(*given).pictures)
        look.click(pictures, asked, followed, api_name="follow", **ONE_MODEL)
    return page.queue(max_size=MOST_WAITING)


def mending(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, with what a visitor can mend said as a message, not as a failure."""

    def call(*given: Any) -> Any:
        try:
            return function(*given)
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from error

    return call


class BodyLimit:
    """Refuses requests of more bytes than any that the page makes, before they are read."""

    def __init__(self, app: Any, most_bytes: int):
        self.app, self.most_bytes = app, most_bytes

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        given = dict(scope["headers"])
        length = given.get(b"content-length", b"0")
        is_chunked = b"chunked" in given.get(b"transfer-encoding", b"")
        if is_chunked or not length.isdigit() or int(length) > self.most_bytes:
            await send({"type": "http.response.start", "status": 413, "headers": []})
            return await send({"type": "http.response.body", "body": b"too large"})
        return await self.app(scope, receive, send)


def serve(page: gr.Blocks, host: str, port: int) -> None:
    """Serve the page until Ctrl-C; UserError where nothing can listen there."""
    from starlette.middleware import Middleware

    check_port(host, port)
    _, address, _ = page.launch(
        server_name=host,
        server_port=port,
        share=False,
        quiet=True,
        ssr_mode=False,
        show_error=True,
        prevent_thread_lock=True,
        footer_links=[],
        css=CSS,
        theme=gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
        app_kwargs={"middleware": [Middleware(BodyLimit, most_bytes=MOST_BODY_BYTES)]},
    )
    print(f"{address} (Ctrl-C ends it)", flush=True)
    try:
        threading.Event().wait()
    finally:
        page.close(verbose=False)


def check_port(host: str, port: int) -> None:
    """UserError where this address is not ours to listen on."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise UserError(
                    f"--port {port}: another program listens there; name another"
                ) from error
            raise UserError(
                f"--host {host}: nothing can listen there ({one_line(error)})"
            ) from error
