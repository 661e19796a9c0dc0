"""Small stand-ins for data sets, made of crops of real photographs."""

import hashlib
import io
import pickle
import tarfile
from pathlib import Path

import numpy as np
import skimage.data
import sklearn.datasets
from PIL import Image
from torchvision.datasets import CIFAR10

import unet

CIFAR_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship")
CIFAR_NAMES += ("truck",)
CIFAR_FOLDER = "cifar-10-batches-py"


def photographs() -> dict[str, np.ndarray]:
    """uint8 [H, W, 3] by name."""
    china, flower = sklearn.datasets.load_sample_images().images
    return {
        "china": china,
        "flower": flower,
        "cat": skimage.data.chelsea(),
        "cup": skimage.data.coffee(),
    }


def crops(photograph: np.ndarray, count: int, size: int, seed: int = 0) -> np.ndarray:
    """uint8 [count, size, size, 3] from random places of a photograph."""
    source = np.random.default_rng(seed)
    tops = source.integers(0, photograph.shape[0] - size, count)
    lefts = source.integers(0, photograph.shape[1] - size, count)
    return np.stack(
        [
            photograph[top : top + size, left : left + size]
            for top, left in zip(tops, lefts, strict=True)
        ]
    )


def write_image_folder(folder: Path, per_class: int = 6, size: int = 40) -> None:
    """A folder of class folders, one for each photograph, of JPEG files."""
    for name, photograph in photographs().items():
        (folder / name).mkdir(parents=True)
        for number, pixels in enumerate(crops(photograph, per_class, size)):
            Image.fromarray(pixels).save(folder / name / f"{number}.jpg")


def write_cifar10(folder: Path, monkeypatch, per_batch: int = 10) -> np.ndarray:
    """Five batches in CIFAR-10's format, whose digests replace torchvision's; the pixels, NHWC."""
    place = folder / CIFAR_FOLDER
    place.mkdir(parents=True)
    batches = [
        crops(photograph, per_batch, 32, seed)
        for seed, photograph in enumerate([*photographs().values(), skimage.data.astronaut()])
    ]
    for number, pixels in enumerate(batches, start=1):
        content = {
            "batch_label": f"training batch {number} of 5",
            "labels": [index % 10 for index in range(per_batch)],
            "data": pixels.transpose(0, 3, 1, 2).reshape(per_batch, -1),
            "filenames": [f"{index}.png" for index in range(per_batch)],
        }
        (place / f"data_batch_{number}").write_bytes(pickle.dumps(content, protocol=2))
    (place / "test_batch").write_bytes((place / "data_batch_1").read_bytes())
    names = {"label_names": list(CIFAR_NAMES), "num_vis": 3072}
    (place / "batches.meta").write_bytes(pickle.dumps(names, protocol=2))
    publish_cifar10(place, monkeypatch)
    return np.concatenate(batches)


def publish_cifar10(place: Path, monkeypatch) -> None:
    """Let torchvision's table of digests say what lies in `place`."""
    md5 = {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in place.iterdir()}
    training = [[f"data_batch_{number}", md5[f"data_batch_{number}"]] for number in range(1, 6)]
    monkeypatch.setattr(CIFAR10, "train_list", training)
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", md5["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": md5["batches.meta"]})


def narrow_unet(monkeypatch) -> None:
    """Let UNets be made with fewer and narrower blocks: 1 million parameters instead of 55."""
    for name, value in {"STEM_WIDTH": 16, "WIDTH": 32, "ENCODER_BLOCKS": 1}.items():
        monkeypatch.setattr(unet, name, value)


def archive_of_cifar10(place: Path, monkeypatch) -> bytes:
    """What lies in `place` as the archive that CIFAR-10 is published as, in torchvision's table."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        archive.add(place, CIFAR_FOLDER)
    content = file.getvalue()
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(content).hexdigest())
    return content
