"""Pictures without torch: decode, turn, crop, uint8 and back, tiles, PNG.

`pixels` are uint8 0..255 with channels last; `images` are float -1..1 in whatever layout.
"""

import contextlib
import io
import re
from pathlib import Path
from typing import IO, TYPE_CHECKING, NamedTuple, Protocol, TypeVar

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError

from support.system.files import UserError, atomic_write, identify, regular_only, shorten

if TYPE_CHECKING:  # torch does not come with this module
    import torch

PNG_MARK = b"Software\0SoFlow"  # in pictures that this project writes

# The formats that are read, and the endings of their files. Some of Pillow's other decoders start
# programs (EPS), open further files, or accept anything as a picture (TGA).
ENDINGS = {
    "AVIF": (".avif", ".avifs"),
    "BMP": (".bmp", ".dib"),
    "GIF": (".gif",),
    "JPEG": (".jfif", ".jpe", ".jpeg", ".jpg", ".mpo"),
    "JPEG2000": (".j2c", ".j2k", ".jp2", ".jpc", ".jpf", ".jpx"),
    "PNG": (".apng", ".png"),
    "PPM": (".pbm", ".pgm", ".pnm", ".ppm"),
    "QOI": (".qoi",),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
}
EXTENSIONS = tuple(sorted(ending for endings in ENDINGS.values() for ending in endings))
# How files of these formats start (RIFF: WebP; P1 to P6: the PPM family).
SIGNATURE = re.compile(
    rb"\xff\xd8\xff|\x89PNG|BM|RIFF|II\*\0|MM\0\*|P[1-6]|GIF8|qoif"
    rb"|\xff\x4f\xff\x51|\0\0\0\x0cjP|....ftypavi[fs]",
    re.DOTALL,
)
SIGNATURE_BYTES = 12
# HEIC and related formats, as phones save them, which Pillow does not read.
HEIC = re.compile(rb"....ftyp(hei|hev|mif1|msf1)", re.DOTALL)
SKIPPED_FILE = "skipped_images.txt"  # lists pictures that are left out as unreadable
MAX_PIXELS = 89_478_485  # 256 MiB of RGB

Array = TypeVar("Array", np.ndarray, "torch.Tensor")


def to_pixels(images: Array) -> Array:
    """uint8 of floats in -1..1 (float32 or wider): clamp(127.5 x + 128, 0, 255), truncated."""
    scaled = images * 127.5
    scaled += 128  # in place: a batch of pictures is large
    scaled = scaled.clip(0, 255)
    return scaled.astype(np.uint8) if isinstance(scaled, np.ndarray) else scaled.byte()


def to_images(pixels: Array) -> Array:
    """float32 in -1..1 of uint8: pixels / 127.5 - 1, which `to_pixels` inverts exactly."""
    floats = pixels.astype(np.float32) if isinstance(pixels, np.ndarray) else pixels.float()
    return floats / 127.5 - 1


class StoredPicture(Protocol):
    """A picture in a larger file; its text names both."""

    @property
    def num_bytes(self) -> int: ...

    def read(self, most: int | None = None) -> bytes:
        """Its bytes, or its first `most`."""


PictureSource = str | Path | StoredPicture


def open_picture(source: PictureSource) -> IO[bytes]:
    if isinstance(source, str | Path):
        return open(source, "rb", opener=regular_only)
    return io.BytesIO(source.read())


