"""The sampler: exact on a known network, independent of batches, streamed to disk; and grids."""

import math

import numpy as np
import pytest
import torch
from commands import succeed
from exact import ExactNetwork
from PIL import Image
from torch import nn

from models import SoFlow
from sampler import SampleRequest, places_of, sample, sample_pixels, write_samples
from support.data.grids import GridImages, save_grid
from support.data.images import ImageBatch
from support.scores.npz import read_archive
from support.system.files import UserError
from support.system.processes import Processes
from support.system.randomness import PerImageStream

ALONE = Processes(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))
SHAPE = (1, 4, 4)


class Recorder(nn.Module):
    """Remembers its calls; predicts 0."""

    def __init__(self):
        super().__init__()
        self.calls: list[tuple] = []

    def forward(self, x, t, gap, labels=None):
        self.calls.append((t[0].item(), gap[0].item(), labels))
        return torch.zeros_like(x)


class ClassImage(nn.Module):
    """Makes an image of one value, that of its class, with Linear and Euler."""

    def forward(self, x, t, gap, labels=None):
        return (x - class_value(labels).view(-1, 1, 1, 1)) / t.view(-1, 1, 1, 1)


def class_value(labels):
    """An image value per class, whose pixel value is far from a rounding edge."""
    return (labels + 0.5) / 5 - 1


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_the_exact_network_is_sampled_exactly_in_any_number_of_steps(steps):
    c = torch.randn(1, *SHAPE, dtype=torch.float64)
    noises = [torch.randn(3, *SHAPE, dtype=torch.float64) for _ in range(steps)]
    assert torch.allclose(sample(SoFlow(ExactNetwork(c)), noises), c.expand(3, -1, -1, -1))


@pytest.mark.parametrize("noising_type", ["Linear", "Trig"])
def test_every_step_goes_from_its_time_to_zero_and_is_noised_afresh(noising_type):
    network, labels = Recorder(), torch.tensor([3, 1])
    noises = [torch.randn(2, *SHAPE) for _ in range(4)]
    result = sample(SoFlow(network, noising_type, "Euler"), noises, labels)
    assert [call[:2] for call in network.calls] == [(t, t) for t in (1.0, 0.75, 0.5, 0.25)]
    assert all(torch.equal(call[2], labels) for call in network.calls)
    # F = 0 with Euler: every step keeps x, so that the last x is the formula unrolled.
    x = noises[0]
    for t, noise in zip((0.75, 0.5, 0.25), noises[1:], strict=True):
        angle = math.pi * t / 2
        alpha, beta = (1 - t, t) if noising_type == "Linear" else (math.cos(angle), math.sin(angle))
        x = alpha * x + beta * noise
    assert torch.allclose(result, x, atol=1e-6)


@pytest.mark.parametrize(("images", "world_size", "batch"), [(10, 1, 4), (10, 3, 2), (5, 4, 8)])
def test_rounds_cover_every_image_once_and_in_order(images, world_size, batch):
    ranks = [list(places_of(rank, images, world_size, batch)) for rank in range(world_size)]
    rounds = list(zip(*ranks, strict=True))
    places = [place for together in rounds for one in together for place in one]
    assert places == list(range(len(places)))
    assert images <= len(places) < images + world_size
    assert all(0 < len(one) <= batch for together in rounds for one in together)


def request(num_images: int, batch_size: int, num_steps: int = 1) -> SampleRequest:
    return SampleRequest(num_images, batch_size, num_steps, PerImageStream(7, 10, SHAPE))


def pixels_of(model, wanted: SampleRequest) -> np.ndarray:
    batches = list(sample_pixels(model, wanted, ALONE, decode=lambda x_0: x_0))
    assert all(len(batch.pixels) == len(batch.labels) for batch in batches)
    return np.concatenate([batch.pixels for batch in batches])


def test_images_do_not_depend_on_the_batch_size():
    torch.manual_seed(0)
    network = nn.Conv2d(1, 1, 3, padding=1)
    model = SoFlow(network)
    network.forward = lambda x, t, gap, labels=None: nn.Conv2d.forward(network, x) * t[0]
    whole, *cuts = (
        pixels_of(model, request(10, size, num_steps=2)).astype(int) for size in (10, 1, 3, 64)
    )
    assert whole.shape == (10, 4, 4, 1)
    for cut in cuts:
        assert np.abs(whole - cut).max() <= 1  # kernels may differ in the last bit


def test_archive_is_streamed_whole_and_in_order(tmp_path):
    path, wanted, reported = tmp_path / "images.npz", request(10, 4), []
    batches = sample_pixels(SoFlow(ClassImage()), wanted, ALONE, decode=lambda x_0: x_0)
    write_samples(path, batches, 10, True, lambda: None, reported.append)
    labels = wanted.stream.draw(range(10), 0).labels.numpy()
    with np.load(path) as archive:
        assert archive.files == ["arr_0", "arr_1"]
        assert (archive["arr_0"].dtype, archive["arr_1"].dtype) == (np.uint8, np.int64)
        assert np.array_equal(archive["arr_1"], labels)
        expected = np.floor(127.5 * class_value(labels) + 128)
        assert np.array_equal(archive["arr_0"][:, 0, 0, 0], expected)
    with read_archive(path) as archive:
        assert archive.images_header().shape == (10, 4, 4, 1)
    assert [len(batch.pixels) for batch in reported] == [4, 4, 2]


