"""Serve a trained model to a browser, whatever its size: images, the way between two seeds, jumps.

    python demo.py runs/digits
    python demo.py SoFlow --subfolder XL-2-cond --port 8000
    python demo.py exported/digits --host 0.0.0.0

Needs requirements_soflow_demo.txt. Listens on this machine alone, unless --host says otherwise;
requests wait in a queue for the one model, and what one may ask for is bounded. page.py makes of a
small model a file that needs no server.
"""

from support.system.command import run_command  # isort: skip - first: it attends to the start

import argparse
import os
import time
from collections.abc import Sequence
from os.path import expanduser
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from models import Method
from sampling import SAMPLERS, Images, LoadedModel, decoding, even_times, load, pixels_of
from support.page.serving import Choices, Shown, build, serve
from support.system.files import UserError
from support.system.randomness import PerImageStream
from support.system.settings import shorten

LOCALHOST, PORT = "127.0.0.1", 7860
STEPS = (1, 2, 4)
MOST_IMAGES = 16
LARGEST_SEED = 10**12
PATH = (1.0, 0.8, 0.6, 0.4, 0.2, 0.0)  # s
ANY = "any"  # the class that each seed draws for itself


class Recorder:
    """A model that keeps what its jumps gave."""

    def __init__(self, model: Method):
        self.model, self.interpolate, self.found = model, model.interpolate, list[Tensor]()

    def jump(self, *given: Any) -> Tensor:
        self.found.append(self.model.jump(*given))
        return self.found[-1]


