"""The model card of an exported folder: Markdown after a head of YAML entries.

It is written from the model's records. Whatever a person wrote into it stays when it is written
again: config.json holds the digest of each part as it was written, so changed parts are known.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from support.runs.stored import StoredModel
from support.scores.table import COLUMNS

MOST_NAMES = 100  # of classes; config.json has them all
UNKNOWN_LICENCE = "license: unknown  # to be filled in"
HUB_DATA_SETS = {
    "Imagenet": "ILSVRC/imagenet-1k",
    "CIFAR10": "uoft-cs/cifar10",
    "FashionMNIST": "zalando-datasets/fashion_mnist",
}


class Facts(NamedTuple):
    """What a card tells beyond the records."""

    title: str
    model: Mapping[str, str]  # rows on the network, the images and the method
    num_classes: int  # 0 if the model takes none
    labels: Sequence[int | str]  # three, as an example; none without classes
    files: Mapping[str, str]  # what each file of the folder is


class Card(NamedTuple):
    """A card's parts by name: the entries of its head, and its sections in their order."""

    entries: dict[str, str]
    sections: dict[str, str]

    def digests(self) -> dict[str, str]:
        parts = self.entries | self.sections
        return {name: _digest(text) for name, text in parts.items()}

    def text(self) -> str:
        head, body = "\n".join(self.entries.values()), "\n\n".join(self.sections.values())
        return f"---\n{head}\n---\n\n{body}\n"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="replace")).hexdigest()[:16]


def split_card(text: str) -> Card:
    """The parts of a card's text."""
    head = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    body = text[head.end() :] if head else text
    entries = re.split(r"^(?=[\w-]+:)", head[1] if head else "", flags=re.MULTILINE)
    sections = re.split(r"^(?=## )", body, flags=re.MULTILINE)
    return Card(_by_name(entries, r"[\w-]+"), _by_name(sections, "## .*"))