def test_archive_of_a_model_without_classes_has_no_labels(tmp_path):
    wanted = SampleRequest(3, 2, 1, PerImageStream(7, None, SHAPE))
    model = SoFlow(ExactNetwork(torch.zeros(1, *SHAPE)))
    batches = sample_pixels(model, wanted, ALONE, decode=lambda x_0: x_0)
    write_samples(tmp_path / "images.npz", batches, 3, True, lambda: None)
    with np.load(tmp_path / "images.npz") as archive:
        assert archive.files == ["arr_0"]


def test_archive_that_is_not_finished_leaves_nothing(tmp_path):
    def broken():
        yield from sample_pixels(SoFlow(ClassImage()), request(4, 4), ALONE, lambda x_0: x_0)
        raise UserError("on fire")

    with pytest.raises(UserError, match="on fire"):
        write_samples(tmp_path / "images.npz", broken(), 8, True, lambda: None)
    assert not list(tmp_path.iterdir())


def test_grid_enlarges_small_images_and_has_full_rows(tmp_path):
    pixels = np.full((6, 8, 8, 1), 255, np.uint8)
    save_grid(tmp_path / "grid.png", pixels, columns=3)
    with Image.open(tmp_path / "grid.png") as picture:
        assert picture.size == (3 * 50, 2 * 50)
        assert picture.getpixel((25, 25)) == 255
    save_grid(tmp_path / "large.png", np.zeros((2, 64, 64, 3), np.uint8), columns=2)
    with Image.open(tmp_path / "large.png") as picture:
        assert picture.size == (2 * 66, 66)


def grid_of(labels, shape, num_classes=10, given=()) -> tuple[list[list[int]], list[int]]:
    """The labels in the grid's cells, row by row, and the rows' classes; added in batches of 7."""
    images = GridImages(shape, num_classes, given)
    for start in range(0, len(labels), 7):
        part = np.array(labels[start : start + 7])
        images.add(ImageBatch(part.astype(np.uint8)[:, None, None, None], part))
    grid = images.arranged()
    return grid.pixels.reshape(-1, grid.columns).tolist(), grid.classes


@pytest.mark.parametrize(
    ("given", "num_images", "shape", "expected"),
    [
        (range(10), 100, (4, 8), [[label] * 8 for label in range(10)]),
        (range(10), 50, (4, 8), [[label] * 5 for label in range(10)]),
        ([7, 3], 100, (2, 4), [[7] * 4, [3] * 4]),
        ([7, 3], 100, (4, 4), [[7] * 4, [7] * 4, [3] * 4, [3] * 4]),
        ([5], 12, (4, 8), [[5] * 6] * 2),
        ([4, 1, 2], 2, (4, 8), [[4], [1]]),  # the third has no image
        ([3, 0], 5, (4, 8), [[3] * 2, [0] * 2]),
        (range(100), 300, (2, 3), [[0] * 3, [50] * 3]),  # more classes than rows
    ],
)
def test_every_class_asked_for_has_rows_of_its_own(given, num_images, shape, expected):
    given = list(given)
    labels = [given[image % len(given)] for image in range(num_images)]
    classes = [row[0] for row in expected]
    assert grid_of(labels, shape, max(10, len(given)), given) == (expected, classes)


@pytest.mark.parametrize(
    ("num_classes", "shape", "classes"), [(10, (4, 8), [0, 2, 5, 7]), (2, (4, 3), [0, 0, 1, 1])]
)
def test_uniform_labels_fill_rows_of_classes_spread_over_all(num_classes, shape, classes):
    labels = np.random.default_rng(0).integers(num_classes, size=300)
    expected = [[label] * shape[1] for label in classes]
    assert grid_of(labels, shape, num_classes) == (expected, classes)


@pytest.mark.parametrize(
    ("num_images", "size"), [(32, (4, 8)), (31, (4, 7)), (13, (2, 6)), (5, (1, 5)), (1, (1, 1))]
)
def test_too_few_images_for_rows_of_classes_stay_in_order_in_a_full_rectangle(num_images, size):
    labels = np.random.default_rng(0).integers(1000, size=num_images) % 250
    cells, classes = grid_of(labels, (4, 8), num_classes=250)
    assert (len(cells), len(cells[0])) == size
    assert [label for row in cells for label in row] == list(labels[: size[0] * size[1]])
    assert classes == []


def test_grid_of_a_model_without_classes_has_the_images_in_their_order():
    images = GridImages((2, 3), 10)
    images.add(ImageBatch(np.arange(9, dtype=np.uint8)[:, None, None, None], None))
    assert images.arranged().pixels.ravel().tolist() == [0, 1, 2, 3, 4, 5]


GROWTH = """
import sys
from pathlib import Path
import torch
from sampler import SampleRequest, sample_pixels, write_samples
from support.system.processes import connected
from support.system.randomness import PerImageStream

def kilobytes(name):
    (line,) = [x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name)]
    return int(line.split()[1])

still, stream = torch.nn.Module(), PerImageStream(42, 10, (4, 32, 32))
still.jump = lambda x_t, t, s, labels: x_t
pictures = lambda x_0: x_0[:, :3].repeat_interleave(8, 2).repeat_interleave(8, 3)
with connected("cpu", 10) as processes:
    request, before = SampleRequest(int(sys.argv[2]), 32, 1, stream), kilobytes("VmRSS")
    batches = sample_pixels(still, request, processes, pictures)
    write_samples(Path(sys.argv[1]), batches, request.num_images, True, lambda: None)
    print(kilobytes("VmHWM") - before)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_images(tmp_path):
    """As `inference.py` writes them, on the CPU, where freed memory is kept for the next batch."""
    few, many = (
        int(succeed("-c", GROWTH, tmp_path / "samples.npz", count)) for count in (100, 1000)
    )
    assert many - few < 80_000  # kB; 900 images of 256 pixels have 177 MB
