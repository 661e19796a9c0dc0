"""The held-out loss: the errors of both losses on images that no step trains on.

Images, noise, labels and times are drawn once, from the seed, and stay the same for the whole run:
a number changes only because the network does. The numbers are raw squared errors in four bins of
t. With p = 1 the weighted losses are near one by construction, and the losses of training move with
the gap fraction. Here the gap fraction is the schedule's last, l_end_ratio.
"""

import torch
from torch import Tensor

from config import Config
from models import Batch, Method
from support.data.datasets import TrainingData
from support.system.processes import Processes
from support.system.randomness import generator

BINS = 4  # of t, from 0 to 1

# N held-out images, B of them at a time


def draw_held_out(config: Config, data: TrainingData, processes: Processes) -> list[Batch]:
    """This process's share of the held-out images. The draws do not depend on the process."""
    count = len(data)
    order = torch.randperm(count, generator=generator(config.seed, "held-out times"))
    mine = range(processes.rank, count, processes.world_size)
    size = config.eval_batch_size
    return [
        _freeze(config, data, order, mine[start : start + size], processes.device)
        for start in range(0, len(mine), size)
    ]


def _freeze(
    config: Config, data: TrainingData, order: Tensor, images: range, device: torch.device
) -> Batch:
    """The same images for both losses; each image draws from its own generator."""
    raw = data[list(images)]
    x_0, x_1, drawn_t, drawn_s = [], [], [], []
    for place, image in enumerate(images):
        source = generator(config.seed, "held-out image", image)
        x_0.append(data.clean(raw.stored[place : place + 1], source))
        x_1.append(torch.randn(x_0[-1].shape, generator=source))
        # Stratified: one t in each of N equal intervals, so that the bins are equally full.
        drawn_t.append((order[image] + torch.rand((), generator=source)) / len(data))
        drawn_s.append(drawn_t[-1] * torch.rand((), generator=source))
    t, s = torch.stack(drawn_t), torch.stack(drawn_s)
    l = t + (s - t) * config.l_end_ratio  # noqa: E741
    return Batch(
        x_0=torch.cat(2 * x_0).to(device),
        x_1=torch.cat(2 * x_1).to(device),
        t=torch.cat([t, t]).to(device),
        l=torch.cat([t, l]).to(device),
        s=torch.cat([t, s]).to(device),
        labels=torch.cat(2 * [raw.labels]).to(device) if config.is_conditional else None,
        flow_matching_rows=len(images),
        global_flow_matching_count=len(images),
        global_consistency_count=len(images),
    )


@torch.no_grad()
def measure(model: Method, frozen: list[Batch], processes: Processes) -> dict[str, list[float]]:
    """The mean squared error of each loss in each bin of t; all processes must call this.

    Draws nothing and leaves the model as it was, so training is not affected.
    """
    was_training = model.training
    sums = _sums(model.eval(), frozen, processes.device)
    model.train(was_training)
    counts = processes.sum_over_ranks(sums.pop("count"))
    return {
        name: (processes.sum_over_ranks(values) / counts).tolist() for name, values in sums.items()
    }


def _sums(model: Method, frozen: list[Batch], device: torch.device) -> dict[str, Tensor]:
    """[BINS] sums of each loss's squared errors, and their number as `count`."""
    totals = {name: torch.zeros(BINS, device=device) for name in ("count", *model.error_names)}
    for batch in frozen:
        bins = (batch.t[: batch.flow_matching_rows] * BINS).long().clamp(max=BINS - 1)
        errors = model.squared_errors(batch) | {"count": torch.ones(len(bins), device=device)}
        for name, values in errors.items():
            totals[name].index_add_(0, bins, values.float())
    return totals
