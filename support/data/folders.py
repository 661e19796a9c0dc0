"""Folders of pictures: which files are read, in which order, and what is left out.

Paths are strings: a Path for each of a million files would take ten times as long as listing them.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import NamedTuple, NoReturn, TypeVar

import numpy as np
from tqdm import tqdm

from support.data.images import (
    EXTENSIONS,
    SIGNATURE,
    SIGNATURE_BYTES,
    PictureSource,
    why_unreadable,
)
from support.system.files import UserError, regular_only, reporting_os_errors

MOST_NAMED = 5  # files, folders or endings that one message names
MOST_CLASSES_LISTED = 20
MOST_CLASSES = 1_000_000
NO_ENDING, FOLDER_LINK = "without ending", "linked as a folder"  # counted like endings
SPLITS = {"train", "training", "test", "testing", "val", "valid", "validation", "dev", "eval"}
SIZES_COMPARED = 16
SECONDS_BEFORE_BAR = 5
MANY = 10_000  # items that are worth a line before work on them starts

Item = TypeVar("Item")
Result = TypeVar("Result")


class FoundPictures(NamedTuple):
    """The picture files below a folder, and what else lies there."""

    paths: list[str]
    left_out: Counter[str]  # files that are not read, by ending, and links to folders
    folders: list[str]  # the folders directly in it, where no picture lies beside them


def left_out_note(endings: Counter[str]) -> str:
    """A line about files that are not read, the most frequent endings first; or nothing."""
    if not endings:
        return ""
    frequent = sorted(endings.items(), key=lambda item: (-item[1], item[0]))[:MOST_NAMED]
    listed = ", ".join(f"{count} {printable(ending)}" for ending, count in frequent)
    count = endings.total()
    return f"left out, not read: {count} {'file' if count == 1 else 'files'} ({listed})"


def find_pictures(folder: str | Path) -> FoundPictures:
    """All pictures in `folder` and below, by extension: folder by folder, in lexicographic order.

    Hidden names are ignored; links to folders below are not followed, but counted. UserError where
    there are no pictures, or where a folder cannot be listed.
    """
    folder = os.fspath(folder)
    paths: list[str] = []
    left_out: Counter[str] = Counter()
    top_folders: list[str] = []
    for place, folders, files in os.walk(folder, onerror=_refuse_listing):
        folders[:] = sorted(name for name in folders if name[0] != ".")
        pictures = [name for name in files if name.lower().endswith(EXTENSIONS) and name[0] != "."]
        if len(pictures) < len(files):
            others = {*files}.difference(pictures)
            left_out.update(ending_of(name) for name in others if name[0] != ".")
        links = sum(os.path.islink(os.path.join(place, name)) for name in folders)
        left_out.update({FOLDER_LINK: links} if links else {})
        if place == folder and not pictures:
            top_folders = folders[:]
        start = os.path.join(place, "")
        paths += [start + name for name in sorted(pictures)]
    if not paths:
        there = f"; {left_out_note(left_out)}" if left_out else ""
        raise UserError(f"{folder}: holds no pictures ({', '.join(EXTENSIONS)}){there}")
    return FoundPictures(paths, left_out, top_folders)


def _refuse_listing(error: OSError) -> NoReturn:
    """Never leave out silently what cannot be listed."""
    raise UserError(f"{error.filename}: cannot be read as a folder ({error.strerror})") from error


def ending_of(name: str) -> str:
    return os.path.splitext(name)[1].lower() or NO_ENDING


@dataclass(frozen=True)
class LabelledFiles:
    """The paths of picture files, with their labels; label k is `class_names[k]`.

    Arrays instead of a million objects: a loader worker that only counts references to objects
    would end up with a copy of each.
    """

    folder: Path
    names: np.ndarray  # [N], paths below `folder`, as the bytes that the file system stores
    labels: np.ndarray  # int64 [N]
    class_names: list[str]
    notes: list[str]  # what the user should know about the listing

    def __len__(self) -> int:
        return len(self.names)

    @property
    def names_tell_labels(self) -> bool:
        """Whether a picture's name has its class, as the folder of a class does."""
        return True

    def __getitem__(self, index: int) -> PictureSource:
        return os.path.join(self.folder, os.fsdecode(self.names[index]))

    def __iter__(self) -> Iterator[PictureSource]:
        start = os.path.join(self.folder, "")
        return (start + name for name in map(os.fsdecode, self.names))

    def name_of(self, index: int) -> str:
        """The name of a picture below the folder, for lists of those left out."""
        return os.fsdecode(self.names[index])

    def sizes(self) -> Iterator[int]:
        """Bytes of each file; -1 for one that is missing."""
        found = in_threads(_size, self, at_once=100)
        return with_progress(found, len(self), "reading the sizes of pictures", "file")

    def checked_sizes(self) -> Iterable[int]:
        """The same; UserError names the first five that are not pictures."""
        return sizes_of_pictures(self)

    def digest(self, sizes: Iterable[int] | None = None) -> str:
        """SHA-256 of the pictures' names and sizes, in order; of labels that no name tells, too."""
        digest = hashlib.sha256()
        for name, num_bytes in zip(self.names, sizes or self.sizes(), strict=True):
            digest.update(b"%b\0%d\0" % (name, num_bytes))
        if not self.names_tell_labels:
            digest.update(np.asarray(self.labels, np.int64).tobytes())
        return digest.hexdigest()

    def some_sizes(self) -> list[int]:
        """Bytes of a few files spread over the list, to compare copies by; -1 for a missing one.

        Asking for the sizes of a million files takes long on a network drive.
        """
        few = np.unique(np.linspace(0, len(self) - 1, SIZES_COMPARED).astype(np.int64))
        return [_size(self[index]) for index in few]


