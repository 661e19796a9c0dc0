"""Pictures in tars, or in tables of rows: the same as in class folders."""

import os
import tarfile
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import standins
from packed_pictures import (
    SOURCES,
    add,
    arrow_table,
    parquet_tables,
    tar_of_folders,
    tar_of_tars,
    tar_shards,
)
from refusals import refusal

from support.data import archives
from support.data.archives import INDEX_FILE
from support.data.build import build_data
from support.data.datasets import DataRequest, outline
from support.data.images import read_image
from support.data.sources import list_source
from support.scores.image_sets import find_images


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    standins.write_image_folder(folder, per_class=5, size=24)
    return folder


def request_of(source, **changes):
    return DataRequest("ImageFolder", 16, str(source), 4, **changes)


# The same pictures.


@pytest.mark.parametrize("form", SOURCES)
def test_a_source_has_the_pictures_and_labels_of_the_class_folders_in_their_order(
    photos, tmp_path, form
):
    source, ours = SOURCES[form](photos, tmp_path), list_source(photos)
    packed = list_source(source)
    assert packed.labels.tolist() == ours.labels.tolist()
    for path, picture in zip(ours, packed, strict=True):
        np.testing.assert_array_equal(read_image(picture), read_image(path))
    has_names = "shards" not in form
    assert packed.class_names == (ours.class_names if has_names else ["0", "1", "2", "3"])
    if form.startswith("tar of"):
        assert packed.digest() == ours.digest()
    else:  # names do not tell the labels
        changed = replace(packed, labels=packed.labels[::-1])
        assert changed.digest() != packed.digest()


@pytest.mark.parametrize("form", SOURCES)
def test_training_and_references_take_pixels_from_any_source(photos, tmp_path, form):
    source = SOURCES[form](photos, tmp_path)
    assert outline(request_of(source)).num_classes == 4
    data, ours = (build_data(request_of(place)) for place in (source, photos))
    assert data[[7, 19]].stored.equal(ours[[7, 19]].stored)
    images, expected = find_images(source), find_images(photos)
    assert images.image_shape == expected.image_shape
    assert np.array_equal(next(images.batches()), next(expected.batches()))


def test_a_tar_in_a_folder_of_its_own_and_a_pattern_are_sources(photos, tmp_path):
    tar_of_folders(photos, tmp_path, prefix="")
    assert len(list_source(tmp_path)) == len(list_source(tmp_path / "p*.tar")) == 20


# The index.


def test_headers_are_read_once_and_again_when_the_tar_changes(photos, tmp_path, monkeypatch):
    source, index = tar_of_tars(photos, tmp_path), tmp_path / "out" / INDEX_FILE
    files = list_source(source, index.parent)
    archives._scan_all.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(tarfile, "TarFile", None)
        again = list_source(source, index.parent)
    assert again.digest() == files.digest() and again.class_names == files.class_names
    index.write_bytes(index.read_bytes()[:200])  # a damaged index is made anew
    assert list_source(source, index.parent).digest() == files.digest()
    os.truncate(source, source.stat().st_size - 15_000)
    assert str(source) in refusal(list_source, source, index.parent)


# Bad input.


@pytest.mark.parametrize("form", [tar_of_folders, tar_of_tars])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.75])
def test_a_tar_cut_short_is_named_with_its_last_entry(photos, tmp_path, form, share):
    source = form(photos, tmp_path)
    with tarfile.open(source) as archive:
        size = int(share * source.stat().st_size)
        last = [entry.name for entry in archive if entry.offset < size][-1]
    os.truncate(source, size)
    line = refusal(list_source, source, tmp_path / "out")
    assert str(source) in line and last in line
    assert not (tmp_path / "out").exists()


def test_a_tar_cut_between_two_entries_is_refused_too(photos, tmp_path):
    source = tar_of_folders(photos, tmp_path)
    with tarfile.open(source) as archive:
        before, cut = archive.getmembers()[3:5]
    os.truncate(source, cut.offset)
    assert before.name in refusal(list_source, source)


