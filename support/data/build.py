"""Build a run's data set: load it, check it, hold out images; compare it with a checkpoint's."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from tqdm import tqdm

from support.data.datasets import ALONE, DATASETS, DataRequest, Selection, TrainingData
from support.data.folders import MOST_NAMED, describe_classes, printable
from support.data.images import SKIPPED_FILE
from support.system.files import UserError, shorten
from support.system.processes import Processes
from support.system.randomness import generator

NAMES_OF_VAE = ("vae", "vae_revision")  # a VAE is compared by the digest of its weights


def build_data(
    request: DataRequest, processes: Processes = ALONE, check_data: bool = False
) -> TrainingData:
    """The requested data set; UserError where it is missing, damaged or too small.

    With `check_data` or `skip_bad` every example is read, each process reading its share.
    """
    where = request.dataset_path or request.dataset_type
    data = DATASETS[request.dataset_type].load(replace(request, processes=processes))
    if check_data or request.skip_bad:
        data = check_examples(data, processes, request.skip_bad, where)
    if request.held_out:
        data = hold_out(data, request, where)
    if len(data) < request.batch_size:
        raise UserError(
            f"batch_size: {request.batch_size} is more than the {len(data)} examples of {where}; "
            f"lower it: --set batch_size={len(data)} at most"
        )
    # Checked here, because on a GPU a wrong label ends the process without naming it.
    for label in data.labels.aminmax():
        if not 0 <= label < data.spec.num_classes:
            raise UserError(
                f"{where}: has a label {label}; its {data.spec.num_classes} classes go from 0 to "
                f"{data.spec.num_classes - 1}"
            )
    data.notes.insert(0, describe_classes(data.spec.class_names, data.class_counts))
    return data


def check_examples(
    data: TrainingData, processes: Processes, skip_bad: bool, where: str
) -> TrainingData:
    """Read every example; leave out those that cannot be read, or name them in a UserError.

    Each process reads its share, and all of them get the same list.
    """
    rank, world_size, count = processes.rank, processes.world_size, len(data)
    share = range(count * rank // world_size, count * (rank + 1) // world_size)
    if processes.is_main:
        print(f"checking that all {count} examples can be read", flush=True)
    # disable=None: a progress bar on terminals only
    quiet = None if processes.is_main else True
    refusals = tqdm(
        data.refusals(share), "checking", total=len(share), unit="example", disable=quiet
    )
    own = {index: why for index, why in zip(share, refusals, strict=True) if why}
    # Shares are in order, so the joined list is too.
    bad = {index: why for found in processes.gather(own) for index, why in found.items()}
    if bad and not skip_bad:
        named = "; ".join(list(bad.values())[:MOST_NAMED])
        more = f"; and {len(bad) - MOST_NAMED} more" if len(bad) > MOST_NAMED else ""
        raise UserError(
            f"{len(bad)} of {count} pictures cannot be read: {named}{more}; mend or delete "
            "them, or leave them out with --set skip_bad=true"
        )
    if bad:
        kept = torch.ones(count, dtype=torch.bool)
        kept[list(bad)] = False
        data, skipped = Selection(data, kept.nonzero()[:, 0]), list(map(data.file_of, bad))
        data.skipped = skipped
        data.notes.append(
            f"left out {len(bad)} of {count} pictures, which cannot be read: see {SKIPPED_FILE}"
        )
        if 0 in data.class_counts:
            name = data.spec.class_names[data.class_counts.index(0)]
            raise UserError(f"{where}/{name}: none of its pictures can be read")
    data.notes.append(f"checked: {len(data)} examples can be read")
    return data


def hold_out(data: TrainingData, request: DataRequest, where: str) -> TrainingData:
    """`data` with `held_out` images set aside: of its test images if it has any, else of its own.

    UserError where there are not that many.
    """
    load_test = DATASETS[request.dataset_type].load_test
    source = load_test(request) if load_test else data
    most = len(source) if load_test else max(0, len(source) - request.batch_size)
    if request.held_out > most:
        whose = "test images" if load_test else f"images, and a batch takes {request.batch_size}"
        raise UserError(
            f"held_out: {request.held_out} is too many: {where} has {len(source)} {whose}; "
            f"{most} at most"
        )
    order = torch.randperm(len(source), generator=generator(request.seed, "held-out images"))
    chosen, rest = order[: request.held_out].sort().values, order[request.held_out :].sort().values
    training = data if load_test else Selection(data, rest)
    training.held_out = Selection(source, chosen)
    whose = "test images" if load_test else "images, on which no step trains"
    training.notes.append(f"held out: {request.held_out} {whose}")
    names = zip(data.spec.class_names, data.class_counts, training.class_counts, strict=True)
    if emptied := [printable(name) for name, before, left in names if before and not left]:
        training.notes.append(
            f"held out: all images of {', '.join(emptied[:MOST_NAMED])}: no step trains on them"
        )
    return training


def compare_data(
    before: Mapping[str, Any], now: Mapping[str, Any], source: str, is_allowed: bool
) -> list[str]:
    """A line if a run continues on other data than before; UserError if it must not.

    Other classes are always refused, because labels would change their meaning.
    """
    notes = []
    if "exif" in now and "exif" not in before:
        notes.append("pictures are turned upright by their EXIF data from here on")
    # Only what was recorded: older checkpoints record less.
    changes = {
        key: value
        for key, value in before.items()
        if now.get(key) != value and key not in NAMES_OF_VAE
    }
    if not changes:
        return notes
    listed = "; ".join(
        "other names or sizes of pictures"
        if key == "files_sha256"
        else f"{key} {shorten(was)} then, {shorten(now.get(key))} now"
        for key, was in changes.items()
    )
    may_go_on = changes.keys() <= {"num_examples", "class_counts", "files_sha256"}
    if may_go_on and is_allowed:
        return [
            *notes,
            f"data changed: {listed}; from here on their order and the held-out images differ, and "
            "epochs are counted as if this had been the data from the start",
        ]
    way_out = "start a new run with another working_dir"
    if may_go_on:
        way_out = "--allow-changed data continues with them, in another order"
    raise UserError(f"{source}: trained on other data: {listed}; {way_out}")
