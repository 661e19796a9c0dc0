"""The draws of a step: each depends on (seed, purpose, step, microbatch) alone."""

import pytest
import torch

from augmentation import draw_augmentation
from config import Config, resolve
from models import Batch
from support.data.batches import BatchPlan
from support.data.datasets import PixelData
from support.system.randomness import generator
from training.draws import draw_batch

CPU = torch.device("cpu")
PLAN = BatchPlan(batch_size=16, first_count=10, world_size=1, accumulation_steps=1)


def config(**values) -> Config:
    given = {"dataset_type": "CIFAR10", "cfg_scale": 2.0, "cfg_drop_rate": 0.5, **values}
    return resolve(Config(working_dir="x", **given))


def draw(drawn_config: Config, step: int = 0, microbatch: int = 0, plan: BatchPlan = PLAN) -> Batch:
    source = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (16, 3, 32, 32), generator=source, dtype=torch.uint8)
    data = PixelData(pixels, torch.arange(16) % 10, tuple("0123456789"))
    return draw_batch(drawn_config, plan, data, data[list(range(16))], step, microbatch, CPU)


def tensors(batch: Batch) -> dict[str, torch.Tensor]:
    """The tensors of a batch, by name."""
    return {name: value for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}


def test_the_same_step_is_drawn_the_same_and_nothing_global_moves():
    before = torch.get_rng_state()
    one, other = tensors(draw(config())), tensors(draw(config()))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "other",
    [{"step": 1}, {"microbatch": 1}, {"drawn_config": config(seed=1)}],
    ids=["step", "microbatch", "seed"],
)
def test_another_step_microbatch_or_seed_has_other_draws(other):
    plan = BatchPlan(32, 20, 2, 1)
    one, two = (draw(**{"drawn_config": config(), "plan": plan, **more}) for more in ({}, other))
    for name in ("x_1", "null_mask", "t", "l", "s"):
        assert not torch.equal(tensors(one)[name], tensors(two)[name]), name
    assert torch.equal(one.x_0, two.x_0)
    assert len({*one.dropout_seeds, *two.dropout_seeds}) == 4


def test_the_first_samples_are_for_flow_matching_and_the_counts_are_global():
    batch = draw(config())
    assert batch.flow_matching_rows == 10
    vel, con = batch.parts()
    assert torch.equal(vel.t, vel.l)
    assert torch.equal(vel.t, vel.s)
    assert (len(con.x_0), (con.s <= con.l).all(), (con.l < con.t).all()) == (6, True, True)
    assert (batch.global_flow_matching_count, batch.global_consistency_count) == (10, 6)
    assert batch.labels.tolist() == [index % 10 for index in range(16)]


def test_gap_of_the_times_follows_the_schedule():
    def ratio(step: int) -> torch.Tensor:
        _, times = draw(config(total_steps=100, l_schedule="Exponent"), step=step).parts()
        return ((times.t - times.l) / (times.t - times.s)).median()

    assert ratio(0) == pytest.approx(0.1, rel=1e-3)
    assert ratio(99) == pytest.approx(0.1 * 0.02**0.99, rel=0.02)


def test_each_time_has_its_own_mean_and_is_drawn_for_itself():
    """With hardly any spread, the times are the sigmoids of their means: t, then s, then t."""
    means = (2.0, -3.0, 1.0)
    narrow = draw(config(time_mean=means, time_std=(1e-3, 1e-3, 1e-3), l_schedule="Const"))
    t, s, later_t = (torch.sigmoid(torch.tensor(mean)) for mean in means)
    vel, con = narrow.parts()
    assert torch.allclose(vel.t, t, atol=1e-3)
    assert torch.allclose(con.s, s, atol=1e-3)
    assert torch.allclose(con.t, later_t, atol=1e-3)
    _, wide = draw(config(time_mean=(0.0, -9.0, 0.0), time_std=(1.0, 1.0, 1.0))).parts()
    ranks = [torch.argsort(torch.argsort(time)).tolist() for time in (wide.t, wide.s)]
    assert ranks[0] != ranks[1]


def test_a_unet_on_cifar_gets_augmented_images_and_what_was_done_to_them():
    plain = config(model_type="UNet", cfg_scale=1.0, cfg_drop_rate=0.0)
    assert plain.augment_probability == 0.12
    batch = draw(plain.model_copy(update={"augment_probability": 1.0}))
    assert batch.labels is batch.null_mask is None
    # Flip and scale are drawn for all at probability 1: the labels say by how much.
    source = generator(plain.seed, "augmentation", 0, 0)
    parameters = draw_augmentation(16, 1.0, source)
    assert torch.equal(batch.augment_labels, parameters.labels)
    assert parameters.labels.abs().sum() > 1
    untouched = draw(plain.model_copy(update={"augment_probability": 0.0}))
    assert untouched.augment_labels is None
    assert not torch.allclose(batch.x_0, untouched.x_0, atol=0.1)


def test_half_the_pictures_are_flipped_on_request_and_nothing_else_changes():
    folder = {"dataset_type": "ImageFolder", "augment_probability": 0.0}
    plain, flipped = (draw(config(horizontal_flips=on, **folder)) for on in (False, True))
    x_0, mirrored = (batch.x_0 for batch in (plain, flipped))
    is_flipped = (mirrored == x_0.flip(-1)).flatten(1).all(dim=1)
    assert torch.equal(mirrored, torch.where(is_flipped[:, None, None, None], x_0.flip(-1), x_0))
    assert 0 < is_flipped.sum() < len(x_0)
    later = draw(config(horizontal_flips=True, **folder), step=1)
    assert not torch.equal(later.x_0, flipped.x_0)
    for name, value in tensors(plain).items():
        assert name.endswith("x_0") or torch.equal(value, tensors(flipped)[name]), name