class Demo:
    """What a visitor may ask for, of one model; UserError says what is wrong with a request.

    Requests come from anywhere: nothing in them is taken for granted, whatever the page offers.
    """

    def __init__(self, loaded: LoadedModel):
        self.loaded = loaded
        is_conditional = loaded.config.is_conditional
        names = loaded.class_names or [str(label) for label in range(loaded.num_classes)]
        self.classes = [ANY, *names] if is_conditional else []

    def draw(self, word: Any, seed: Any, count: Any, steps: Any, sampler: Any) -> Shown:
        """`count` images, of seeds one after the other."""
        label, seed = self._label(word), self._whole("seed", seed, 0, LARGEST_SEED)
        count = self._whole("images", count, 1, MOST_IMAGES)
        steps, sampler = self._steps(steps), self._sampler(sampler)
        seeds = range(seed, seed + count)
        start = time.perf_counter()
        images = self.loaded.sample(label, seeds, steps, sampler=sampler, batch_size=count)
        seconds = (time.perf_counter() - start) / count
        pictures = [
            (self._enlarged(image), f"seed {n}") for image, n in zip(images, seeds, strict=True)
        ]
        jumps = "1 jump" if steps == 1 else f"{steps} jumps"
        return Shown(pictures, f"{1000 * seconds:.3g} ms per image, {jumps} each")

    def between(self, word: Any, seed: Any, other: Any, share: Any, steps: Any) -> Image.Image:
        """The image of the noise at `share` of the way between two seeds', along the sphere."""
        first, second = (self._whole("seed", given, 0, LARGEST_SEED) for given in (seed, other))
        if not isinstance(share, int | float) or not 0 <= share <= 1:
            raise UserError(f"share: {shorten(share)} is not a number from 0 to 1")
        label, steps = self._label(word), self._steps(steps)
        draws = [self._draws(given, 1) for given in (first, second)]
        noise = slerp(draws[0].noises[0], draws[1].noises[0], share)
        own = self._drawn(draws[0].labels) if label is None else label
        images = self.loaded.sample(own, [first], steps, sampler="chain", noise=noise)
        return self._enlarged(images[0])

    @torch.inference_mode()
    def follow(self, word: Any, seed: Any, steps: Any, sampler: Any) -> Shown:
        """x after each jump, and where one jump from the noise leads at each s of PATH."""
        label, seed = self._label(word), self._whole("seed", seed, 0, LARGEST_SEED)
        steps, sampler = self._steps(steps), self._sampler(sampler)
        weights = next(self.loaded.model.parameters())
        draws = self._draws(seed, SAMPLERS[sampler].num_noises(steps))
        noises = [noise.to(weights) for noise in draws.noises]
        labels = (
            draws.labels if label is None else torch.tensor(self.loaded.labels_of([label], "class"))
        )
        labels = None if labels is None else labels.to(weights.device)
        recorder = Recorder(self.loaded.model)
        SAMPLERS[sampler].run(recorder, noises, labels, even_times(steps))  # type: ignore[arg-type]
        one = torch.ones(1).to(weights)
        along = [self.loaded.model.jump(noises[0], one, s * one, labels) for s in PATH]
        with decoding(self.loaded.config, weights.device) as decode:
            x = torch.cat([noises[0], *recorder.found, *along]).float()
            pixels = pixels_of(decode(x)).cpu().numpy()
        said = ["noise", *(f"jump {n + 1}" for n in range(steps)), *(f"s = {s:g}" for s in PATH)]
        pictures = [self._enlarged(image) for image in Images(pixels, x)]
        return Shown(list(zip(pictures, said, strict=True)), "")

    def _draws(self, seed: int, num_noises: int) -> Any:
        num_classes = self.loaded.num_classes if self.loaded.config.is_conditional else None
        return PerImageStream(seed, num_classes, self.loaded.shape).draw([0], num_noises)

    def _drawn(self, labels: Tensor | None) -> int | str | None:
        return None if labels is None else self.loaded.word_of(int(labels))

    def _label(self, word: Any) -> str | None:
        if not self.classes or word in (None, ANY):
            return None
        if not isinstance(word, str) or word not in self.classes:
            raise UserError(f"class: {shorten(word)} is not one of the classes")
        return str(word)

    def _steps(self, steps: Any) -> int:
        if not isinstance(steps, int) or steps not in STEPS:
            raise UserError(f"jumps: {shorten(steps)} is not one of {', '.join(map(str, STEPS))}")
        return int(steps)

    def _sampler(self, sampler: Any) -> str:
        if not isinstance(sampler, str) or sampler not in SAMPLERS:
            raise UserError(f"sampler: {shorten(sampler)} is not one of {', '.join(SAMPLERS)}")
        return sampler

    def _whole(self, name: str, value: Any, least: int, most: int) -> int:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not least <= value <= most or value != int(value):
            raise UserError(
                f"{name}: {shorten(value)} is not a whole number from {least} to {most}"
            )
        return int(value)

    def _enlarged(self, image: Image.Image) -> Image.Image:
        """A picture that a browser does not blur; large ones as they are."""
        scale = max(1, 128 // image.width)
        return image.resize((scale * image.width, scale * image.height), Image.Resampling.NEAREST)


def slerp(a: Tensor, b: Tensor, share: float) -> Tensor:
    """Between two noises, [1, C, H, W], at `share` of the angle from a to b."""
    cosine = (a * b).sum() / (a.square().sum() * b.square().sum()).sqrt()
    angle = cosine.clamp(-1, 1).acos()
    if angle.sin() < 1e-6:  # one and the same noise
        return a
    return (((1 - share) * angle).sin() * a + (share * angle).sin() * b) / angle.sin()


def run(source: str, subfolder: str, host: str, port: int) -> None:
    """Load the model once and serve it until Ctrl-C."""
    loaded = load(source, subfolder)
    demo = Demo(loaded)
    title = os.path.basename(os.path.abspath(os.path.join(source, subfolder)))
    choices = Choices(demo.classes, STEPS, tuple(SAMPLERS), MOST_IMAGES)
    serve(build(title, demo, choices), host, port)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    source_help = "a run's folder, a checkpoint, an exported folder, or a name on the hub"
    add("source", type=expanduser, metavar="RUN_OR_EXPORT", help=source_help)
    add("--subfolder", default="", metavar="DIR", help="where in RUN_OR_EXPORT the model is")
    host_help = f"which address to listen on ({LOCALHOST}: this machine alone; 0.0.0.0: any)"
    add("--host", default=LOCALHOST, metavar="ADDRESS", help=host_help)
    add("--port", type=int, default=PORT, metavar="N", help=f"({PORT})")
    arguments = parser.parse_args(argv)
    if not 0 < arguments.port < 2**16:
        parser.error(f"--port: must be from 1 to {2**16 - 1}, not {arguments.port}")
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    arguments = parse_arguments(argv)
    run(arguments.source, arguments.subfolder, arguments.host, arguments.port)


if __name__ == "__main__":
    run_command(main)
