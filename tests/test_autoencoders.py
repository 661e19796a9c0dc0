"""Every class of autoencoder goes all the way: extracted, trained on, sampled and decoded."""

import json

import h5py
import numpy as np
import pytest
import standins
import torch
from commands import ROOT
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from latent_files import some_moments, write_ours, write_reference_form
from PIL import Image
from tiny_vae import SETTINGS, make_tiny_vae, with_an_encoder_of_rae
from torch import nn

import latent_dataset
import sampling
import train
from support.data import autoencoders
from support.data.autoencoders import (
    KINDS,
    Kind,
    LatentForm,
    decode,
    draw_latents,
    encode,
    encode_point,
    measure_form,
)
from support.data.latents import LATENT_FILE, LatentReader
from support.data.vae import find_vae, load_vae
from support.system.files import UserError

SIZE, PER_CLASS = 32, 6
CPU = torch.device("cpu")


class Squeeze(ModelMixin, ConfigMixin):
    """A class of one's own: a latent is the mean of 4 x 4 pixels."""

    @register_to_config
    def __init__(self, scaling_factor: float | None = None):
        super().__init__()
        self.pool = nn.Conv2d(3, 3, 4, 4)

    def encode(self, images, return_dict):
        return [self.pool(images)]

    def decode(self, z):
        return nn.functional.interpolate(z, scale_factor=4)


@pytest.fixture(scope="module", autouse=True)
def classes():
    with pytest.MonkeyPatch.context() as patch, with_an_encoder_of_rae():
        patch.setitem(KINDS, "AutoencoderRAE", KINDS["AutoencoderRAE"]._replace(needs="torch"))
        own = Kind(
            encode_point, lambda vae, z: vae.decode(z), autoencoders.read_statistics, __name__
        )
        patch.setitem(KINDS, "Squeeze", own)
        yield


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for name in ("china", "flower"):
        (folder / name).mkdir()
        for index, crop in enumerate(standins.crops(standins.photographs()[name], PER_CLASS, SIZE)):
            Image.fromarray(crop).save(folder / name / f"{index}.png")
    return folder


def images_of(photos):
    pixels = [np.asarray(Image.open(path)) for path in sorted(photos.glob("*/*.png"))]
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2) / 127.5 - 1


def drawn(latents, form):
    """x_0 by the noise that an extraction looks at."""
    return draw_latents(latents, torch.Generator().manual_seed(42), form)


def made(folder, vae_class, photos):
    """An autoencoder whose statistics are those of the photos, or are to be measured."""
    if vae_class == "Squeeze":
        Squeeze().save_pretrained(folder)
        return folder
    settings = {"AutoencoderKL": {"latent_channels": 16}}.get(vae_class, {})
    if vae_class != "AutoencoderKLFlux2":
        has_none = vae_class in ("AutoencoderRAE", "AutoencoderKLKVAE")
        unknown = {} if has_none else {"scaling_factor": None}
        return make_tiny_vae(folder, vae_class=vae_class, **settings, **unknown)
    vae = load_vae(find_vae(str(make_tiny_vae(folder, vae_class=vae_class))), CPU)
    z = drawn(encode(vae, images_of(photos), 5), LatentForm(latent_channels=24, latent_scale=1.0))
    vae.bn.running_var, vae.bn.running_mean = torch.var_mean(z, dim=(0, 2, 3))
    vae.save_pretrained(folder)
    return folder


def extract(photos, save, vae, size=SIZE):
    words = {"data-path": photos, "save-path": save, "vae": vae, "image-size": size}
    words |= {"device-batch-size": 4, "num-workers": 0, "device": "cpu"}
    latent_dataset.main([f"--{key}={value}" for key, value in words.items()])
    return LatentReader(save / LATENT_FILE)


