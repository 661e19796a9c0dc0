"""Tars of pictures, read where they lie: an index of their entries, and the bytes of one.

A tar holds a tar for each class, as ILSVRC2012_img_train.tar does; or class folders; or pictures
with labels beside them, KEY.jpg and KEY.cls or KEY.json, as WebDataset's shards do.
"""

import functools
import json
import os
import tarfile
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from support.data.folders import (
    SPLITS,
    LabelledFiles,
    ending_of,
    in_class_order,
    left_out_note,
    numbered_classes,
    packed,
    with_progress,
)
from support.data.images import EXTENSIONS
from support.system.files import UserError, atomic_write, make_folder, regular_only, shorten

INDEX_FILE = "pictures.index"
INDEX_FORMAT = 1
LABEL_ENDINGS = (".cls", ".json")


class TarEntry(NamedTuple):
    """A picture in a tar."""

    tar: str
    name: str
    start: int  # of its bytes in the tar
    num_bytes: int

    def __str__(self) -> str:
        return f"{self.tar}:{self.name}"

    def read(self, most: int | None = None) -> bytes:
        """Its bytes, or its first `most`; OSError where the tar has become shorter."""
        count = self.num_bytes if most is None else min(most, self.num_bytes)
        with open(self.tar, "rb", buffering=0, opener=regular_only) as file:
            content = os.pread(file.fileno(), count, self.start)
        if len(content) < count:
            raise OSError("the tar was cut short after it was listed")
        return content


@dataclass(frozen=True)
class ArchivedFiles(LabelledFiles):
    """Pictures in tars."""

    tars: list[str]
    places: np.ndarray  # int64 [N, 3]: the tar's number, offset and length of each picture

    @property
    def names_tell_labels(self) -> bool:
        """Not of shards: there a label is in a file beside the picture."""
        return os.fsdecode(self.names[0]).split("/")[0] in self.class_names

    def __getitem__(self, index: int) -> TarEntry:
        tar, start, num_bytes = self.places[index].tolist()
        return TarEntry(self.tars[tar], os.fsdecode(self.names[index]), start, num_bytes)

    def __iter__(self) -> Iterator[TarEntry]:
        return (self[index] for index in range(len(self)))

    def name_of(self, index: int) -> str:
        return f"{os.path.basename(self.tars[self.places[index, 0]])}:{self[index].name}"

    def sizes(self) -> Iterator[int]:
        return iter(self.places[:, 2].tolist())

    def some_sizes(self) -> list[int]:
        return [size for _, size, _ in stamps(self.tars)]


def stamps(paths: Sequence[str]) -> list[list[Any]]:
    """Name, size and time of files, which tell whether they are still the same."""
    found = [(os.path.basename(path), os.stat(path)) for path in paths]
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in found]


def list_tars(
    source: Path, tars: Sequence[str], index_folder: Path | None, keep_index: bool = True
) -> ArchivedFiles:
    """The pictures in tars, class by class, by name; UserError where a tar or a label is bad.

    One pass over the headers finds them; INDEX_FILE in `index_folder` saves the next one.
    """
    index = index_folder / INDEX_FILE if index_folder else None
    stamp = json.dumps([INDEX_FORMAT, stamps(tars)])
    if index and (known := _read_index(index, stamp, source, tars)):
        return known
    files = _scan_all(source, tuple(tars), stamp)
    if index and keep_index:
        said = json.dumps({"stamp": stamp, "class_names": files.class_names, "notes": files.notes})
        make_folder(index.parent)
        with atomic_write(index) as file:
            text = np.frombuffer(said.encode(), np.uint8)
            np.savez_compressed(
                file, said=text, names=files.names, labels=files.labels, places=files.places
            )
    return files


def _read_index(index: Path, stamp: str, source: Path, tars: Sequence[str]) -> ArchivedFiles | None:
    """What an earlier pass over the same tars found."""
    try:
        with np.load(index, allow_pickle=False) as arrays:
            said = json.loads(arrays["said"].tobytes())
            if said.pop("stamp") != stamp:
                return None
            found = {key: arrays[key] for key in ("names", "labels", "places")}
            return ArchivedFiles(folder=source, tars=[*tars], **found, **said)
    except Exception:  # not there, or damaged in one of many ways: it is made anew
        return None


@dataclass
class _Found:
    """The pictures found so far. Arrays of numbers: objects for a million would fill memory."""

    names: list[str] = field(default_factory=list)
    places: array = field(default_factory=lambda: array("q"))
    labels: array = field(default_factory=lambda: array("q"))  # -1: none beside the picture
    left_out: Counter[str] = field(default_factory=Counter)

    def scan(self, number: int, tar: str) -> None:
        """Add the pictures of a tar."""
        first, labels = len(self.names), dict[str, int]()
        with open(tar, "rb", opener=regular_only) as file:
            for entry in _entries(file, tar, 0, os.fstat(file.fileno()).st_size):
                place = TarEntry(tar, entry.name, entry.offset_data, entry.size)
                stem, ending = os.path.splitext(entry.name)
                if ending == ".tar":
                    for inner in _entries(file, str(place), place.start, place.num_bytes):
                        self._add(number, inner, f"{os.path.basename(stem)}/{inner.name}")
                elif ending == ".cls":
                    labels[_key(entry.name)] = _label(place)
                elif ending == ".json":  # what .cls says comes first
                    labels.setdefault(_key(entry.name), _label_in_json(place))
                else:
                    self._add(number, entry, entry.name)
        self.labels.extend(labels.get(_key(name), -1) for name in self.names[first:])

    def _add(self, number: int, entry: tarfile.TarInfo, name: str) -> None:
        if entry.isfile() and name.lower().endswith(EXTENSIONS):
            self.names.append(name)
            self.places.extend((number, entry.offset_data, entry.size))
        else:
            self.left_out[ending_of(name) if entry.isfile() else "linked"] += 1


