"""Pictures without torch: decode, turn, crop, class folders, uint8 and back, tiles, PNG.

`pixels` are uint8 0..255 with channels last; `images` are float -1..1 in whatever layout.
"""

import hashlib
import itertools
import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np
from PIL import ExifTags, Image, PngImagePlugin, UnidentifiedImageError, features
from tqdm import tqdm

from support.system.files import UserError, atomic_write, regular_only, shorten

if TYPE_CHECKING:  # torch does not come with this module
    import torch

PNG_MARK = b"Software\0SoFlow"  # in pictures that were made here

# What is read, and by which endings it is found. Named, because some of Pillow's other decoders
# start programs (EPS), open further files, or take anything for a picture (TGA).
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
# Builds of Pillow may lack these, under its own names for them.
MAY_LACK = {"AVIF": "avif", "JPEG2000": "jpg_2000", "WEBP": "webp"}
FORMATS = tuple(kind for kind in ENDINGS if kind not in MAY_LACK or features.check(MAY_LACK[kind]))
EXTENSIONS = tuple(sorted(ending for kind in FORMATS for ending in ENDINGS[kind]))
# How files of these formats begin (RIFF: WebP; P1 to P6: PPM and its kin).
SIGNATURE = re.compile(
    rb"\xff\xd8\xff|\x89PNG|BM|RIFF|II\*\0|MM\0\*|P[1-6]|GIF8|qoif"
    rb"|\xff\x4f\xff\x51|\0\0\0\x0cjP|....ftypavi[fs]",
    re.DOTALL,
)
SIGNATURE_BYTES = 12
# HEIC and its kin, as phones save them, which Pillow does not read.
HEIC = re.compile(rb"....ftyp(hei|hev|mif1|msf1)", re.DOTALL)
# How the eight EXIF orientations are turned upright.
UPRIGHT = 1
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
MOST_NAMED = 5  # files that one message names
NO_ENDING, FOLDER_LINK = "without ending", "linked as a folder"  # such as endings are counted
BESIDE = "beside the class folders"
MOST_CLASSES_LISTED = 20
SIZES_COMPARED = 16
SECONDS_BEFORE_BAR = 5
SKIPPED_FILE = "skipped_images.txt"  # lists pictures that are left out, as they cannot be read
MAX_PIXELS = 89_478_485  # where Pillow begins to warn of decompression bombs: 256 MiB of RGB

Array = TypeVar("Array", np.ndarray, "torch.Tensor")
Item = TypeVar("Item")
Result = TypeVar("Result")


def to_pixels(images: Array) -> Array:
    """uint8 of floats in -1..1 (float32 or wider): clamp(127.5 x + 128, 0, 255), truncated."""
    scaled = images * 127.5
    scaled += 128  # in place: a batch of pictures is large
    scaled = scaled.clip(0, 255)
    return scaled.astype(np.uint8) if isinstance(scaled, np.ndarray) else scaled.byte()


def to_images(pixels: Array) -> Array:
    """float32 in -1..1 of uint8: pixels / 127.5 - 1, which `to_pixels` takes back exactly."""
    floats = pixels.astype(np.float32) if isinstance(pixels, np.ndarray) else pixels.float()
    return floats / 127.5 - 1


