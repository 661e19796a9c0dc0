"""Folders of pictures: what is listed, in which order, and what is said of the rest."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from commands import ROOT
from refusals import refusal

from support.data import folders
from support.data.folders import class_folders, describe_classes, find_pictures, sizes_of_pictures


def make_files(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


# Order.


@pytest.mark.parametrize("in_order", [["0", "01", "2", "10"], ["10", "2", "x"]])
def test_classes_are_in_numerical_order_where_every_name_is_an_integer(tmp_path, in_order):
    make_files(tmp_path, *(f"{name}/{number}.png" for name in in_order for number in (9, 10)))
    files = class_folders(tmp_path)
    assert files.class_names == in_order
    assert files.labels.tolist() == [label for label in range(len(in_order)) for _ in (0, 1)]
    listed = [f"{tmp_path}/{name}/{number}.png" for name in in_order for number in (10, 9)]
    assert list(files) == [files[index] for index in range(len(files))] == listed


def test_pictures_below_a_folder_come_folder_by_folder_without_hidden_names(tmp_path):
    make_files(tmp_path, "b.png", "a/2.png", "a/1.PNG", "a/deep/0.png", "c.jpg", ".git/x.png")
    make_files(tmp_path, "._b.png")
    names = ["b.png", "c.jpg", "a/1.PNG", "a/2.png", "a/deep/0.png"]
    assert find_pictures(tmp_path).paths == [f"{tmp_path}/{name}" for name in names]


def test_names_that_are_no_text_are_listed_and_opened(tmp_path):
    make_files(tmp_path, "caf\udce9/\udcff.png", "caf\udce9/日本.png")
    assert list(class_folders(tmp_path).sizes()) == [0, 0]


# What is left out.


def test_files_that_are_not_read_are_counted_by_ending(tmp_path):
    make_files(tmp_path, "a/1.png", "b/1.png", "b/2.HEIC", "b/3.heic", "b/deep/x.mov", "b/README")
    make_files(tmp_path, "b/.DS_Store", "b/.git/x.heic", "labels.csv", "elsewhere/1.png")
    make_files(tmp_path, "a/a\n.\x1b[31m")
    (tmp_path / "a" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "linked").symlink_to(tmp_path / "elsewhere")  # a class like any other
    files = class_folders(tmp_path)
    assert files.labels.tolist() == [0, 1, 2, 3]
    (note,) = files.notes
    assert note.isprintable()
    for said in ("7 files", "2 .heic", "1 .?[31m", "1 .csv", "1 .mov", "1 linked"):
        assert said in note
    (tmp_path / "b" / "1.png").unlink()
    said = refusal(class_folders, tmp_path)
    assert str(tmp_path / "b") in said and "2 .heic" in said


def test_classes_are_described_in_one_line_however_many(tmp_path):
    few = describe_classes(["cat", "b\n\udcff"], [3, 1])
    assert few == "4 examples of 2 classes, in order: cat (3), b?? (1)"
    many = describe_classes([f"n{k:08}" for k in range(1000)], [1300] * 1000)
    assert "1300000 examples of 1000 classes, in order: n00000000 (1300), " in many
    assert "n00000999 (1300)" in many
    assert len(many) < 150


def test_folders_without_classes_or_pictures_are_named(tmp_path):
    assert str(tmp_path) in refusal(class_folders, tmp_path)
    (tmp_path / "cat").mkdir()
    assert str(tmp_path / "cat") in refusal(class_folders, tmp_path)
    assert str(tmp_path / "absent") in refusal(find_pictures, tmp_path / "absent")


# One level too high.


@pytest.mark.parametrize(
    ("names", "meant"),
    [
        (["train/cat/1.png", "test/cat/1.png"], "train"),
        (["val/cat/1.png", "val/dog/1.png", "Train/cat/1.png", "Train/dog/1.png"], "Train"),
        (["train/cat/1.png", "train/dog/1.png", "samples/1.png"], "train"),
        (["train/cat/1.png"], "train"),
    ],
)
def test_the_folder_above_the_classes_is_refused_and_theirs_is_named(tmp_path, names, meant):
    make_files(tmp_path, *names)
    assert str(tmp_path / meant) in refusal(class_folders, tmp_path)
    class_folders(tmp_path / meant)


def test_classes_made_of_folders_alone_are_named_with_what_may_have_been_meant(tmp_path):
    make_files(tmp_path, "dog/beagle/1.png", "dog/poodle/1.png", "cat/1.png", "cat/old/2.png")
    make_files(tmp_path, "train/images/1.png", "train/boxes.txt")
    files = class_folders(tmp_path)
    assert files.class_names == ["cat", "dog", "train"]
    note = files.notes[0]
    assert "dog (beagle, poodle)" in note and str(tmp_path / "dog") in note
    assert "cat" not in note and "train" not in note
    for number in range(9):
        make_files(tmp_path, f"{number}/a/1.png", f"{number}/b/1.png")
    note = class_folders(tmp_path).notes[0]
    assert "4 (a, b)" in note and "5 (a, b)" not in note


# What cannot be listed or followed.


AS_ANOTHER = ("setpriv", "--bounding-set=-dac_override,-dac_read_search")
KINDS = ("ImageFolder", "CIFAR10", "FashionMNIST", "Imagenet")
TRY = f"""
import json, sys
from support.data.build import build_data
from support.data.datasets import DATASETS, DataRequest, outline
from support.data.folders import find_pictures
from support.system.files import UserError
def said(work, *arguments):
    try:
        return work(*arguments) and ""
    except UserError as error:
        return str(error)
