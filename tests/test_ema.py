"""The averaged weights against a plain loop."""

import copy

import torch
from torch import nn

from soflow.ema import is_ema_step, update_ema


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def test_the_average_moves_after_every_step_or_after_1_17_33():
    assert [step for step in range(1, 6) if is_ema_step(step, 1)] == [1, 2, 3, 4, 5]
    assert [step for step in range(1, 50) if is_ema_step(step, 16)] == [1, 17, 33, 49]


def test_the_average_equals_a_plain_loop_and_buffers_are_copied():
    for every, steps in ((1, 10), (16, 40)):
        model = small_model()
        average = copy.deepcopy(model)
        expected = [p.detach().double() for p in average.parameters()]
        decay = 0.99
        source = torch.Generator().manual_seed(1)
        for step in range(1, steps + 1):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn(parameter.shape, generator=source))
            model[1].running_mean += 1
            if step % every == 1 % every:
                update_ema(average, model, decay, every)
                expected = [
                    decay**every * old + (1 - decay**every) * new.detach().double()
                    for old, new in zip(expected, model.parameters(), strict=True)
                ]
        for found, wanted in zip(average.parameters(), expected, strict=True):
            assert found.dtype == torch.float32
            assert torch.allclose(found.double(), wanted, rtol=1e-5, atol=1e-6)
        last_update = max(step for step in range(1, steps + 1) if step % every == 1 % every)
        assert average[1].running_mean[0] == last_update
        assert average[1].num_batches_tracked.dtype == torch.int64
