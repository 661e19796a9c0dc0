"""The sampler: exact on a known network, independent of batches, streamed to disk."""

import math

import numpy as np
import pytest
import torch
from exact import ExactNetwork
from PIL import Image
from torch import nn

from models import SoFlow
from soflow.distributed import Processes
from soflow.files import UserError
from soflow.npz import read_archive
from soflow.randomness import GivenLabels, PerImageStream
from soflow.sampling import (
    FirstImages,
    SampleRequest,
    labels_by_row,
    plan_rounds,
    sample,
    sample_pixels,
    save_grid,
    write_samples,
)

ALONE = Processes(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))
SHAPE = (1, 4, 4)


class Recorder(nn.Module):
    """Remembers what it was called with; predicts nothing."""

    def __init__(self):
        super().__init__()
        self.calls: list[tuple] = []

    def forward(self, x, t, gap, labels=None):
        self.calls.append((x.clone(), t[0].item(), gap[0].item(), labels))
        return torch.zeros_like(x)


class ClassImage(nn.Module):
    """With Linear and Euler, makes an image whose every value says its class."""

    def forward(self, x, t, gap, labels=None):
        return (x - class_value(labels).view(-1, 1, 1, 1)) / t.view(-1, 1, 1, 1)


def class_value(labels):
    """An image value per class, whose pixel value is far from a rounding edge."""
    return (labels + 0.5) / 5 - 1


@pytest.mark.parametrize("jumps", [1, 2, 5])
def test_the_exact_network_is_sampled_exactly_in_any_number_of_jumps(jumps):
    c = torch.randn(1, *SHAPE, dtype=torch.float64)
    noises = [torch.randn(3, *SHAPE, dtype=torch.float64) for _ in range(jumps)]
    assert torch.allclose(sample(SoFlow(ExactNetwork(c)), noises), c.expand(3, -1, -1, -1))


@pytest.mark.parametrize("noising_type", ["Linear", "Trig"])
def test_every_jump_goes_from_its_time_to_zero_and_is_noised_afresh(noising_type):
    network = Recorder()
    model = SoFlow(network, noising_type, "Euler")
    noises = [torch.randn(2, *SHAPE) for _ in range(4)]
    labels = torch.tensor([3, 1])
    result = sample(model, noises, labels)
    assert [call[1] for call in network.calls] == [1.0, 0.75, 0.5, 0.25]
    assert [call[2] for call in network.calls] == [1.0, 0.75, 0.5, 0.25]
    assert all(torch.equal(call[3], labels) for call in network.calls)
    # F = 0 with Euler: every jump keeps x, so that the last x is the formula unrolled.
    x = noises[0]
    for t, noise in zip((0.75, 0.5, 0.25), noises[1:], strict=True):
        angle = math.pi * t / 2
        alpha, beta = (1 - t, t) if noising_type == "Linear" else (math.cos(angle), math.sin(angle))
        x = alpha * x + beta * noise
    assert torch.allclose(result, x, atol=1e-6)


@pytest.mark.parametrize(("images", "world_size", "batch"), [(10, 1, 4), (10, 3, 2), (5, 4, 8)])
def test_rounds_cover_every_image_once_and_in_order(images, world_size, batch):
    places = [
        place
        for work in plan_rounds(images, world_size, batch)
        for rank in range(world_size)
        for place in work.images_of(rank)
    ]
    assert places == list(range(len(places)))
    assert images <= len(places) < images + world_size
    assert all(
        0 < work.images_per_process <= batch for work in plan_rounds(images, world_size, batch)
    )


def request(num_images: int, batch_size: int, num_jumps: int = 1) -> SampleRequest:
    return SampleRequest(num_images, batch_size, num_jumps, PerImageStream(7, 10, SHAPE))


def pixels_of(model, wanted: SampleRequest) -> np.ndarray:
    batches = list(sample_pixels(model, wanted, ALONE, decode=lambda x_0: x_0))
    assert all(len(batch.pixels) == len(batch.labels) for batch in batches)
    return np.concatenate([batch.pixels for batch in batches])