def read_image(
    path: PictureSource, crop_size: int | None = None, apply_exif: bool = True
) -> np.ndarray:
    """The picture at `path` as RGB, uint8 [H, W, 3]; with `crop_size`, its `centre_crop`.

    As Pillow decodes it: grey is repeated, alpha is dropped, and only the first frame is read. Of
    16-bit grey the upper 8 bits are kept, where Pillow would clip at white. EXIF rotation is
    applied unless `apply_exif` is false. UserError if the file is damaged, has another format, or
    unpacks to more than 89 megapixels.
    """
    start = b""
    try:
        with open_picture(path) as file:
            start = file.read(SIGNATURE_BYTES)
            file.seek(0)
            with Image.open(file, formats=tuple(ENDINGS)) as picture:
                if picture.width * picture.height > MAX_PIXELS:
                    raise ValueError(f"{picture.width} x {picture.height} pixels are too many")
                rgb = _as_rgb(picture)
                pixels = np.asarray(_upright(rgb, picture) if apply_exif else rgb)
        return pixels if crop_size is None else centre_crop(pixels, crop_size)
    except UnidentifiedImageError as error:
        kind = "of another format"
        if HEIC.match(start):
            kind = "HEIC: convert it"
        elif isinstance(path, str | Path):
            kind = identify(Path(path))
        raise UserError(
            f"{path}: not a readable picture (it is {kind}; readable: {', '.join(ENDINGS)})"
        ) from error
    except Exception as error:  # Pillow's decoders raise many kinds on damaged files
        reason = getattr(error, "strerror", None) or shorten(error)
        raise UserError(f"{path}: not a readable picture ({reason})") from error


def _as_rgb(picture: Image.Image) -> Image.Image:
    """`picture` with 8 bits per colour; ValueError if nothing defines which value is white."""
    # Pillow decodes PNG and PPM files of 16 bits per value to 32.
    had_sixteen = picture.mode == "I" and picture.format in ("PNG", "PPM")
    if had_sixteen or picture.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8)).convert("RGB")
    if picture.mode in ("I", "F"):
        raise ValueError(
            "32 bits per value, and no value is known to be white; save it with 8 or 16"
        )
    return picture.convert("RGB")


def _upright(pixels: Image.Image, picture: Image.Image) -> Image.Image:
    """`pixels`, decoded from `picture`, turned as its EXIF data say."""
    # After decoding: by then Pillow has turned a TIFF itself, and its data say so.
    pixels.info = dict(picture.info)
    with contextlib.suppress(Exception):  # raised for damaged EXIF data; the pixels are whole
        ImageOps.exif_transpose(pixels, in_place=True)
    return pixels


def centre_crop(pixels: np.ndarray, size: int) -> np.ndarray:
    """The middle [size, size, 3] of uint8 [H, W, 3], after resizing its short side to `size`.

    ADM's crop: halve the sides with a box filter while the short one is at least twice `size`, then
    resize with a bicubic filter, then cut.
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


def why_unreadable(path: PictureSource, crop_size: int | None = None) -> str:
    """The error with which `read_image` refuses a picture; empty where it reads it."""
    try:
        read_image(path, crop_size)
    except UserError as error:
        return str(error)
    return ""


class LabelledImages(NamedTuple):
    """`pixels` uint8 [N, H, W, C], `labels` int64 [N]."""

    pixels: np.ndarray
    labels: np.ndarray

    def part(self, chosen: slice) -> "LabelledImages":
        return LabelledImages(self.pixels[chosen], self.labels[chosen])


class ImageBatch(NamedTuple):
    """Generated images: pixels uint8 [B, H, W, C], and labels [B] if there are classes."""

    pixels: np.ndarray
    labels: np.ndarray | None


def tile(pixels: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """One picture [rows H, columns W, C] of uint8 [rows * columns, H, W, C], row by row."""
    height, width, channels = pixels.shape[1:]
    grid = pixels.reshape(rows, columns, height, width, channels)
    # rows, columns, H, W, C -> rows, H, columns, W, C
    return grid.transpose(0, 2, 1, 3, 4).reshape(rows * height, columns * width, channels)


def save_png(path: str | Path, pixels: np.ndarray) -> None:
    """Write uint8 [H, W, 3] or grey [H, W, 1] to `path`, completely or not at all."""
    picture = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    said = PngImagePlugin.PngInfo()
    keyword, _, maker = PNG_MARK.decode().partition("\0")
    said.add_text(keyword, maker)
    with atomic_write(path) as file:
        picture.save(file, format="PNG", pnginfo=said)
