"""What the documents show: commands, code, and a copy of the project to try them in."""

import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from commands import ROOT

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Options that make a run small.
SMALL = (
    "--set total_steps=2 --set batch_size=4 --set num_workers=0 --set prefetch_factor=null "
    "--set eval_demo_steps=0 --set eval_steps=1 --set eval_num_samples=6"
)


class Command(NamedTuple):
    """One command of a document, split into words."""

    place: str
    words: list[str]

    def __str__(self) -> str:
        return f"{self.place}: {shlex.join(self.words)}"


def blocks(path: Path, language: str) -> list[str]:
    """The fenced code blocks of a document in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), re.M | re.S)


def commands_of(path: Path) -> Iterator[Command]:
    """Every line of a document's ```sh blocks."""
    for block in blocks(path, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            yield Command(path.name, shlex.split(line, comments=True))


def copy_project(folder: Path) -> None:
    """Copy what belongs to the project, and nothing that it made here."""

    def made_here(place: str, names: list[str]) -> set[str]:
        made = {"runs", "data", "exported", "shared"} if Path(place) == ROOT else set()
        return {name for name in names if name[0] == "." or name in made | {"__pycache__"}}

    shutil.copytree(ROOT, folder, ignore=made_here, dirs_exist_ok=True)
