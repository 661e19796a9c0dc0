"""A latent file in the making: parts that stand on their own, and their merge into one file.

Everything is in the folder imagenet_latent.parts beside the target: plan.json says what is being
made. 000000.part, 000001.part, ... are the parts: a line with a CRC-32 and a JSON header, then the
latents' bytes. A process killed at any moment leaves whole parts, and the same command makes the
missing ones. The merge copies each part into merged.hdf5, reads it back from there and deletes it.
When merged.hdf5 holds all parts, it gets its final name.
"""

import contextlib
import dataclasses
import io
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from tqdm import tqdm

from support.data.images import SKIPPED_FILE
from support.data.latents import (
    LATENT_FILE,
    ROWS_LOOKED_AT,
    LatentInfo,
    LatentReader,
    Recipe,
    locate_latents,
    write_frame,
)
from support.system.files import (
    UserError,
    atomic_write,
    make_folder,
    reporting_os_errors,
    shorten,
    sync_folder,
)
from support.system.locks import hold_lock

PART_IMAGES = 256  # a killed process loses less work than this
PARTS_LOOKED_AT = 16  # when their merge begins
KEPT = "finished work is kept: mend this, and the same command continues"

Record = TypeVar("Record")  # Plan or Ledger
# Of the labels and some of the latents, a row of numbers each.
Describe = Callable[[np.ndarray, np.ndarray], LatentInfo]

# R rows of a part


