"""Pictures of samples, made small enough for a page."""

import base64
import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from PIL import Image

TOTAL_BYTES = 2_000_000  # of all pictures of a page
MOST_PICTURES = 48  # of all runs: a large grid takes a tenth of a second
WIDTHS = (768, 512, 384, 256, 128)  # pixels, tried in turn until a picture is small enough


class Picture(NamedTuple):
    """A picture as a page holds it."""

    step: int
    source: str  # data: URI
    width: int
    height: int


def embed(paths_by_run: Iterable[Mapping[int, Path]], notes: list[str]) -> list[list[Picture]]:
    """The pictures of each run that fit in a page, evenly over the steps, with first and last.

    Pictures that cannot be read are noted and left out.
    """
    runs = list(paths_by_run)
    most = max(2, MOST_PICTURES // len(runs))
    chosen = [{step: paths[step] for step in _spread(list(paths), most)} for paths in runs]
    limit = TOTAL_BYTES // max(1, sum(map(len, chosen)))
    found: list[list[Picture]] = [[] for _ in runs]
    for pictures, paths in zip(found, chosen, strict=True):
        for step, path in paths.items():
            try:
                pictures.append(_shrink(path, step, limit))
            except (OSError, ValueError, Image.DecompressionBombError) as error:
                notes.append(f"{path}: cannot be shown ({error})")
    return found


def _spread(steps: list[int], most: int) -> list[int]:
    """At most so many of the steps, evenly, with the first and the last."""
    if len(steps) <= most:
        return steps
    return [steps[round(i * (len(steps) - 1) / (most - 1))] for i in range(most)]


def _shrink(path: Path, step: int, limit_bytes: int) -> Picture:
    """A picture within a bound: the file itself if it is small, else with fewer pixels."""
    data, kind = path.read_bytes(), "png"
    with Image.open(path) as opened:
        size = opened.size
        if len(data) * 4 / 3 > limit_bytes:
            image, kind = opened.convert("RGB"), "webp"
            for width in WIDTHS:
                image.thumbnail((width, 4 * width), Image.Resampling.LANCZOS)
                file = io.BytesIO()
                image.save(file, "webp", quality=80)
                data, size = file.getvalue(), image.size
                if len(data) * 4 / 3 <= limit_bytes:
                    break
    return Picture(step, f"data:image/{kind};base64,{base64.b64encode(data).decode()}", *size)
