"""Data sets: what each is made of, and what is refused before training starts."""

import contextlib
import hashlib
import os
import pickle
import shutil
from collections import Counter

import numpy as np
import pytest
import standins
import torch
from commands import ROOT, run
from loading import batches_of, data_of
from PIL import Image

import support.data.datasets
import train
from config import config_from_dict
from support.data.batches import BatchPlan
from support.data.datasets import (
    DataRequest,
    DataSet,
    PixelData,
    build_data,
    compare_data,
    count_classes,
    digits_split,
    list_pictures,
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


def refusal(config):
    with pytest.raises(UserError) as caught:
        data_of(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def first_steps(config, data):
    return batches_of(config, data, BatchPlan(4, 3, 1, 1))


# Digits.


def test_split_of_the_digits_is_fixed_and_disjoint():
    split = digits_split()
    assert split.training_pixels.shape == (1197, 8, 8, 1)
    assert split.held_out_pixels.shape == (600, 8, 8, 1)
    digest = hashlib.sha256(b"".join(array.tobytes() for array in split))
    assert digest.hexdigest() == "8264a8e50e2102390e2c09b3018a37a6961705131b3d51460f22262a0d10148e"
    # Some of the digits look the same pixel for pixel; as a multiset the halves are the whole.
    from sklearn.datasets import load_digits

    whole = np.round(load_digits().images * (255 / 16)).astype(np.uint8).reshape(1797, 64)
    halves = np.concatenate([split.training_pixels, split.held_out_pixels]).reshape(1797, 64)
    assert sorted(map(bytes, whole)) == sorted(map(bytes, halves))


def test_digits_are_grey_images_from_black_to_white():
    data = data_of(config_of("Digits"))
    assert data.spec.to_dict() == {
        "channels": 1,
        "size": 8,
        "num_classes": 10,
        "class_names": [*"0123456789"],
        "num_examples": 1197,
    }
    raw = data[[5, 0, 5]]
    assert raw.stored.shape == (3, 1, 8, 8)
    assert torch.equal(raw.stored[0], raw.stored[2])
    np.testing.assert_array_equal(raw.stored[1, 0], digits_split().training_pixels[0, :, :, 0])
    images = data.clean(data[range(1197)].stored, torch.Generator())
    assert images.dtype == torch.float32
    assert images.aminmax() == (-1, 1)


# CIFAR-10.


def test_cifar10_is_bytes_in_memory_with_channels_first(tmp_path, monkeypatch):
    pixels = standins.write_cifar10(tmp_path, monkeypatch)
    data = data_of(config_of("CIFAR10", tmp_path))
    assert data.spec.shape == (3, 32, 32)
    assert data.spec.class_names == standins.CIFAR_NAMES
    assert data.pixels.dtype == torch.uint8
    assert data.pixels.is_contiguous()
    np.testing.assert_array_equal(data.pixels.permute(0, 2, 3, 1), pixels)
    raw = data[[49, 3]]
    np.testing.assert_array_equal(raw.stored[0].permute(1, 2, 0), pixels[49])
    assert raw.labels.tolist() == [9, 3]
    assert raw.labels.dtype == torch.int64


def test_damaged_cifar10_is_refused_with_its_file(tmp_path, monkeypatch):
    standins.write_cifar10(tmp_path, monkeypatch)
    path = tmp_path / standins.CIFAR_FOLDER / "data_batch_4"
    path.write_bytes(path.read_bytes()[:-1])
    assert refusal(config_of("CIFAR10", tmp_path)).startswith(f"{path}: not the published file")


# Folders of pictures.


@pytest.fixture(scope="session")
def photographs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photographs")
    standins.write_image_folder(folder)
    return folder


def test_folder_alone_makes_a_data_set(photographs):
    data = data_of(config_of("ImageFolder", photographs))
    assert data.spec.shape == (3, 16, 16)
    assert data.spec.class_names == ("cat", "china", "cup", "flower")
    assert len(data) == data.spec.num_examples == 24
    raw = data[[23, 0]]
    assert raw.labels.tolist() == [3, 0]
    assert raw.stored.dtype == torch.uint8
    assert raw.stored.is_contiguous()
    expected = read_image(photographs / "flower" / "5.jpg", 16)
    np.testing.assert_array_equal(raw.stored[0].permute(1, 2, 0), expected)
    assert count_classes(config_of("ImageFolder", photographs).data_request()) == 4


def test_every_kind_of_picture_becomes_rgb_of_one_size(tmp_path):
    photograph = Image.fromarray(standins.photographs()["cat"])
    kinds = {
        "grey.png": photograph.convert("L").crop((0, 0, 90, 50)),
        "palette.png": photograph.convert("P").crop((0, 0, 40, 41)),
        "alpha.webp": photograph.convert("RGBA").crop((0, 0, 16, 16)),
        "small.jpg": photograph.crop((0, 0, 9, 12)),
        "deep/print.TIFF": photograph.convert("CMYK").crop((0, 0, 33, 17)),
    }
    for name, picture in kinds.items():
        (tmp_path / "cat" / name).parent.mkdir(parents=True, exist_ok=True)
        picture.save(tmp_path / "cat" / name)
    (tmp_path / "cat" / "notes.txt").write_text("not a picture, and not named like one")
    data = data_of(config_of("ImageFolder", tmp_path))
    raw = data[list(range(5))]
    assert raw.stored.shape == (5, 3, 16, 16)
    alpha, grey = raw.stored[0], raw.stored[1]
    np.testing.assert_array_equal(
        alpha.permute(1, 2, 0), np.asarray(Image.open(tmp_path / "cat/alpha.webp").convert("RGB"))
    )
    assert torch.equal(grey[0], grey[1])
    assert torch.equal(grey[0], grey[2])


@pytest.mark.parametrize(
    ("names", "in_order"),
    [(["10", "2", "0"], ("0", "2", "10")), (["10", "2", "b"], ("10", "2", "b"))],
)
def test_classes_are_numeric_only_if_all_names_are(tmp_path, names, in_order):
    for level, name in enumerate(names):
        (tmp_path / name).mkdir()
        Image.new("RGB", (16, 16), (level, 0, 0)).save(tmp_path / name / "a.png")
    data = data_of(config_of("ImageFolder", tmp_path, batch_size=3))
    assert data.spec.class_names == in_order
    raw = data[[0, 1, 2]]
    assert raw.labels.tolist() == [0, 1, 2]
    assert raw.stored[:, 0, 0, 0].tolist() == [names.index(name) for name in in_order]


def test_names_that_are_not_text_are_read(tmp_path):
    folder = tmp_path / "caf\udce9"
    folder.mkdir()
    Image.new("RGB", (16, 16)).save(folder / "\udcff.png")
    data = data_of(config_of("ImageFolder", tmp_path, batch_size=1, velocity_loss_ratio=0))
    assert data[[0]].stored.shape == (1, 3, 16, 16)


def test_files_that_are_no_pictures_are_named_at_the_start(photographs, tmp_path):
    standins.write_image_folder(tmp_path / "photographs")
    folder = tmp_path / "photographs"
    (folder / "cat" / "page.jpg").write_text("<html>not found</html>")
    (folder / "cup" / "empty.png").touch()
    (folder / "cup" / "link.png").symlink_to(folder / "absent.png")
    said = refusal(config_of("ImageFolder", folder))
    for name in ("cat/page.jpg", "cup/empty.png", "cup/link.png"):
        assert f"{folder / name}: not a readable picture (" in said
    assert said.count("not a readable picture") == 3


def test_of_very_many_files_that_are_no_pictures_five_are_named(tmp_path):
    (tmp_path / "cat").mkdir()
    for number in range(2000):
        (tmp_path / "cat" / f"{number}.jpg").touch()
    assert refusal(config_of("ImageFolder", tmp_path)).count("not a readable picture") == 5


@pytest.mark.parametrize("num_workers", [0, 2])
def test_picture_damaged_further_on_is_named_when_its_batch_comes(tmp_path, num_workers):
    standins.write_image_folder(tmp_path, per_class=2)
    path = tmp_path / "cup" / "broken.png"
    Image.fromarray(standins.photographs()["cup"]).save(path)
    path.write_bytes(path.read_bytes()[:5000])
    config = config_of(
        "ImageFolder", tmp_path, num_workers=num_workers, prefetch_factor=num_workers or None
    )
    data = data_of(config)
    go_on = "--set skip_bad=true --allow-changed data$"
    with pytest.raises(UserError, match=f"^{path}: not a readable picture [^\n]*{go_on}"):
        list(first_steps(config, data))


def test_small_folders_are_decoded_once_and_large_ones_are_not_kept(photographs, monkeypatch):
    read = []
    monkeypatch.setattr(
        support.data.datasets,
        "read_image",
        lambda path, *how: read.append(path) or read_image(path, *how),
    )
    data = data_of(config_of("ImageFolder", photographs))
    first, second = data[[3, 8, 3]], data[[8, 3, 3]]
    assert len(read) == 2
    assert torch.equal(first.stored, second.stored[[1, 0, 2]])
    monkeypatch.setattr(support.data.datasets, "KEPT_BYTES", 24 * 3 * 16**2 - 1)
    data = data_of(config_of("ImageFolder", photographs))
    assert torch.equal(data[[3, 8, 3]].stored, first.stored)
    assert len(read) == 5


def damage(*paths):
    """Cut pictures short, far enough in to begin as pictures do."""
    for path in paths:
        path.write_bytes(path.read_bytes()[:500])


def test_every_picture_is_checked_on_request_and_the_bad_ones_are_named(tmp_path):
    standins.write_image_folder(tmp_path)
    config = config_of("ImageFolder", tmp_path)
    assert "checked: 24 examples can be read" in data_of(config, check_data=True).notes
    damage(*(tmp_path / "cup").iterdir(), tmp_path / "cat" / "3.jpg")
    data_of(config)
    with pytest.raises(UserError) as caught:
        data_of(config, check_data=True)
    said = str(caught.value)
    assert said.startswith(f"7 of 24 pictures cannot be read: {tmp_path / 'cat' / '3.jpg'}: not a")
    assert said.count("not a readable picture") == 5
    assert said.endswith(
        "; and 2 more; mend or delete them, or leave them out by --set skip_bad=true"
    )
    assert "\n" not in said


def test_bad_pictures_are_left_out_on_request(tmp_path):
    standins.write_image_folder(tmp_path, per_class=3)
    damage(tmp_path / "cup" / "1.jpg", tmp_path / "cat" / "0.jpg")
    (tmp_path / "china" / "page.jpg").write_text("<html>not found</html>")
    (tmp_path / "flower" / "gone.jpg").symlink_to("nowhere")
    data = data_of(config_of("ImageFolder", tmp_path, skip_bad=True))
    assert data.skipped == ["cat/0.jpg", "china/page.jpg", "cup/1.jpg", "flower/gone.jpg"]
    assert data.notes == [
        "10 examples of 4 classes, in order: cat (2), china (3), cup (2), flower (3)",
        "left out 4 of 14 pictures, which cannot be read: see skipped_images.txt",
        "checked: 10 examples can be read",
    ]
    assert data.labels.tolist() == [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]
    assert data.record()["class_counts"] == [2, 3, 2, 3]
    assert data.record()["num_examples"] == 10
    raw = data[list(range(10))]
    expected = read_image(tmp_path / "cup" / "2.jpg", 16)
    np.testing.assert_array_equal(raw.stored[6].permute(1, 2, 0), expected)


def test_class_that_loses_all_its_pictures_is_refused(tmp_path):
    standins.write_image_folder(tmp_path, per_class=3)
    damage(*(tmp_path / "cup").iterdir())
    said = refusal(config_of("ImageFolder", tmp_path, skip_bad=True))
    assert said == f"{tmp_path / 'cup'}: none of its pictures can be read"


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
    why = support.data.datasets.why_unreadable
    monkeypatch.setattr(
        support.data.datasets, "why_unreadable", lambda path, *how: tried.append(path) or why(path)
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

    def counted(name):
        function = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda *given, **how: calls.update([name]) or function(*given, **how)
        )

    for name in ("scandir", "open", "stat"):
        counted(name)
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
    assert calls["stat"] <= 2 * SIZES_COMPARED + 1  # and of the folder itself
    sizes.clear()
    sent.append(class_folders(tmp_path))
    sizes.append([1])
    with pytest.raises(UserError, match=f"{tmp_path}: process 1 sees other pictures there than"):
        list_pictures(tmp_path, other)


@pytest.mark.parametrize("key", ["skip_bad", "horizontal_flips"])
def test_keys_for_folders_of_pictures_are_refused_elsewhere(key):
    with pytest.raises(UserError, match=f"test: {key}: true is for dataset_type ImageFolder, not"):
        config_of("Digits", **{key: True})


def test_flips_are_not_asked_for_twice(tmp_path):
    values = {"model_type": "UNet", "augment_probability": 0.1, "horizontal_flips": True}
    with pytest.raises(UserError, match="horizontal_flips: true must be false where augment_prob"):
        config_of("ImageFolder", tmp_path, **values)


def test_pictures_of_phones_are_trained_on_upright(tmp_path):
    photograph = Image.fromarray(standins.photographs()["cat"][:40, :60])
    for name, turned, orientation in (("a", 0, 1), ("b", 90, 6)):
        exif = Image.Exif()
        exif[0x0112] = orientation
        (tmp_path / name).mkdir()
        photograph.rotate(turned, expand=True).save(tmp_path / name / "0.png", exif=exif)
    data = data_of(config_of("ImageFolder", tmp_path, batch_size=2))
    assert torch.equal(*data[[0, 1]].stored)


def test_folders_without_classes_or_pictures_are_refused(tmp_path):
    config = config_of("ImageFolder", tmp_path)
    assert "holds no class folders; put the pictures of each class" in refusal(config)
    (tmp_path / "cat").mkdir()
    assert refusal(config).startswith(f"{tmp_path / 'cat'}: holds no pictures")
    absent = config_of("ImageFolder", tmp_path / "absent")
    assert "absent: cannot be read as a folder" in refusal(absent)


# What all have in common.


@pytest.mark.parametrize("dataset_type", ["CIFAR10", "ImageFolder", "Imagenet"])
def test_a_file_in_place_of_a_folder_is_refused(tmp_path, dataset_type):
    (tmp_path / "file").touch()
    request = DataRequest(dataset_type, 32, str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"dataset_path.*/file "):
        build_data(request)


@pytest.mark.parametrize("dataset_type", ["CIFAR10", "ImageFolder"])
@pytest.mark.parametrize("path", [None, ""])
def test_path_that_is_not_set_is_asked_for(dataset_type, path):
    said = refusal(config_of(dataset_type, path))
    assert said.startswith(f"dataset_path: not set; {dataset_type} needs a folder")


def test_data_smaller_than_a_batch_are_refused(photographs):
    said = refusal(config_of("ImageFolder", photographs, batch_size=25))
    assert said == (
        f"batch_size: 25 is more than the 24 examples of {photographs}; lower it: "
        "--set batch_size=24 at most"
    )


@pytest.mark.parametrize("label", [-1, 3])
def test_label_out_of_range_is_refused_before_it_reaches_a_device(monkeypatch, label):
    data = PixelData(
        torch.zeros(5, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 1, 2, 0, label]), (*"abc",)
    )
    monkeypatch.setitem(support.data.datasets.DATASETS, "Digits", DataSet(1, 3, lambda _: data))
    said = refusal(config_of("Digits"))
    assert said == f"Digits: has a label {label}; its 3 classes go from 0 to 2"


# In training.


def options(folder, path, *flags, **values):
    settings = {
        "working_dir": folder,
        "dataset_type": "ImageFolder",
        "dataset_path": path,
        "data_size": 16,
        "model_type": "DiT-Nano-4",
        "total_steps": 2,
        "batch_size": 8,
        "num_workers": 2,
        "eval_demo_steps": 2,
        "eval_demo_shape": "[4, 2]",
        "eval_steps": 0,
        **values,
    }
    flags += tuple(f"--set={key}={value}" for key, value in settings.items())
    return ["--config", str(ROOT / "configs" / "digits.yaml"), *flags]


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
    with pytest.raises(UserError, match="trained on other data: other names or sizes of pictures;"):
        train.main(again)
    train.main([*again, "--allow-changed=data"])
    assert "data changed: other names or sizes of pictures" in (run / "log.txt").read_text()


@pytest.mark.parametrize("place", ["", "run", "cat/run", "./run/../run"])
def test_results_cannot_lie_among_the_classes(photographs, place):
    with pytest.raises(UserError, match=r"working_dir: .* lies in dataset_path, where every fol"):
        train.main(options(photographs / place, photographs))
    for elsewhere in (photographs / ".runs" / "x", photographs.parent / "photographs-run"):
        refuse_start(config_of("ImageFolder", photographs, working_dir=str(elsewhere)))


def test_a_class_that_is_held_out_as_a_whole_is_named(tmp_path):
    standins.write_image_folder(tmp_path, per_class=5)
    (tmp_path / "alone").mkdir()
    shutil.copy(tmp_path / "cat" / "0.jpg", tmp_path / "alone")
    said = [
        data_of(config_of("ImageFolder", tmp_path, held_out=12, seed=seed)).notes
        for seed in range(5)
    ]
    named = ["held out: all images of alone: no step trains" in " ".join(notes) for notes in said]
    assert True in named and False in named


def test_photographs_train_to_a_grid_and_their_classes_are_recorded(photographs, tmp_path):
    train.main(options(tmp_path, photographs))
    assert (tmp_path / "figs" / "2.png").exists()
    checkpoint = torch.load(tmp_path / "ckpts" / "2.pt", weights_only=True)
    assert checkpoint["data"]["class_names"] == ["cat", "china", "cup", "flower"]
    assert checkpoint["data"]["channels"] == 3
    table = checkpoint["model"]["network.y_embedder.embedding_table.weight"]
    assert len(table) == 4 + 1, "the classes and the null class"


def test_bad_picture_met_on_the_way_is_left_out_when_that_is_agreed_to(tmp_path, capsys):
    folder, run_folder = tmp_path / "photographs", tmp_path / "run"
    standins.write_image_folder(folder)
    train.main(options(run_folder, folder, total_steps=4, ckpt_saving_steps=2, num_workers=0))
    (run_folder / "ckpts" / "4.pt").unlink()
    damage(folder / "cup" / "0.jpg")
    skip = options(run_folder, folder, total_steps=4, skip_bad="true", num_workers=0)
    with pytest.raises(
        UserError, match=r"num_examples 24 then, 23 now; .*--allow-changed data con"
    ):
        train.main(skip)
    train.main([*skip, "--allow-changed", "data"])
    log = (run_folder / "log.txt").read_text()
    assert "23 examples of 4 classes, in order: cat (6), china (6), cup (5), flower (6)" in log
    assert "left out 1 of 24 pictures, which cannot be read: see skipped_images.txt" in log
    assert "data changed: num_examples 24 then, 23 now; class_counts" in log
    assert (run_folder / "skipped_images.txt").read_text() == "cup/0.jpg\n"
    checkpoint = torch.load(run_folder / "ckpts" / "4.pt", weights_only=True)
    assert checkpoint["data"]["class_counts"] == [6, 6, 5, 6]


def test_other_data_are_refused_and_other_classes_whatever_is_allowed():
    before = {"channels": 3, "class_names": ["a", "b"], "num_examples": 4, "class_counts": [2, 2]}
    fewer = {**before, "num_examples": 3, "class_counts": [2, 1]}
    renamed = {**fewer, "class_names": ["a", "c"]}
    assert compare_data(before, before, "1.pt", False) == []
    older = {key: before[key] for key in ("channels", "class_names", "num_examples")}
    assert compare_data(older, before, "1.pt", False) == []
    said = "1.pt: trained on other data: num_examples 4 then, 3 now"
    with pytest.raises(UserError, match=f"^{said}.*; --allow-changed data continues"):
        compare_data(before, fewer, "1.pt", False)
    (line,) = compare_data(before, fewer, "1.pt", True)
    assert line.startswith("data changed: num_examples 4 then, 3 now; class_counts ")
    for is_allowed in (True, False):
        with pytest.raises(
            UserError, match=r"class_names \['a', 'b'\] then, .*now; .* another working_dir"
        ):
            compare_data(before, renamed, "1.pt", is_allowed)


def test_dry_run_looks_up_the_classes_of_a_folder(photographs, tmp_path, capsys):
    train.main(options(tmp_path / "run", photographs, "--dry-run"))
    four = capsys.readouterr().out
    assert "DiT-Nano-4, " in four
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="dataset_path: not set; ImageFolder needs a folder"):
        train.main(options(tmp_path / "run", "null", "--dry-run"))


@pytest.mark.slow
def test_unreadable_picture_ends_training_in_one_line(tmp_path):
    standins.write_image_folder(tmp_path / "photographs", per_class=2)
    path = tmp_path / "photographs" / "cup" / "0.jpg"
    path.write_bytes(path.read_bytes()[:300])
    ended = run("train.py", *options(tmp_path / "run", tmp_path / "photographs", total_steps=20))
    assert ended.returncode == 1
    assert ended.stderr.startswith(f"error: {path}: not a readable picture (")
    assert ended.stderr.count("\n") == 1


def test_a_run_of_a_time_when_pictures_were_not_turned_is_told_that_they_are_now():
    before = {"channels": 3, "class_names": ["a", "b"], "num_examples": 4}
    notes = compare_data(before, {**before, "exif": "apply"}, "1.pt", is_allowed=False)
    assert notes == ["pictures are turned upright by their EXIF data from here on"]
    assert compare_data(before, before, "1.pt", is_allowed=False) == []
