"""What makes a run another experiment, and where a run may start."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from config import FIELDS, Config
from support.data.batches import BatchPlan
from support.data.datasets import DATASETS
from support.system.files import UserError
from support.system.settings import may_change

DECIDES_SHAPES = ("dataset_type", "model_type", "data_size")  # of the weights


def refuse_start(config: Config) -> None:
    """Checks for starting a run, not for reading one; UserError where one fails."""
    if DATASETS[config.dataset_type].has_files and config.dataset_path:
        data, results = (
            Path(os.path.expanduser(path)).resolve()
            for path in (config.dataset_path, config.working_dir)
        )
        # Folders whose names start with a dot are no classes.
        if data in [results, *results.parents] and not str(results).startswith(f"{data}/."):
            raise UserError(
                f"working_dir: {config.working_dir} lies in dataset_path, where every folder is a "
                "class; choose another"
            )


def refuse_another_experiment(
    old: Config, new: Config, allowed: Sequence[str], source: str
) -> list[str]:
    """A line for each key that changed; UserError if that makes it another experiment.

    `allowed` names the keys that the user has agreed to change.
    """
    before, after = old.to_dict(), new.to_dict()
    changes = {
        key: f"{before[key]!r} -> {after[key]!r}" for key in FIELDS if before[key] != after[key]
    }
    refused = [key for key in changes if not may_change(FIELDS[key]) and key not in allowed]
    if refused:
        listed = ", ".join(f"{key} {changes[key]}" for key in refused)
        flags = " ".join(f"--allow-changed {key}" for key in refused)
        way_out = f"use another working_dir, or say {flags} to continue all the same"
        if any(key in DECIDES_SHAPES for key in refused):
            way_out = "its weights do not fit; use another working_dir"
        raise UserError(f"{source} is of another experiment: {listed}; {way_out}")
    return [f"{key} changed: {change}" for key, change in changes.items()]


def compare_plans(plan: BatchPlan, content: Mapping[str, Any]) -> list[str]:
    """A line if the batch was cut differently before: noise is drawn by microbatch."""
    was = BatchPlan.from_record(content["parts"]) if "parts" in content else plan
    if was == plan:
        return []
    order = "goes on" if was.batch_size == plan.batch_size else "is another"
    noise = "goes on" if was.num_microbatches == plan.num_microbatches else "is another"
    return [f"batch {plan} now, {was} before: the order of the data {order}, the noise {noise}"]
