"""The VAE is found or refused early, and latents go through it and back at one scale."""

import pytest
import torch
from commands import run
from tiny_vae import make_tiny_vae

from config import Config
from sampling import decoder_record, decoding, find_decoder
from support.data.vae import (
    LATENT_SCALE,
    decode,
    draw_latents,
    encode,
    encoded_at_a_time,
    find_vae,
    load_vae,
)
from support.system.files import UserError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_vae(tmp_path_factory.mktemp("vae") / "tiny")


@pytest.fixture(scope="module")
def vae(folder):
    return load_vae(find_vae(str(folder)), CPU)


def some_images(count=3):
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_moments_are_the_mean_and_then_the_deviation(vae):
    posterior = vae.encode(some_images()).latent_dist
    moments = encode(vae, some_images(), 3)
    assert moments.shape == (3, 8, 4, 4)
    assert torch.equal(moments[:, :4], posterior.mean)
    assert torch.equal(moments[:, 4:], torch.exp(0.5 * posterior.logvar))


def test_latents_are_mean_plus_deviation_times_noise_at_the_scale():
    moments = torch.cat([torch.full((2, 4, 3, 3), 5.0), torch.full((2, 4, 3, 3), 0.5)], dim=1)
    x_0 = draw_latents(moments, torch.Generator().manual_seed(1))
    noise = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(x_0, (5 + 0.5 * noise) * 0.18215)
    assert x_0.dtype == torch.float32
    assert draw_latents(moments.half(), torch.Generator()).dtype == torch.float32


def test_decoding_undoes_the_scale_and_takes_some_at_a_time(vae, monkeypatch):
    latents = torch.randn(5, 4, 4, 4, generator=torch.Generator().manual_seed(2))
    expected = torch.cat([vae.decode(latent[None]).sample for latent in latents])
    sizes = []
    whole = vae.decode
    monkeypatch.setattr(vae, "decode", lambda part: (sizes.append(len(part)), whole(part))[1])
    images = decode(vae, latents * LATENT_SCALE, batch_size=2)
    assert sizes == [2, 2, 1]
    assert images.shape == (5, 3, 32, 32)
    assert torch.allclose(images, expected, atol=1e-5)


def test_encoded_mean_drawn_without_spread_is_decoded_as_the_vae_decodes_it(vae):
    mean, std = encode(vae, some_images(), 8).chunk(2, dim=1)
    x_0 = draw_latents(torch.cat([mean, 0 * std], dim=1), torch.Generator())
    assert torch.allclose(decode(vae, x_0, 16), vae.decode(mean).sample, atol=1e-5)


def test_vae_is_read_once_and_is_on_the_device_while_pixels_are_made(folder, monkeypatch):
    loaded, moved = [], []
    monkeypatch.setattr(
        "sampling.vae.load_vae", lambda *given: loaded.append(load_vae(*given)) or loaded[-1]
    )
    config = Config(working_dir="unused", vae=str(folder))
    find_decoder(config)
    assert not loaded
    x_0 = torch.randn(2, 4, 4, 4)
    for _ in range(2):
        with decoding(config, CPU) as function:
            monkeypatch.setattr(
                loaded[0], "to", lambda place: (moved.append(str(place)), loaded[0])[1]
            )
            assert torch.equal(function(x_0), decode(loaded[0], x_0, 16))
    assert len(loaded) == 1
    assert moved == ["cpu", "cpu", "cpu"]  # back; there and back
    assert decoder_record(config)["vae"] == str(folder)


