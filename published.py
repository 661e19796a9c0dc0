"""A config in the words of the published code, for going on there with what was begun here."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from config import FIELDS, PUBLISHED_KEYS, Config, resolve, shorten
from support.data.datasets import DATASETS, count_classes
from support.system.files import UserError, atomic_write

# For these keys it knows no other values.
VALUES = {
    "model_type": ("DiT-B-4", "DiT-B-2", "DiT-M-2", "DiT-L-2", "DiT-XL-2", "UNet"),
    "dataset_type": ("Imagenet", "CIFAR10"),
}
# Keys of ours that change neither training nor images, or their number alone: these are left out.
DISPENSABLE = frozenset(
    {
        "accumulation_steps", "activation_checkpointing", "channels_last", "compile", "device",
        "ema_decay_rates", "ema_power", "ema_snapshot_steps", "eval_num_samples", "held_out_steps",
        "keep_every_steps", "keep_last", "log_to", "precision", "timeout_minutes", "vae",
        "vae_batch_size",
    }
)  # fmt: skip


def published_values(config: Config) -> dict[str, Any]:
    """The keys that the published code knows, with values that it takes.

    It divides by the numbers of steps, so that what never happens here is due after the end there;
    it needs a loader worker. UserError names what it has no word for.
    """
    refused = [
        f"{key} {shorten(getattr(config, key))} (there: {', '.join(known)})"
        for key, known in VALUES.items()
        if getattr(config, key) not in known
    ]
    refused += [
        f"{key} {shorten(value)} (there always {shorten(usual)})"
        for key, (value, usual) in _unusual(config).items()
        if key not in DISPENSABLE
    ]
    if refused:
        raise UserError(f"the published code has no word for: {'; '.join(refused)}")
    values = {key: value for key, value in config.to_dict().items() if key in PUBLISHED_KEYS}
    if not config.dataset_path:
        del values["dataset_path"]
    never = config.total_steps + 1
    instead = {
        "eval_steps": never,
        "eval_demo_steps": never,
        "logging_steps": never,
        "ckpt_saving_steps": config.total_steps,  # the last step is saved here
        "num_workers": 1,
        "prefetch_factor": 2,  # torch's own default
    }
    return {key: value or instead.get(key, value) for key, value in values.items()}


def save_published_config(config: Config, path: Path) -> list[str]:
    """Write it; returns a line on the file and one on what it leaves out, if anything.

    UserError where the config asks for what the published code cannot do, or `path` is there.
    """
    known = DATASETS[config.dataset_type].num_classes
    if config.is_latent and (count := count_classes(config.data_request())) != known:
        raise UserError(
            f"{config.dataset_path}: latents of {count} classes; the published code takes them for "
            f"{known:,}"
        )
    values = published_values(config)
    if path.exists():
        raise UserError(f"{path}: is there already; name another file")
    with atomic_write(path) as file:
        file.write(yaml.safe_dump(values, sort_keys=False, default_flow_style=None).encode())
    lines = [f"{path}: {len(values)} keys, which the published code knows"]
    left_out = [
        f"{key} {shorten(value)} (there {shorten(usual)})"
        for key, (value, usual) in _unusual(config).items()
        if key in DISPENSABLE
    ]
    if left_out:
        lines.append(f"left out, as it has no word for them: {', '.join(left_out)}")
    return lines


def _unusual(config: Config) -> Mapping[str, tuple[Any, Any]]:
    """The keys of ours that ask for other than the published code does; that comes second."""
    ours = [key for key in FIELDS if key not in PUBLISHED_KEYS]
    silent = {key: FIELDS[key].default for key in ours}
    usual = resolve(config.model_copy(update=silent))
    pairs = {key: (getattr(config, key), getattr(usual, key)) for key in ours}
    return {key: pair for key, pair in pairs.items() if (pair[0] or None) != (pair[1] or None)}
