"""Pictures of samples: which images they show, and where."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from support.data.images import ImageBatch, save_png, tile

MIN_TILE_PIXELS = 48  # so that a grid of 8 x 8 digits can be seen
FRAME_GREY = 96
MOST_CLASS_ROWS = 32  # of a grid that has a row for each class asked for


def save_grid(path: Path, pixels: np.ndarray, columns: int) -> None:
    """Write uint8 [N, H, W, C] as full rows of one picture; small images are enlarged."""
    zoom = max(1, MIN_TILE_PIXELS // pixels.shape[1])
    enlarged = pixels.repeat(zoom, axis=1).repeat(zoom, axis=2)
    framed = np.pad(enlarged, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=FRAME_GREY)
    save_png(path, tile(framed, len(framed) // columns, columns))


class Grid(NamedTuple):
    """What `save_grid` draws: pixels uint8 [rows * columns, H, W, C], and the class of each row."""

    pixels: np.ndarray
    columns: int
    classes: list[int]  # none where rows are not of one class


class GridImages:
    """Gathers from a stream of batches what a picture of (rows, columns) is to show.

    That is one class a row: each of the `given` classes, in that order, with as many columns as all
    of them fill; where none are given (or too many), classes spread evenly over `num_classes`, if
    their rows fill up. Otherwise it is the first images as they come, in a rectangle that they
    fill.
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
        self._room: Iterator[np.ndarray] | None = None  # for the images that are kept

    def add(self, batch: ImageBatch) -> None:
        """Keep what may be shown of the batch, in copies: a view would keep all of it.

        The copies lie in one piece, taken at once. One by one, between batches that come and go,
        they would leave the heap no gap for the next batch, and it would grow by each.
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
        """The picture's images, which leave no cell of it empty."""
        made = {label: images for label, images in self._of_class.items() if images}
        shown = made if self.shows_all else self._of_class
        fewest = min(map(len, shown.values()), default=0)
        if fewest >= (1 if self.shows_all else self.columns):
            rows, columns = fullest_rectangle(fewest, (self.rows_of_each, self.columns))
            pixels = [image for images in shown.values() for image in images[: rows * columns]]
            return Grid(np.stack(pixels), columns, [label for label in shown for _ in range(rows)])
        rows, columns = fullest_rectangle(len(self._first), (self.rows, self.columns))
        # As they come: sorted, a class would go on in the next row.
        return Grid(np.stack(self._first[: rows * columns]), columns, [])


def fullest_rectangle(num_images: int, shape: tuple[int, int]) -> tuple[int, int]:
    """The (rows, columns) within `shape` that take most of the images and are full."""
    rows, columns = shape
    fitting = [(row, min(columns, num_images // row)) for row in range(1, rows + 1)]
    return max(fitting, key=math.prod)


def labels_by_row(num_classes: int, shape: tuple[int, int]) -> list[int]:
    """One class per row of a grid of (rows, columns), spread evenly over the classes."""
    rows, columns = shape
    return [row * num_classes // rows for row in range(rows) for _ in range(columns)]
