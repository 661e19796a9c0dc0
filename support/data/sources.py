"""What pictures lie in: class folders, or files that hold many; found out by looking."""

import glob
import os
import re
from pathlib import Path

from support.data.archives import list_tars
from support.data.folders import SPLITS, LabelledFiles, class_folders, class_names, entries_of
from support.data.images import EXTENSIONS
from support.data.tables import list_tables
from support.system.files import UserError

TABLES = (".parquet", ".arrow")
SHARDS = (".tar", *TABLES)


def shards_of(source: Path) -> list[str]:
    """The files of many pictures at `source`: itself, those in the folder, or those of a pattern.

    None for class folders. UserError for two kinds of source, or two splits, in one place.
    """
    others: list[str] = []
    if os.path.isdir(source):
        names = {entry.name: entry.name.lower() for entry in entries_of(source)}
        found = [f"{source}/{name}" for name, low in names.items() if low.endswith(SHARDS)]
        if found:
            is_other = {name: low.endswith(EXTENSIONS) for name, low in names.items()}
            others = [n for n, is_one in is_other.items() if is_one or os.path.isdir(source / n)]
    else:
        found = [str(source)] if os.path.isfile(source) else sorted(glob.glob(str(source)))
        found = [path for path in found if path.lower().endswith(SHARDS)]
    kinds = sorted({os.path.splitext(path)[1].lower() for path in found})
    if found and (others or len(kinds) > 1):
        beside = (
            f"{others[0]} beside {os.path.basename(found[0])}" if others else " and ".join(kinds)
        )
        raise UserError(f"{source}: holds two kinds of source, {beside}; give one of them")
    starts = {re.split(r"[^A-Za-z]", os.path.basename(path))[0] for path in found}
    if len(splits := sorted(start for start in starts if start.lower() in SPLITS)) > 1:
        patterns = " or ".join(f"{source}/{split}*{kinds[0]}" for split in splits)
        raise UserError(f"{source}: holds {' and '.join(splits)}; give one of them: {patterns}")
    return found


def list_source(
    source: Path, index_folder: Path | None = None, keep_index: bool = True
) -> LabelledFiles:
    """The pictures of a source; `index_folder` has or gets the index of tars."""
    shards = shards_of(source)
    if not shards:
        return class_folders(source)
    if shards[0].lower().endswith(TABLES):
        return list_tables(source, shards)
    return list_tars(source, shards, index_folder, keep_index)


def count_classes(source: Path, index_folder: Path | None = None) -> int:
    """The number of classes of a source."""
    if not shards_of(source):
        return len(class_names(source))
    return len(list_source(source, index_folder, keep_index=False).class_names)
