"""Data sets: what each is made of, and what is refused before training starts."""

import contextlib
import functools
import hashlib
import os
import pickle
import shutil
from collections import Counter

import numpy as np
import pytest
import standins
import torch
from commands import digits_settings
from loading import batches_of, data_of
from PIL import Image
from refusals import refusal

import train
from config import config_from_dict
from support.data import datasets, digits
from support.data.batches import BatchPlan
from support.data.build import build_data, compare_data
from support.data.datasets import (
    DATASETS,
    DataRequest,
    DataSet,
    PixelData,
    list_pictures,
    outline,
)
from support.data.folders import SIZES_COMPARED, class_folders
from support.data.images import read_image
from support.system.files import UserError
from support.system.processes import Processes
from training.identity import refuse_start


def config_of(dataset_type, path=None, **values):
    sizes = {"Digits": 8, "CIFAR10": 32, "ImageFolder": 16}
    return config_from_dict(
        {
            "working_dir": "x",
            "model_type": "DiT-Nano-4",
            "dataset_type": dataset_type,
            "dataset_path": None if path is None else str(path),
            "data_size": sizes[dataset_type],
            "batch_size": 4,
            "total_steps": 8,
            "num_workers": 0,
            **values,
        },
        "test",
    )


# Digits.


def test_halves_of_the_digits_are_fixed_and_disjoint():
    training, held_out = digits.load_training_set(), digits.load_test_set()
    digest = hashlib.sha256(b"".join(array.tobytes() for array in (*training, *held_out)))
    assert digest.hexdigest() == "8264a8e50e2102390e2c09b3018a37a6961705131b3d51460f22262a0d10148e"
    # Some of the digits look the same pixel for pixel; as a multiset the halves are the whole.
    from sklearn.datasets import load_digits

    whole = np.round(load_digits().images * (255 / 16)).astype(np.uint8).reshape(1797, 64)
    halves = np.concatenate([training.pixels, held_out.pixels]).reshape(1797, 64)
    assert sorted(map(bytes, whole)) == sorted(map(bytes, halves))


def test_digits_are_grey_images_from_black_to_white():
    data = data_of(config_of("Digits"))
    assert (*data.spec.shape, data.spec.num_examples) == (1, 8, 8, 1197)
    assert data.spec.class_names == tuple("0123456789")
    np.testing.assert_array_equal(data.pixels[:, 0], digits.load_training_set().pixels[..., 0])
    images = data.clean(data[range(1197)].stored, torch.Generator())
    assert images.dtype == torch.float32
    assert images.aminmax() == (-1, 1)


# Folders of pictures.


@pytest.fixture(scope="session")
def photographs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photographs")
    standins.write_image_folder(folder)
    return folder


def damage(*paths):
    """Cut pictures short, far enough in to begin as pictures do."""
    for path in paths:
        path.write_bytes(path.read_bytes()[:500])


def test_folder_alone_makes_a_data_set(photographs):
    data = data_of(config_of("ImageFolder", photographs))
    assert data.spec.to_dict() == {
        "channels": 3,
        "size": 16,
        "num_classes": 4,
        "class_names": ["cat", "china", "cup", "flower"],
        "num_examples": 24,
    }
    raw = data[[23, 0]]
    assert raw.labels.tolist() == [3, 0]
    assert raw.stored.dtype == torch.uint8
    expected = read_image(photographs / "flower" / "5.jpg", 16)
    np.testing.assert_array_equal(raw.stored[0].permute(1, 2, 0), expected)
    assert outline(config_of("ImageFolder", photographs).data_request()).num_classes == 4


def test_files_that_are_no_pictures_are_named_at_the_start(tmp_path):
    standins.write_image_folder(tmp_path)
    (tmp_path / "cat" / "page.jpg").write_text("<html>not found</html>")
    (tmp_path / "cup" / "empty.png").touch()
    (tmp_path / "cup" / "link.png").symlink_to(tmp_path / "absent.png")
    said = refusal(data_of, config_of("ImageFolder", tmp_path))
    for name in ("cat/page.jpg", "cup/empty.png", "cup/link.png"):
        assert str(tmp_path / name) in said
    assert said.count(str(tmp_path)) == 3


