"""The averaged weights against a plain loop."""

import copy
import math

import torch
from torch import nn

from config import Config, resolve
from support.runs.averages import Average
from support.runs.optimizers import build_optimizer


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def test_the_average_equals_a_plain_loop_and_buffers_are_copied():
    for every, steps in ((1, 10), (16, 40)):
        model = small_model()
        average = copy.deepcopy(model)
        expected = [p.detach().double() for p in average.parameters()]
        decay, moved = 0.99, []
        ema = Average(average, model, decay, every)
        source = torch.Generator().manual_seed(1)
        for step in range(1, steps + 1):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn(parameter.shape, generator=source))
            model[1].running_mean += 1
            before = average[1].running_mean.clone()
            ema.follow(step)
            if not torch.equal(average[1].running_mean, before):
                moved.append(step)
                expected = [
                    decay**every * old + (1 - decay**every) * new.detach().double()
                    for old, new in zip(expected, model.parameters(), strict=True)
                ]
        for found, wanted in zip(average.parameters(), expected, strict=True):
            assert found.dtype == torch.float32
            assert torch.allclose(found.double(), wanted, rtol=1e-5, atol=1e-6)
        assert moved == [*range(1, steps + 1, every)]
        assert average[1].running_mean[0] == moved[-1]
        assert average[1].num_batches_tracked.dtype == torch.int64


def test_radam_and_a_sixteen_step_average_equal_a_plain_loop_over_forty_steps():
    """CIFAR-10's recipe, against Liu et al. (arXiv 1908.03265, algorithm 2) written out."""
    config = resolve(Config(working_dir="x", dataset_type="CIFAR10", model_type="UNet"))
    model = small_model()
    average = copy.deepcopy(model)
    optimizer = build_optimizer(
        config.optimizer, model, config.learning_rate, config.betas, config.weight_decay
    )
    ema = Average(average, model, config.ema_decay_rate, config.ema_every_steps)
    parameters = [p.detach().double() for p in model.parameters()]
    averages = [p.clone() for p in parameters]
    first = [torch.zeros_like(p) for p in parameters]
    second = [torch.zeros_like(p) for p in parameters]
    (beta_1, beta_2), decay = config.betas, config.ema_decay_rate
    longest = 2 / (1 - beta_2) - 1
    source = torch.Generator().manual_seed(0)
    for step in range(1, 41):
        for index, parameter in enumerate(model.parameters()):
            parameter.grad = torch.randn(parameter.shape, generator=source)
            gradient = parameter.grad.double()
            first[index] = beta_1 * first[index] + (1 - beta_1) * gradient
            second[index] = beta_2 * second[index] + (1 - beta_2) * gradient**2
            mean = first[index] / (1 - beta_1**step)
            length = longest - 2 * step * beta_2**step / (1 - beta_2**step)
            if length > 5:
                rectified = math.sqrt(
                    (length - 4) * (length - 2) * longest
                    / ((longest - 4) * (longest - 2) * length)
                )  # fmt: skip
                spread = second[index].sqrt() + 1e-8
                mean = rectified * math.sqrt(1 - beta_2**step) * mean / spread
            parameters[index] = parameters[index] - config.learning_rate * mean
        optimizer.step()
        ema.follow(step)
        if step in (1, 17, 33):
            averages = [
                decay**16 * old + (1 - decay**16) * new
                for old, new in zip(averages, parameters, strict=True)
            ]
    for found, wanted in ((model, parameters), (average, averages)):
        for tensor, expected in zip(found.parameters(), wanted, strict=True):
            assert torch.allclose(tensor.double(), expected, rtol=1e-6, atol=1e-7)
    moved = [(new - old).abs().max() for new, old in zip(parameters, averages, strict=True)]
    assert min(moved) > 1e-4