def train_on(save, vae, run, size, **settings):
    settings = {
        "working_dir": run, "model_type": "DiT-Nano-1", "data_size": size, "dataset_path": save,
        "vae": vae, "device": "cpu", "total_steps": 4, "batch_size": 4, "num_workers": 0,
        "ckpt_saving_steps": 4, "logging_steps": 2, "eval_demo_steps": 4,
        "eval_demo_shape": "[2, 2]", "eval_steps": 4, "eval_num_samples": 3, **settings,
    }  # fmt: skip
    config = str(ROOT / "configs" / "image_latents.yaml")
    train.main(["--config", config, *(f"--set={key}={value}" for key, value in settings.items())])


FORMS = {  # channels, pixels a latent, point or posterior
    "AutoencoderKL": (16, 8, False),
    "AutoencoderKLFlux2": (24, 16, False),
    "AsymmetricAutoencoderKL": (4, 2, False),
    "AutoencoderKLHunyuanImage": (4, 2, False),
    "AutoencoderKLKVAE": (4, 2, False),
    "VQModel": (3, 2, True),
    "AutoencoderDC": (8, 2, True),
    "AutoencoderTiny": (4, 8, True),
    "AutoencoderRAE": (64, 8, True),
    "Squeeze": (3, 4, True),
}


@pytest.mark.parametrize("vae_class", FORMS)
def test_a_class_is_extracted_trained_on_sampled_and_decoded(vae_class, photos, tmp_path, capsys):
    channels, pixels, is_point = FORMS[vae_class]
    vae = made(tmp_path / "vae", vae_class, photos)
    reader = extract(photos, tmp_path / "latents", vae)
    side = SIZE // pixels
    said = capsys.readouterr().out
    assert f"data_size {side}" in said
    form = reader.form
    assert (form.vae_class, form.latent_channels) == (vae_class, channels)
    assert (form.pixels_per_latent, form.is_point) == (pixels, is_point)
    assert reader.shape == (2 * PER_CLASS, channels * (1 if is_point else 2), side, side)
    stored = reader.read(range(len(reader)))
    x_0 = drawn(stored, form)
    assert x_0.mean(dim=(0, 2, 3)).abs().max() < 1e-3
    assert x_0.std() == pytest.approx(1, abs=0.02)
    images = images_of(photos)
    loaded = load_vae(find_vae(str(vae)), CPU)
    back = decode(loaded, form.normalise(stored[:, :channels]), 5, form)
    error = (back - images).abs().mean()
    print(f"{vae_class}: the round trip is off by {error:.3f} on average, in -1..1")
    assert error.isfinite()
    directly = KINDS[vae_class].decode(loaded, encode(loaded, images, 5)[:, :channels])
    assert torch.allclose(back, directly, atol=1e-3)

    train_on(tmp_path / "latents", vae, tmp_path / "run", side)
    with np.load(tmp_path / "run" / "evals" / "4.npz") as archive:
        assert archive["arr_0"].shape == (3, SIZE, SIZE, 3)
    record = json.loads((tmp_path / "run" / "evals" / "4.json").read_text())
    assert record["latent_scale"] == form.latent_scale
    model = sampling.load(tmp_path / "run", device="cpu")
    assert model.shape == (channels, side, side)
    assert model.sample(seeds=[1, 2]).numpy().shape == (2, SIZE, SIZE, 3)


@pytest.mark.parametrize(
    ("vae_class", "settings", "expected"),
    [
        ("AutoencoderKL", {"scaling_factor": 0.5, "shift_factor": 0.25}, (0.5, 0.25)),
        ("AutoencoderDC", {"scaling_factor": 0.5}, (0.5, 0)),
        ("AutoencoderKL", {"latents_mean": [3] * 4, "latents_std": [4] * 4}, ([0.25] * 4, [3] * 4)),
        ("AutoencoderRAE", {"latents_mean": [3], "latents_std": [4]}, (1, 0)),  # does it itself
        ("AutoencoderTiny", {"scaling_factor": None}, ([], 0)),  # to be measured
    ],
)
def test_statistics_are_those_of_the_config(vae_class, settings, expected, tmp_path):
    vae = load_vae(find_vae(str(make_tiny_vae(tmp_path, vae_class=vae_class, **settings))), CPU)
    form = measure_form(vae, SIZE)
    assert (form.latent_scale, form.latent_shift) == expected
    z = torch.randn(2, form.latent_channels, 4, 4)
    if form.latent_scale:
        assert torch.allclose(form.denormalise(form.normalise(z)), z, atol=1e-5)