@pytest.mark.parametrize("num_workers", [0, 2])
def test_picture_damaged_further_on_is_named_when_its_batch_comes(tmp_path, num_workers):
    standins.write_image_folder(tmp_path, per_class=2)
    path = tmp_path / "cup" / "broken.png"
    Image.fromarray(standins.photographs()["cup"]).save(path)
    path.write_bytes(path.read_bytes()[:5000])
    workers = {"num_workers": num_workers, "prefetch_factor": num_workers or None}
    config = config_of("ImageFolder", tmp_path, **workers)
    batches = batches_of(config, data_of(config), BatchPlan(4, 3, 1, 1))
    said = refusal(list, batches)
    for named in (str(path), "--set skip_bad=true", "--allow-changed data"):
        assert named in said


def test_small_folders_are_decoded_once_and_large_ones_are_not_kept(photographs, monkeypatch):
    read = []
    monkeypatch.setattr(
        datasets, "read_image", lambda path, *how: read.append(path) or read_image(path, *how)
    )
    data = data_of(config_of("ImageFolder", photographs))
    first, second = data[[3, 8, 3]], data[[8, 3, 3]]
    assert len(read) == 2
    assert torch.equal(first.stored, second.stored[[1, 0, 2]])
    monkeypatch.setattr(datasets, "KEPT_BYTES", 24 * 3 * 16**2 - 1)
    data = data_of(config_of("ImageFolder", photographs))
    assert torch.equal(data[[3, 8, 3]].stored, first.stored)
    assert len(read) == 5


def test_every_picture_is_checked_on_request_and_the_bad_ones_are_named(tmp_path, capsys):
    standins.write_image_folder(tmp_path)
    config = config_of("ImageFolder", tmp_path)
    assert "24 examples" in data_of(config, check_data=True).notes[-1]
    assert "24 examples" in capsys.readouterr().out, "said before it starts"
    damage(*(tmp_path / "cup").iterdir(), tmp_path / "cat" / "3.jpg")
    data_of(config)
    said = refusal(data_of, config, check_data=True)
    assert said.startswith(f"7 of 24 pictures cannot be read: {tmp_path / 'cat' / '3.jpg'}: ")
    assert said.count(str(tmp_path)) == 5
    assert "2 more" in said
    assert "--set skip_bad=true" in said


def test_bad_pictures_are_left_out_on_request(tmp_path):
    standins.write_image_folder(tmp_path, per_class=3)
    damage(tmp_path / "cup" / "1.jpg", tmp_path / "cat" / "0.jpg")
    (tmp_path / "china" / "page.jpg").write_text("<html>not found</html>")
    (tmp_path / "flower" / "gone.jpg").symlink_to("nowhere")
    data = data_of(config_of("ImageFolder", tmp_path, skip_bad=True))
    assert data.skipped == ["cat/0.jpg", "china/page.jpg", "cup/1.jpg", "flower/gone.jpg"]
    described, left_out, checked = data.notes
    assert "cat (2), china (3), cup (2), flower (3)" in described
    assert "4 of 14 pictures" in left_out and "skipped_images.txt" in left_out
    assert "10 examples" in checked
    assert data.labels.tolist() == [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]
    record = data.record()
    assert (record["class_counts"], record["num_examples"]) == ([2, 3, 2, 3], 10)
    assert "files_sha256" in record
    expected = read_image(tmp_path / "cup" / "2.jpg", 16)
    np.testing.assert_array_equal(data[[6]].stored[0].permute(1, 2, 0), expected)
    damage(*(tmp_path / "cup").iterdir())
    said = refusal(data_of, config_of("ImageFolder", tmp_path, skip_bad=True))
    assert str(tmp_path / "cup") in said, "a class that loses all its pictures"


def test_processes_check_a_share_each_and_come_to_one_list(tmp_path, monkeypatch):
    standins.write_image_folder(tmp_path, per_class=3)
    damage(tmp_path / "cup" / "1.jpg", tmp_path / "cat" / "0.jpg")
    found, tried = {}, []
    files = class_folders(tmp_path)
    monkeypatch.setattr(Processes, "broadcast_object", lambda own, value: value or files)
    monkeypatch.setattr(
        Processes,
        "gather",
        lambda own, value: found.update(value) or [value] if isinstance(value, dict) else [value],
    )
    why = datasets.why_unreadable
    monkeypatch.setattr(
        datasets, "why_unreadable", lambda path, *how: tried.append(path) or why(path)
    )
    config = config_of("ImageFolder", tmp_path)
    for rank in range(5):
        with pytest.raises(UserError) if rank in (0, 3) else contextlib.nullcontext():
            data_of(config, Processes(rank, rank, 5, torch.device("cpu")), check_data=True)
    assert sorted(found) == [0, 7]
    assert len(tried) == len(set(tried)) == 12