def read_image(
    path: str | Path, crop_size: int | None = None, apply_exif: bool = True
) -> np.ndarray:
    """The picture at `path` as RGB, uint8 [H, W, 3]; with `crop_size`, its `centre_crop`.

    Decoded as Pillow does: grey is repeated, alpha dropped, of several frames the first is taken;
    but of 16 bits a value the upper 8 are taken in grey too, which Pillow would cut off at white.
    Turned upright as its EXIF data say, unless told not to. Raises UserError where the file is
    damaged, of another format, or unpacks to more than 89 megapixels.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with (
                open(path, "rb", opener=regular_only) as file,
                Image.open(file, formats=FORMATS) as picture,
            ):
                rgb = _as_rgb(picture)
                pixels = np.asarray(_upright(rgb, picture) if apply_exif else rgb)
        return pixels if crop_size is None else centre_crop(pixels, crop_size)
    except UnidentifiedImageError as error:
        reason = f"cannot identify it as one of {', '.join(FORMATS)}"
        if HEIC.match(_first_bytes(path)):
            reason = "it is HEIC, whatever its name: convert it"
        raise UserError(f"{path}: not a readable picture ({reason})") from error
    except Exception as error:  # Pillow's decoders raise many kinds on damaged files
        raise UserError(f"{path}: not a readable picture ({shorten(error)})") from error


def _as_rgb(picture: Image.Image) -> Image.Image:
    """`picture` with 8 bits a colour; ValueError where nothing says which value is white."""
    # Where Pillow has 32 bits a value, those of PNG and PPM had 16 in the file.
    had_sixteen = picture.mode == "I" and picture.format in ("PNG", "PPM")
    if had_sixteen or picture.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8)).convert("RGB")
    if picture.mode in ("I", "F"):
        raise ValueError(
            "32 bits a value, of which none is known to be white; save it with 8 or 16"
        )
    return picture.convert("RGB")


def _upright(pixels: Image.Image, picture: Image.Image) -> Image.Image:
    """`pixels`, decoded from `picture`, turned as its EXIF data say."""
    try:
        # After decoding: Pillow then has turned a TIFF itself, and says so here.
        turn = TURNS.get(picture.getexif().get(ExifTags.Base.Orientation, UPRIGHT))
    except Exception:  # Pillow raises many kinds on damaged EXIF data; the pixels are whole
        return pixels
    return pixels if turn is None else pixels.transpose(turn)


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
    """The paths of picture files, with their labels; label k is `class_names[k]`.

    In arrays instead of a million objects: a loader worker that only counts references to these
    would come to hold a copy of each.
    """

    folder: Path
    names: np.ndarray  # [N], paths below `folder`, as the bytes that the file system knows them by
    labels: np.ndarray  # int64 [N]
    class_names: list[str]
    left_out: dict[str, Counter[str]]  # by place: how many files of each ending are not read

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Path:
        return self.folder / os.fsdecode(self.names[index])

    def __iter__(self) -> Iterator[Path]:
        return map(self.__getitem__, range(len(self)))

    def sizes(self, of_absent: int | None = None) -> Iterator[int]:
        """Bytes of each file; UserError names one that is not there, unless `of_absent` stands."""

        def size(path: Path) -> int:
            try:
                return path.stat().st_size
            except OSError as error:
                if of_absent is not None:
                    return of_absent
                raise UserError(f"{path}: cannot be read ({error.strerror})") from error

        return with_bar(in_threads(size, self, at_once=100), len(self), "looking at sizes", "file")

    def digest(self, of_absent: int | None = None) -> str:
        """SHA-256 of the pictures' names and sizes, in order; as `sizes`."""
        digest = hashlib.sha256()
        for name, num_bytes in zip(self.names, self.sizes(of_absent), strict=True):
            digest.update(b"%b\0%d\0" % (name, num_bytes))
        return digest.hexdigest()

    def some_sizes(self) -> list[int]:
        """Bytes of a few files all over the list, by which copies can be compared; -1: not there.

        A look at all of a million files takes long on a network drive.
        """
        few = np.unique(np.linspace(0, len(self) - 1, SIZES_COMPARED).astype(np.int64))
        return [p.stat().st_size if p.exists() else -1 for p in map(self.__getitem__, few)]

    def left_out_note(self) -> str:
        """A line on the files that are not read; nothing where there are none."""
        if not self.left_out:
            return ""
        classes = [
            f"{printable(name)} {_list_endings(found)}" for name, found in self.left_out.items()
        ]
        count = sum(found.total() for found in self.left_out.values())
        more = f"; and in {len(classes) - MOST_NAMED} more folders" if classes[MOST_NAMED:] else ""
        return _left_out_note(count, "; ".join(classes[:MOST_NAMED]) + more)


def class_folders(folder: str | Path) -> LabelledFiles:
    """The pictures in the class folders of `folder`, class by class, files in lexicographic order.

    Classes are in lexicographic order too, but numerically where every class name is an integer
    (0, 1, 2, 10). Names that start with a dot are passed over. Raises UserError where there is no
    class folder, or one without pictures.
    """
    folder = Path(folder)
    classes = class_names(folder)
    beside = Counter(_ending(entry.name) for entry in _entries(folder) if not entry.is_dir())
    listed = in_threads(find_pictures, (folder / name for name in classes))
    found = list(with_bar(listed, len(classes), "listing", "class"))
    paths = [path for pictures in found for path in pictures.paths]
    names = [os.fsencode(path.relative_to(folder).as_posix()) for path in paths]
    labels = np.repeat(np.arange(len(classes)), [len(pictures.paths) for pictures in found])
    endings = [beside, *(pictures.left_out for pictures in found)]
    left_out = {place: f for place, f in zip([BESIDE, *classes], endings, strict=True) if f}
    return LabelledFiles(folder, np.array(names), labels, classes, left_out)


def _left_out_note(count: int, which: str) -> str:
    return f"left out, not read: {count} {'file' if count == 1 else 'files'} ({which})"


def _list_endings(counts: Counter[str]) -> str:
    """The most frequent endings with their counts."""
    frequent = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:MOST_NAMED]
    return ", ".join(f"{count} {printable(ending)}" for ending, count in frequent)


def describe_classes(names: Sequence[str], counts: Sequence[int]) -> str:
    """The classes in order, with their numbers of examples, in one line of bearable length."""
    listed = [f"{printable(name)} ({count})" for name, count in zip(names, counts, strict=True)]
    if len(listed) > MOST_CLASSES_LISTED:
        listed = [*listed[:3], "...", listed[-1]]
    classes = "class" if len(names) == 1 else "classes"
    return f"{sum(counts)} examples of {len(names)} {classes}, in order: {', '.join(listed)}"


def printable(name: str) -> str:
    """`name`, of a file, as any screen takes it, in one line of bearable length."""
    text = "".join(letter if letter.isprintable() else "?" for letter in name)
    return text if len(text) <= 40 else f"{text[:30]}..."


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


