"""How a run's weights were made and scored, as far as the records of the run tell."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from support.runs.checkpoint import run_of_checkpoint
from support.runs.stored import StoredModel
from support.scores.table import read_record, read_records

MADE = ("code_version", "torch", "device", "processes")
MEASURED = ("file", "NFE", "num_images", "scores", "distances", "notes")
FILES = ("name", "sha256", "num_images")
VERSIONS = ("soflow", "tensorflow")


def add_records(stored: StoredModel, weights_sha256: str) -> StoredModel:
    """The model with the records of its run, without paths of this machine.

    An exported folder has them already. Scores are those of these very weights.
    """
    run = run_of_checkpoint(stored.path)
    if run is None:
        return stored
    scores = []
    for name, record in read_records(run / "evals").items():
        made = read_record((run / "evals" / name).with_suffix(".json"))
        is_of_step = record.get("step") == stored.finished_steps
        if is_of_step and made.get("weights_sha256", weights_sha256) == weights_sha256:
            reference, graph = (_described(record.get(key) or {}) for key in ("reference", "graph"))
            scores.append(
                _picked(record, MEASURED)
                | {"sampler": made.get("sampler", "renoise"), "reference": reference}
                | {"graph": graph, "versions": _picked(record.get("versions") or {}, VERSIONS)}
            )
    made = read_record(stored.path.with_suffix(".json"))
    return replace(stored, made=_picked(made, MADE), scores=scores)


def _picked(record: Mapping[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    return {key: record[key] for key in keys if key in record}


def _described(file: Mapping[str, Any]) -> dict[str, Any]:
    """A file by its name, not its place, and its digest."""
    return _picked(file, FILES) | {"name": Path(str(file.get("name", "?"))).name}
