"""The latent file: read fast and as it is, refused where it is not what it should be."""

import os
import pickle

import h5py
import numpy as np
import pytest
import torch
from loading import batches_of, data_of
from tiny_vae import make_tiny_vae

from config import config_from_dict
from support.data.batches import BatchPlan
from support.data.datasets import count_classes
from support.data.latents import LATENT_FILE, LatentInfo, LatentReader, locate_latents, write_frame
from support.data.vae import VAE_NAME, find_vae, load_vae
from support.system.digests import weights_digest
from support.system.files import UserError

INFO = LatentInfo(
    vae=VAE_NAME,
    vae_revision="c" * 40,
    vae_sha256="0" * 64,
    latent_scale=0.18215,
    image_size=32,
    dtype="float32",
    seed=42,
    images_sha256="1" * 64,
    class_names=("cat", "dog", "fish"),
    class_counts=(4, 4, 4),
    code_version="test",
)


def some_moments(count=12, size=4):
    source = np.random.default_rng(0)
    mean = source.standard_normal((count, 4, size, size))
    return np.concatenate([mean, np.abs(mean) + 0.1], axis=1).astype(np.float32)


def write_reference_form(folder, moments=None, labels=None, **options):
    """The file as the published code writes it: contiguous, no attributes."""
    moments = some_moments() if moments is None else moments
    labels = np.arange(len(moments)) % 3 if labels is None else labels
    folder.mkdir(exist_ok=True)
    with h5py.File(folder / LATENT_FILE, "w") as file:
        file.create_dataset("latents", data=moments, **options)
        file.create_dataset("labels", data=np.asarray(labels, np.int64))
        file.create_dataset("amount", data=np.int64(len(moments)))
        file.create_dataset("latent_size", data=np.int64(moments.shape[-1]))
    return folder / LATENT_FILE


def write_ours(folder, moments=None, **info):
    """The file as latent_dataset.py writes it."""
    moments = some_moments() if moments is None else moments
    folder.mkdir(exist_ok=True)
    path = folder / LATENT_FILE
    values = {**vars(INFO), **info}
    with open(path, "wb") as file:
        write_frame(file, np.arange(len(moments)) % 3, LatentInfo(**values))
    with open(path, "r+b") as file:
        file.seek(locate_latents(path).offset)
        file.write(moments.astype(values["dtype"]).tobytes())
    return path


def config_of(folder, **values):
    return config_from_dict(
        {
            "working_dir": "x",
            "model_type": "DiT-Nano-2",
            "dataset_path": str(folder),
            "data_size": 4,
            "batch_size": 4,
            "total_steps": 6,
            "num_workers": 0,
            **values,
        },
        "test",
    )


def refusal(folder, **values):
    with pytest.raises(UserError) as caught:
        data_of(config_of(folder, **values))
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Reading.


LAYOUTS = {
    "contiguous": {},
    "chunked": {"chunks": (1, 8, 4, 4)},
    "compressed": {"chunks": (5, 8, 4, 4), "compression": "gzip"},
    "big-endian": {"dtype": ">f4"},
    "half": {"dtype": "f2"},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_come_in_the_order_asked_for_whatever_the_layout(tmp_path, layout):
    moments = some_moments()
    reader = LatentReader(write_reference_form(tmp_path, moments, **LAYOUTS[layout]))
    assert reader.is_plain == (layout in ("contiguous", "half"))
    rows = [7, 0, 11, 7, 3]
    expected = torch.from_numpy(moments[rows])
    if layout == "half":
        assert reader.read(rows).dtype == torch.float16
        expected = expected.half()
    assert torch.equal(reader.read(rows), expected)
    assert torch.equal(reader.labels, torch.arange(12) % 3)


def test_file_behind_a_header_of_the_users_own_is_read(tmp_path):
    path = tmp_path / LATENT_FILE
    with h5py.File(path, "w", userblock_size=512) as file:
        file["latents"] = some_moments()
        file["labels"], file["amount"] = np.zeros(12, np.int64), np.int64(12)
        file["latent_size"] = np.int64(4)
    assert torch.equal(LatentReader(path).read([5]), torch.from_numpy(some_moments()[[5]]))


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


def test_value_that_is_not_finite_ends_training_in_one_line_with_workers_too(tmp_path):
    moments = some_moments(400)
    moments[5] = np.nan  # not among those that are looked at before
    write_reference_form(tmp_path, moments)
    config = config_of(tmp_path, num_workers=2, batch_size=200)
    loader = batches_of(config, data_of(config), BatchPlan(200, 3, 1, 1))
    with pytest.raises(UserError, match=r"row 5 has values that are not finite$"):
        list(loader)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_file_cut_short_while_training_ends_it_in_one_line(tmp_path, num_workers):
    path = write_reference_form(tmp_path, some_moments(60))
    config = config_of(tmp_path, num_workers=num_workers, batch_size=4, total_steps=15)
    loader = batches_of(config, data_of(config), BatchPlan(4, 3, 1, 1))
    next(loader)
    os.truncate(path, locate_latents(path).offset + 20 * 512 + 7)
    said = rf"^{path}: ends before row [2-5][0-9] of 60 does: it was cut short or replaced"
    with pytest.raises(UserError, match=said):
        list(loader)


def test_neighbouring_rows_are_read_together_and_any_others_too(tmp_path, monkeypatch):
    moments, calls = some_moments(600), []
    reader = LatentReader(write_reference_form(tmp_path, moments))

    def counted(descriptor, buffers, offset):
        calls.append(len(buffers))
        return preadv(descriptor, buffers, offset)

    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", counted)
    for rows, runs in (([], []), ([7], [1]), ([3, 9, 2, 9, 8, 8], [2, 1, 2, 1])):
        assert torch.equal(reader.read(rows), torch.from_numpy(moments[np.array(rows, int)]))
        assert calls == runs
        calls.clear()
    rows = list(reversed(range(600)))
    assert torch.equal(reader.read(rows), torch.from_numpy(moments[rows]))
    assert calls == [256, 256, 88]


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


def test_clean_latents_are_drawn_from_the_generator_given(tmp_path):
    write_reference_form(tmp_path)
    data = data_of(config_of(tmp_path))
    stored = data[[3, 1]].stored
    x_0 = data.clean(stored, torch.Generator().manual_seed(5))
    noise = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(5))
    assert torch.allclose(x_0, (stored[:, :4] + stored[:, 4:] * noise) * 0.18215)
    assert torch.equal(x_0, data.clean(stored, torch.Generator().manual_seed(5)))


