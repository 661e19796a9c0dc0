import math

import goldens
import pytest
import torch

from augmentation import SYM6, AugmentationParameters, augment, draw_augmentation
from augmentation import _filter_down as filter_down
from augmentation import _filter_up as filter_up

# N images, C channels, H height, W width


def parameters(**given: list) -> AugmentationParameters:
    """What is `given` for each image, and 0 for the rest."""
    translate = torch.tensor(given.pop("translate", [[0.0], [0.0]]), dtype=torch.float64)
    tensors = {name: torch.tensor(values, dtype=torch.float64) for name, values in given.items()}
    N = max([translate.shape[1], *map(len, tensors.values())])
    rest = {name: torch.zeros(N) for name in ("flip", "scale", "aniso", "aniso_angle")}
    return AugmentationParameters(**(rest | tensors), translate=translate.expand(2, N))


def random_images(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return 2 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1


def strong_parameters(N: int) -> AugmentationParameters:
    """Everything at once, and strong enough that some images run out of reflections."""
    generator = torch.Generator().manual_seed(1)
    return draw_augmentation(N, 1.0, generator)


# The whole


def test_augmented_images_are_those_of_the_reference():
    arrays, _ = goldens.load("augmentation")
    names = ("flip", "scale", "aniso", "aniso_angle", "translate")
    drawn = AugmentationParameters(*(arrays[name] for name in names))
    torch.testing.assert_close(drawn.labels, arrays["labels"], rtol=0, atol=1e-6)
    augmented = augment(arrays["images"], drawn)
    torch.testing.assert_close(augmented, arrays["augmented"], rtol=0, atol=1e-4)


def up_weight(j: int, i: int) -> float:
    """How much pixel i gives to upsampled sample j, and that to pixel i on the way down."""
    return SYM6[j - 2 * i + 5] if 0 <= j - 2 * i + 5 < 12 else 0.0


def slow_augment(image: torch.Tensor, drawn: AugmentationParameters, n: int) -> torch.Tensor:
    """Image [H, W] moved by the n-th parameters, sample by sample on an unbounded lattice."""
    H, W = image.shape
    if drawn.flip[n]:
        image = image.flip(1)
    reflected = [list(range(1 - side, 2 * side - 1)) for side in (H, W)]

    def reflect(i: int, side: int) -> int:
        return abs(i) if i < side else 2 * (side - 1) - i

    extended = image[[reflect(i, H) for i in reflected[0]]][
        :, [reflect(i, W) for i in reflected[1]]
    ]
    samples = [range(-2 * side - 20, 4 * side + 20) for side in (H, W)]
    up_y, up_x = (
        torch.tensor([[up_weight(j, i) for i in pixels] for j in js], dtype=torch.float64)
        for js, pixels in zip(samples, reflected, strict=True)
    )
    upsampled = up_y @ extended @ up_x.T

    def read(x: float, y: float) -> float:
        """Bilinear in the upsampled image, at upsampled coordinates."""
        total = 0.0
        for row in (math.floor(y), math.floor(y) + 1):
            for column in (math.floor(x), math.floor(x) + 1):
                if row in samples[0] and column in samples[1]:
                    share = (1 - abs(y - row)) * (1 - abs(x - column))
                    total += share * upsampled[row - samples[0][0], column - samples[1][0]].item()
        return total

    k = 2 ** (0.2 * drawn.aniso[n].item())
    r = drawn.aniso_angle[n].item()
    u = torch.tensor([math.cos(r), -math.sin(r)], dtype=torch.float64)
    stretch = k * torch.outer(u, u) + (torch.eye(2) - torch.outer(u, u)) / k
    forward = stretch * 2 ** (0.2 * drawn.scale[n].item())
    centre = torch.tensor([(W - 1) / 2, (H - 1) / 2], dtype=torch.float64)
    shift = 0.125 * torch.tensor([W, H]) * drawn.translate[:, n].double()
    rows, columns = range(-12, 2 * H + 12), range(-12, 2 * W + 12)
    moved = torch.zeros(len(rows), len(columns), dtype=torch.float64)
    for a, row in enumerate(rows):
        for b, column in enumerate(columns):
            arrives = torch.tensor([column / 2, row / 2], dtype=torch.float64)
            x, y = centre + torch.linalg.solve(forward, arrives - shift - centre)
            moved[a, b] = read(2 * x.item(), 2 * y.item())
    down_y = torch.tensor([[up_weight(j, i) for j in rows] for i in range(H)], dtype=torch.float64)
    down_x = torch.tensor(
        [[up_weight(j, i) for j in columns] for i in range(W)], dtype=torch.float64
    )
    return down_y @ moved @ down_x.T


def test_augmentation_agrees_with_its_definition_sample_by_sample():
    images = random_images(4, 1, 5, 7)
    drawn = strong_parameters(4)
    augmented = augment(images, drawn)
    for n in range(4):
        expected = slow_augment(images[n, 0], drawn, n)
        torch.testing.assert_close(augmented[n, 0], expected, rtol=0, atol=1e-9)


def test_an_image_does_not_depend_on_the_others_of_its_batch():
    images = random_images(8, 3, 12, 10)
    drawn = strong_parameters(8)
    together = augment(images, drawn)
    for n in range(8):
        alone = AugmentationParameters(*(v[..., n : n + 1] for v in vars(drawn).values()))
        torch.testing.assert_close(
            augment(images[n : n + 1], alone)[0], together[n], rtol=0, atol=1e-12
        )


def test_the_images_given_stay_as_they_are_and_the_result_is_repeatable():
    images = random_images(4, 3, 8, 8).float()
    before = images.clone()
    first = augment(images, strong_parameters(4))
    assert torch.equal(first, augment(images, strong_parameters(4)))
    assert torch.equal(images, before)
    assert first.dtype == torch.float32


# What each parameter does


@pytest.mark.parametrize("H, W", [(32, 32), (7, 12), (4, 1)])
def test_without_a_transform_the_image_comes_back(H, W):
    images = random_images(2, 3, H, W)
    augmented = augment(images, parameters(scale=[0.0, 0.0]))
    torch.testing.assert_close(augmented, images, rtol=0, atol=1e-9)


def test_flip_exchanges_left_and_right_exactly_where_drawn():
    images = random_images(2, 3, 8, 10)
    augmented = augment(images, parameters(flip=[1.0, 0.0]))
    torch.testing.assert_close(augmented[0], images[0].flip(2), rtol=0, atol=1e-9)
    torch.testing.assert_close(augmented[1], images[1], rtol=0, atol=1e-9)


def test_translation_moves_right_and_down_in_eighths_of_the_sides():
    images = random_images(1, 1, 24, 16)
    augmented = augment(images, parameters(translate=[[1.5], [1.0]]))
    # 1.5 x 16 / 8 and 1 x 24 / 8 pixels; what comes into view is the reflection.
    reflected = torch.nn.functional.pad(images, (3, 0, 3, 0), mode="reflect")
    torch.testing.assert_close(augmented, reflected[:, :, :24, :16], rtol=0, atol=1e-9)


def test_translation_upwards_and_left_brings_in_the_other_reflections():
    images = random_images(1, 1, 8, 16)
    augmented = augment(images, parameters(translate=[[-2.0], [-3.0]]))
    reflected = torch.nn.functional.pad(images, (0, 4, 0, 3), mode="reflect")
    torch.testing.assert_close(augmented, reflected[:, :, 3:, 4:], rtol=0, atol=1e-9)


def test_flip_comes_before_translation():
    images = random_images(1, 1, 8, 8)
    augmented = augment(images, parameters(flip=[1.0], translate=[[2.0], [0.0]]))
    torch.testing.assert_close(augmented[..., 2:], images.flip(3)[..., :-2], rtol=0, atol=1e-9)


def test_beyond_one_reflection_there_is_nothing():
    images = random_images(1, 1, 8, 8)
    # 21 pixels right: the 7 reflected ones are 14 away from the image by then.
    augmented = augment(images, parameters(translate=[[21.0], [0.0]]))
    torch.testing.assert_close(augmented, torch.zeros_like(images), rtol=0, atol=1e-12)


def blob(x: float, y: float, H: int, W: int) -> torch.Tensor:
    """[1, 1, H, W]: a smooth spot around pixel position (x, y)."""
    rows, columns = torch.arange(H, dtype=torch.float64), torch.arange(W, dtype=torch.float64)
    squared = (columns - x) ** 2 + (rows[:, None] - y) ** 2
    return (-squared / 8).exp()[None, None]


def centroid(images: torch.Tensor) -> tuple[float, float]:
    """Pixel position (x, y) of the centre of mass."""
    mass = images[0, 0] / images.sum()
    rows, columns = (torch.arange(side, dtype=torch.float64) for side in mass.shape)
    return (mass.sum(0) @ columns).item(), (mass.sum(1) @ rows).item()


@pytest.mark.parametrize(
    "given, expected",
    [
        # The spot is (6, -4) from the centre; the factors are 2^(0.2 w).
        ({"scale": [2.5]}, (6 * 2**0.5, -4 * 2**0.5)),
        ({"scale": [-2.5]}, (6 / 2**0.5, -4 / 2**0.5)),
        # Along x by k, along y by 1 / k.
        ({"aniso": [2.5]}, (6 * 2**0.5, -4 / 2**0.5)),
        # A right angle exchanges the two.
        ({"aniso": [2.5], "aniso_angle": [math.pi / 2]}, (6 / 2**0.5, -4 * 2**0.5)),
        # Right and up: the part (5, -5) is stretched and the part (1, 1) is shrunk.
        (
            {"aniso": [2.5], "aniso_angle": [math.pi / 4]},
            (5 * 2**0.5 + 0.5**0.5, -5 * 2**0.5 + 0.5**0.5),
        ),
        # The shift, by (8, -6), comes last: nothing scales it.
        ({"scale": [2.5], "aniso": [2.5], "translate": [[1.0], [-1.0]]}, (12 + 8, -4 - 6)),
    ],
)
def test_content_moves_about_the_centre_pixel_as_stated(given, expected):
    x, y = centroid(augment(blob(37.5, 19.5, 48, 64), parameters(**given)))
    # The filter is not quite symmetric. Taking the middle of the samples for the centre would
    # cost a tenth of a pixel here.
    assert (x - 31.5, y - 23.5) == pytest.approx(expected, abs=0.05)


# The filters


def test_filters_are_the_stated_sums():
    x = random_images(1, 1, 1, 6)
    upsampled = filter_up(x, 3)[0, 0, 0]
    samples = range(-5, 17)  # all that six pixels reach
    expected = [sum(x[0, 0, 0, i] * up_weight(j, i) for i in range(6)) for j in samples]
    torch.testing.assert_close(upsampled, torch.stack(expected))
    u = random_images(1, 1, len(samples), 1)
    expected = [
        sum(u[0, 0, n, 0] * up_weight(j, i) for n, j in enumerate(samples)) for i in range(6)
    ]
    torch.testing.assert_close(filter_down(u, 2)[0, 0, :, 0], torch.stack(expected))


@pytest.mark.parametrize("dim", [2, 3])
def test_filtering_down_is_the_adjoint_and_the_inverse_of_filtering_up(dim):
    x = random_images(2, 3, 9, 6)
    upsampled = filter_up(x, dim)
    u = random_images(*upsampled.shape)
    torch.testing.assert_close((upsampled * u).sum(), (x * filter_down(u, dim)).sum())
    torch.testing.assert_close(filter_down(upsampled, dim), x, rtol=0, atol=1e-9)


# Drawing


def test_labels_are_flip_scale_stretch_along_two_axes_and_translation():
    drawn = parameters(
        flip=[1.0, 0.0],
        scale=[0.5, 0.0],
        aniso=[2.0, 0.0],
        aniso_angle=[math.pi / 6, 1.0],
        translate=[[0.25, 0.0], [-0.75, 0.0]],
    )
    expected = torch.tensor([[1, 0.5, 3**0.5, 1.0, 0.25, -0.75], [0.0] * 6], dtype=torch.float64)
    torch.testing.assert_close(drawn.labels, expected)


def assert_happens(events: torch.Tensor, odds: float) -> None:
    """Fails by chance once in two million: five standard deviations."""
    deviation = math.sqrt(odds * (1 - odds) / len(events))
    assert abs(events.double().mean().item() - odds) < 5 * deviation


def assert_standard_normal(draws: torch.Tensor) -> None:
    n = len(draws)
    assert abs(draws.mean().item()) < 5 / math.sqrt(n)
    assert abs(draws.square().mean().item() - 1) < 5 * math.sqrt(2 / n)
    assert abs((draws.abs() < 0.6745).double().mean().item() - 0.5) < 5 * 0.5 / math.sqrt(n)


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
    drawn = draw_augmentation(100_000, 1.0, torch.Generator().manual_seed(3))
    strengths = [drawn.scale, drawn.aniso, *drawn.translate]
    for strength in strengths:
        assert_standard_normal(strength)
    correlation = torch.corrcoef(torch.stack(strengths)) - torch.eye(4)
    assert correlation.abs().max() < 5 / math.sqrt(100_000)
    angles = drawn.aniso_angle[drawn.aniso_angle != 0]
    assert -math.pi - 1e-6 <= angles.min() and angles.max() <= math.pi
    for boundary in (-0.5, 0.0, 0.5):
        assert_happens(angles < boundary * math.pi, (boundary + 1) / 2)


def test_probability_zero_leaves_flips_only():
    drawn = draw_augmentation(100, 0.0, torch.Generator().manual_seed(4))
    assert drawn.labels[:, 0].any()
    assert not drawn.labels[:, 1:].any()


def test_draws_come_from_the_given_generator_alone():
    before = torch.get_rng_state()
    labels = [
        draw_augmentation(50, 0.5, torch.Generator().manual_seed(seed)).labels for seed in (5, 5, 6)
    ]
    assert torch.equal(labels[0], labels[1])
    assert not torch.equal(labels[0], labels[2])
    assert torch.equal(torch.get_rng_state(), before)
    assert labels[0].shape == (50, 6)
    assert labels[0].dtype == torch.float32
