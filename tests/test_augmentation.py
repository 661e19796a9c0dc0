"""Augmentation: the reference's images, what each parameter does, and how parameters are drawn."""

import math

import goldens
import pytest
import torch
from torch.nn import functional as F

from augmentation import AugmentationParameters, augment, draw_augmentation
from augmentation import _filter_down as filter_down
from augmentation import _filter_up as filter_up

# N images, C channels, H height, W width


def parameters(**given: list) -> AugmentationParameters:
    """The given parameters of each image, and 0 for the others."""
    translate = torch.tensor(given.pop("translate", [[0.0], [0.0]]), dtype=torch.float64)
    tensors = {name: torch.tensor(values, dtype=torch.float64) for name, values in given.items()}
    N = max([translate.shape[1], *map(len, tensors.values())])
    rest = {name: torch.zeros(N) for name in ("flip", "scale", "aniso", "aniso_angle")}
    return AugmentationParameters(**(rest | tensors), translate=translate.expand(2, N))


def random_images(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return 2 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1


# The whole


def test_augmented_images_are_those_of_the_reference():
    arrays, _ = goldens.load("augmentation")
    names = ("flip", "scale", "aniso", "aniso_angle", "translate")
    drawn = AugmentationParameters(*(arrays[name] for name in names))
    torch.testing.assert_close(drawn.labels, arrays["labels"], rtol=0, atol=1e-6)
    augmented = augment(arrays["images"], drawn)
    torch.testing.assert_close(augmented, arrays["augmented"], rtol=0, atol=1e-4)


def test_an_image_does_not_depend_on_the_others_of_its_batch_and_the_input_stays():
    images = random_images(8, 3, 12, 10)
    before = images.clone()
    drawn = draw_augmentation(8, 1.0, torch.Generator().manual_seed(1))
    together = augment(images, drawn)
    assert torch.equal(images, before)
    assert augment(images.float(), drawn).dtype == torch.float32
    for n in range(8):
        alone = AugmentationParameters(*(v[..., n : n + 1] for v in vars(drawn).values()))
        found = augment(images[n : n + 1], alone)[0]
        torch.testing.assert_close(found, together[n], rtol=0, atol=1e-12)


# What each parameter does


@pytest.mark.parametrize(
    ("given", "shape", "expected"),
    [
        ({}, (32, 32), lambda x: x),
        ({}, (7, 12), lambda x: x),
        ({}, (4, 1), lambda x: x),
        ({"flip": [1.0]}, (8, 10), lambda x: x.flip(3)),
        # 1.5 x 16 / 8 pixels right and 1 x 24 / 8 down; the reflection comes into view.
        ({"translate": [[1.5], [1.0]]}, (24, 16),
         lambda x: F.pad(x, (3, 0, 3, 0), "reflect")[:, :, :24, :16]),
        ({"translate": [[-2.0], [-3.0]]}, (8, 16),
         lambda x: F.pad(x, (0, 4, 0, 3), "reflect")[:, :, 3:, 4:]),
        # A flip comes before a translation.
        ({"flip": [1.0], "translate": [[2.0], [0.0]]}, (8, 8),
         lambda x: F.pad(x.flip(3), (2, 0, 0, 0), "reflect")[..., :8]),
        # 21 pixels right: the 7 reflected ones are 14 away from the image by then.
        ({"translate": [[21.0], [0.0]]}, (8, 8), torch.zeros_like),
    ],
)  # fmt: skip
def test_flips_and_translations_move_pixels_and_reflections_exactly(given, shape, expected):
    images = random_images(1, 3, *shape)
    augmented = augment(images, parameters(**given))
    torch.testing.assert_close(augmented, expected(images), rtol=0, atol=1e-9)


@pytest.mark.parametrize("dim", [2, 3])
def test_filtering_down_is_the_adjoint_and_the_inverse_of_filtering_up(dim):
    x = random_images(2, 3, 9, 6)
    upsampled = filter_up(x, dim)
    u = random_images(*upsampled.shape)
    torch.testing.assert_close((upsampled * u).sum(), (x * filter_down(u, dim)).sum())
    torch.testing.assert_close(filter_down(upsampled, dim), x, rtol=0, atol=1e-9)


# Drawing


def assert_happens(events: torch.Tensor, odds: float) -> None:
    """Fails by chance once in two million: five standard deviations."""
    deviation = math.sqrt(odds * (1 - odds) / len(events))
    assert abs(events.double().mean().item() - odds) < 5 * deviation


def test_each_transform_happens_with_its_probability_independently_of_the_others():
    drawn = draw_augmentation(200_000, 0.12, torch.Generator().manual_seed(2))
    assert set(drawn.flip.unique().tolist()) == {0.0, 1.0}
    events = {
        "flip": (drawn.flip == 1, 0.5),
        "scale": (drawn.scale != 0, 0.12),
        "aniso": (drawn.aniso != 0, 0.12),
        "angle": (drawn.aniso_angle != 0, 0.5),
        "translate": (drawn.translate[0] != 0, 0.12),
    }
    for name, (happens, odds) in events.items():
        assert_happens(happens, odds)
        for other, (happens_too, other_odds) in events.items():
            if other != name:
                assert_happens(happens & happens_too, odds * other_odds)
    assert torch.equal(drawn.translate[0] != 0, drawn.translate[1] != 0)


def test_strengths_are_standard_normal_and_angles_uniform():
    n = 100_000
    drawn = draw_augmentation(n, 1.0, torch.Generator().manual_seed(3))
    strengths = torch.stack([drawn.scale, drawn.aniso, *drawn.translate])
    assert strengths.mean(1).abs().max() < 5 / math.sqrt(n)
    assert (strengths.square().mean(1) - 1).abs().max() < 5 * math.sqrt(2 / n)
    assert (torch.corrcoef(strengths) - torch.eye(4)).abs().max() < 5 / math.sqrt(n)
    for strength in strengths:
        assert_happens(strength.abs() < 0.6745, 0.5)
    angles = drawn.aniso_angle[drawn.aniso_angle != 0]
    assert -math.pi - 1e-6 <= angles.min() and angles.max() <= math.pi
    for boundary in (-0.5, 0.0, 0.5):
        assert_happens(angles < boundary * math.pi, (boundary + 1) / 2)
