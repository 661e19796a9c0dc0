"""The VAE is found or refused early, and latents go through it and back at one scale."""

import shutil

import pytest
import torch
from commands import forked
from hub import COMMIT, serving
from safetensors.torch import load_file, save_file
from tiny_vae import make_tiny_vae

from config import Config
from sampler import decoder_record, decoding, find_decoder
from support.data.autoencoders import (
    LATENT_SCALE,
    LatentForm,
    decode,
    default_encode_batch,
    draw_latents,
    encode,
)
from support.data.vae import (
    WEIGHT_FILES,
    decoder_notes,
    find_vae,
    load_vae,
    vae_digest,
)
from support.system.files import UserError

CPU = torch.device("cpu")
SAFETENSORS, PICKLE = WEIGHT_FILES


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_vae(tmp_path_factory.mktemp("vae") / "tiny")


@pytest.fixture(scope="module")
def vae(folder):
    return load_vae(find_vae(str(folder)), CPU)


def some_images(count=3):
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


def refusal(folder):
    with pytest.raises(UserError) as caught:
        load_vae(find_vae(str(folder)), CPU)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def with_weights(folder, target, change):
    """A copy of a VAE in `target` with changed weights."""
    (target / "config.json").write_bytes((folder / "config.json").read_bytes())
    save_file(change(load_file(folder / SAFETENSORS)), target / SAFETENSORS)
    return target


# Images and latents


def test_moments_are_the_mean_and_then_the_deviation(vae):
    posterior = vae.encode(some_images()).latent_dist
    moments = encode(vae, some_images(), 3)
    assert moments.shape == (3, 8, 4, 4)
    assert torch.equal(moments[:, :4], posterior.mean)
    assert torch.equal(moments[:, 4:], torch.exp(0.5 * posterior.logvar))


def test_latents_are_mean_plus_deviation_times_noise_at_the_scale():
    moments = torch.cat([torch.full((2, 4, 3, 3), 5.0), torch.full((2, 4, 3, 3), 0.5)], dim=1)
    x_0 = draw_latents(moments, torch.Generator().manual_seed(1), LatentForm())
    noise = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(x_0, (5 + 0.5 * noise) * 0.18215)
    half = draw_latents(moments.half(), torch.Generator(), LatentForm())
    assert half.dtype == torch.float32


def test_decoding_undoes_the_scale(vae):
    latents = torch.randn(5, 4, 4, 4, generator=torch.Generator().manual_seed(2))
    expected = torch.cat([vae.decode(latent[None]).sample for latent in latents])
    decoded = decode(vae, latents * LATENT_SCALE, 2, LatentForm())
    assert torch.allclose(decoded, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "function", "given", "more"),
    [
        ("encode", encode, some_images(5), []),
        ("decode", decode, torch.zeros(5, 4, 4, 4), [LatentForm()]),
    ],
)
def test_the_vae_gets_a_batch_at_a_time(vae, monkeypatch, name, function, given, more):
    whole, sizes = getattr(vae, name), []
    monkeypatch.setattr(vae, name, lambda part: (sizes.append(len(part)), whole(part))[1])
    torch.testing.assert_close(
        function(vae, given, 2, *more), function(vae, given, 5, *more), atol=1e-5, rtol=1e-5
    )
    assert sizes == [2, 2, 1, 5]
    assert [default_encode_batch(size) for size in (256, 512, 8192)] == [32, 8, 1]


def test_bf16_is_near_and_not_the_same(vae):
    exact, coarse = (encode(vae, some_images(), 8, is_bf16) for is_bf16 in (False, True))
    assert coarse.dtype == torch.float32
    assert 0 < (coarse - exact).abs().max() < 0.1


def test_vae_is_read_once_and_is_on_the_device_while_pixels_are_made(folder, monkeypatch):
    loaded, moved = [], []
    monkeypatch.setattr(
        "support.data.vae.load_vae", lambda *given: loaded.append(load_vae(*given)) or loaded[-1]
    )
    config = Config(working_dir="unused", vae=str(make_tiny_vae(folder.parent / "once")))
    find_decoder(config)
    assert not loaded
    x_0 = torch.randn(2, 4, 4, 4)
    for _ in range(2):
        with decoding(config, {}, CPU) as function:
            monkeypatch.setattr(
                loaded[0], "to", lambda place: (moved.append(str(place)), loaded[0])[1]
            )
            assert torch.equal(function(x_0), decode(loaded[0], x_0, 16, LatentForm()))
    assert len(loaded) == 1
    assert moved == ["cpu", "cpu", "cpu"]  # back; there and back
    assert decoder_record(config, {})["vae"] == config.vae


def test_pixels_are_not_decoded():
    config = Config(working_dir="unused", dataset_type="Digits", data_size=8, vae="/nowhere")
    images = torch.randn(2, 1, 8, 8)
    with decoding(config, {}, CPU) as function:
        assert function(images) is images
    assert decoder_record(config, {}) == {}


