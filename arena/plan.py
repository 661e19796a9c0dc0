"""The jobs of an experiments file: each is one training run and its samples."""

import dataclasses
import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from models import add_method
from support.system.files import UserError
from support.system.settings import read_yaml

FOLDER = Path(__file__).resolve().parent
PARTS = ("scales", "objectives", "ablations")
NO_GUIDANCE = {"cfg_scale": 1.0, "cfg_drop_rate": 0.0, "mix_ratio": 1.0}


@dataclass(frozen=True)
class Job:
    """One training run, and the samples to make from its checkpoints."""

    part: str  # of PARTS
    name: str  # as tables show it
    objective: str  # the `method` of its config
    seed: int
    settings: Mapping[str, Any]
    guided: bool = False
    nfe: tuple[int, ...] = (1,)
    checkpoints: int = 1
    images: int = 600
    chosen_by: int = 1  # the guidance scale is chosen by FD at this NFE

    @property
    def file_name(self) -> str:
        """The name of the run's folder; parts share equal runs."""
        kind = "ablation" if self.part == "ablations" else "guided" if self.guided else "plain"
        scale = f"-{self.settings['cfg_scale']}" if self.guided else ""
        name = self.name.replace(" ", "_").replace(",", "")
        return f"{kind}-{name}{scale}-{self.seed}"

    @property
    def steps(self) -> list[int]:
        """The training steps with samples, evenly spaced."""
        total = int(self.settings["total_steps"])
        return [total * (k + 1) // self.checkpoints for k in range(self.checkpoints)]

    def samples(self, folder: Path) -> dict[tuple[int, int], Path]:
        """The archive of samples for each training step and NFE."""
        place = folder / self.file_name / "samples"
        pairs = itertools.product(self.steps, self.nfe)
        return {(step, nfe): place / f"{step}_{nfe}.npz" for step, nfe in pairs}

    def record(self) -> dict[str, Any]:
        """What determines the job's samples, as JSON stores it."""
        described = json.loads(json.dumps(dataclasses.asdict(self)))
        return {key: value for key, value in described.items() if key not in ("part", "chosen_by")}


@dataclass(frozen=True)
class Plan:
    """An experiments file, with the guidance scales once they are chosen."""

    values: Mapping[str, Any]
    best: dict[str, float] = field(default_factory=dict)  # name -> scale

    @property
    def config(self) -> str:
        return str(FOLDER.parent / self.values["config"])

    def with_objective(self, text: str) -> "Plan":
        """The plan with a user's objective, FILE.py:NAME, beside the others, without guidance."""
        file, _, name = text.rpartition(":")
        if name in {**self.values["guided"], **self.values["unguided"]}:
            raise UserError(f"--objective {text}: {name} is taken; choose another name")
        try:
            add_method(text)
        except ValueError as error:
            raise UserError(f"--objective {text}: must be FILE.py:NAME ({error})") from error
        entry = {"objective": f"{Path(file).expanduser().resolve()}:{name}"}
        values = {**self.values, "unguided": {**self.values["unguided"], name: entry}}
        return dataclasses.replace(self, values=values)

    def jobs(self, part: str) -> Iterator[Job]:
        """The jobs of a part; of `objectives`, the guided ones once their scale is chosen."""
        values = self.values
        if part == "scales":
            for name, scale in itertools.product(values["guided"], values["scales"]):
                yield self._job(part, name, values["seeds"][0], scale)
        elif part == "objectives":
            compared = [*self.best.items(), *((name, None) for name in values["unguided"])]
            for seed, (name, scale) in itertools.product(values["seeds"], compared):
                yield self._job(part, name, seed, scale)
        else:
            ablations = values["ablations"]
            common = {**values["settings"], **ablations["settings"]}
            changes = ablations["changes"].items()
            for seed, (name, change) in itertools.product(values["seeds"], changes):
                yield Job(part, name, "SoFlow", seed, common | change, images=values["images"])

    def _job(self, part: str, name: str, seed: int, scale: float | None) -> Job:
        """A run of an objective, guided by `scale` or, with None, not at all."""
        entry = self.values["unguided" if scale is None else "guided"][name]
        guidance = NO_GUIDANCE if scale is None else {"cfg_scale": scale}
        return Job(
            part=part,
            name=name,
            objective=entry.get("objective", name),
            seed=seed,
            settings={**self.values["settings"], **guidance, **entry.get("settings", {})},
            guided=scale is not None,
            nfe=tuple(self.values["nfe"]),
            checkpoints=self.values["checkpoints"],
            images=self.values["images"],
            chosen_by=entry.get("chosen_by", 1),
        )


def read_plan(data: str) -> Plan:
    """The plan for a data set; UserError where there is none."""
    path = FOLDER / f"{data}.yaml"
    if not path.exists():
        known = ", ".join(sorted(found.stem for found in FOLDER.glob("*.yaml")))
        raise UserError(f"--data {data}: is not one of {known}")
    values = read_yaml(path)
    if "like" in values:
        values = read_yaml(FOLDER / f"{values['like']}.yaml") | values
    return Plan(values)