# What the file says.


def test_reference_form_has_a_thousand_classes(tmp_path):
    write_reference_form(tmp_path)
    assert data_of(config_of(tmp_path)).spec.num_classes == 1000
    assert count_classes(config_of(tmp_path).data_request()) == 1000
    assert count_classes(config_of(tmp_path / "absent").data_request()) == 1000


def test_our_file_says_what_it_is_and_has_the_reference_entries(tmp_path):
    path = write_ours(tmp_path)
    data = data_of(config_of(tmp_path))
    assert data.spec.class_names == ("cat", "dog", "fish")
    assert count_classes(config_of(tmp_path).data_request()) == 3
    assert data.reader.info == INFO
    assert data.reader.is_plain
    with h5py.File(path, "r") as file:
        assert sorted(file) == ["amount", "labels", "latent_size", "latents"]
        assert np.array_equal(file["latents"][:], some_moments())
        assert file["latents"].dtype == np.float32
        assert file["labels"].dtype == np.int64
        assert file["amount"].dtype == file["latent_size"].dtype == np.int64
        assert (file["amount"][()], file["latent_size"][()]) == (12, 4)


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
    assert LatentReader(path).info == INFO
    assert INFO.exif == "ignore"


def test_other_size_and_scale_are_refused(tmp_path):
    write_ours(tmp_path)
    assert f"data_size: 8, and the latents in {tmp_path}" in refusal(tmp_path, data_size=8)
    write_ours(tmp_path, latent_scale=0.13025)
    assert "made for the scale 0.13025; it must be 0.18215" in refusal(tmp_path)


@pytest.mark.slow
def test_other_vae_is_refused_and_the_same_under_another_name_is_not(tmp_path):
    tiny, other = make_tiny_vae(tmp_path / "tiny"), make_tiny_vae(tmp_path / "other", seed=1)
    digest = weights_digest(load_vae(find_vae(str(tiny)), torch.device("cpu")).state_dict())
    write_ours(tmp_path / "data", vae="somebody/tiny", vae_sha256=digest)
    assert data_of(config_of(tmp_path / "data", vae="somebody/tiny"))
    assert data_of(config_of(tmp_path / "data", vae=str(tiny)))
    said = refusal(tmp_path / "data", vae=str(other))
    assert "made by the VAE somebody/tiny" in said
    assert "has other weights; say vae: somebody/tiny" in said
    said = refusal(tmp_path / "data", vae="/nowhere")
    assert "made by the VAE somebody/tiny, and vae: /nowhere cannot be compared with it" in said


# Bad files.


def test_missing_and_foreign_files_are_named(tmp_path):
    assert f"{tmp_path / LATENT_FILE}: does not exist; latent_dataset.py makes" in refusal(tmp_path)
    (tmp_path / LATENT_FILE).write_text("no HDF5")
    assert f"{tmp_path / LATENT_FILE}: not a readable HDF5 file" in refusal(tmp_path)
    assert "dataset_path: not set; Imagenet needs the folder of imagenet_" in refusal(None or "")