@dataclass(frozen=True, kw_only=True)
class Plan(Recipe):
    """What is being made; parts of another recipe do not belong with these."""

    num_images: int
    part_images: int  # images of a part: whatever the folder was begun with

    def recipe(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(Recipe)}

    @property
    def num_parts(self) -> int:
        return -(-self.num_images // self.part_images)  # the last may be smaller

    def images_of(self, part: int) -> range:
        start = part * self.part_images
        return range(start, min(start + self.part_images, self.num_images))


class Part(NamedTuple):
    """The rows of some images, and the pictures left out because they cannot be read."""

    latents: np.ndarray  # [R, 2C or C, S, S], with the file's dtype
    labels: np.ndarray  # int64 [R]
    skipped: tuple[str, ...]


class Header(NamedTuple):
    """What a part's file says before its latents."""

    labels: list[int]
    skipped: list[str]
    crc32: int  # of the latents


class Ledger(NamedTuple):
    """What the parts held when the merge began, in order."""

    rows: list[int]
    skipped: list[str]


class PartsFolder:
    """The folder of one latent file in the making."""

    def __init__(self, save_path: str | Path):
        self.target = Path(save_path) / LATENT_FILE
        self.folder = Path(save_path) / "imagenet_latent.parts"
        self.ledger_path = self.folder / "merge.json"  # there once the merge has begun
        self.merged_path = self.folder / "merged.hdf5"

    def part_path(self, part: int) -> Path:
        return self.folder / f"{part:06}.part"

    def damaged_path(self, part: int) -> Path:
        """Where a damaged part is set aside."""
        return self.folder / f"{part:06}.damaged"

    def is_made(self, plan: Plan) -> bool:
        """Whether the target exists; UserError if another command made it, or it is damaged."""
        if not self.target.exists():
            return False
        info = LatentReader(self.target).info
        if differing := info.differences(plan) if info else "it has no attributes":
            raise UserError(
                f"{self.target}: made by another command ({differing}); move it, or choose another "
                "--save-path"
            )
        self.clear()
        return True

    @contextlib.contextmanager
    def owned(self) -> Iterator[None]:
        """A block during which no other command works on this folder."""
        make_folder(self.folder)
        with hold_lock(self.folder / "lock", f"{self.folder}: another process is at work here"):
            yield

    def begin(self, plan: Plan) -> Plan:
        """The plan to continue with; UserError if the folder is being used for another."""
        path = self.folder / "plan.json"
        if not path.exists():
            _write_json(path, dataclasses.asdict(plan))
            return plan
        recorded = self._recorded(path, Plan)
        if differing := recorded.differences(plan):
            raise UserError(
                f"{self.folder}: has the parts of another command: {differing}; finish that one, "
                "delete the folder, or choose another --save-path"
            )
        return dataclasses.replace(plan, part_images=recorded.part_images)

    def _recorded(self, path: Path, kind: Callable[..., Record]) -> Record:
        try:
            return kind(**json.loads(path.read_bytes()))
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise UserError(
                f"{path}: not readable ({shorten(error)}); delete {self.folder} to start again"
            ) from error

    def missing_parts(self, plan: Plan) -> list[int]:
        """The parts still to be made."""
        is_merging = self.ledger_path.exists()  # then other absent parts are merged
        return [
            part
            for part in range(plan.num_parts)
            if not self.part_path(part).exists()
            and (not is_merging or self.damaged_path(part).exists())
        ]

    def write_part(self, index: int, part: Part) -> None:
        """Write a part, whole or not at all."""
        latents = part.latents.tobytes()
        header = Header(part.labels.tolist(), [*part.skipped], zlib.crc32(latents))
        line = json.dumps(header._asdict()).encode()
        with _kept(), atomic_write(self.part_path(index)) as file:
            file.write(b"%08x %b\n" % (zlib.crc32(line), line))
            file.write(latents)
        self.damaged_path(index).unlink(missing_ok=True)

    def read_header(self, index: int) -> Header:
        """A part's header; UserError if it is damaged, and the part is set aside."""
        with self._whole(index), open(self.part_path(index), "rb") as file:
            checksum, _, line = file.readline().rstrip(b"\n").partition(b" ")
            if int(checksum, 16) != zlib.crc32(line):
                raise ValueError("its header is damaged")
            return Header(**json.loads(line))

    def read_latents(self, index: int) -> bytes:
        """A part's latents; UserError if they are damaged, and the part is set aside."""
        header = self.read_header(index)
        with self._whole(index), open(self.part_path(index), "rb") as file:
            file.readline()
            latents = file.read()
            if zlib.crc32(latents) != header.crc32:
                raise ValueError("its latents are damaged")
            return latents

    def skipped(self, plan: Plan) -> list[str]:
        """The pictures that finished parts left out."""
        finished = [part for part in range(plan.num_parts) if self.part_path(part).exists()]
        return [path for part in finished for path in self.read_header(part).skipped]

    @contextlib.contextmanager
    def _whole(self, index: int) -> Iterator[None]:
        """A block that reads a part: if it cannot, the part is set aside for another to be made."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:  # a damaged header may raise any kind
            path, aside = self.part_path(index), self.damaged_path(index)
            with contextlib.suppress(OSError):
                path.rename(aside)
            raise UserError(
                f"{path}: not a whole part ({shorten(error)}); it is now {aside.name}, and the "
                "same command makes the part again"
            ) from error

    # Merging

    def merge(self, plan: Plan, describe: Describe) -> Ledger:
        """Make the latent file of all parts, and delete them; continues an interrupted merge.

        Needs little more room on the disk than the parts have.
        """
        if not self.ledger_path.exists():
            self._begin_merge(plan, describe)
        ledger = self._recorded(self.ledger_path, Ledger)
        offset, row_bytes = locate_latents(self.merged_path)
        bounds = (offset + row_bytes * np.cumsum([0, *ledger.rows])).tolist()
        places = tqdm([*pairwise(bounds)], "merging", unit="part", disable=None)
        with reporting_os_errors(f"{self.merged_path}: not written; {KEPT}"):
            with open(self.merged_path, "r+b", buffering=0) as merged:
                for part, (start, end) in enumerate(places):
                    # An interrupted merge has deleted those that are in the file.
                    if self.part_path(part).exists():
                        self._merge_part(part, merged, start, end - start)
            self._publish(ledger)
        return ledger

    def _begin_merge(self, plan: Plan, describe: Describe) -> None:
        """Write a merged file without latents, and then the ledger."""
        parts = [self.read_header(index) for index in range(plan.num_parts)]
        labels = np.array([label for part in parts for label in part.labels], np.int64)
        if len(labels) == 0:
            raise UserError(f"{self.folder}: none of the {plan.num_images} pictures can be read")
        info = describe(labels, self._some_latents(parts, plan))
        with _kept(), atomic_write(self.merged_path) as file:
            write_frame(file, labels, info)
        rows = [len(part.labels) for part in parts]
        skipped = [path for part in parts for path in part.skipped]
        _write_json(self.ledger_path, Ledger(rows, skipped)._asdict())

    def _some_latents(self, parts: list[Header], plan: Plan) -> np.ndarray:
        """Latents of parts spread over the whole, a row of numbers each."""
        filled = [index for index, part in enumerate(parts) if part.labels]
        chosen = np.unique(np.linspace(0, len(filled) - 1, PARTS_LOOKED_AT).astype(int))
        count, latents = -(-ROWS_LOOKED_AT // len(chosen)), []
        for index in (filled[place] for place in chosen):
            values = np.frombuffer(self.read_latents(index), plan.dtype)
            latents.append(values.reshape(len(parts[index].labels), -1)[:count])
        return np.concatenate(latents)

    def _merge_part(self, index: int, merged: io.FileIO, start: int, num_bytes: int) -> None:
        """Copy a part to its place, read it back from the disk, and delete it."""
        latents = self.read_latents(index)
        if len(latents) != num_bytes:
            raise UserError(
                f"{self.part_path(index)}: has other rows than when the merge began; delete "
                f"{self.folder} to start again"
            )
        _write_at(merged.fileno(), memoryview(latents), start)
        os.fsync(merged.fileno())
        if hasattr(os, "posix_fadvise"):  # else they may come from the system's cache
            os.posix_fadvise(merged.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if os.pread(merged.fileno(), num_bytes, start) != latents:
            raise UserError(
                f"{self.merged_path}: the latents of part {index} are not read back as they "
                "were written; check the disk, then give the same command"
            )
        self.part_path(index).unlink()

    def _publish(self, ledger: Ledger) -> None:
        if ledger.skipped:
            with _kept(), atomic_write(self.target.with_name(SKIPPED_FILE)) as file:
                file.write("".join(f"{path}\n" for path in ledger.skipped).encode(errors="replace"))
        os.replace(self.merged_path, self.target)
        sync_folder(self.target.parent)
        self.clear()

    def clear(self) -> None:
        """Delete the folder, which is no longer needed."""
        shutil.rmtree(self.folder, ignore_errors=True)


@contextlib.contextmanager
def _kept() -> Iterator[None]:
    """A block whose failure to write tells what becomes of the work."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{error}; {KEPT}") from error


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    with _kept(), atomic_write(path) as file:
        file.write(json.dumps(values, indent=2).encode() + b"\n")


def _write_at(descriptor: int, values: memoryview, offset: int) -> None:
    """Write all of `values`, of which one call may write less, as on a full disk."""
    while values:
        written = os.pwrite(descriptor, values, offset)
        values, offset = values[written:], offset + written