def all_said(path):
    asked = [DataRequest(kind, DATASETS[kind].size or 8, path) for kind in {KINDS}]
    counted = [said(find_pictures, path), said(outline, asked[0])]
    return counted + [said(build_data, request) for request in asked]
print(json.dumps({{path: all_said(path) for path in sys.argv[1:]}}))
"""


@pytest.mark.slow
def test_what_another_user_may_not_list_enter_or_read_is_named(tmp_path):
    if shutil.which(AS_ANOTHER[0]) is None or os.geteuid():
        pytest.skip("needs root and setpriv")
    closed = tmp_path / "closed"
    make_files(closed, "1.png")
    data = {name: tmp_path / name for name in ("top", "class", "deep", "class link", "link")}
    for folder in data.values():
        make_files(folder, "cat/1.png", "cat/deep/2.png")
    (data["class link"] / "dog").symlink_to(closed / "dog")
    (data["link"] / "cat" / "3.png").symlink_to(closed / "1.png")
    for name in ("1.png", "deep/2.png"):
        (data["link"] / "cat" / name).write_bytes(b"\x89PNG")
    for folder in (closed, data["top"], data["class"] / "cat", data["deep"] / "cat" / "deep"):
        folder.chmod(0)
    if b"denied" not in subprocess.run([*AS_ANOTHER, "ls", closed], capture_output=True).stderr:
        pytest.skip("setpriv has no effect here")
    command = [*AS_ANOTHER, sys.executable, "-c", TRY, *data.values(), closed / "below"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    said = json.loads(ended.stdout.splitlines()[-1])
    for named, listed in (
        (data["top"], [0, 1, 2, 3, 4, 5]),
        (data["class"] / "cat", [0, 2]),
        (data["deep"] / "cat" / "deep", [0, 2]),
        (data["class link"] / "dog", [1, 2]),
        (data["link"] / "cat" / "3.png", [2]),
        (closed / "below", [0, 1, 2, 3, 4, 5]),
    ):
        (lines,) = (lines for path, lines in said.items() if named.is_relative_to(path))
        for kind in listed:
            assert str(named) in lines[kind] and "\n" not in lines[kind]


@pytest.mark.parametrize("target", ["dog", "other", "nowhere", ".", "..", "../data/cat/.."])
def test_links_among_the_classes_that_lead_nowhere_or_upwards_are_named(tmp_path, target):
    data = tmp_path / "data"
    make_files(data, "cat/1.png")
    (data / "other").symlink_to("dog")
    (data / "dog").symlink_to(target)
    line = refusal(class_folders, data)
    assert str(data / "dog") in line or str(data / "other") in line


def test_links_that_loop_below_a_class_are_no_pictures(tmp_path):
    make_files(tmp_path, "cat/1.png")
    (tmp_path / "cat" / "2.png").symlink_to("2.png")
    (tmp_path / "cat" / "more").symlink_to("more")
    (tmp_path / "cat" / "up").symlink_to("..")
    files = class_folders(tmp_path)
    assert "2 files" in files.notes[0]
    assert str(tmp_path / "cat" / "2.png") in refusal(sizes_of_pictures, files)


# Opening.


def test_files_that_are_no_pictures_are_named_and_no_more_than_five(tmp_path):
    make_files(tmp_path, *(f"cat/{number:04}.jpg" for number in range(2000)))
    line = refusal(sizes_of_pictures, class_folders(tmp_path))
    assert [f"{number:04}.jpg" in line for number in range(6)] == [True] * 5 + [False]


def test_many_items_are_announced_by_a_line_and_few_are_not(tmp_path, monkeypatch, capsys):
    make_files(tmp_path, "cat/1.png", "cat/2.png")
    files = class_folders(tmp_path)
    assert str(tmp_path) in capsys.readouterr().out
    assert len(list(files.sizes())) == 2
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(folders, "MANY", 2)
    assert len(list(files.sizes())) == 2
    assert "2 files" in capsys.readouterr().out