def test_images_do_not_depend_on_the_batch_size():
    torch.manual_seed(0)
    network = nn.Conv2d(1, 1, 3, padding=1)
    model = SoFlow(network)
    network.forward = lambda x, t, gap, labels=None: nn.Conv2d.forward(network, x) * t[0]
    whole = pixels_of(model, request(10, 10, num_jumps=2)).astype(int)
    assert whole.shape == (10, 4, 4, 1)
    for batch_size in (1, 3, 64):
        cut = pixels_of(model, request(10, batch_size, num_jumps=2)).astype(int)
        assert np.abs(whole - cut).max() <= 1  # kernels may differ in the last bit


def test_archive_is_streamed_whole_and_in_order(tmp_path):
    path = tmp_path / "images.npz"
    wanted = request(10, 4)
    first = FirstImages(6)
    batches = sample_pixels(SoFlow(ClassImage()), wanted, ALONE, decode=lambda x_0: x_0)
    write_samples(path, batches, 10, True, lambda: None, first.add)
    labels = wanted.stream.draw(range(10), 0).labels.numpy()
    expected = np.floor(127.5 * class_value(labels) + 128)
    with np.load(path) as archive:
        assert archive.files == ["arr_0", "arr_1"]
        assert archive["arr_0"].dtype == np.uint8
        assert archive["arr_1"].dtype == np.int64
        assert np.array_equal(archive["arr_1"], labels)
        assert np.array_equal(archive["arr_0"][:, 0, 0, 0], expected)
    with read_archive(path) as archive:
        assert archive.images_header().shape == (10, 4, 4, 1)
    assert np.array_equal(first.by_class()[:, 0, 0, 0], np.sort(expected[:6]))


def test_archive_of_a_model_without_classes_has_no_labels(tmp_path):
    wanted = SampleRequest(3, 2, 1, PerImageStream(7, None, SHAPE))
    batches = sample_pixels(
        SoFlow(ExactNetwork(torch.zeros(1, *SHAPE))), wanted, ALONE, lambda x: x
    )
    write_samples(tmp_path / "images.npz", batches, 3, True, lambda: None)
    with np.load(tmp_path / "images.npz") as archive:
        assert archive.files == ["arr_0"]


def test_archive_that_is_not_finished_leaves_nothing(tmp_path):
    def broken():
        yield from sample_pixels(SoFlow(ClassImage()), request(4, 4), ALONE, lambda x_0: x_0)
        raise UserError("the disk is on fire")

    with pytest.raises(UserError, match="on fire"):
        write_samples(tmp_path / "images.npz", broken(), 8, True, lambda: None)
    assert not list(tmp_path.iterdir())


def test_decoder_is_called_once_per_batch():
    sizes = []

    def decode(x_0):
        sizes.append(len(x_0))
        return x_0.repeat(1, 3, 2, 2)

    batches = list(sample_pixels(SoFlow(ClassImage()), request(7, 3), ALONE, decode))
    assert sizes == [3, 3, 1]
    assert batches[0].pixels.shape == (3, 8, 8, 3)


def test_labels_by_row_spread_over_the_classes():
    assert labels_by_row(10, (10, 2)) == [row for row in range(10) for _ in range(2)]
    assert labels_by_row(1000, (4, 1)) == [0, 250, 500, 750]
    assert labels_by_row(2, (4, 1)) == [0, 0, 1, 1]


def test_given_labels_reach_the_network():
    stream = GivenLabels(PerImageStream(7, 10, SHAPE), [9, 4])
    pixels = pixels_of(SoFlow(ClassImage()), SampleRequest(4, 3, 1, stream))
    assert pixels[0].mean() == pixels[2].mean() > pixels[1].mean() == pixels[3].mean()


def test_grid_fills_its_last_row_and_enlarges_small_images(tmp_path):
    pixels = np.full((5, 8, 8, 1), 255, np.uint8)
    save_grid(tmp_path / "grid.png", pixels, columns=3)
    with Image.open(tmp_path / "grid.png") as picture:
        assert picture.size == (3 * 50, 2 * 50)
        assert picture.getpixel((25, 25)) == 255
        assert picture.getpixel((125, 75)) == 0
    save_grid(tmp_path / "large.png", np.zeros((2, 64, 64, 3), np.uint8), columns=2)
    with Image.open(tmp_path / "large.png") as picture:
        assert picture.size == (2 * 66, 66)
