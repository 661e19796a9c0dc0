"""Pictures are decoded as Pillow does, cropped as ADM does, and turned into floats and back."""

import errno
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from commands import ROOT
from PIL import Image
from refusals import refusal

from support.data.folders import find_pictures, sizes_of_pictures
from support.data.images import (
    ENDINGS,
    EXTENSIONS,
    centre_crop,
    read_image,
    save_png,
    tile,
    to_images,
    to_pixels,
)


def some_pixels(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


# uint8 and back.


def test_every_pixel_value_survives_the_round_trip_in_arrays_and_tensors():
    pixels = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(to_pixels(to_images(pixels)), pixels)
    tensor = torch.from_numpy(pixels)
    assert torch.equal(to_pixels(to_images(tensor)), tensor)
    assert (to_images(pixels).dtype, to_images(tensor).dtype) == (np.float32, torch.float32)
    images = np.random.default_rng(0).normal(size=10_000).astype(np.float32)
    np.testing.assert_array_equal(to_pixels(torch.from_numpy(images)).numpy(), to_pixels(images))


def test_floats_are_clamped_and_truncated():
    images = np.array([-9, -1, 0, 0.0039, 0.0040, 1, 9], np.float32)
    assert to_pixels(images).tolist() == [0, 0, 128, 128, 128, 255, 255]
    assert to_pixels(np.array([0.9 / 127.5, 1.1 / 127.5], np.float32)).tolist() == [128, 129]


# Decoding.


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "CMYK", "1", "LA"])
def test_every_kind_of_picture_is_read_as_pillow_converts_it(tmp_path, mode):
    picture = Image.fromarray(some_pixels(6, 5, 3)).convert(mode)
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    picture.save(path)
    pixels = read_image(path)
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, np.asarray(Image.open(path).convert("RGB")))


def readable(*endings):
    """Runs a test once for each of these endings that this build of Pillow reads."""
    return pytest.mark.parametrize("ending", [one for one in endings if f".{one}" in EXTENSIONS])


@readable("png", "tiff", "pgm", "jp2")
def test_of_sixteen_bits_of_grey_the_upper_eight_are_taken(tmp_path, ending):
    path = tmp_path / f"a.{ending}"
    grey = some_pixels(6, 5, 1)
    Image.fromarray(grey[..., 0].astype(np.uint16) * 256 + 9).save(path)
    np.testing.assert_array_equal(read_image(path), grey.repeat(3, axis=2))


@readable("avif", "bmp", "gif", "jp2", "j2k", "jfif", "qoi", "apng")
def test_pictures_are_found_by_ending_and_read_by_what_they_are(tmp_path, ending):
    path = tmp_path / f"a.{ending}"
    frames = [Image.new("RGB", (9, 5), colour) for colour in ("red", "blue")]
    later = {"save_all": True, "append_images": frames[1:]} if ending in ("gif", "apng") else {}
    frames[0].save(path, format="PNG" if ending == "apng" else None, **later)
    assert find_pictures(tmp_path).paths == [str(path)]
    assert sizes_of_pictures([path]) == [path.stat().st_size]
    pixels = read_image(path)
    assert pixels.shape == (5, 9, 3)
    assert np.abs(pixels.astype(int) - [255, 0, 0]).max() < 5, "the first frame"
    path.rename(tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), pixels)


def test_formats_that_start_programs_or_open_files_are_not_read():
    assert not {"EPS", "WMF", "FPX", "MIC", "IMT", "TGA"} & set(ENDINGS)
    assert not {".eps", ".ps", ".wmf", ".tga"} & set(EXTENSIONS)


@pytest.mark.parametrize("extension", ["png", "jpg", "webp", "tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_upright_as_their_exif_data_say(tmp_path, extension, orientation):
    """Of the picture's four corners, the one that EXIF says is at the top left, is there."""
    quarters = np.kron([[0, 80], [160, 240]], np.ones((8, 16)))[..., None].repeat(3, axis=2)
    turns = {  # what a viewer does, by the standard's names of the 0th row and 0th column
        1: lambda p: p, 2: lambda p: p[:, ::-1], 3: lambda p: p[::-1, ::-1], 4: lambda p: p[::-1],
        5: lambda p: p.swapaxes(0, 1), 6: lambda p: p[::-1].swapaxes(0, 1),
        7: lambda p: p[::-1, ::-1].swapaxes(0, 1), 8: lambda p: p[:, ::-1].swapaxes(0, 1),
    }  # fmt: skip
    path = tmp_path / f"a.{extension}"
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"tiffinfo": {0x0112: orientation}} if extension == "tiff" else {"exif": exif}
    Image.fromarray(quarters.astype(np.uint8)).save(path, **options)
    assert np.abs(read_image(path) - turns[orientation](quarters)).max() < 12
    if extension != "tiff":  # which Pillow turns itself
        assert np.abs(read_image(path, apply_exif=False) - quarters).max() < 12


@pytest.mark.parametrize("exif", [b"", b"Exif\0\0II*\0", b"Exif\0\0MM" + b"\xff" * 40, b"x" * 99])
def test_damaged_exif_data_leave_a_picture_as_it_lies(tmp_path, exif):
    Image.fromarray(some_pixels(4, 6, 3)).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), some_pixels(4, 6, 3))


