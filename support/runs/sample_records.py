"""When samples may replace samples: only if their records describe the same images."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from support.scores.table import read_record
from support.system.files import UserError, shorten

# Entries of a record, or of the config in it, that determine the images up to rounding.
DECISIVE = (
    *("weights_sha256", "noising_type", "coefficient_type", "model_type", "dataset_type"),
    *("num_images", "NFE", "times", "sampler", "seed", "labels", "noise_stream"),
    *("vae", "vae_revision", "vae_sha256", "latent_scale"),
)
DECISIVE_IN_REFERENCE_STREAM = ("eval_batch_size", "processes", "device")


def refuse_other_samples(output: Path, record: Mapping[str, Any]) -> None:
    """UserError if `output` holds other samples than `record` describes, or unknown ones."""
    beside = output.with_suffix(".json")
    way_out = "choose another --output FILE, or add --overwrite"
    there = read_record(beside)
    if not isinstance(there.get("config"), dict):
        for path in (output, beside):
            if path.exists():
                raise UserError(f"{path}: exists, and no record describes its samples; {way_out}")
        return
    if not output.exists():
        return  # a kill left the record alone
    before, now = _decisive(there), _decisive(record)
    # The same VAE may be a name here and a folder there. Older records have no digest.
    has_digests = before["vae_sha256"] and now["vae_sha256"]
    ignored = ("vae", "vae_revision") if has_digests else ("vae_sha256",)
    differing = [
        f"{key} {shorten(before.get(key))} there, {shorten(now.get(key))} requested"
        for key in before | now
        if key not in ignored and before.get(key) != now.get(key)
    ]
    if differing:
        raise UserError(f"{output}: holds other samples: {'; '.join(differing)}; {way_out}")


def _decisive(record: Mapping[str, Any]) -> dict[str, Any]:
    known = {**record["config"], **record}
    is_reference = known.get("noise_stream") == "reference"
    keys = DECISIVE + (DECISIVE_IN_REFERENCE_STREAM if is_reference else ())
    return {key: known.get(key) for key in keys}