def test_a_deviation_far_from_1_is_said(photos, tmp_path, capsys):
    vae = make_tiny_vae(tmp_path / "vae", scaling_factor=1e-3)
    assert extract(photos, tmp_path / "scaled", vae).form.latent_scale == 1e-3
    assert "scaling_factor" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("vae_class", "size"), [("AutoencoderKL", 33), ("AutoencoderDC", 33), ("AutoencoderRAE", 64)]
)
def test_pictures_of_another_size_than_the_class_makes_are_refused(
    vae_class, size, photos, tmp_path
):
    vae = make_tiny_vae(tmp_path / "vae", vae_class=vae_class)
    with pytest.raises(UserError, match=f"{vae_class} .*{size} pixels"):
        extract(photos, tmp_path / "latents", vae, size)
    assert not (tmp_path / "latents").exists()


def test_statistics_of_other_channels_are_refused(tmp_path):
    folder = make_tiny_vae(tmp_path, latents_mean=[0.0] * 3, latents_std=[1.0] * 3)
    with pytest.raises(UserError, match=r"AutoencoderKL .*3 .*4 channels"):
        measure_form(load_vae(find_vae(str(folder)), CPU), SIZE)


def test_a_package_that_a_class_needs_is_named(tmp_path, monkeypatch):
    folder = make_tiny_vae(tmp_path, vae_class="AutoencoderRAE")
    monkeypatch.setitem(KINDS, "AutoencoderRAE", KINDS["AutoencoderRAE"]._replace(needs="absent"))
    with pytest.raises(UserError, match=r"AutoencoderRAE .*absent"):
        load_vae(find_vae(str(folder)), CPU)


@pytest.mark.parametrize(
    ("vae_class", "settings"),
    [
        ("AutoencoderTiny", {}),  # takes them, and makes other pictures of them
        ("AutoencoderKL", {"latent_channels": 16}),
        ("AutoencoderKL", {f"{way}_block_types": (f"{kind}Block2D",) * 3 for way, kind in
                           (("down", "DownEncoder"), ("up", "UpDecoder"))}
         | {"block_out_channels": (8,) * 3}),
    ],
)  # fmt: skip
def test_latents_of_another_autoencoder_are_refused_before_training(vae_class, settings, tmp_path):
    write_reference_form(tmp_path)
    vae = make_tiny_vae(tmp_path / "vae", vae_class=vae_class, **settings)
    with pytest.raises(UserError, match=rf"^vae: {vae}, {vae_class}, .*\[4, 4, 4\]"):
        train_on(tmp_path, vae, tmp_path / "run", 4)
    assert not list(tmp_path.glob("run/ckpts/*"))


def test_older_files_have_the_form_of_then(tmp_path):
    path = write_ours(tmp_path)
    with h5py.File(path, "r+") as file:
        for name in ("vae_class", "latent_channels", "pixels_per_latent", "is_point"):
            del file.attrs[name]
        del file.attrs["latent_shift"]
    reader = LatentReader(path)
    assert reader.form == LatentReader(write_ours(tmp_path)).form
    x_0 = reader.form.normalise(reader.read([0, 1]))
    assert torch.equal(x_0, torch.from_numpy(some_moments()[:2]) * 0.18215)


def test_all_classes_are_tried():
    assert {*SETTINGS, "Squeeze"} == {*KINDS} == {*FORMS}
