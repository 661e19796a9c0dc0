"""A latent file in the making: parts that stand on their own, and their merge into one file.

All of it lies in the folder imagenet_latent.parts beside the file to be: plan.json says what is
being made, 000000.npz and so on are the parts. A process killed at any moment leaves parts that are
whole, and the same command makes those that are missing. The merge notes in merge.json what the
parts hold, copies each into merged.hdf5 and deletes it when it is safe there; the file gets its
final name when all of it has been read back.
"""

import contextlib
import dataclasses
import io
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from support.data.images import SKIPPED_FILE
from support.data.latents import LATENT_FILE, LatentInfo, LatentReader, locate_latents, write_frame
from support.system.files import (
    UserError,
    atomic_write,
    make_folder,
    shorten,
    sync_folder,
)
from support.system.locks import hold_lock

PART_IMAGES = 256  # the work that a killed process loses is less than this
KEPT = "what is finished is kept: mend this, and the same command goes on from there"

Record = TypeVar("Record")  # Plan or Ledger

# R rows of a part


@dataclass(frozen=True)
class Plan:
    """What is being made: parts made by another plan do not belong with these."""

    num_images: int
    images_sha256: str
    image_size: int
    vae_sha256: str
    dtype: str
    seed: int
    part_images: int  # images of a part; a matter of form, taken over from the folder
    exif: str = "ignore"  # as of LatentInfo; plans that do not say are of before
    precision: str = ""  # likewise

    def attributes(self) -> dict[str, Any]:
        """What the latent file is to say of this."""
        return {k: value for k, value in vars(self).items() if k in LatentInfo.__annotations__}

    @property
    def num_parts(self) -> int:
        return -(-self.num_images // self.part_images)  # the last may be smaller

    def images_of(self, part: int) -> range:
        start = part * self.part_images
        return range(start, min(start + self.part_images, self.num_images))


def list_differences(there: object, here: object, keys: Iterable[str]) -> str:
    """What of two plans, or of a file and a plan, is not the same; nothing where all is."""
    return "; ".join(
        f"{key} {getattr(there, key)} there, {getattr(here, key)} now"
        for key in keys
        if getattr(there, key) not in ("", getattr(here, key))  # where it is said
    )


class Part(NamedTuple):
    """The rows of some images, and the pictures left out because they cannot be read."""

    latents: np.ndarray  # [R, 8, S, S], as they are to stand in the file
    labels: np.ndarray  # int64 [R]
    skipped: tuple[str, ...]


class Ledger(NamedTuple):
    """What the parts hold, in order; kept while parts disappear into the merged file."""

    rows: list[int]
    checksums: list[int]  # CRC-32 of the bytes of a part's latents
    skipped: list[str]


class PartsFolder:
    """The folder of one latent file in the making, and the names in it."""

    def __init__(self, save_path: str | Path):
        self.target = Path(save_path) / LATENT_FILE
        self.folder = Path(save_path) / "imagenet_latent.parts"
        self.ledger_path = self.folder / "merge.json"
        self.merged_path = self.folder / "merged.hdf5"

    def part_path(self, part: int) -> Path:
        return self.folder / f"{part:06}.npz"

    @contextlib.contextmanager
    def owned(self) -> Iterator[None]:
        """A block in which no other command works on this folder."""
        make_folder(self.folder)
        with hold_lock(self.folder / "lock", f"{self.folder}: another process is at work here"):
            yield

    def begin(self, plan: Plan) -> Plan:
        """The plan to go on with; UserError where the folder is being used for another."""
        path = self.folder / "plan.json"
        if not path.exists():
            with atomic_write(path) as file:
                file.write(json.dumps(dataclasses.asdict(plan), indent=2).encode() + b"\n")
            return plan
        recorded = self._recorded(path, Plan)
        here = dataclasses.replace(plan, part_images=recorded.part_images)
        if differing := list_differences(recorded, here, vars(plan)):
            raise UserError(
                f"{self.folder}: has the parts of another command: {differing}; finish that one, "
                "delete the folder, or choose another --save-path"
            )
        # One that does not say its precision goes on in the one that is asked for now.
        return dataclasses.replace(recorded, precision=plan.precision)

    def _recorded(self, path: Path, kind: Callable[..., Record]) -> Record:
        try:
            return kind(**json.loads(path.read_bytes()))
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise UserError(
                f"{path}: not readable ({shorten(error)}); delete {self.folder} to start anew"
            ) from error

    def missing_parts(self, plan: Plan) -> list[int]:
        """The parts still to be made."""
        if self.merged_path.exists():  # begun when there were none
            return []
        return [part for part in range(plan.num_parts) if not self.part_path(part).exists()]

    def write_part(self, index: int, part: Part) -> None:
        """Write a part, whole or not at all."""
        # In memory first, for it is small: NumPy seeks, and a full disk then has one place.
        buffer = io.BytesIO()
        np.savez(
            buffer,
            latents=part.latents,
            labels=part.labels,
            skipped=np.array(json.dumps(part.skipped)),
        )
        with self._explained(), atomic_write(self.part_path(index)) as file:
            file.write(buffer.getbuffer())

    def read_part(self, index: int) -> Part:
        """A part, its bytes as they were written; UserError where they are not."""
        with self._entries(index) as entries:
            return Part(entries["latents"], entries["labels"], _skipped(entries))

    def skipped(self, plan: Plan) -> Iterator[str]:
        """The pictures that finished parts left out."""
        for part in range(plan.num_parts):
            if self.part_path(part).exists():
                with self._entries(part) as entries:
                    yield from _skipped(entries)

    @contextlib.contextmanager
    def _entries(self, index: int) -> Iterator[Any]:
        path = self.part_path(index)
        try:
            with np.load(path, allow_pickle=False) as entries:  # zip checks what is read
                yield entries
        except Exception as error:  # zipfile and NumPy raise many kinds
            way_out = "delete it, and the same command makes it again"
            if self.merged_path.exists():
                way_out = f"delete {self.folder} to start anew"
            raise UserError(f"{path}: not a whole part ({shorten(error)}); {way_out}") from error

    # Merging

    def merge(
        self,
        plan: Plan,
        describe: Callable[[np.ndarray], LatentInfo],
        report: Callable[[str, int, int], None],
    ) -> Ledger:
        """Make the latent file of all parts, and delete them; `describe` is told the labels.

        Goes on where an earlier merge was stopped. Needs the memory of a part, and little more room
        on the disk than the parts have. UserError where the file does not hold what they did.
        `report` is told what is being done, and how many parts of how many it is done with.
        """
        ledger = self._ledger(plan, report)
        if not self.merged_path.exists():
            self._create_merged(plan, describe)
        try:
            self._copy_parts(ledger, report)
            self._verify(ledger, report)
            self._publish(ledger)
        except OSError as error:
            reason = error.strerror or shorten(error)
            raise UserError(f"{self.merged_path}: not written ({reason}); {KEPT}") from error
        return ledger

    def _ledger(self, plan: Plan, report: Callable[[str, int, int], None]) -> Ledger:
        """What the parts hold, every byte of them checked before any is deleted."""
        if self.merged_path.exists():
            return self._recorded(self.ledger_path, Ledger)
        ledger = Ledger([], [], [])
        for index in range(plan.num_parts):
            part = self.read_part(index)
            ledger.rows.append(len(part.labels))
            ledger.checksums.append(zlib.crc32(_bytes_of(part.latents)))
            ledger.skipped.extend(part.skipped)
            report("checking", index + 1, plan.num_parts)
        if sum(ledger.rows) == 0:
            raise UserError(f"{self.folder}: none of the {plan.num_images} pictures can be read")
        with self._explained(), atomic_write(self.ledger_path) as file:
            file.write(json.dumps(ledger._asdict()).encode())
        return ledger

    def _create_merged(self, plan: Plan, describe: Callable[[np.ndarray], LatentInfo]) -> None:
        every_label = []
        for index in range(plan.num_parts):
            with self._entries(index) as entries:
                every_label.append(entries["labels"])
        labels = np.concatenate(every_label)
        with self._explained(), atomic_write(self.merged_path) as file:
            write_frame(file, labels, describe(labels))

    def _copy_parts(self, ledger: Ledger, report: Callable[[str, int, int], None]) -> None:
        """Copy the parts that are still there; each is deleted once its rows are on the disk."""
        with open(self.merged_path, "r+b", buffering=0) as file:
            for index, place in enumerate(self._places(ledger)):
                if not self.part_path(index).exists():
                    continue
                values = _bytes_of(self.read_part(index).latents)
                if (len(values), zlib.crc32(values)) != (len(place), ledger.checksums[index]):
                    raise UserError(
                        f"{self.part_path(index)}: not the part that the merge began with; "
                        f"delete {self.folder} to start anew"
                    )
                _write_at(file.fileno(), values, place.start)
                os.fsync(file.fileno())
                self.part_path(index).unlink()
                report("merging", index + 1, len(ledger.rows))

    def _verify(self, ledger: Ledger, report: Callable[[str, int, int], None]) -> None:
        """UserError where what is in the file is not what the parts held."""
        if len(LatentReader(self.merged_path)) != sum(ledger.rows):
            raise UserError(f"{self.merged_path}: not the file of merge.json beside it")
        with open(self.merged_path, "rb") as file:
            if hasattr(os, "posix_fadvise"):  # from the disk, and not from what was to go there
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            for index, place in enumerate(self._places(ledger)):
                file.seek(place.start)
                if zlib.crc32(file.read(len(place))) != ledger.checksums[index]:
                    raise UserError(
                        f"{self.merged_path}: part {index} reads back otherwise than it was "
                        f"written; see to the disk, and delete {self.folder} to start anew"
                    )
                report("verifying", index + 1, len(ledger.rows))

    def _places(self, ledger: Ledger) -> Iterator[range]:
        """The bytes of the merged file that each part's latents take."""
        start, row_bytes = locate_latents(self.merged_path)
        for rows in ledger.rows:
            yield range(start, start + rows * row_bytes)
            start += rows * row_bytes

    def _publish(self, ledger: Ledger) -> None:
        if ledger.skipped:
            skipped_path = self.target.with_name(SKIPPED_FILE)
            with self._explained(), atomic_write(skipped_path) as file:
                file.write("".join(f"{path}\n" for path in ledger.skipped).encode(errors="replace"))
        os.replace(self.merged_path, self.target)
        sync_folder(self.target.parent)
        self.clear()

    def clear(self) -> None:
        """Delete the folder, of which nothing is needed any more."""
        shutil.rmtree(self.folder, ignore_errors=True)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """A block whose failure to write is said together with what becomes of the work."""
        try:
            yield
        except UserError as error:
            raise UserError(f"{error}; {KEPT}") from error


def _bytes_of(array: np.ndarray) -> memoryview:
    return memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8))


def _skipped(entries: Mapping[str, np.ndarray]) -> tuple[str, ...]:
    return tuple(json.loads(str(entries["skipped"])))


def _write_at(descriptor: int, values: memoryview, offset: int) -> None:
    """Write all of `values`; one call may write less, as where the disk is full."""
    while values:
        written = os.pwrite(descriptor, values, offset)
        values, offset = values[written:], offset + written
