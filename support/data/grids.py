"""Grids of samples: which images they show, and where."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from support.data.images import ImageBatch, save_png, tile

MIN_TILE_PIXELS = 48  # smaller images are enlarged
FRAME_GREY = 96
MOST_CLASS_ROWS = 32  # in a grid with one row per requested class


def save_grid(path: Path, pixels: np.ndarray, columns: int) -> None:
    """Write uint8 [N, H, W, C] as the full rows of one picture."""
    zoom = max(1, MIN_TILE_PIXELS // pixels.shape[1])
    enlarged = pixels.repeat(zoom, axis=1).repeat(zoom, axis=2)
    framed = np.pad(enlarged, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=FRAME_GREY)
    save_png(path, tile(framed, len(framed) // columns, columns))


class Grid(NamedTuple):
    """What `save_grid` draws: pixels uint8 [rows * columns, H, W, C], and the class of each row."""

    pixels: np.ndarray
    columns: int
    classes: list[int]  # empty if rows mix classes


class GridImages:
    """Collects from a stream of batches the images for a grid of (rows, columns).

    The grid has one class per row: each of the `given` classes in that order, with as many columns
    as all of them fill. If none are given (or too many), the classes are spread evenly over
    `num_classes`, provided that their rows fill up. Otherwise the grid shows the first images, in a
    rectangle that they fill.
    """

    def __init__(self, shape: tuple[int, int], num_classes: int, given: Sequence[int] = ()):
        self.rows, self.columns = shape
        choices = list(dict.fromkeys(given)) or range(num_classes)
        self.shows_all = bool(given) and len(choices) <= max(self.rows, MOST_CLASS_ROWS)
        if not self.shows_all:
            spread = labels_by_row(len(choices), (min(self.rows, len(choices)), 1))
            choices = [choices[place] for place in spread]
        self.rows_of_each = max(1, self.rows // len(choices))
        self._of_class: dict[int, list[np.ndarray]] = {label: [] for label in choices}
        self._first: list[np.ndarray] = []
        self._room: Iterator[np.ndarray] | None = None  # memory for the kept images

    def add(self, batch: ImageBatch) -> None:
        """Keep copies of what may be shown: views would keep the whole batch.

        All copies share one allocation. Allocated one by one between batches, they would fragment
        the heap, which would then grow with every batch.
        """
        if self._room is None:
            most = (self.rows + len(self._of_class) * self.rows_of_each) * self.columns
            self._room = iter(np.zeros((most, *batch.pixels.shape[1:]), np.uint8))
        missing = self.rows * self.columns - len(self._first)
        self._first += [self._keep(image) for image in batch.pixels[:missing]]
        labels = [] if batch.labels is None else batch.labels.tolist()
        for label, image in zip(labels, batch.pixels, strict=False):
            images = self._of_class.get(label)
            if images is not None and len(images) < self.rows_of_each * self.columns:
                images.append(self._keep(image))

    def _keep(self, image: np.ndarray) -> np.ndarray:
        """A copy of the image."""
        assert self._room is not None
        copy = next(self._room)
        copy[:] = image
        return copy

    def arranged(self) -> Grid:
        """The images of the grid, which leave no cell empty."""
        made = {label: images for label, images in self._of_class.items() if images}
        shown = made if self.shows_all else self._of_class
        fewest = min(map(len, shown.values()), default=0)
        if fewest >= (1 if self.shows_all else self.columns):
            rows, columns = fullest_rectangle(fewest, (self.rows_of_each, self.columns))
            pixels = [image for images in shown.values() for image in images[: rows * columns]]
            return Grid(np.stack(pixels), columns, [label for label in shown for _ in range(rows)])
        rows, columns = fullest_rectangle(len(self._first), (self.rows, self.columns))
        # Not sorted: a class would continue in the next row.
        return Grid(np.stack(self._first[: rows * columns]), columns, [])


def fullest_rectangle(num_images: int, shape: tuple[int, int]) -> tuple[int, int]:
    """The (rows, columns) within `shape` that hold most of the images and are full."""
    rows, columns = shape
    fitting = [(row, min(columns, num_images // row)) for row in range(1, rows + 1)]
    return max(fitting, key=math.prod)


def labels_by_row(num_classes: int, shape: tuple[int, int]) -> list[int]:
    """One class per row of a grid of (rows, columns), spread evenly over the classes."""
    rows, columns = shape
    return [row * num_classes // rows for row in range(rows) for _ in range(columns)]
