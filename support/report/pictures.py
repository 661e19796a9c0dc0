"""Pictures of samples, made small enough for a page."""

import base64
import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

TOTAL_BYTES = 2_000_000  # of all pictures of a page
MOST_PICTURES = 48  # of all runs: a large grid takes a tenth of a second
WIDTHS = (768, 512, 384, 256, 128)  # pixels, tried in turn until a picture is small enough


def embed(runs: Mapping[int, Mapping[int, Path]], notes: list[str]) -> dict[int, list[dict]]:
    """The pictures of each run that fit in a page, as the page's script reads them.

    They lie evenly over the steps, with the first and the last. Pictures that cannot be read are
    noted and left out, and so are runs without any.
    """
    most = max(2, MOST_PICTURES // len(runs))
    chosen = [(run, step) for run, paths in runs.items() for step in _spread(list(paths), most)]
    found: dict[int, list[dict]] = {}
    for run, step in chosen:
        path = runs[run][step]
        try:
            source, width = _shrink(path, TOTAL_BYTES // len(chosen))
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            notes.append(f"{path}: cannot be shown ({error})")
        else:
            found.setdefault(run, []).append({"step": step, "source": source, "width": width})
    return found


def _spread(steps: list[int], most: int) -> list[int]:
    """At most so many of the steps, evenly, with the first and the last."""
    places = np.linspace(0, len(steps) - 1, min(most, len(steps)))
    return [steps[place] for place in places.round().astype(int)]


def _shrink(path: Path, limit_bytes: int) -> tuple[str, int]:
    """A picture as a data: URI, and its width; with fewer pixels if the file is too large."""
    data, kind = path.read_bytes(), "png"
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    for width in WIDTHS:
        if len(data) * 4 / 3 <= limit_bytes:
            break
        image.thumbnail((width, 4 * width), Image.Resampling.LANCZOS)
        file = io.BytesIO()
        image.save(file, "webp", quality=80)
        data, kind = file.getvalue(), "webp"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}", image.width
