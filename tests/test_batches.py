"""Every sample of a batch is used once, in an order that any step can be continued from."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loading import batches_of

from config import config_from_dict
from support.data.batches import BatchPlan, DataOrder, microbatch_indices
from support.data.datasets import PixelData
from support.system.files import UserError


def all_parts(plan):
    return [
        (list(plan.first_samples(microbatch)), list(plan.other_samples(microbatch)))
        for rank in range(plan.world_size)
        for microbatch in plan.microbatches_of(rank)
    ]


# How a global batch is cut.


@given(
    st.integers(1, 9), st.integers(1, 5), st.integers(1, 5), st.floats(0, 1, allow_subnormal=False)
)
def test_parts_are_equal_and_take_every_sample_once(part_size, world_size, accumulation, share):
    batch_size = part_size * world_size * accumulation
    count = int(share * batch_size)
    microbatches = all_parts(BatchPlan(batch_size, count, world_size, accumulation))
    assert {len(first) + len(other) for first, other in microbatches} == {part_size}
    assert [place for first, _ in microbatches for place in first] == list(range(count))
    others = [place for _, other in microbatches for place in other]
    assert others == list(range(count, batch_size))
    sizes = [len(first) for first, _ in microbatches]
    assert max(sizes) - min(sizes) <= 1


def test_processes_and_accumulation_cut_the_same_parts():
    plans = [BatchPlan(24, 18, *cut) for cut in ((6, 1), (1, 6), (2, 3), (3, 2))]
    assert [all_parts(plan) for plan in plans[1:]] == [all_parts(plans[0])] * 3


def test_plan_is_said_in_one_line():
    assert str(BatchPlan(256, 192, 2, 2)) == "256 = 2 processes x 64 x 2 accumulation"
    assert str(BatchPlan(256, 192, 1, 1)) == "256 = 1 process x 256 x 1 accumulation"


def test_batch_that_cannot_be_cut_is_refused_by_its_key():
    with pytest.raises(UserError, match=r"batch_size: 10 .* 2 .*accumulation_steps = 4"):
        BatchPlan(10, 5, 2, 2)


# In which order the examples come.


def epoch_of(order, epoch):
    first = epoch * order.steps_per_epoch
    return torch.cat([order.global_batch(first + step) for step in range(order.steps_per_epoch)])


def test_every_epoch_is_a_part_of_a_new_permutation():
    order = DataOrder(num_examples=103, batch_size=10, seed=1)
    epochs = [epoch_of(order, epoch).tolist() for epoch in range(4)]
    for examples in epochs:
        assert len(set(examples)) == len(examples) == 100
        assert set(examples) <= set(range(103))
    assert len(set(map(tuple, epochs))) == 4
    assert len({frozenset(examples) for examples in epochs}) > 1, "the dropped ones change, too"
    other_seed = DataOrder(num_examples=103, batch_size=10, seed=2)
    assert epoch_of(other_seed, 0).tolist() != epochs[0]


def test_order_of_a_step_does_not_depend_on_the_steps_before_it():
    order = DataOrder(num_examples=23, batch_size=5, seed=1)
    in_turn = [order.global_batch(step).tolist() for step in range(12)]
    for step in (11, 3, 8, 0, 4):
        assert order.global_batch(step).tolist() == in_turn[step]
        assert DataOrder(23, 5, 1).global_batch(step).tolist() == in_turn[step]


def test_order_is_the_same_for_ever():
    order = DataOrder(num_examples=10, batch_size=5, seed=42)
    assert order.global_batch(0).tolist() == [6, 2, 8, 1, 3]


def test_samples_of_the_first_kind_come_first_in_each_microbatch():
    order, plan = DataOrder(60, 8, 1), BatchPlan(8, 6, 2, 1)
    batch = order.global_batch(0).tolist()
    first, second = (next(microbatch_indices(order, plan, rank, range(1))) for rank in (0, 1))
    assert first == [*batch[:3], batch[6]]
    assert second == [*batch[3:6], batch[7]]


# Loading.


def numbered_data(count=40):
    pixels = torch.arange(count, dtype=torch.uint8)[:, None, None, None].expand(-1, 1, 2, 2)
    return PixelData(pixels, torch.arange(count) % 3, ("a", "b", "c"))


def loader_of(data, num_workers, start_step=0, rank=0):
    values = {"working_dir": "x", "batch_size": 8, "total_steps": 12, "prefetch_factor": 2}
    config = config_from_dict({**values, "num_workers": num_workers}, "test")
    return batches_of(config, data, BatchPlan(8, 6, 2, 1), rank, start_step)


def test_workers_give_the_batches_that_none_give():
    data = numbered_data()
    alone, helped = (list(loader_of(data, count)) for count in (0, 2))
    assert len(alone) == len(helped) == 12
    for one, other in zip(alone, helped, strict=True):
        assert all(map(torch.equal, one, other))
    batch = DataOrder(40, 8, 42).global_batch(7)
    assert alone[7].stored[:, 0, 0, 0].tolist() == batch[[0, 1, 2, 6]].tolist()
    assert alone[7].labels.tolist() == (batch[[0, 1, 2, 6]] % 3).tolist()


def test_loader_goes_on_from_any_step_and_draws_from_nobody():
    data = numbered_data()
    state = torch.get_rng_state()
    whole, tail = list(loader_of(data, 2)), list(loader_of(data, 2, start_step=7))
    assert torch.equal(torch.get_rng_state(), state)
    for one, other in zip(tail, whole[7:], strict=True):
        assert torch.equal(one.stored, other.stored)