def test_slices_are_encoded_like_the_whole_and_memory_is_bounded_by_them(vae, monkeypatch):
    assert [encoded_at_a_time(size) for size in (256, 512, 8192)] == [32, 8, 1]
    whole, sizes = vae.encode, []
    monkeypatch.setattr(vae, "encode", lambda images: (sizes.append(len(images)), whole(images))[1])
    images = some_images()
    moments = encode(vae, images, len(images))
    torch.testing.assert_close(encode(vae, images, 2), moments, atol=1e-5, rtol=0)
    assert sizes == [len(images), *[2] * (len(images) // 2), *([1] if len(images) % 2 else [])]


def test_bf16_is_near_and_not_the_same(vae):
    exact, coarse = (encode(vae, some_images(), 8, is_bf16) for is_bf16 in (False, True))
    assert coarse.dtype == torch.float32
    assert 0 < (coarse - exact).abs().max() < 0.1


def test_images_are_not_decoded():
    config = Config(working_dir="unused", dataset_type="Digits", data_size=8, vae="/nowhere")
    images = torch.randn(2, 1, 8, 8)
    with decoding(config, CPU) as function:
        assert function(images) is images
    assert decoder_record(config) == {}


# Found or refused.


def test_folder_without_weights_is_named(folder, tmp_path):
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(UserError, match=rf"vae: {tmp_path}: has no weights \(diffusion_pytorch_"):
        find_vae(str(tmp_path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not the description of a VAE"),
        ("[]", "not the description of a VAE"),
        ('{"latent_channels": 4}', "not the description of a VAE .*block_out_channels"),
        ('{"latent_channels": 16, "block_out_channels": [1, 1, 1, 1]}', "16 channels, 8 pixels"),
        ('{"latent_channels": 4, "block_out_channels": [1, 1, 1]}', "4 channels, 4 pixels each; n"),
    ],
)
def test_vae_of_another_kind_is_refused(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    (tmp_path / "diffusion_pytorch_model.safetensors").touch()
    with pytest.raises(UserError, match=message) as caught:
        find_vae(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_damaged_weights_are_named(folder, tmp_path):
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    weights = (folder / "diffusion_pytorch_model.safetensors").read_bytes()
    for size in (0, 100, len(weights) // 2):
        (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(weights[:size])
        with pytest.raises(UserError, match=rf"vae: {tmp_path}: cannot be loaded") as caught:
            load_vae(find_vae(str(tmp_path)), CPU)
        assert "\n" not in str(caught.value)


def test_absent_folder_is_named_and_nothing_is_asked_of_the_hub():
    for name in ("/nowhere/vae", "./vae", "vae", "a/b/c"):
        with pytest.raises(UserError, match=rf"vae: {name}: "):
            find_vae(name)


def hub_cache(home, folder, name):
    """A cache as the hub's client leaves it after fetching `folder` as `name`."""
    repository = home / "hub" / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / ("c" * 40)
    snapshot.mkdir(parents=True)
    for file in folder.iterdir():
        (snapshot / file.name).write_bytes(file.read_bytes())
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("c" * 40)


@pytest.mark.slow
def test_offline_the_cache_of_the_hub_is_used_or_its_lack_explained(folder, tmp_path):
    """In processes of their own: the hub's client reads its settings when it is imported."""
    hub_cache(tmp_path, folder, "somebody/tiny")
    code = (
        "import sys\n"
        "from support.system.files import UserError\n"
        "from support.data.vae import find_vae\n"
        "try: print(find_vae(sys.argv[1]))\n"
        "except UserError as error: print('error:', error)"
    )
    settings = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    there = run("-c", code, "somebody/tiny", env=settings)
    assert there.returncode == 0, there.stderr
    assert f"revision='{'c' * 40}'" in there.stdout
    missing = run("-c", code, "somebody/absent", env=settings)
    (line,) = missing.stdout.splitlines()
    assert line.startswith("error: vae: somebody/absent: ")
    assert "HF_HUB_OFFLINE" in line and "`hf download somebody/absent --local-dir FOLDER`" in line
    unreachable = run(
        "-c", code, "somebody/absent",
        env={"HF_HOME": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"},
    )  # fmt: skip
    (line,) = unreachable.stdout.splitlines()
    assert line.startswith("error: vae: somebody/absent: ")
