"""A model card, in Markdown: what an exported folder is, made of the records of its run."""

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from config import Config
from sampling import LoadedModel
from support.data.vae import PIXELS_PER_LATENT
from support.runs.budget import count_parameters
from support.runs.checkpoint import run_of_checkpoint
from support.runs.stored import StoredModel
from support.scores.table import COLUMNS, read_record, read_records

LICENCE = "unknown"  # what the hub's list of licences calls it
MOST_NAMES = 100  # of classes; config.json has them all


def model_card(
    title: str, stored: StoredModel, loaded: LoadedModel, files: Mapping[str, str]
) -> str:
    """The card's text; `files` are those of the folder, and what each is."""
    config = loaded.config
    picture = "![Samples](samples.png)\n\n" if "samples.png" in files else ""
    labels = ""
    if config.is_conditional:
        labels = f"labels={[loaded.word_of(label) for label in (0, 0, loaded.num_classes - 1)]}, "
    return f"""---
license: {LICENCE}  # to be filled in
pipeline_tag: unconditional-image-generation
tags: [image-generation, one-step, soflow]
---

# {title}

{picture}Makes an image in one step, or in a few: a Solution Flow Model (arXiv 2512.15657).

## Use

In the folder of the code, or with it on Python's path:

```python
from sampling import load
model = load("{title}")  # this folder, or its name on the hub
images = model.sample({labels}seeds=[0, 1, 2], steps=1)
```

## Model

{_table(_facts_of_model(stored, loaded))}

## Data

{_table(_facts_of_data(stored, loaded))}

## Training

{_table(_facts_of_training(stored, config))}

## Scores

{_scores(stored, loaded.weights_sha256)}

## Files

{_table({f"`{name}`": what for name, what in files.items()})}

## Licence

To be filled in by who publishes the model, here and in the first lines. Mind the terms of the data.
"""


def _table(facts: Mapping[str, object]) -> str:
    return "\n".join(["| | |", "| --- | --- |", *(f"| {k} | {v} |" for k, v in facts.items())])


def _facts_of_model(stored: StoredModel, loaded: LoadedModel) -> dict[str, object]:
    config = loaded.config
    side = config.data_size * (PIXELS_PER_LATENT if config.is_latent else 1)
    facts: dict[str, object] = {
        "network": f"{config.model_type}, {count_parameters(loaded.model)}",
        "images": f"{side} x {side} pixels",
        "method": f"{config.method}; path {config.noising_type}, solution form "
        f"{config.coefficient_type}",
    }
    if config.is_latent:
        facts["decoder"] = f"{stored.config['vae']}, of latents {list(loaded.shape)}"
    return facts


def _facts_of_data(stored: StoredModel, loaded: LoadedModel) -> dict[str, object]:
    facts: dict[str, object] = {"data set": loaded.config.dataset_type}
    if "num_examples" in stored.data:
        facts["examples"] = f"{stored.data['num_examples']:,}"
    if loaded.config.is_conditional:
        names = ", ".join(loaded.class_names[:MOST_NAMES])
        more = ", ..." if len(loaded.class_names) > MOST_NAMES else ""
        facts["classes"] = f"{loaded.num_classes}" + (f": {names}{more}" if names else "")
    return facts


def _facts_of_training(stored: StoredModel, config: Config) -> dict[str, object]:
    facts: dict[str, object] = {
        "steps": f"{stored.finished_steps:,} of {config.total_steps:,}, "
        f"{config.batch_size:,} samples each",
        "optimizer": f"{config.optimizer}, learning rate {config.learning_rate:g}, betas "
        f"{config.betas[0]:g} and {config.betas[1]:g}, weight decay {config.weight_decay:g}",
        "weights": f"averaged, {stored.average or f'decay {config.ema_decay_rate:g}'}"
        + (f" every {config.ema_every_steps} steps" if config.ema_every_steps != 1 else ""),
        "guidance": f"scale {config.cfg_scale:g}, mix {config.mix_ratio:g}, labels dropped "
        f"{config.cfg_drop_rate:g}; trained in, there is none to choose"
        if config.cfg_scale > 1
        else "none",
        "seed": config.seed,
    }
    if origin := stored.started_from:
        facts["started from"] = (
            f"{origin['source']} after {origin['finished_steps']:,} steps, file's SHA-256 "
            f"{origin['file_sha256']}; {origin['copied']} tensors copied, {len(origin['new'])} new"
        )
    made = read_record(stored.path.with_suffix(".json")) if stored.path.suffix == ".pt" else {}
    known = {"code": "code_version", "torch": "torch", "device": "device", "processes": "processes"}
    return facts | {name: made[key] for name, key in known.items() if key in made}


def _scores(stored: StoredModel, weights_sha256: str) -> str:
    """Tables of scores of these very weights, one for each way in which they were measured."""
    run = run_of_checkpoint(stored.path)
    found = sorted(_records_of(run / "evals", stored, weights_sha256), key=_protocol) if run else []
    if not found:
        return "None of these weights is in the run's records."
    return "\n\n".join(_scores_by(*group) for group in itertools.groupby(found, key=_protocol))


def _records_of(folder: Path, stored: StoredModel, weights_sha256: str) -> Iterator[dict[str, Any]]:
    """The records of samples that these weights made, with how they were made."""
    for name, record in read_records(folder).items():
        made = read_record((folder / name).with_suffix(".json"))
        is_of_step = record.get("step") == stored.finished_steps
        if is_of_step and made.get("weights_sha256", weights_sha256) == weights_sha256:
            yield {**record, "sampler": made.get("sampler", "renoise")}


def _protocol(record: Mapping[str, Any]) -> str:
    """By what scores were measured, in words; those of the same can be compared."""
    reference, graph = (record.get(key) or {} for key in ("reference", "graph"))
    versions = record.get("versions") or {}
    return (
        f"Measured by evaluator.py of soflow {versions.get('soflow', '?')} with TensorFlow "
        f"{versions.get('tensorflow', '?')} and the graph {_named(graph)}, against the reference "
        f"{_named(reference)} of {reference.get('num_images', '?')} images; prec and recall by "
        f"{record.get('distances', 'exact')} distances."
    )


def _named(file: Mapping[str, Any]) -> str:
    """A file by its name, not its place, and by its digest."""
    return f"{Path(str(file.get('name', '?'))).name} (SHA-256 {file.get('sha256', 'unknown')})"


def _scores_by(protocol: str, records: Iterator[dict[str, Any]]) -> str:
    rows = sorted(records, key=lambda one: (one["sampler"], one.get("NFE") or 0, one["file"]))
    columns = [column for column in COLUMNS if any(column in row["scores"] for row in rows)]
    lines = [
        ["steps", "sampler", "N images", *columns],
        ["---"] * (3 + len(columns)),
        *(
            [row.get("NFE", "?"), row["sampler"], f"{row.get('num_images', 0):,}"]
            + [f"{row['scores'][c]:.4g}" if c in row["scores"] else "" for c in columns]
            for row in rows
        ),
    ]
    notes = dict.fromkeys(note for row in rows for note in row.get("notes", []))
    table = "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
    return "\n\n".join([table, " ".join([protocol, *(f"{note}." for note in notes)])])


def lacks_licence(card: Path) -> bool:
    """Whether nobody has filled in the licence of a card that is there."""
    try:
        return f"\nlicense: {LICENCE}" in card.read_text(errors="replace")
    except OSError:
        return False
