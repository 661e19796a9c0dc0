"""The latent file: read fast and as it is, refused if it is not what it should be."""

import os
import pickle

import h5py
import numpy as np
import pytest
import torch
from latent_files import INFO, some_moments, write_ours, write_reference_form
from loading import batches_of, data_of
from tiny_vae import make_tiny_vae

from config import config_from_dict
from support.data.batches import BatchPlan
from support.data.build import compare_data
from support.data.datasets import outline
from support.data.latents import LATENT_FILE, LatentReader, locate_latents
from support.data.vae import find_vae, vae_digest
from support.system.files import UserError


def config_of(folder, **values):
    settings = {
        "working_dir": "x", "model_type": "DiT-Nano-2", "dataset_path": str(folder),
        "data_size": 4, "batch_size": 4, "total_steps": 6, "num_workers": 0, **values,
    }  # fmt: skip
    return config_from_dict(settings, "test")


def refusal(folder, **values):
    with pytest.raises(UserError) as caught:
        data_of(config_of(folder, **values))
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Reading


LAYOUTS = {
    "contiguous": {},
    "chunked": {"chunks": (1, 8, 4, 4)},
    "compressed": {"chunks": (5, 8, 4, 4), "compression": "gzip"},
    "big-endian": {"dtype": ">f4"},
    "half": {"dtype": "f2"},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_come_in_the_order_asked_for_in_every_layout(tmp_path, layout):
    moments = some_moments()
    reader = LatentReader(write_reference_form(tmp_path, moments, **LAYOUTS[layout]))
    assert reader.is_plain == (layout in ("contiguous", "half"))
    rows = [7, 0, 11, 7, 3]
    expected = torch.from_numpy(moments[rows])
    if layout == "half":
        expected = expected.half()
    assert reader.read(rows).dtype == expected.dtype
    assert torch.equal(reader.read(rows), expected)
    assert torch.equal(reader.labels, torch.arange(12) % 3)
    assert len(reader.read([])) == 0


@pytest.mark.parametrize("layout", ["contiguous", "chunked"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_loader_workers_open_the_file_for_themselves(tmp_path, layout, num_workers):
    write_reference_form(tmp_path, **LAYOUTS[layout])
    config = config_of(tmp_path, num_workers=num_workers, batch_size=6)
    data = data_of(config)
    data.reader.read([0])  # opened here, before the workers are started
    loader = batches_of(config, data, BatchPlan(6, 3, 1, 1))
    seen = [batch for _, batch in zip(range(4), loader, strict=False)]
    moments = torch.from_numpy(some_moments())
    for batch in seen:
        places = [int((moments == row).flatten(1).all(1).nonzero()) for row in batch.stored]
        assert torch.equal(batch.labels, torch.tensor(places) % 3)
    assert len({tuple(batch.labels.tolist()) for batch in seen}) > 1


@pytest.mark.parametrize("layout", ["contiguous", "chunked"])
def test_open_file_is_not_shared_with_another_process(tmp_path, layout):
    reader = LatentReader(write_reference_form(tmp_path, **LAYOUTS[layout]))
    reader.read([0])
    opened = reader._file
    if os.fork() == 0:
        reader.read([1])
        os._exit(0 if reader._file is not opened else 1)
    assert os.wait()[1] == 0
    copied = pickle.loads(pickle.dumps(reader))
    assert copied._file is None
    assert torch.equal(copied.read([2]), reader.read([2]))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_file_cut_short_while_training_ends_it_in_one_line(tmp_path, num_workers):
    path = write_reference_form(tmp_path, some_moments(60))
    config = config_of(tmp_path, num_workers=num_workers, batch_size=4, total_steps=15)
    loader = batches_of(config, data_of(config), BatchPlan(4, 3, 1, 1))
    next(loader)
    os.truncate(path, locate_latents(path)[0] + 20 * 512 + 7)
    with pytest.raises(UserError, match=rf"^{path}: .*row [2-5][0-9] of 60"):
        list(loader)


# What the file says


def test_reference_form_has_a_thousand_classes_and_no_vae(tmp_path):
    write_reference_form(tmp_path)
    data = data_of(config_of(tmp_path))
    assert data.spec.num_classes == 1000
    assert not any("vae" in key for key in data.record())
    for folder in (tmp_path, tmp_path / "absent"):
        seen = outline(config_of(folder).data_request())
        assert (seen.num_classes, seen.channels, seen.image_shape) == (1000, 4, (3, 32, 32))


def test_our_file_says_what_it_is_and_has_the_reference_entries(tmp_path):
    path = write_ours(tmp_path)
    data = data_of(config_of(tmp_path))
    assert data.spec.class_names == ("cat", "dog", "fish")
    assert outline(config_of(tmp_path).data_request()).num_classes == 3
    assert data.reader.info == INFO
    assert data.reader.is_plain
    with h5py.File(path, "r") as file:
        assert sorted(file) == ["amount", "labels", "latent_size", "latents"]
        assert np.array_equal(file["latents"][:], some_moments())
        assert file["latents"].dtype == np.float32
        assert file["labels"].dtype == np.int64
        assert file["amount"].dtype == file["latent_size"].dtype == np.int64
        assert (file["amount"][()], file["latent_size"][()]) == (12, 4)


def test_checkpoints_say_which_vae_made_the_latents_and_its_name_may_change(tmp_path):
    write_ours(tmp_path)
    record = data_of(config_of(tmp_path)).record()
    assert record["vae"] == INFO.vae
    assert record["vae_revision"] == INFO.vae_revision
    assert record["vae_sha256"] == INFO.vae_sha256
    assert record["latent_scale"] == 0.18215
    assert (
        compare_data(record, {**record, "vae": "folder", "vae_revision": ""}, "1.pt", False) == []
    )
    with pytest.raises(UserError, match=r"1\.pt: .*vae_sha256"):
        compare_data(record, {**record, "vae_sha256": "1" * 64}, "1.pt", False)


def test_many_classes_with_odd_names_are_said(tmp_path):
    names = tuple(f"class é {k}" for k in range(20_000))
    write_ours(tmp_path, class_names=names, class_counts=(0,) * 20_000)
    assert data_of(config_of(tmp_path)).spec.class_names == names
    write_ours(tmp_path, class_names=("a", "b\udcff", "c"))
    assert data_of(config_of(tmp_path)).spec.class_names == ("a", "b?", "c")


def test_older_file_of_ours_had_its_pictures_as_they_lay(tmp_path):
    path = write_ours(tmp_path, exif="apply")
    assert LatentReader(path).info.exif == "apply"
    with h5py.File(path, "r+") as file:
        del file.attrs["exif"]
    assert LatentReader(path).info.exif == "ignore"


def test_the_size_is_that_of_the_file_and_another_is_refused(tmp_path):
    write_ours(tmp_path)
    settings = config_of(tmp_path).to_dict()
    del settings["data_size"]
    assert config_from_dict(settings, "test").data_size == 4
    assert config_from_dict({**settings, "dataset_path": None}, "test").data_size == 32
    assert "data_size: 8" in refusal(tmp_path, data_size=8)
    with h5py.File(write_ours(tmp_path), "r+") as file:
        file.attrs["image_size"] = 64
    assert "image_size" in refusal(tmp_path)


@pytest.mark.parametrize("factor", [0.18215, 1 / 0.18215])
def test_latents_of_another_scale_are_refused_unless_the_file_says_its_vae(tmp_path, factor):
    """Scaled already, or divided by the scale once more."""
    moments = some_moments() * np.float32(factor)
    deviation = f"{moments[:, :4].std(ddof=1):.2g}"
    write_reference_form(tmp_path, moments)
    said = refusal(tmp_path)
    assert LATENT_FILE in said
    assert deviation in said
    write_ours(tmp_path, moments)
    assert any(deviation in note for note in data_of(config_of(tmp_path)).notes)


@pytest.mark.slow
def test_other_vae_is_refused_and_the_same_under_another_name_is_not(tmp_path):
    tiny, other = make_tiny_vae(tmp_path / "tiny"), make_tiny_vae(tmp_path / "other", seed=1)
    digest = vae_digest(find_vae(str(tiny)))
    write_ours(tmp_path / "data", vae="somebody/tiny", vae_sha256=digest)
    assert data_of(config_of(tmp_path / "data", vae="somebody/tiny"))
    assert data_of(config_of(tmp_path / "data", vae=str(tiny)))
    for wrong in (str(other), "/nowhere"):
        said = refusal(tmp_path / "data", vae=wrong)
        assert f"vae: {wrong} " in said
        assert "vae: somebody/tiny" in said


# Bad files


def test_missing_and_foreign_files_are_named(tmp_path):
    assert str(tmp_path / LATENT_FILE) in refusal(tmp_path)
    (tmp_path / LATENT_FILE).write_text("no HDF5")
    assert str(tmp_path / LATENT_FILE) in refusal(tmp_path)
    assert "dataset_path: " in refusal("")


def test_file_cut_short_anywhere_is_refused(tmp_path):
    for write in (write_reference_form, write_ours):
        path = write(tmp_path)
        data = path.read_bytes()
        for tenth in range(10):
            path.write_bytes(data[: len(data) * tenth // 10])
            assert LATENT_FILE in refusal(tmp_path)


def test_flipped_bytes_are_refused_or_read_and_nothing_else(tmp_path):
    path = write_reference_form(tmp_path, compression="gzip", chunks=(4, 8, 4, 4))
    data = path.read_bytes()
    source = np.random.default_rng(0)
    for _ in range(150):
        damaged = bytearray(data)
        damaged[source.integers(len(data))] ^= 1 << source.integers(8)
        path.write_bytes(damaged)
        try:
            loaded = data_of(config_of(tmp_path))
            loaded[list(range(len(loaded)))]
        except UserError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize("layout", ["contiguous", "compressed"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused_with_their_row(tmp_path, layout, value):
    moments = some_moments(400)
    moments[0, 1, 2, 3] = value
    write_reference_form(tmp_path, moments, **LAYOUTS[layout])
    assert "row 0 " in refusal(tmp_path)
    moments[0, 1, 2, 3] = 0
    moments[5, 1, 2, 3] = value  # not among those that are looked at before
    write_reference_form(tmp_path / "b", moments, **LAYOUTS[layout])
    config = config_of(tmp_path / "b", num_workers=2, batch_size=200)
    data = data_of(config)
    data[[4, 6]]
    with pytest.raises(UserError, match="row 5 "):
        data[[4, 5, 6]]
    with pytest.raises(UserError, match="row 5 "):
        list(batches_of(config, data, BatchPlan(200, 3, 1, 1)))


def test_large_values_are_not_taken_for_infinite_ones(tmp_path):
    path = write_reference_form(tmp_path, np.full((12, 8, 4, 4), 3e38, np.float32))
    assert LatentReader(path).read([0, 1]).isfinite().all()


@pytest.mark.parametrize(
    ("change", "row"),
    [
        (lambda moments: moments[:9], 9),  # the others were never written
        (lambda moments: moments[:, [4, 5, 6, 7, 0, 1, 2, 3]], 0),  # no deviations
    ],
)
def test_rows_that_are_not_those_of_a_vae_are_refused(tmp_path, change, row):
    changed = change(some_moments())
    moments = np.zeros_like(some_moments())
    moments[: len(changed)] = changed
    write_reference_form(tmp_path, moments)
    assert f"row {row} " in refusal(tmp_path)


@pytest.mark.parametrize("label", [1000, -1])
def test_labels_beyond_the_classes_are_refused(tmp_path, label):
    write_reference_form(tmp_path, labels=[0] * 11 + [label])
    assert f"label {label}" in refusal(tmp_path)
    write_ours(tmp_path, class_names=("cat", "dog"))
    assert "label 2" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("entries", "named"),
    [
        ({"latents": None}, "latents"),
        ({"labels": np.zeros(11, np.int64)}, r"labels .*\[11\].*\[12\]"),
        ({"labels": np.zeros(12)}, "labels .*float64"),
        ({"latents": np.zeros((12, 4, 4, 4), "f4")}, r"latents .*\[12, 4, 4, 4\]"),
        ({"latents": np.zeros((12, 8, 4, 5), "f4")}, r"latents .*\[12, 8, 4, 5\]"),
        ({"latents": np.zeros((12, 8), "f4")}, r"latents .*\[12, 8\]"),
        ({"latents": np.zeros((0, 8, 4, 4), "f4")}, r"latents .*\[0, 8, 4, 4\]"),
        ({"latents": np.zeros((12, 8, 4, 4), "i4")}, "latents .*int32"),
    ],
)
def test_entries_that_are_not_those_of_latents_are_refused(tmp_path, entries, named):
    with h5py.File(write_reference_form(tmp_path), "r+") as file:
        for name, value in entries.items():
            del file[name]
            if value is not None:
                file[name] = value
    with pytest.raises(UserError, match=f"{LATENT_FILE}: .*{named}"):
        data_of(config_of(tmp_path))


def test_values_kept_in_other_files_are_refused(tmp_path):
    path = write_reference_form(tmp_path)
    (tmp_path / "secret").write_bytes(bytes(12 * 512))
    elsewhere = [(str(tmp_path / "secret"), 0, 12 * 512)]
    layout = h5py.VirtualLayout((12, 8, 4, 4), "f4")
    layout[:] = h5py.VirtualSource(str(tmp_path / "other.hdf5"), "latents", (12, 8, 4, 4))
    for store in (
        lambda file: file.create_dataset("latents", (12, 8, 4, 4), "f4", external=elsewhere),
        lambda file: file.create_virtual_dataset("latents", layout),
    ):
        with h5py.File(path, "r+") as file:
            del file["latents"]
            store(file)
        assert f"{LATENT_FILE}: latents " in refusal(tmp_path)


@pytest.mark.parametrize("options", [{}, {"chunks": (4, 8, 4, 4)}, {"compression": "gzip"}])
def test_size_that_is_declared_and_not_there_is_refused_before_it_is_read(tmp_path, options):
    path = write_reference_form(tmp_path)
    with h5py.File(path, "r+") as file:
        for name in file:
            del file[name]
        count = 2**40
        file.create_dataset("latents", (count, 8, 4, 4), "f4", **options)
        file.create_dataset("labels", (count,), "i8")
        file["amount"], file["latent_size"] = np.int64(count), np.int64(4)
    assert f"{LATENT_FILE}: latents [{count}, 8, 4, 4]" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["class_names", "vae_sha256", "latent_scale", "class_counts"])
def test_odd_attributes_are_refused(tmp_path, name):
    path = write_ours(tmp_path)
    with h5py.File(path, "r+") as file:
        del file.attrs[name]
    assert LATENT_FILE in refusal(tmp_path)
    with h5py.File(path, "r+") as file:
        file.attrs[name] = h5py.Empty("f")
    assert LATENT_FILE in refusal(tmp_path)