def _size(path: PictureSource) -> int:
    if not isinstance(path, str | Path):
        return path.num_bytes
    try:
        return os.stat(path).st_size
    except OSError:
        return -1  # found to be unreadable when the picture is read


def packed(names: Iterable[str]) -> np.ndarray:
    """Names as an array of bytes. Encoded all at once, which takes a fraction of the time."""
    return np.array(os.fsencode("\0".join(names)).split(b"\0"))  # names hold no zero bytes


def class_folders(folder: str | Path) -> LabelledFiles:
    """The pictures in the class folders of `folder`, class by class, in `find_pictures`' order.

    UserError if there are no class folders, or if one has no pictures or cannot be read.
    """
    names = class_names(folder)
    places = (os.path.join(folder, name) for name in names)
    print(f"listing the pictures in {folder}", flush=True)
    listing = with_progress(map(find_pictures, places), len(names), "listing", "class")
    start = len(os.path.join(folder, ""))
    parts, counts, subfolders = [], [], {}
    left_out = Counter(ending_of(entry.name) for entry in entries_of(folder) if not entry.is_dir())
    for name, found in zip(names, listing, strict=True):
        parts.append(packed([path[start:] for path in found.paths]))
        counts.append(len(found.paths))
        left_out += found.left_out
        subfolders[name] = found.folders
    notes = [*_nested_notes(Path(folder), subfolders), *filter(None, [left_out_note(left_out)])]
    labels = np.repeat(np.arange(len(names)), counts)
    return LabelledFiles(Path(folder), np.concatenate(parts), labels, names, notes)


def class_names(folder: str | Path) -> list[str]:
    """The class folders of `folder`, in `in_class_order`.

    Hidden names are ignored. UserError if there are no class folders, or if a link is broken: it
    may have been one.
    """
    names = []
    for entry in entries_of(folder):
        if entry.is_symlink():
            _check_link(entry.path, os.path.realpath(folder))
        if entry.is_dir():
            names.append(entry.name)
    if not names:
        raise UserError(
            f"{folder}: holds no class folders; put the pictures of each class into a folder there"
        )
    return in_class_order(names)


def in_class_order(names: Iterable[str]) -> list[str]:
    """Names of classes in order: numerical where all are integers, else lexicographic."""
    in_order = sorted(names)
    if all(name.isascii() and name.isdecimal() for name in in_order):
        in_order.sort(key=int)
    return in_order


def numbered_classes(labels: np.ndarray, place: str) -> list[str]:
    """Names of classes that have only numbers; UserError where a label cannot be one."""
    if not 0 <= labels.min() <= labels.max() < MOST_CLASSES:
        wrong = labels.min() if labels.min() < 0 else labels.max()
        raise UserError(f"{place}: has the label {wrong}; labels go from 0 to {MOST_CLASSES - 1}")
    return [str(number) for number in range(labels.max() + 1)]


def entries_of(folder: str | Path) -> list[os.DirEntry]:
    """What lies in `folder`, in lexicographic order, without hidden names."""
    with (
        reporting_os_errors(f"{folder}: cannot be read as a folder"),
        os.scandir(folder) as entries,
    ):
        return sorted((e for e in entries if e.name[0] != "."), key=lambda entry: entry.name)


