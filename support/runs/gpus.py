"""GPUs that are not here: what they can do, by their maker or as benchmarks/gpu.py measured."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from support.system.files import UserError
from support.system.settings import suggest

# What training gets of a peak, assumed. The PaLM paper (arXiv 2204.02311, table 3) lists 21 % to
# 46 % for language models in bfloat16. Without tensor cores the peak is nearer.
SHARE_OF_PEAK = {"tf32": 0.35, "bf16": 0.35, "fp32": 0.6}


@dataclass(frozen=True)
class Gpu:
    """A GPU by its maker's figures: dense peaks, without sparsity, and links each way."""

    title: str
    tflops: Mapping[str, float]  # by precision; fp32 stands in for one that it lacks
    memory_bytes: float
    bandwidth: float  # of its memory, bytes a second
    link: str
    link_bandwidth: float  # bytes a second, each way, to the others of its machine

    def arithmetic_seconds(self, flops: Mapping[str, float]) -> float:
        """Seconds for so many FLOPs in each precision."""
        seconds = 0.0
        for name, count in flops.items():
            used = self.precision_for(name)
            seconds += count / (self.tflops[used] * 1e12 * SHARE_OF_PEAK[used])
        return seconds

    def precision_for(self, name: str) -> str:
        """What it computes in where that precision is asked for."""
        return name if name in self.tflops else "fp32"


# NVIDIA's figures as others repeat them; its data sheets themselves were not at hand. Those with
# sparsity are halved; of the GeForce bf16 is with fp32 accumulation. Not found anywhere, and from
# memory: the GeForce's tf32, the H200's bandwidth, the V100's link.
GPUS = {
    "v100": Gpu("Tesla V100 SXM2 32 GB", {"fp32": 15.7}, 32e9, 900e9, "NVLink", 150e9),
    "a100": Gpu(
        "A100 SXM 80 GB",
        {"tf32": 156, "bf16": 312, "fp32": 19.5}, 80e9, 2039e9, "NVLink", 300e9,
    ),
    "h100": Gpu(
        "H100 SXM 80 GB",
        {"tf32": 494, "bf16": 989, "fp32": 67}, 80e9, 3350e9, "NVLink", 450e9,
    ),
    "h200": Gpu(
        "H200 SXM 141 GB",
        {"tf32": 494, "bf16": 989, "fp32": 67}, 141e9, 4800e9, "NVLink", 450e9,
    ),
    "b200": Gpu(
        "B200 180 GB (HGX)",
        {"tf32": 1100, "bf16": 2250, "fp32": 80}, 180e9, 8000e9, "NVLink", 900e9,
    ),
    "l40s": Gpu(
        "L40S 48 GB",
        {"tf32": 183, "bf16": 362, "fp32": 91.6}, 48e9, 864e9, "PCIe 4", 32e9,
    ),
    "rtx4090": Gpu(
        "GeForce RTX 4090 24 GB",
        {"tf32": 82.6, "bf16": 165.2, "fp32": 82.6}, 24e9, 1008e9, "PCIe 4", 32e9,
    ),
}  # fmt: skip


# What has been measured


@dataclass(frozen=True)
class Measurements:
    """What benchmarks/gpu.py has measured on a GPU."""

    source: str
    device: str
    values: Mapping[tuple[str, str], float]  # by section and name

    def step_seconds(self, precision: str, compiled: bool) -> dict[str, float]:
        """Seconds a step takes for an image, by model_type."""
        ending = f" {precision}" + " compiled" * compiled
        return {
            name.removesuffix(ending): value
            for (section, name), value in self.values.items()
            if section == "step" and name.endswith(ending)
        }


def find_gpu(asked: str) -> tuple[Gpu, Measurements | None]:
    """The GPU of that name, or the one that a JSON file of benchmarks/gpu.py was made on."""
    if asked.lower() in GPUS:
        return GPUS[asked.lower()], None
    if not asked.endswith(".json"):
        raise UserError(
            f"--gpu {asked}: is not one of {', '.join(GPUS)}, nor the .json file that "
            f"benchmarks/gpu.py writes{suggest(asked, GPUS)}"
        )
    measured = read_measurements(asked)
    named = measured.device.lower().replace(" ", "").replace("-", "")
    for name, gpu in GPUS.items():
        if name in named:
            return gpu, measured
    raise UserError(
        f"--gpu {asked}: was measured on {measured.device!r}, whose memory and links are not known "
        f"here; known are {', '.join(GPUS)}"
    )


def read_measurements(path: str) -> Measurements:
    """The numbers in a file that benchmarks/gpu.py has written; what failed there is left out."""
    try:
        content = json.loads(Path(path).expanduser().read_text())
        rows = {(row["section"], row["name"]): row["value"] for row in content["rows"]}
        device = str(content["device"])
    except OSError as error:
        raise UserError(f"--gpu {path}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(
            f"--gpu {path}: is not a file that benchmarks/gpu.py has written: it has no device and "
            "rows of section, name and value"
        ) from None
    values = {
        (str(section), str(name)): float(value)
        for (section, name), value in rows.items()
        if isinstance(value, int | float) and 0 < value < math.inf
    }
    return Measurements(path, device, values)