def refuse_non_pictures(paths: LabelledFiles | Sequence[Path]) -> None:
    """UserError names files that are no pictures, at most five of them.

    Affordable for a million files: it reads the first bytes of each, and decodes only those that do
    not begin as a picture does. What is damaged further on is left for `find_unreadable`.
    """

    def refusal(path: Path) -> str:
        return "" if SIGNATURE.match(_first_bytes(path)) else why_unreadable(path)

    refusals = with_bar(in_threads(refusal, paths, at_once=100), len(paths), "opening", "file")
    if named := list(itertools.islice(filter(None, refusals), MOST_NAMED)):
        raise UserError("; ".join(named))


def with_bar(results: Iterable[Result], total: int, doing: str, unit: str) -> Iterator[Result]:
    """The same, with a progress bar on terminals where they take more than a few seconds."""
    yield from tqdm(
        results, desc=doing, total=total, unit=unit, delay=SECONDS_BEFORE_BAR, disable=None
    )


def why_unreadable(path: Path, crop_size: int | None = None) -> str:
    """What `read_image` refuses a picture with, or nothing."""
    try:
        read_image(path, crop_size)
    except UserError as error:
        return str(error)
    return ""


def in_threads(
    work: Callable[[Item], Result], items: Iterable[Item], num_threads: int = 16, at_once: int = 1
) -> Iterator[Result]:
    """The results of `work` in order: files on network drives take long to open, and no work.

    A thread takes `at_once` items in a row, which saves time where each takes little.
    """
    rest = iter(items)
    chunks = iter(lambda: list(itertools.islice(rest, at_once)), [])
    with ThreadPoolExecutor(num_threads) as pool:
        try:
            for results in pool.map(lambda chunk: [work(item) for item in chunk], chunks):
                yield from results
        finally:
            pool.shutdown(cancel_futures=True)


def _first_bytes(path: str | Path) -> bytes:
    try:
        descriptor = regular_only(path, os.O_RDONLY)
    except OSError:
        return b""
    try:
        return os.read(descriptor, SIGNATURE_BYTES)
    except OSError:
        return b""
    finally:
        os.close(descriptor)


class FoundPictures(NamedTuple):
    """Picture files, and how many others there are, by their endings: files and linked folders."""

    paths: list[Path]
    left_out: Counter[str]

    def left_out_note(self) -> str:
        """A line on the files that are not read; nothing where there are none."""
        if not self.left_out:
            return ""
        return _left_out_note(self.left_out.total(), _list_endings(self.left_out))


def find_pictures(folder: str | Path) -> FoundPictures:
    """All pictures in `folder` and below, by extension: folder by folder, in lexicographic order.

    Links to folders below are not followed, but counted. Raises UserError where there are none.
    """
    folder = Path(folder)
    _entries(folder)
    paths: list[Path] = []
    left_out: Counter[str] = Counter()
    for place, below, names in os.walk(folder):
        below[:] = sorted(name for name in below if not name.startswith("."))
        if num_links := sum(os.path.islink(os.path.join(place, name)) for name in below):
            left_out[FOLDER_LINK] += num_links
        for name in sorted(name for name in names if not name.startswith(".")):
            if name.lower().endswith(EXTENSIONS):
                paths.append(Path(place, name))
            else:
                left_out[_ending(name)] += 1
    if not paths:
        there = f"; {_list_endings(left_out)} there are not read" if left_out else ""
        raise UserError(f"{folder}: holds no pictures ({', '.join(EXTENSIONS)}){there}")
    return FoundPictures(paths, left_out)


def _ending(name: str) -> str:
    return os.path.splitext(name)[1].lower() or NO_ENDING


def _entries(folder: Path) -> list[os.DirEntry]:
    """What lies in `folder`, in lexicographic order, hidden names left out."""
    try:
        with os.scandir(folder) as entries:
            visible = [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise UserError(f"{folder}: cannot be read as a folder ({error.strerror})") from error
    return sorted(visible, key=lambda entry: entry.name)


class ImageBatch(NamedTuple):
    """Images made: pixels uint8 [B, H, W, C], and labels [B] where there are classes."""

    pixels: np.ndarray
    labels: np.ndarray | None


def tile(pixels: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """One picture [rows H, columns W, C] of uint8 [rows * columns, H, W, C], row by row."""
    height, width, channels = pixels.shape[1:]
    grid = pixels.reshape(rows, columns, height, width, channels)
    # rows, columns, H, W, C -> rows, H, columns, W, C
    return grid.transpose(0, 2, 1, 3, 4).reshape(rows * height, columns * width, channels)


def save_png(path: str | Path, pixels: np.ndarray) -> None:
    """Write uint8 [H, W, 3] or grey [H, W, 1] to `path`, whole or not at all."""
    picture = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    said = PngImagePlugin.PngInfo()
    keyword, _, maker = PNG_MARK.decode().partition("\0")
    said.add_text(keyword, maker)
    with atomic_write(path) as file:
        picture.save(file, format="PNG", pnginfo=said)
