"""What the processes of test_processes.py do: several of one run, or one alone."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from config import Config, resolve
from models import Batch, build_model
from sampler import SampleRequest, sample_pixels
from support.data.batches import BatchPlan
from support.system.command import run_command
from support.system.processes import Processes, connected
from support.system.randomness import PerImageStream, ReferenceStream
from training.learner import Learner

SHAPE = (1, 8, 8)
CONFIG = resolve(
    Config(
        working_dir="unused", model_type="DiT-Nano-4", dataset_type="Digits", data_size=8,
        batch_size=16, cfg_scale=2.0, mix_ratio=0.5, cfg_drop_rate=0.1,
    )
)  # fmt: skip


def toy_model():
    """A small DiT all of whose weights matter, unlike those of a fresh one."""
    torch.manual_seed(0)
    model = build_model(**CONFIG.model_arguments(data_channels=1, num_classes=10))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def gradients(processes: Processes, batches: list[Batch], plan: BatchPlan) -> dict:
    """Metrics summed over the processes, and the gradients, of this process's batches."""
    learner = Learner(CONFIG, processes, plan, toy_model())
    model = learner.state.model
    with torch.no_grad():
        loss = torch.stack([model(batch).loss for batch in batches]).sum()
    metrics = torch.stack([*learner.accumulate_gradients(iter(batches)).values()])
    return {
        "metrics": processes.sum_over_ranks(torch.cat([metrics, loss[None]])),
        "gradients": [p.grad for p in model.parameters() if p.grad is not None],
    }


def samples(processes: Processes, stream, num_images: int) -> dict:
    """Pixels and labels of a request for two jumps in batches of four."""
    request = SampleRequest(num_images, 4, 2, stream)
    batches = list(sample_pixels(toy_model().eval(), request, processes, decode=lambda x_0: x_0))
    if not processes.is_main:
        return {}
    return {
        "pixels": torch.cat([torch.from_numpy(batch.pixels) for batch in batches]),
        "labels": torch.cat([torch.from_numpy(batch.labels) for batch in batches]),
    }


def reference_stream(processes: Processes) -> ReferenceStream:
    return ReferenceStream(
        42, processes.rank, 10, SHAPE, is_conditional=True, device=processes.device
    )


def main(source: str, target: str) -> None:
    """Work on the parts in `source`; the main process writes what came out to `target`."""
    parts = torch.load(source, weights_only=False)
    with connected("cpu", timeout_minutes=2) as processes:
        torch.set_num_threads(1)
        plan = BatchPlan(16, 10, processes.world_size, len(parts) // processes.world_size)
        found = {
            "gradients": gradients(
                processes, [parts[part] for part in plan.microbatches_of(processes.rank)], plan
            ),
            "per image": samples(processes, PerImageStream(42, 10, SHAPE), 11),
            "reference": samples(processes, reference_stream(processes), 11),
        }
        if processes.is_main:
            torch.save(found, target)


if __name__ == "__main__":
    run_command(lambda: main(*sys.argv[1:]))