# Which VAE it is


def test_digest_is_that_of_the_weights_whatever_file_they_are_in(folder, tmp_path):
    digest = vae_digest(find_vae(str(folder)))
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    torch.save(load_file(folder / SAFETENSORS), tmp_path / PICKLE)
    assert vae_digest(find_vae(str(tmp_path))) == digest
    assert vae_digest(find_vae(str(make_tiny_vae(tmp_path / "other", seed=1)))) != digest


def test_decoder_that_did_not_make_the_latents_is_told_in_a_line(folder):
    found = find_vae(str(folder))
    same = {"vae": "somebody/other-name", "vae_sha256": vae_digest(found), "num_examples": 3}
    shape = (4, 4, 4)
    assert decoder_notes(found, same, shape) == []
    assert decoder_notes(found, {}, shape) == []  # latents of the published code
    (note,) = decoder_notes(found, {**same, "vae_sha256": "0" * 64}, shape)
    assert str(folder) in note
    assert "somebody/other-name" in note


# Found or refused


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("missing", lambda w: {k: v for k, v in w.items() if not k.startswith("quant_conv.")}),
        ("unexpected", lambda w: {**w, "quant_conv.gamma": torch.ones(1)}),
        ("shape", lambda w: {**w, "quant_conv.bias": torch.ones(3)}),
    ],
)
def test_weights_that_do_not_fit_are_named(folder, tmp_path, kind, change):
    said = refusal(with_weights(folder, tmp_path, change))
    assert str(tmp_path) in said
    assert kind in said
    assert "quant_conv." in said


def test_vae_with_the_attention_names_of_old_is_loaded(folder, tmp_path):
    """As sd-vae-ft-mse has them."""

    def with_old_names(weights):
        pairs = (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn"))
        renamed = {}
        for name, value in weights.items():
            for new, old in pairs:
                name = name.replace(f".{new}.", f".{old}.")
            renamed[name] = value
        assert renamed.keys() != weights.keys()
        return renamed

    old = with_weights(folder, tmp_path, with_old_names)
    assert vae_digest(find_vae(str(old))) == vae_digest(find_vae(str(folder)))


def test_folder_without_weights_is_named(tmp_path):
    assert str(tmp_path) in refusal(tmp_path)
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").touch()
    assert str(tmp_path / "vae") in refusal(tmp_path)  # a whole pipeline


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "config.json"),
        ("[]", "config.json"),
        ('{"_class_name": 7}', "7"),
        ('{"_class_name": "AutoencoderKLWan"}', "AutoencoderKLWan"),  # of video
        ('{"_class_name": "AutoencoderOobleck"}', "AutoencoderOobleck"),  # of sound
        ('{"latent_channels": 9}', SAFETENSORS),
    ],
)
def test_vae_of_another_kind_is_refused(tmp_path, text, named):
    (tmp_path / "config.json").write_text(text)
    (tmp_path / SAFETENSORS).touch()
    assert named in refusal(tmp_path)


@pytest.mark.parametrize("kept", [0, 0.01, 0.5])
def test_damaged_weights_are_named(folder, tmp_path, kept):
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    weights = (folder / SAFETENSORS).read_bytes()
    (tmp_path / SAFETENSORS).write_bytes(weights[: int(len(weights) * kept)])
    assert str(tmp_path) in refusal(tmp_path)


@pytest.mark.parametrize("name", ["/nowhere/vae", "./vae", "vae", "a/b/c"])
def test_absent_folder_is_named_and_nothing_is_asked_of_the_hub(name, monkeypatch):
    monkeypatch.setattr("socket.socket.connect", lambda *given: pytest.fail("asked the network"))
    assert f"vae: {name}: " in refusal(name)


FIND = """
import sys
from support.system.files import UserError
from support.data.vae import find_vae
for name in sys.argv[1:]:
    try: print(find_vae(name))
    except UserError as error: print("error:", error)
"""


def found_by_name(*names, **settings):
    done = forked("-c", FIND, *names, env=settings)
    return done.stdout.splitlines()


@pytest.mark.slow
def test_vae_is_fetched_from_the_hub_its_two_files_alone(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "hub" / "somebody" / "tiny")
    (tmp_path / "hub" / "somebody" / "tiny" / PICKLE).touch()
    shutil.copytree(folder, tmp_path / "hub" / "somebody" / "pipeline" / "vae")
    with serving(tmp_path / "hub") as (hub, address):
        settings = {"HF_HOME": str(tmp_path), "HF_ENDPOINT": address, "HF_HUB_DISABLE_XET": "1"}
        there, pipeline = found_by_name("somebody/tiny", "somebody/pipeline", **settings)
    assert f"revision='{COMMIT}'" in there
    assert hub.fetched() == {"config.json", SAFETENSORS}
    assert pipeline.startswith("error: vae: somebody/pipeline: ")
    assert "FOLDER/vae" in pipeline