def _key(name: str) -> str:
    """What a picture and its label have in common: the name without all its endings."""
    folder, base = os.path.split(name)
    return os.path.join(folder, base.partition(".")[0])


def _label(place: TarEntry) -> int:
    try:
        return int(place.read())
    except ValueError as error:
        raise UserError(f"{place}: holds no class's number") from error


def _label_in_json(place: TarEntry) -> int:
    try:
        label = json.loads(place.read())["label"]
        return label if type(label) is int else -1
    except (ValueError, KeyError, TypeError, RecursionError):
        return -1


def _entries(file: IO[bytes], where: str, start: int, num_bytes: int) -> Iterator[tarfile.TarInfo]:
    """The entries of a tar within `file`, without folders and hidden names; UserError if cut."""
    end, last = start + num_bytes, "its beginning"
    try:
        file.seek(start)
        tar = tarfile.TarFile(fileobj=file)
        while (entry := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined] # it would keep them all
            last = entry.name
            if entry.offset_data + entry.size > end:
                raise tarfile.ReadError(f"cut short within {last}")
            entry.name = entry.name.lstrip("/").removeprefix("./")
            if not (entry.isdir() or entry.name.startswith(".") or "/." in entry.name):
                yield entry
        file.seek(tar.offset)
        # A tar ends with zeros; tarfile ends at any header that it cannot read.
        if tar.offset + tarfile.BLOCKSIZE > end or any(file.read(tarfile.BLOCKSIZE)):
            raise tarfile.ReadError(f"cut short or damaged after {last}")
    except (tarfile.TarError, OSError) as error:
        raise UserError(f"{where}: not a whole tar ({shorten(error)})") from error


@functools.lru_cache(maxsize=1)
def _scan_all(source: Path, tars: tuple[str, ...], stamp: str) -> ArchivedFiles:
    """The pictures of tars; `stamp` is another where the tars have changed."""
    total = sum(size for _, size, _ in stamps(tars))
    print(f"reading the headers of {source} ({total / 1e9:.1f} GB)", flush=True)
    found = _Found()
    for number, tar in enumerate(with_progress(tars, len(tars), "reading headers", "tar")):
        found.scan(number, tar)
    note = left_out_note(found.left_out)
    if not found.names:
        raise UserError(f"{source}: holds no pictures ({', '.join(EXTENSIONS)}); {note}")
    places, labels = (np.array(values, np.int64) for values in (found.places, found.labels))
    places = places.reshape(-1, 3)
    is_labelled = bool((labels >= 0).any())
    names = found.names if is_labelled else _without_common_folder(found.names)
    is_bare = labels < 0 if is_labelled else np.array(["/" not in name for name in names])
    for index in np.flatnonzero(is_bare):
        raise UserError(
            f"{tars[places[index, 0]]}:{names[index]}: has no label: it is in no class folder, or "
            f"others have {' or '.join(LABEL_ENDINGS)} beside them"
        )
    if is_labelled:
        class_names = numbered_classes(labels, str(source))
    else:
        class_names, labels = _classes_by_folder(names, source)
    # As in folders: pictures of a folder by name, then those of the folders in it.
    keys = ["\0".join(os.path.split(name)).replace("/", "\1") for name in names]
    by_name = np.array(sorted(range(len(names)), key=keys.__getitem__))
    order = by_name[labels[by_name].argsort(kind="stable")]
    return ArchivedFiles(
        folder=source,
        names=packed(names)[order],
        labels=labels[order],
        class_names=class_names,
        notes=[note] if note else [],
        tars=[*tars],
        places=places[order],
    )


def _without_common_folder(names: list[str]) -> list[str]:
    """Names below the folder of the class folders, where the tar has these in another one."""
    while True:
        start = names[0].partition("/")[0] + "/"
        if not all(name.startswith(start) and "/" in name[len(start) :] for name in names):
            return names
        names = [name[len(start) :] for name in names]


def _classes_by_folder(names: list[str], source: Path) -> tuple[list[str], np.ndarray]:
    """The class folders' names, and the label of each picture."""
    heads = [name.partition("/")[0] for name in names]
    classes = in_class_order({*heads})
    if {name.lower() for name in classes} <= SPLITS:
        raise UserError(f"{source}: {' and '.join(classes)} are splits, not classes")
    numbers = {name: number for number, name in enumerate(classes)}
    return classes, np.array([numbers[head] for head in heads], np.int64)