def test_file_cut_short_anywhere_is_refused(tmp_path):
    for write in (write_reference_form, write_ours):
        path = write(tmp_path)
        data = path.read_bytes()
        for tenth in range(10):
            path.write_bytes(data[: len(data) * tenth // 10])
            assert LATENT_FILE in refusal(tmp_path)


def test_file_that_hides_that_it_was_cut_short_is_refused(tmp_path):
    path = write_reference_form(tmp_path)
    moments = some_moments().tobytes()
    data = path.read_bytes()
    end = data.index(moments) + len(moments) - 700
    assert data[40:48] == len(data).to_bytes(8, "little")  # the end of the file, in its header
    path.write_bytes(data[:40] + end.to_bytes(8, "little") + data[48:end])
    assert "invalid dataset size, likely file corruption" in refusal(tmp_path)


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
    assert f"{LATENT_FILE}: row 0 has values that are not finite" in refusal(tmp_path)
    moments[0, 1, 2, 3] = 0
    moments[5, 1, 2, 3] = value  # not among those that are looked at before
    write_reference_form(tmp_path / "b", moments, **LAYOUTS[layout])
    data = data_of(config_of(tmp_path / "b"))
    data[[4, 6]]
    with pytest.raises(UserError, match="row 5 has values that are not finite"):
        data[[4, 5, 6]]


def test_large_values_are_not_taken_for_infinite_ones(tmp_path):
    write_reference_form(tmp_path, np.full((12, 8, 4, 4), 3e38, np.float32))
    data_of(config_of(tmp_path))


def test_rows_that_were_never_written_are_refused(tmp_path):
    moments = some_moments()
    moments[9:] = 0
    write_reference_form(tmp_path, moments)
    assert "row 9 is all zeros: the file is not complete" in refusal(tmp_path)


def test_values_without_deviations_are_refused(tmp_path):
    write_reference_form(tmp_path, some_moments()[:, [4, 5, 6, 7, 0, 1, 2, 3]])
    assert "row 0 has negative standard deviations" in refusal(tmp_path)


@pytest.mark.parametrize("label", [1000, -1])
def test_labels_beyond_the_classes_are_refused(tmp_path, label):
    write_reference_form(tmp_path, labels=[0] * 11 + [label])
    assert f"has a label {label}; its 1000 classes go from 0 to 999" in refusal(tmp_path)


def test_labels_beyond_the_named_classes_are_refused(tmp_path):
    write_ours(tmp_path, class_names=("cat", "dog"))
    assert "has a label 2; its 2 classes go from 0 to 1" in refusal(tmp_path)


def change(path, **entries):
    with h5py.File(path, "r+") as file:
        for name, value in entries.items():
            del file[name]
            if value is not None:
                file[name] = value


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"latents": None}, "has no entry latents"),
        ({"amount": None}, "has no entry amount"),
        ({"amount": np.int64(11)}, "amount must be the number 12"),
        ({"latent_size": np.int64(8)}, "latent_size must be the number 4"),
        ({"latent_size": np.arange(2)}, "latent_size must be the number 4"),
        ({"labels": np.zeros(11, np.int64)}, r"labels are int64 \[11\]; they must be int64 \[12\]"),
        ({"labels": np.zeros(12)}, r"labels are float64 \[12\]; they must be"),
        ({"latents": np.zeros((12, 4, 4, 4), "f4")}, r"shape \[12, 4, 4, 4\]; it must be"),
        ({"latents": np.zeros((12, 8, 4, 5), "f4")}, r"shape \[12, 8, 4, 5\]; it must be"),
        ({"latents": np.zeros((12, 8), "f4")}, r"shape \[12, 8\]; it must be"),
        ({"latents": np.zeros((0, 8, 4, 4), "f4")}, "latents are empty"),
        ({"latents": np.zeros((12, 8, 4, 4), "i4")}, "latents are int32; they must be float32"),
        ({"labels": h5py.ExternalLink("/etc/passwd", "x")}, "labels is not an array in this file"),
        ({"labels": h5py.SoftLink("/amount")}, "labels is not an array in this file"),
    ],
)
def test_entries_that_are_not_those_of_latents_are_refused(tmp_path, entries, message):
    change(write_reference_form(tmp_path), **entries)
    with pytest.raises(UserError, match=message):
        data_of(config_of(tmp_path))
    refusal(tmp_path)


def test_values_kept_in_other_files_are_refused(tmp_path):
    path = write_reference_form(tmp_path)
    (tmp_path / "secret").write_bytes(bytes(12 * 512))
    with h5py.File(path, "r+") as file:
        del file["latents"]
        file.create_dataset(
            "latents", (12, 8, 4, 4), "f4", external=[(str(tmp_path / "secret"), 0, 12 * 512)]
        )
    assert "latents is not an array in this file" in refusal(tmp_path)
    layout = h5py.VirtualLayout((12, 8, 4, 4), "f4")
    layout[:] = h5py.VirtualSource(str(tmp_path / "other.hdf5"), "latents", (12, 8, 4, 4))
    with h5py.File(path, "r+") as file:
        del file["latents"]
        file.create_virtual_dataset("latents", layout)
    assert "latents is not an array in this file" in refusal(tmp_path)


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
    assert "it is not complete" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["class_names", "vae_sha256", "latent_scale", "class_counts"])
def test_odd_attributes_are_refused(tmp_path, name):
    path = write_ours(tmp_path)
    with h5py.File(path, "r+") as file:
        del file.attrs[name]
    assert "its attributes are not those of a latent file" in refusal(tmp_path)
    with h5py.File(path, "r+") as file:
        file.attrs[name] = h5py.Empty("f")
    refusal(tmp_path)
