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
    decode,
    encode,
    encode_point,
    measure_form,
    normalised_by,
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


def made(folder, vae_class, photos, **settings):
    """An autoencoder whose statistics, where it has any, are those of the photos."""
    if vae_class == "Squeeze":
        Squeeze().save_pretrained(folder)
        return folder
    make_tiny_vae(folder, vae_class=vae_class, **settings)
    vae = load_vae(find_vae(str(folder)), CPU)
    kind = KINDS[vae_class]
    with torch.inference_mode():
        z = kind.encode(vae, images_of(photos))[0]
    deviation, mean = torch.std_mean(z, dim=(0, 2, 3))
    if vae_class == "AutoencoderKLFlux2":
        vae.bn.running_mean, vae.bn.running_var = mean, deviation**2
        vae.save_pretrained(folder)
        return folder
    numbers = {
        "AutoencoderKL": {"latents_mean": mean.tolist(), "latents_std": deviation.tolist()},
        "AutoencoderDC": {"scaling_factor": 1 / z.std().item()},
        "AutoencoderTiny": {"scaling_factor": 1 / z.std().item(), "shift_factor": z.mean().item()},
        "AutoencoderRAE": {
            "latents_mean": mean[:, None, None].tolist(),
            "latents_std": deviation[:, None, None].tolist(),
        },
    }[vae_class]
    return make_tiny_vae(folder, vae_class=vae_class, **{**settings, **numbers})


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
    "AutoencoderDC": (8, 2, True),
    "AutoencoderTiny": (4, 8, True),
    "AutoencoderRAE": (64, 8, True),
    "Squeeze": (3, 4, True),
}


@pytest.mark.parametrize("vae_class", FORMS)
def test_a_class_is_extracted_trained_on_sampled_and_decoded(vae_class, photos, tmp_path, capsys):
    channels, pixels, is_point = FORMS[vae_class]
    settings = {"latent_channels": 16} if vae_class == "AutoencoderKL" else {}
    vae = made(tmp_path / "vae", vae_class, photos, **settings)
    reader = extract(photos, tmp_path / "latents", vae)
    side = SIZE // pixels
    said = capsys.readouterr().out
    assert f"data_size {side}" in said
    form = reader.form
    assert (form.vae_class, form.latent_channels) == (vae_class, channels)
    assert (form.pixels_per_latent, form.is_point) == (pixels, is_point)
    assert reader.shape == (2 * PER_CLASS, channels * (1 if is_point else 2), side, side)
    x_0 = form.normalise(reader.read(range(len(reader)))[:, :channels])
    assert abs(x_0.mean()) < (0.5 if vae_class == "AutoencoderDC" else 1e-3)  # it has no shift
    assert x_0.std() == pytest.approx(1, abs=0.02)
    images = images_of(photos)
    loaded = load_vae(find_vae(str(vae)), CPU)
    error = (decode(loaded, x_0, 5, form) - images).abs().mean()
    print(f"{vae_class}: the round trip is off by {error:.3f} on average, in -1..1")
    assert error.isfinite()
    again = decode(loaded, form.normalise(encode(loaded, images, 5)[:, :channels]), 5, form)
    assert torch.allclose(again, decode(loaded, x_0, 5, form), atol=1e-3)

    train_on(tmp_path / "latents", vae, tmp_path / "run", side)
    with np.load(tmp_path / "run" / "evals" / "4.npz") as archive:
        assert archive["arr_0"].shape == (3, SIZE, SIZE, 3)
    record = json.loads((tmp_path / "run" / "evals" / "4.json").read_text())
    assert record["latent_scale"] == form.latent_scale
    model = sampling.load(tmp_path / "run", device="cpu")
    assert model.shape == (channels, side, side)
    assert model.sample(seeds=[1, 2]).numpy().shape == (2, SIZE, SIZE, 3)


@pytest.mark.parametrize("vae_class", ["AutoencoderKL", "AutoencoderDC"])
def test_what_no_config_normalises_is_measured_and_what_one_does_badly_is_said(
    vae_class, photos, tmp_path, capsys
):
    vae = make_tiny_vae(tmp_path / "vae", vae_class=vae_class, scaling_factor=None)
    form = extract(photos, tmp_path / "measured", vae).form
    assert "scaling_factor" not in capsys.readouterr().out
    assert len(form.latent_scale) == len(form.latent_shift) == form.latent_channels
    vae = make_tiny_vae(tmp_path / "vae", vae_class=vae_class, scaling_factor=1e-3)
    assert extract(photos, tmp_path / "scaled", vae).form.latent_scale == 1e-3
    assert "scaling_factor" in capsys.readouterr().out


def test_measured_channels_have_mean_0_and_deviation_1_and_a_constant_one_stays_finite():
    z = torch.randn(4, 2, 5, 5) * torch.tensor([3, 0])[:, None, None] + 7
    form = normalised_by(autoencoders.LatentForm(latent_channels=2), z)
    deviation, mean = torch.std_mean(form.normalise(z), dim=(0, 2, 3))
    assert torch.allclose(mean, torch.zeros(2), atol=1e-3)
    assert torch.allclose(deviation, torch.tensor([1.0, 0.0]), atol=1e-3)
    assert torch.allclose(form.denormalise(form.normalise(z)), z, atol=1e-4)


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
    path = write_ours(tmp_path)
    with h5py.File(path, "r+") as file:
        file.attrs["latent_scale"] = [1.0] * 3
    with pytest.raises(UserError, match=LATENT_FILE):
        LatentReader(path)


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
