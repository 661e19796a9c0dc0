"""What the arena runs: the jobs of an experiments' file, each one training and its samples."""

import ast
import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from support.system.files import UserError, sha256_of, shorten
from support.system.settings import read_yaml

FOLDER = Path(__file__).resolve().parent
PARTS = ("scales", "objectives", "ablations")


@dataclass(frozen=True)
class Job:
    """One training run, and how samples are made of its checkpoints."""

    part: str  # of PARTS
    name: str  # of what is compared
    guided: bool
    objective: str
    seed: int
    settings: Mapping[str, Any]
    sampler: str = "renoise"
    jumps: tuple[int, ...] = (1,)
    checkpoints: int = 1
    images: int = 600
    chosen_by: int = 1  # jumps, by whose FD a scale is chosen
    source_sha256: str = ""  # of the file of a user's objective

    @property
    def file_name(self) -> str:
        """A name for its folder and files: that of the run, which parts may share."""
        kind = "ablation" if self.part == "ablations" else "guided" if self.guided else "plain"
        scale = f"-{self.settings['cfg_scale']}" if self.guided else ""
        name = self.name.replace(" ", "_").replace(",", "")
        return f"{kind}-{name}{scale}-{self.seed}"

    @property
    def steps(self) -> list[int]:
        """After which steps there are samples."""
        total = int(self.settings["total_steps"])
        if total % self.checkpoints:
            raise UserError(
                f"total_steps {total}: not {self.checkpoints} equal parts (checkpoints)"
            )
        return [total * (k + 1) // self.checkpoints for k in range(self.checkpoints)]


@dataclass(frozen=True)
class Plan:
    """An experiments' file."""

    data: str
    values: Mapping[str, Any]
    best: dict[str, float] = field(default_factory=dict)  # name -> scale, once that is known

    @property
    def config(self) -> str:
        return str(FOLDER.parent / self.values["config"])

    @property
    def seeds(self) -> list[int]:
        return self.values["seeds"]

    def with_objective(self, text: str) -> "Plan":
        """The plan with a user's objective, FILE.py:NAME, beside the others, without guidance."""
        file, _, name = text.rpartition(":")
        if not (name.isidentifier() and Path(file).is_file()):
            raise UserError(f"--objective {text}: must be FILE.py:NAME, of a file that is there")
        if name in {**self.values["guided"], **self.values["unguided"]}:
            raise UserError(f"--objective {text}: {name} is there already; name yours otherwise")
        if name not in classes_of(Path(file)):
            raise UserError(f"--objective {text}: {file} has no class {name}")
        entry = {"objective": name, "sampler": "chain", "source_sha256": sha256_of(Path(file))}
        values = {**self.values, "unguided": {**self.values["unguided"], name: entry}}
        return dataclasses.replace(self, values=values)

    def jobs(self, part: str) -> Iterator[Job]:
        """The jobs of a part; those of `objectives` need the best scales."""
        if part == "ablations":
            yield from self._ablations()
            return
        if part == "scales":
            for name, entry in self.values["guided"].items():
                for scale in self.values["scales"]:
                    yield self._job(part, name, entry, self.seeds[0], scale)
            return
        for seed in self.seeds:
            for name, entry in self.values["guided"].items():
                yield self._job(part, name, entry, seed, self.best[name])
            for name, entry in self.values["unguided"].items():
                yield self._job(part, name, entry, seed, None)

    def _job(
        self, part: str, name: str, entry: Mapping[str, Any], seed: int, scale: float | None
    ) -> Job:
        guidance = {"cfg_scale": scale}
        if scale is None:
            guidance = {"cfg_scale": 1.0, "cfg_drop_rate": 0.0, "mix_ratio": 1.0}
        settings = {**self.values["settings"], **guidance, **entry.get("settings", {})}
        return Job(
            part=part,
            name=name,
            guided=scale is not None,
            objective=entry["objective"],
            seed=seed,
            settings=settings,
            sampler=entry["sampler"],
            jumps=tuple(self.values["jumps"]),
            checkpoints=self.values["checkpoints"],
            images=self.values["images"],
            chosen_by=entry.get("chosen_by", 1),
            source_sha256=entry.get("source_sha256", ""),
        )

    def _ablations(self) -> Iterator[Job]:
        part = self.values["ablations"]
        for seed in self.seeds:
            for name, change in part["changes"].items():
                settings = {**self.values["settings"], **part["settings"], **change}
                images = self.values["images"]
                yield Job("ablations", name, False, "SoFlow", seed, settings, images=images)


def classes_of(path: Path) -> list[str]:
    """The names of the classes that a file of Python defines; UserError where it is none."""
    try:
        body = ast.parse(path.read_bytes()).body
    except (SyntaxError, ValueError) as error:
        raise UserError(f"{path}: not Python ({shorten(error)})") from error
    return [node.name for node in body if isinstance(node, ast.ClassDef)]


def read_plan(data: str) -> Plan:
    """The plan for a data set; UserError where there is none."""
    path = FOLDER / f"{data}.yaml"
    if not path.exists():
        there = ", ".join(sorted(found.stem for found in FOLDER.glob("*.yaml")))
        raise UserError(f"--data {data}: there is {there}")
    values = read_yaml(path)
    if "like" in values:
        values = read_yaml(FOLDER / f"{values['like']}.yaml") | values
    return Plan(data, values)