def test_a_damaged_picture_is_named_with_its_shard_and_left_out_on_request(photos, tmp_path):
    with tarfile.open(tar_shards(photos, tmp_path) / "photos-0003.tar", "w") as archive:
        add(archive, "bad.png", b"\x89PNG and then nothing")
        add(archive, "page.jpg", b"<html>")
        for key in ("bad", "page"):
            add(archive, f"{key}.cls", b"2")
    line = refusal(build_data, request_of(tmp_path))
    assert f"{tmp_path}/photos-0003.tar:page.jpg" in line
    data = build_data(request_of(tmp_path, skip_bad=True))
    assert data.skipped == ["photos-0003.tar:bad.png", "photos-0003.tar:page.jpg"]
    assert len(data) == 20


@pytest.mark.parametrize(
    ("entries", "named"),
    [
        ({"a.jpg": b"", "a.cls": b"1", "b.jpg": b""}, "x.tar:b.jpg"),
        ({"a.jpg": b"", "a.cls": b"cat"}, "x.tar:a.cls"),
        ({"a.jpg": b"", "b.jpg": b""}, "x.tar:a.jpg"),
        ({"a.jpg": b"", "a.cls": b"4000000000"}, "4000000000"),
        ({"train/1.jpg": b"", "val/1.jpg": b""}, "train"),
        ({"a.txt": b""}, ".txt"),
    ],
)
def test_labels_that_are_missing_or_no_numbers_are_named_with_the_shard(tmp_path, entries, named):
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name, content in entries.items():
            add(archive, name, content)
    assert named in refusal(list_source, tmp_path)


@pytest.mark.parametrize(
    "names",
    [["x.tar", "cat/1.png"], ["x.tar", "1.png"], ["train-0.tar", "val-0.tar"], ["x.zip"]],
)
def test_two_kinds_of_source_or_two_splits_in_one_folder_are_named(tmp_path, names):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    source = tmp_path / names[0] if len(names) == 1 else tmp_path
    line = refusal(list_source, source)
    assert all(name.split("/")[0].split("-")[0] in line for name in names)


# Tables.


def refusal_of_table(folder, columns):
    pq.write_table(pa.table(columns), folder / "x.parquet")
    return refusal(list_source, folder)


@pytest.mark.parametrize(
    ("columns", "named"),
    [
        ({"label": [1, 0], "caption": ["a", "b"]}, ["image", "label, caption"]),
        ({"image": [b"", b""], "caption": ["a", "b"]}, ["label", "image, caption"]),
        ({"one": [b""], "other": [b""], "label": [1]}, ["2 image", "one, other"]),
        ({"image": [b"", b""], "label": [1, None]}, ["label", "1"]),
        ({"image": [b"", b""], "label": [1, -1]}, ["x.parquet:1", "-1"]),
    ],
)
def test_tables_without_pictures_or_labels_are_named_with_their_columns(tmp_path, columns, named):
    line = refusal_of_table(tmp_path, columns)
    assert all(word in line for word in [str(tmp_path / "x.parquet"), *named])


@pytest.mark.parametrize("form", [arrow_table, parquet_tables])
def test_a_table_that_is_cut_short_is_named(photos, tmp_path, form):
    form(photos, tmp_path)
    source = min(path for path in tmp_path.iterdir() if path.is_file())
    os.truncate(source, source.stat().st_size // 2)
    assert str(source) in refusal(list_source, source)


def test_a_damaged_picture_is_named_with_its_table_and_row(photos, tmp_path):
    cells = [{"bytes": b"<html>", "path": "a"}, {"bytes": None, "path": "b"}]
    table = {"image": [*cells, {"bytes": next(photos.rglob("*.jpg")).read_bytes(), "path": "c"}]}
    pq.write_table(pa.table({**table, "label": [0, 0, 0]}), tmp_path / "x.parquet")
    request = DataRequest("ImageFolder", 16, str(tmp_path), skip_bad=True)
    assert build_data(request).skipped == ["x.parquet:0", "x.parquet:1"]
    assert f"{tmp_path}/x.parquet:0" in refusal(find_images, tmp_path)