def _by_name(parts: Iterable[str], name: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for text in filter(str.strip, parts):
        title = start[0] if (start := re.match(name, text)) else ""
        while title in found:  # a heading that is there twice
            title += "'"
        found[title] = text.strip("\n")
    return found


def keep_written(new: Card, old: Card, digests: Mapping[str, str]) -> tuple[Card, list[str]]:
    """The new card with all parts of the old one that a person wrote or changed; their names.

    `digests` are those of the parts that were written before.
    """
    kept = [
        {name: text for name, text in parts.items() if _digest(text) != digests.get(name)}
        for parts in old
    ]
    return Card(new.entries | kept[0], new.sections | kept[1]), [*kept[0], *kept[1]]


def lacks_licence(text: str) -> bool:
    """Whether nobody has filled in the licence of this card."""
    return f"\n{UNKNOWN_LICENCE}" in text


# Writing


def write_card(stored: StoredModel, facts: Facts, further_entries: str) -> Card:
    """The card of a model; `further_entries` are YAML lines for its head."""
    data_set = HUB_DATA_SETS.get(stored.config["dataset_type"])
    head = f"""---
{UNKNOWN_LICENCE}
library_name: soflow
pipeline_tag: unconditional-image-generation
tags: [image-generation, one-step, soflow]
{f"datasets: [{data_set}]" if data_set else ""}
{further_entries}
---
"""
    picture = "![Samples](samples.png)\n\n" if "samples.png" in facts.files else ""
    labels = f"labels={facts.labels}, " if facts.labels else ""
    body = f"""# {facts.title}

{picture}Makes images in one step or a few: a Solution Flow Model (arXiv 2512.15657).

## Use

In the folder of the code, or with it on Python's path:

```python
from sampling import load
model = load("{facts.title}")  # this folder, or its name on the hub
images = model.sample({labels}seeds=[0, 1, 2], steps=1)
```

## Model

{_table(facts.model)}

## Data

{_table(_facts_of_data(stored, facts.num_classes))}

## Training

{_table(_facts_of_training(stored))}

## Scores

{_scores(stored.scores)}

## Files

{_table({f"`{name}`": what for name, what in facts.files.items()})}

## Licence

To be filled in by the publisher of the model, here and at the head. Mind the terms of the data.
"""
    return split_card(head + body)


def _table(facts: Mapping[str, object]) -> str:
    return "\n".join(["| | |", "| --- | --- |", *(f"| {k} | {v} |" for k, v in facts.items())])


def _facts_of_data(stored: StoredModel, num_classes: int) -> dict[str, object]:
    rows: dict[str, object] = {"data set": stored.config["dataset_type"]}
    if "num_examples" in stored.data:
        rows["examples"] = f"{stored.data['num_examples']:,}"
    if stored.data.get("vae_sha256"):
        rows["latents made by"] = f"{stored.data.get('vae')} (SHA-256 {stored.data['vae_sha256']})"
    if num_classes:
        names = list(stored.data.get("class_names", ()))
        more = ["..."] if len(names) > MOST_NAMES else []
        listed = ", ".join(names[:MOST_NAMES] + more)
        rows["classes"] = f"{num_classes}: {listed}" if names else num_classes
    return rows


def _facts_of_training(stored: StoredModel) -> dict[str, object]:
    settings = stored.config
    average = stored.average or f"decay {settings['ema_decay_rate']:g}"
    every = settings["ema_every_steps"]
    guidance = "none"
    if settings["cfg_scale"] > 1:
        guidance = (
            f"scale {settings['cfg_scale']:g}, mix {settings['mix_ratio']:g}, labels dropped "
            f"{settings['cfg_drop_rate']:g}; trained in, so there is none to choose"
        )
    rate, decay = f"{settings['learning_rate']:g}", f"{settings['weight_decay']:g}"
    betas = " and ".join(f"{beta:g}" for beta in settings["betas"])
    rows: dict[str, object] = {
        "steps": f"{stored.finished_steps:,} of {settings['total_steps']:,}, "
        f"{settings['batch_size']:,} samples each",
        "optimizer": f"{settings['optimizer']}, learning rate {rate}, betas {betas}, "
        f"weight decay {decay}",
        "weights": f"averaged, {average}" + (f" every {every} steps" if every != 1 else ""),
        "guidance": guidance,
        "seed": settings["seed"],
    }
    if origin := stored.started_from:
        rows["started from"] = (
            f"{origin['source']} after {origin['finished_steps']:,} steps, file's SHA-256 "
            f"{origin['file_sha256']}; {origin['copied']} tensors copied, {len(origin['new'])} new"
        )
    known = {"code": "code_version", "torch": "torch", "device": "device", "processes": "processes"}
    return rows | {name: stored.made[key] for name, key in known.items() if key in stored.made}


def _scores(records: Sequence[Mapping[str, Any]]) -> str:
    """A table for each way in which scores were measured; only its rows can be compared."""
    tables: dict[str, list[Mapping[str, Any]]] = {}
    for row in sorted(records, key=lambda one: (one["sampler"], one.get("NFE") or 0, one["file"])):
        tables.setdefault(_protocol(row), []).append(row)
    parts = [f"{_score_table(rows)}\n\n{protocol}" for protocol, rows in sorted(tables.items())]
    return "\n\n".join(parts) or "The records have no scores of these weights."


def _protocol(record: Mapping[str, Any]) -> str:
    reference, graph, versions = (record.get(key, {}) for key in ("reference", "graph", "versions"))
    notes = "".join(f" {note}." for note in record.get("notes", ()))
    return (
        f"Measured by evaluator.py of soflow {versions.get('soflow', '?')} with TensorFlow "
        f"{versions.get('tensorflow', '?')} and the graph {_named(graph)}, against the reference "
        f"{_named(reference)} of {reference.get('num_images', '?')} images; prec and recall by "
        f"{record.get('distances', 'exact')} distances.{notes}"
    )


def _named(file: Mapping[str, Any]) -> str:
    return f"{file.get('name', '?')} (SHA-256 {file.get('sha256', 'unknown')})"


def _score_table(rows: Sequence[Mapping[str, Any]]) -> str:
    columns = [column for column in COLUMNS if any(column in row["scores"] for row in rows)]
    lines = [["steps", "sampler", "N images", *columns], ["---"] * (3 + len(columns))]
    for row in rows:
        scores = [f"{row['scores'][c]:.4g}" if c in row["scores"] else "" for c in columns]
        lines.append([f"{row.get('NFE', '?')}", row["sampler"], f"{row['num_images']:,}", *scores])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
