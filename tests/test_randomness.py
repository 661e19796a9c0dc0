"""A draw depends on its seed, purpose and position, and on nothing else."""

import torch

from support.system.randomness import GivenLabels, PerImageStream, derive_seed

SHAPE = (3, 8, 8)


def test_seeds_differ_by_seed_purpose_and_position_and_never_change():
    seeds = {
        derive_seed(*key)
        for key in ((0, "noise"), (1, "noise"), (0, "times"), (0, "noise", 1), (0, "noise", 1, 1))
    }
    assert len(seeds) == 5
    assert all(0 <= seed < 2**63 for seed in seeds)
    # A fixed value: a seed must never change.
    assert derive_seed(42, "noise", 7, 0) == 4_799_446_856_563_491_915


def test_per_image_draws_do_not_depend_on_the_batch():
    stream = PerImageStream(7, 10, SHAPE)
    whole = stream.draw(range(12), num_noises=2)
    pieces = [stream.draw(images, num_noises=2) for images in (range(5), range(5, 6), range(6, 12))]
    assert torch.equal(whole.labels, torch.cat([piece.labels for piece in pieces]))
    for step in range(2):
        assert torch.equal(whole.noises[step], torch.cat([piece.noises[step] for piece in pieces]))
    assert whole.noises[0].shape == (12, *SHAPE)
    assert whole.noises[0].dtype == torch.float32


def test_the_number_of_steps_changes_neither_labels_nor_first_noise_and_the_seed_changes_all():
    one, two = (PerImageStream(7, 10, SHAPE).draw(range(4), steps) for steps in (1, 2))
    assert torch.equal(one.labels, two.labels)
    assert torch.equal(one.noises[0], two.noises[0])
    assert not torch.equal(two.noises[0], two.noises[1])
    other = PerImageStream(8, 10, SHAPE).draw(range(4), 1)
    assert not torch.equal(one.noises[0], other.noises[0])
    assert PerImageStream(7, None, SHAPE).draw(range(4), 1).labels is None


def test_per_image_noise_is_normal_and_labels_are_uniform():
    draws = PerImageStream(0, 10, SHAPE).draw(range(2_000), 1)
    noise = draws.noises[0].double()
    count = noise.numel()
    assert abs(noise.mean()) < 5 / count**0.5
    assert abs(noise.var() - 1) < 5 * (2 / count) ** 0.5
    assert abs((noise**4).mean() - 3) < 5 * (96 / count) ** 0.5
    counts = torch.bincount(draws.labels, minlength=10)
    assert (counts - 200).abs().max() < 5 * (2_000 * 0.1 * 0.9) ** 0.5
    # Images are independent of one another.
    first, second = noise[:-1].flatten(), noise[1:].flatten()
    assert abs((first * second).mean()) < 5 / count**0.5


def test_given_labels_repeat_and_leave_the_noise_alone():
    stream = PerImageStream(7, 10, SHAPE)
    draws = GivenLabels(stream, [3, 7, 7]).draw(range(2, 7), 1)
    assert draws.labels.tolist() == [7, 3, 7, 7, 3]
    assert torch.equal(draws.noises[0], stream.draw(range(2, 7), 1).noises[0])