def test_the_main_process_alone_lists_and_opens_pictures(tmp_path, monkeypatch):
    standins.write_image_folder(tmp_path, per_class=40)
    calls = Counter()

    def counted(function, *given, **how):
        calls.update([function.__name__])
        return function(*given, **how)

    for name in ("scandir", "open", "stat"):
        monkeypatch.setattr(os, name, functools.partial(counted, getattr(os, name)))
    main, other = (Processes(rank, rank, 2, torch.device("cpu")) for rank in range(2))
    sent, sizes = [], []
    monkeypatch.setattr(
        Processes,
        "broadcast_object",
        lambda own, value: (sent.append(value) or value) if own.is_main else sent.pop(0),
    )
    monkeypatch.setattr(Processes, "gather", lambda own, value: sizes.append(value) or sizes)
    config = config_of("ImageFolder", tmp_path)
    data_of(config, main)
    assert calls["scandir"] >= 5
    assert calls["open"] == 160
    calls.clear()
    sent[0] = pickle.loads(pickle.dumps(sent[0]))
    data_of(config, other)
    assert calls["scandir"] == 1, "of dataset_path itself"
    assert calls["open"] == 0
    assert calls["stat"] <= 2 * SIZES_COMPARED
    sizes.clear()
    sent.append(class_folders(tmp_path))
    sizes.append([1])
    assert "process 1" in refusal(list_pictures, tmp_path, other)


@pytest.mark.parametrize(
    ("dataset_type", "values"),
    [
        ("Digits", {"skip_bad": True}),
        ("Digits", {"horizontal_flips": True}),
        (
            "ImageFolder",
            {"horizontal_flips": True, "model_type": "UNet", "augment_probability": 0.1},
        ),
    ],
)
def test_keys_for_folders_are_refused_elsewhere_and_flips_twice(dataset_type, values):
    assert f"test: {next(iter(values))}: true" in refusal(config_of, dataset_type, "x", **values)


# What all have in common.


@pytest.mark.parametrize("dataset_type", ["CIFAR10", "FashionMNIST", "ImageFolder", "Imagenet"])
def test_a_dataset_path_that_is_a_file_or_not_set_is_refused(tmp_path, dataset_type):
    (tmp_path / "file").touch()
    for path in (str(tmp_path / "file"), None, ""):
        said = refusal(build_data, DataRequest(dataset_type, 32, path))
        assert said.startswith("dataset_path: ")
        assert (path or dataset_type) in said


def test_data_smaller_than_a_batch_are_refused(photographs):
    said = refusal(data_of, config_of("ImageFolder", photographs, batch_size=25))
    for named in ("batch_size: 25", str(photographs), "--set batch_size=24"):
        assert named in said


@pytest.mark.parametrize("label", [-1, 3])
def test_label_out_of_range_is_refused_before_it_reaches_a_device(monkeypatch, label):
    data = PixelData(
        torch.zeros(5, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 1, 2, 0, label]), (*"abc",)
    )
    monkeypatch.setitem(DATASETS, "Digits", DataSet(1, 3, lambda _: data))
    assert f"Digits: has a label {label};" in refusal(data_of, config_of("Digits"))


def test_other_data_are_refused_and_other_classes_whatever_is_allowed():
    before = {"channels": 3, "class_names": ["a", "b"], "num_examples": 4, "class_counts": [2, 2]}
    fewer = {**before, "num_examples": 3, "class_counts": [2, 1]}
    renamed = {**fewer, "class_names": ["a", "c"]}
    assert compare_data(before, before, "1.pt", False) == []
    older = {key: before[key] for key in ("channels", "class_names", "num_examples")}
    assert compare_data(older, before, "1.pt", False) == []
    said = refusal(compare_data, before, fewer, "1.pt", False)
    for named in ("1.pt: ", "num_examples 4 then, 3 now", "--allow-changed data"):
        assert named in said
    (line,) = compare_data(before, fewer, "1.pt", True)
    assert "num_examples 4 then, 3 now; class_counts " in line
    for is_allowed in (True, False):
        said = refusal(compare_data, before, renamed, "1.pt", is_allowed)
        assert "class_names ['a', 'b'] then" in said
        assert "working_dir" in said
    (line,) = compare_data(before, {**before, "exif": "apply"}, "1.pt", is_allowed=False)
    assert "EXIF" in line, "a run of a time when pictures were not turned is told that they are now"