@readable("png", "jpg", "bmp", "webp", "avif", "gif", "jp2")
def test_a_picture_cut_short_is_named(tmp_path, ending):
    path = tmp_path / f"a.{ending}"
    Image.fromarray(some_pixels(40, 40, 3)).save(path)
    data = path.read_bytes()
    for size in (0, 4, len(data) // 2):
        path.write_bytes(data[:size])
        assert refusal(read_image, path).startswith(f"{path}: ")


def test_other_and_exploding_pictures_are_named_with_what_they_are(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "foreign.png", format="EPS")
    Image.new("1", (10_000, 9_000)).save(tmp_path / "bomb.png")
    (tmp_path / "heic.jpg").write_bytes(b"\0\0\0\x18ftypheic" + bytes(50))
    for kind in (np.float32, np.int32):
        Image.fromarray(np.ones((5, 6), kind)).save(tmp_path / f"{kind.__name__}.tiff")
    save_png(tmp_path / "thread.png", some_pixels(1, 50_000, 3))
    expected = {
        "absent.png": os.strerror(errno.ENOENT), "foreign.png": "JPEG", "heic.jpg": "HEIC",
        "bomb.png": "10000 x 9000", "float32.tiff": "32 bits", "int32.tiff": "32 bits",
        "thread.png": "50000 x 1",
    }  # fmt: skip
    for name, named in expected.items():
        said = refusal(read_image, tmp_path / name, 256)
        assert said.startswith(f"{tmp_path / name}: ")
        assert said.count(str(tmp_path)) == 1
        assert named in said


WARNED_OF = """
import sys
from pathlib import Path
import torch
from PIL import Image
from support.data.batches import BatchPlan, build_loader
from support.data.datasets import PixelData
from support.data.images import why_unreadable
folder, exif = Path(sys.argv[1]), Image.Exif()
exif[0x0112], exif[0x010E] = 6, "x" * 100
picture = Image.new("RGB", (8, 8))
picture.save(folder / "exif.jpg", exif=exif.tobytes()[:-60])
picture.save(folder / "exif.png", exif=exif.tobytes()[:30])
picture.convert("P").save(folder / "palette.png", transparency=bytes(range(256)))
Image.new("L", (9500, 9500)).save(folder / "large.png")
print(*(path.name for path in sorted(folder.iterdir()) if why_unreadable(path)))
data = PixelData(torch.zeros(4, 1, 2, 2, dtype=torch.uint8), torch.zeros(4).long(), ("a",))
next(build_loader(data, BatchPlan(1, 1, 1, 1), 0, range(2), 0, num_workers=20, prefetch_factor=1))
"""


@pytest.mark.slow
def test_nothing_but_our_own_lines_reaches_the_terminal(tmp_path):
    command = [sys.executable, "-W", "default", "-c", WARNED_OF, str(tmp_path)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (ended.stdout, ended.stderr) == ("large.png\n", "")


# The crop.


def halved(pixels):
    """The mean of every two by two pixels, rounded up after each axis."""
    wide = pixels.astype(int)
    rows = (wide[:, ::2] + wide[:, 1::2] + 1) // 2
    return (rows[::2] + rows[1::2] + 1) // 2


def bicubic(count, size):
    """[size, count]: what each of `count` pixels gives to each of `size`, by Keys' kernel, -1/2.

    A kernel is as wide as the pixels that it makes, and its weights inside the picture sum to 1.
    """
    scale = max(1, count / size)
    centres = (np.arange(size) + 0.5) * count / size
    x = np.abs(np.arange(count) + 0.5 - centres[:, None]) / scale
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    weights = np.where(x < 1, near, np.where(x < 2, far, 0))
    return weights / weights.sum(axis=1, keepdims=True)


def resized(pixels, height, width):
    rows = np.einsum("hwc,vw->hvc", pixels, bicubic(pixels.shape[1], width)).round().clip(0, 255)
    return np.einsum("hvc,uh->uvc", rows, bicubic(pixels.shape[0], height)).round().clip(0, 255)


CROPS = {
    "square, the size itself": ((8, 8), lambda p: p),
    "one to four": ((8, 32), lambda p: p[:, 12:20]),
    "four to one": ((32, 8), lambda p: p[12:20]),
    "one more, cut below": ((9, 8), lambda p: p[:8]),
    "three more, cut one above and two below": ((8, 11), lambda p: p[:, 1:9]),
    "exactly twice": ((16, 16), halved),
    "exactly four times": ((32, 32), lambda p: halved(halved(p))),
    "twice, one to four": ((16, 64), lambda p: halved(p)[:, 12:20]),
    "one short of twice": ((15, 15), lambda p: resized(p, 8, 8)),
    "odd, and wider": ((13, 21), lambda p: resized(p, 8, 13)[:, 2:10]),
    "smaller": ((5, 5), lambda p: resized(p, 8, 8)),
    "smaller, two to one": ((6, 3), lambda p: resized(p, 16, 8)[4:12]),
}


@pytest.mark.parametrize("name", CROPS)
def test_crop_gives_the_pixels_worked_out_here(name):
    (height, width), work_out = CROPS[name]
    pixels = some_pixels(height, width, 3)
    difference = np.abs(centre_crop(pixels, 8).astype(int) - work_out(pixels))
    # Pillow's weights are rounded to 22 bits, which may round a pixel of a resize the other way.
    assert difference.max() <= ("resized" in work_out.__code__.co_names)
    assert difference.mean() < 0.01


# Grids.


def test_tiles_fill_rows_first():
    pixels = np.arange(6, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 3, 1), np.uint8)
    grid = tile(pixels, 2, 3)
    assert grid.shape == (4, 9, 1)
    assert grid[::2, ::3, 0].tolist() == [[0, 1, 2], [3, 4, 5]]


def test_a_png_is_written_whole_and_read_with_or_without_a_crop(tmp_path):
    pixels = some_pixels(20, 30, 3)
    save_png(tmp_path / "a.png", pixels)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), pixels)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png", 8), centre_crop(pixels, 8))
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