def _check_link(path: str, folder: str) -> None:
    """UserError where a link among the class folders leads nowhere, or to a folder around it."""
    with reporting_os_errors(f"{path}: this link cannot be followed"):
        os.stat(path)
    target = os.path.realpath(path)
    if os.path.commonpath([target, folder]) == target:
        raise UserError(f"{path}: this link leads to {target}, which it lies in itself")


def _nested_notes(folder: Path, subfolders: dict[str, list[str]]) -> list[str]:
    """A line about classes that hold several folders and no pictures beside them.

    UserError if these are the splits of a data set: then the classes are one level down.
    """
    splits = [name for name in subfolders if name.lower() in SPLITS]
    fewest = 1 if len(splits) == len(subfolders) else 2
    if meant := [name for name in splits if len(subfolders[name]) >= fewest]:
        best = next((name for name in meant if name.lower().startswith("train")), meant[0])
        raise UserError(
            f"{folder}: {' and '.join(meant)} are splits, not classes; "
            f"did you mean {folder / best}?"
        )
    nested = [name for name, below in subfolders.items() if len(below) > 1]
    if not nested:
        return []
    listed = [f"{printable(name)} ({', '.join(subfolders[name][:3])})" for name in nested]
    more = f" and {len(nested) - MOST_NAMED} more" if nested[MOST_NAMED:] else ""
    return [
        f"classes of several folders and no pictures beside them: "
        f"{', '.join(listed[:MOST_NAMED])}{more}; if these folders are the classes, "
        f"use {folder / nested[0]}"
    ]


def describe_classes(names: Sequence[str], counts: Sequence[int]) -> str:
    """The classes in order, with their numbers of examples, in one line."""
    listed = [f"{printable(name)} ({count})" for name, count in zip(names, counts, strict=True)]
    if len(listed) > MOST_CLASSES_LISTED:
        listed = [*listed[:3], "...", listed[-1]]
    classes = "class" if len(names) == 1 else "classes"
    return f"{sum(counts)} examples of {len(names)} {classes}, in order: {', '.join(listed)}"


def printable(name: str) -> str:
    """A file's `name`, shortened, with `?` for what a terminal cannot show."""
    text = "".join(letter if letter.isprintable() else "?" for letter in name)
    return text if len(text) <= 40 else f"{text[:30]}..."


def sizes_of_pictures(paths: LabelledFiles | Sequence[PictureSource]) -> list[int]:
    """Bytes of each file; UserError names the first five that are not pictures.

    Affordable for a million files: it reads the first bytes of each, and decodes only those that do
    not start as a picture does. Damage further on is left for `check_examples`.
    """

    def look(path: PictureSource) -> int | str:
        try:
            if isinstance(path, str | Path):
                with open(path, "rb", buffering=0, opener=regular_only) as file:
                    start, num_bytes = file.read(SIGNATURE_BYTES), os.fstat(file.fileno()).st_size
            else:
                start, num_bytes = path.read(SIGNATURE_BYTES), path.num_bytes
        except OSError:
            return why_unreadable(path)
        return num_bytes if SIGNATURE.match(start) else why_unreadable(path) or num_bytes

    looks = in_threads(look, paths, at_once=100)
    sizes, refusals = [], []
    for seen in with_progress(looks, len(paths), "opening pictures", "file"):
        if isinstance(seen, int):
            sizes.append(seen)
        else:
            refusals.append(seen)
        if len(refusals) == MOST_NAMED:
            break
    if refusals:
        raise UserError("; ".join(refusals))
    return sizes


def with_progress(results: Iterable[Result], total: int, doing: str, unit: str) -> Iterator[Result]:
    """`results`, announced by a line where they are many, with a progress bar on terminals."""
    if total >= MANY:
        print(f"{doing}: {total} {unit}s", flush=True)
    # disable=None: a bar on terminals only
    yield from tqdm(
        results, desc=doing, total=total, unit=unit, delay=SECONDS_BEFORE_BAR, disable=None
    )


def in_threads(
    work: Callable[[Item], Result], items: Iterable[Item], num_threads: int = 16, at_once: int = 1
) -> Iterator[Result]:
    """The results of `work` in order. Opening a file on a network drive is mostly waiting.

    A thread takes `at_once` items in a row, which saves time where each item is quick.
    """
    with ThreadPool(num_threads) as pool:
        yield from pool.imap(work, items, at_once)
