"""Pictures without torch: decode, crop, class folders, uint8 and back, tiles, PNG.

`pixels` are uint8 0..255 with channels last; `images` are float -1..1 in whatever layout.
"""

import os
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image, UnidentifiedImageError

from soflow.files import UserError, atomic_write, one_line, regular_only

EXTENSIONS = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
# Named, because some of Pillow's other decoders start programs (EPS) or open further files.
FORMATS = ("BMP", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
# How files of these formats begin (RIFF: WebP; P1 to P6: PPM and its kin).
SIGNATURES = (
    *(b"\xff\xd8\xff", b"\x89PNG", b"BM", b"RIFF", b"II*\0", b"MM\0*"),
    *(b"P1", b"P2", b"P3", b"P4", b"P5", b"P6"),
)
MAX_PIXELS = 89_478_485  # where Pillow begins to warn of decompression bombs: 256 MiB of RGB

Array = TypeVar("Array")  # numpy.ndarray or torch.Tensor


def to_pixels(images: Array) -> Array:
    """uint8 of floats in -1..1 (float32 or wider): clamp(127.5 x + 128, 0, 255), truncated."""
    scaled = images * 127.5
    scaled += 128  # in place: a batch of pictures is large
    scaled = scaled.clip(0, 255)
    return scaled.byte() if hasattr(scaled, "byte") else scaled.astype(np.uint8)


def to_images(pixels: Array) -> Array:
    """float32 in -1..1 of uint8: pixels / 127.5 - 1, which `to_pixels` takes back exactly."""
    floats = pixels.float() if hasattr(pixels, "float") else pixels.astype(np.float32)
    return floats / 127.5 - 1


def read_image(path: str | Path, crop_size: int | None = None) -> np.ndarray:
    """The picture at `path` as RGB, uint8 [H, W, 3]; with `crop_size`, its `centre_crop`.

    Decoded as Pillow does: grey is repeated, alpha dropped, EXIF rotation not applied. Raises
    UserError where the file is damaged, of another format, or unpacks to more than 89 megapixels.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with (
                open(path, "rb", opener=regular_only) as file,
                Image.open(file, formats=FORMATS) as picture,
            ):
                pixels = np.asarray(picture.convert("RGB"))
        return pixels if crop_size is None else centre_crop(pixels, crop_size)
    except UnidentifiedImageError as error:
        raise UserError(
            f"{path}: not a readable picture (cannot identify it as one of {', '.join(FORMATS)})"
        ) from error
    except Exception as error:  # Pillow's decoders raise many kinds on damaged files
        raise UserError(f"{path}: not a readable picture ({one_line(error)})") from error


def centre_crop(pixels: np.ndarray, size: int) -> np.ndarray:
    """The middle [size, size, 3] of uint8 [H, W, 3] whose short side was brought to `size`.

    ADM's crop: the sides are halved with a box filter while the short one is at least twice `size`,
    then resized with a bicubic filter, then cut.
    """
    picture = Image.fromarray(pixels)
    while min(picture.size) >= 2 * size:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = size / min(picture.size)
    width, height = round(picture.width * scale), round(picture.height * scale)
    if width * height > MAX_PIXELS:
        raise UserError(f"too long and thin to crop: {pixels.shape[1]} x {pixels.shape[0]} pixels")
    resized = np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC))
    top, left = (height - size) // 2, (width - size) // 2
    return resized[top : top + size, left : left + size]


@dataclass(frozen=True)
class LabelledFiles:
    """Picture files with their labels; label k is `class_names[k]`."""

    paths: list[Path]
    labels: list[int]
    class_names: list[str]


def class_folders(folder: str | Path) -> LabelledFiles:
    """The pictures in the class folders of `folder`, class by class, files in lexicographic order.

    Classes are in lexicographic order too, but numerically where every class name is an integer
    (0, 1, 2, 10). Names that start with a dot are passed over. Raises UserError where there is no
    class folder, or one without pictures.
    """
    folder = Path(folder)
    names = class_names(folder)
    files = LabelledFiles([], [], names)
    for label, name in enumerate(names):
        paths = find_pictures(folder / name)
        files.paths.extend(paths)
        files.labels.extend([label] * len(paths))
    return files


def class_names(folder: str | Path) -> list[str]:
    """The class folders of `folder`, in the order of `class_folders`; UserError without any."""
    names = [entry.name for entry in _entries(Path(folder)) if entry.is_dir()]
    if not names:
        raise UserError(
            f"{folder}: holds no class folders; put the pictures of each class into a folder there"
        )
    if all(name.isascii() and name.isdecimal() for name in names):
        names.sort(key=int)
    return names


def refuse_non_pictures(paths: Sequence[Path]) -> None:
    """UserError names files that are no pictures, at most five of them.

    Affordable for a million files: it reads the first bytes of each, and decodes only those that do
    not begin as a picture does. What is damaged further on is left for `read_image` to find.
    """
    chunks = [paths[start : start + 500] for start in range(0, len(paths), 500)]
    refusals = []
    # Threads, because a file on a network drive takes long to open and no work.
    with ThreadPoolExecutor(16) as pool:
        for suspects in pool.map(_without_signature, chunks):
            for path in suspects:
                try:
                    read_image(path)
                except UserError as error:
                    refusals.append(str(error))
            if len(refusals) >= 5:
                pool.shutdown(cancel_futures=True)
                break
    if refusals:
        raise UserError("; ".join(refusals[:5]))


def _without_signature(paths: Sequence[Path]) -> list[Path]:
    """Those of `paths` that do not begin as a picture does, or cannot be opened."""
    return [path for path in paths if not _first_bytes(path).startswith(SIGNATURES)]


def _first_bytes(path: Path) -> bytes:
    try:
        descriptor = regular_only(path, os.O_RDONLY)
    except OSError:
        return b""
    try:
        return os.read(descriptor, 8)
    except OSError:
        return b""
    finally:
        os.close(descriptor)


def find_pictures(folder: str | Path) -> list[Path]:
    """All pictures in `folder` and below, by extension: folder by folder, in lexicographic order.

    Links to folders below are not followed. Raises UserError where there are none.
    """
    _entries(Path(folder))
    paths = []
    for place, below, files in os.walk(folder):
        below[:] = sorted(name for name in below if not name.startswith("."))
        paths += [
            Path(place, name)
            for name in sorted(files)
            if name.lower().endswith(EXTENSIONS) and not name.startswith(".")
        ]
    if not paths:
        raise UserError(f"{folder}: holds no pictures ({', '.join(EXTENSIONS)})")
    return paths


def _entries(folder: Path) -> list[os.DirEntry]:
    """What lies in `folder`, in lexicographic order, hidden names left out."""
    try:
        with os.scandir(folder) as entries:
            visible = [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise UserError(f"{folder}: cannot be read as a folder ({error.strerror})") from error
    return sorted(visible, key=lambda entry: entry.name)


def tile(pixels: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """One picture [rows H, columns W, C] of uint8 [rows * columns, H, W, C], row by row."""
    count, height, width, channels = pixels.shape
    if count != rows * columns:
        raise ValueError(f"{count} images do not fill {rows} rows of {columns}")
    grid = pixels.reshape(rows, columns, height, width, channels)
    # rows, columns, H, W, C -> rows, H, columns, W, C
    return grid.transpose(0, 2, 1, 3, 4).reshape(rows * height, columns * width, channels)


def save_png(path: str | Path, pixels: np.ndarray) -> None:
    """Write uint8 [H, W, 3] or grey [H, W, 1] to `path`, whole or not at all."""
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] not in (1, 3):
        raise ValueError(f"must be uint8 [H, W, 1 or 3], not {pixels.dtype} {pixels.shape}")
    picture = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    with atomic_write(path) as file:
        picture.save(file, format="PNG")