# In training.


def options(folder, path, *flags, **values):
    values = {"total_steps": 2, "num_workers": 2, "data_size": 16, "batch_size": 8, **values}
    values |= {"dataset_type": "ImageFolder", "dataset_path": path, "model_type": "DiT-Nano-4"}
    values |= {"eval_demo_steps": 2, "eval_demo_shape": "[4, 2]"}
    return [*digits_settings(folder, **values), *flags]


@pytest.mark.parametrize("change", ["renamed", "replaced", "swapped"])
def test_other_pictures_of_the_same_number_are_refused_until_they_are_allowed(tmp_path, change):
    folder, run = tmp_path / "photographs", tmp_path / "run"
    standins.write_image_folder(folder, per_class=5)
    train.main(options(run, folder, total_steps=1))
    cat, cup = folder / "cat" / "0.jpg", folder / "cup" / "0.jpg"
    one, other = cat.read_bytes(), cup.read_bytes()
    if change == "renamed":
        cat.rename(folder / "cat" / "zz.jpg")
    else:
        cat.write_bytes(other + b"." * (len(one) == len(other)))
        if change == "swapped":
            cup.write_bytes(one)
    again = options(run, folder, "--allow-changed=total_steps", total_steps=2)
    assert "--allow-changed data" in refusal(train.main, again)
    train.main([*again, "--allow-changed=data"])
    assert "other names or sizes" in (run / "log.txt").read_text()


@pytest.mark.parametrize("place", ["", "run", "cat/run", "./run/../run"])
def test_results_cannot_lie_among_the_classes(photographs, place):
    said = refusal(train.main, options(photographs / place, photographs))
    assert said.startswith("working_dir: ")
    assert "dataset_path" in said
    for elsewhere in (photographs / ".runs" / "x", photographs.parent / "photographs-run"):
        refuse_start(config_of("ImageFolder", photographs, working_dir=str(elsewhere)))


def test_a_class_that_is_held_out_as_a_whole_is_named(tmp_path):
    standins.write_image_folder(tmp_path, per_class=5)
    (tmp_path / "alone").mkdir()
    shutil.copy(tmp_path / "cat" / "0.jpg", tmp_path / "alone")
    requests = [config_of("ImageFolder", tmp_path, held_out=12, seed=seed) for seed in range(5)]
    assert {"alone" in " ".join(data_of(one).notes[1:]) for one in requests} == {True, False}


def test_photographs_train_to_a_grid_and_their_classes_are_recorded(photographs, tmp_path):
    train.main(options(tmp_path / "run", photographs))
    assert (tmp_path / "run" / "figs" / "2.png").exists()
    checkpoint = torch.load(tmp_path / "run" / "ckpts" / "2.pt", weights_only=True)
    assert checkpoint["data"]["class_names"] == ["cat", "china", "cup", "flower"]
    assert checkpoint["data"]["channels"] == 3
    table = checkpoint["model"]["network.y_embedder.embedding_table.weight"]
    assert len(table) == 4 + 1, "the classes and the null class"


def test_bad_picture_met_on_the_way_is_left_out_when_that_is_agreed_to(tmp_path):
    folder, run_folder = tmp_path / "photographs", tmp_path / "run"
    standins.write_image_folder(folder)
    train.main(options(run_folder, folder, total_steps=4, ckpt_saving_steps=2, num_workers=0))
    (run_folder / "ckpts" / "4.pt").unlink()
    damage(folder / "cup" / "0.jpg")
    skip = options(run_folder, folder, total_steps=4, skip_bad="true", num_workers=0)
    assert "num_examples 24 then, 23 now" in refusal(train.main, skip)
    train.main([*skip, "--allow-changed", "data"])
    assert "num_examples 24 then, 23 now; class_counts" in (run_folder / "log.txt").read_text()
    assert (run_folder / "skipped_images.txt").read_text() == "cup/0.jpg\n"
    checkpoint = torch.load(run_folder / "ckpts" / "4.pt", weights_only=True)
    assert checkpoint["data"]["class_counts"] == [6, 6, 5, 6]
