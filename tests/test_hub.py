"""Models go to a hub and come from it: what is needed and no more, whole or not at all."""

import shutil

import numpy as np
import pytest
import torch
from commands import ROOT, digits_settings, run
from hub import serving

import export
import train
from sampling import load

pytestmark = pytest.mark.slow

CODE = """
import sys
from huggingface_hub import constants
constants.DOWNLOAD_CHUNK_SIZE = 250_000  # by which a fetch that broke off goes on
from sampling import load
from support.system.command import run_command
def main():
    images = load(sys.argv[1], subfolder=sys.argv[2], device="cpu").sample([1, 2], [3, 4])
    import numpy; numpy.save(sys.argv[3], images.latents.numpy())
run_command(main)
"""
NOBODY = "http://127.0.0.1:9"  # where nothing listens


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """An exported run, and the images that it makes."""
    place = tmp_path_factory.mktemp("hub")
    train.main([*digits_settings(place / "run", total_steps=3), "--set=seed=5"])
    export.main([str(place / "run"), str(place / "out")])
    loaded = load(place / "run", device="cpu", report=lambda line: None)
    return place, loaded.sample([1, 2], [3, 4]).latents


@pytest.fixture
def hub(tmp_path):
    with serving(tmp_path / "repositories") as (server, address):
        # Everything in the hub's own words, since its client reads them when it is imported.
        server.env = {
            "HF_ENDPOINT": address,
            "HF_HOME": str(tmp_path / "cache"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_TOKEN": "",
            "PYTHONPATH": str(ROOT),
        }
        yield server


def fetched(hub, name: str, tmp_path, subfolder: str = "", **env: str):
    """The finished process of a user who loads a model by name, and the images they have."""
    output = tmp_path / "latents.npy"
    output.unlink(missing_ok=True)
    done = run("-c", CODE, name, subfolder, output, folder=tmp_path, env={**hub.env, **env})
    return done, torch.from_numpy(np.load(output)) if output.exists() else None


def pushed(hub, *words: object, **env: str):
    return run("export.py", *words, env={**hub.env, "HF_TOKEN": "hf_secret", **env})


def refusal(done) -> str:
    """What a command that has to fail says: one line."""
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: "), done.stderr
    return done.stderr


def test_a_model_goes_to_the_hub_and_is_the_same_in_a_clean_process(exported, hub, tmp_path):
    place, expected = exported
    hub.token = "hf_secret"
    flags = [place / "run", tmp_path / "out", "--push", "owner/digits", "--private"]
    done = pushed(hub, *flags)
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert said[-2].endswith("/owner/digits")
    assert said[-1].endswith("README.md: its licence is still to be filled in, and pushed again")
    assert hub.private == {"owner/digits": True}
    files = hub.files("owner/digits")
    assert files == ["README.md", "config.json", "model.safetensors", "samples.png"]
    assert 'load("owner/digits")' in (hub.folder / "owner" / "digits" / "README.md").read_text()
    done, latents = fetched(hub, "owner/digits", tmp_path)
    assert latents is not None and torch.equal(latents, expected), done.stderr
    assert hub.fetched() == {"config.json", "model.safetensors"}
    # From the cache: because the user wants it so, or because nobody answers.
    done, latents = fetched(hub, "owner/digits", tmp_path, HF_HUB_OFFLINE="1")
    assert latents is not None and torch.equal(latents, expected), done.stderr
    done, latents = fetched(hub, "owner/digits", tmp_path, HF_ENDPOINT=NOBODY)
    assert latents is not None and torch.equal(latents, expected), done.stderr
    assert "owner/digits: as fetched before (" in done.stderr


def test_a_folder_is_sent_as_it_is_and_never_to_a_public_place_by_mistake(exported, hub, tmp_path):
    place, _ = exported
    out = shutil.copytree(place / "out", tmp_path / "out")
    card = out / "README.md"
    card.write_text(card.read_text().replace("license: unknown  # to be filled in", "license: mit"))
    done = pushed(hub, out, "--push", "owner/digits")
    assert done.returncode == 0, done.stderr
    assert "licence" not in done.stdout
    sent = hub.folder / "owner" / "digits" / "README.md"
    assert sent.read_text() == card.read_text()
    card.write_text("secret")
    line = refusal(pushed(hub, out, "--push", "owner/digits", "--private"))
    assert "owner/digits: is there already, and public; make it private on its page" in line
    assert "secret" not in sent.read_text()


def test_what_keeps_a_push_from_working_is_a_line_and_said_early_where_it_is_known(
    exported, hub, tmp_path
):
    place, _ = exported
    flags = [place / "run", tmp_path / "out", "--push", "owner/digits"]
    line = refusal(pushed(hub, *flags, HF_TOKEN=""))
    assert "owner/digits: no token for the hub; run `hf auth login`, or set HF_TOKEN" in line
    assert not (tmp_path / "out").exists()
    hub.token = "hf_other"
    line = refusal(pushed(hub, place / "out", "--push", "owner/digits"))
    assert "error: owner/digits: " in line
    assert not hub.folder.exists()
    hub.token, hub.refused = None, 403
    line = refusal(pushed(hub, place / "out", "--push", "owner/digits"))
    assert "owner/digits: not uploaded (" in line and "the token may not do that" in line
    assert hub.files("owner/digits") == []
    line = refusal(pushed(hub, place / "out", "--push", "owner/digits", HF_ENDPOINT=NOBODY))
    assert "owner/digits: not uploaded (" in line


def test_a_fetch_that_breaks_off_goes_on_where_it_was(exported, hub, tmp_path):
    place, expected = exported
    shutil.copytree(place / "out", hub.folder / "owner" / "digits")
    hub.cut_after = 1_000_000
    done, latents = fetched(hub, "owner/digits", tmp_path)
    assert latents is not None and torch.equal(latents, expected), done.stderr
    assert hub.ranges == ["bytes=1000000-"]


def test_what_is_damaged_or_lost_on_the_hub_is_a_line(exported, hub, tmp_path):
    place, _ = exported
    shutil.copytree(place / "out", hub.folder / "owner" / "digits")
    hub.lost = "model.safetensors"
    line = refusal(fetched(hub, "owner/digits", tmp_path)[0])
    assert "owner/digits: not on this machine, and not fetched (" in line
    hub.lost = None
    with open(hub.folder / "owner" / "digits" / "model.safetensors", "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    line = refusal(fetched(hub, "owner/digits", tmp_path)[0])
    assert "model.safetensors: damaged: its SHA-256 is not the one in" in line
    assert "`hf cache rm model/OWNER/NAME`" in line


def test_of_the_published_repository_a_folders_config_and_newest_checkpoint_are_fetched(
    exported, hub, tmp_path
):
    place, expected = exported
    ckpts = hub.folder / "zlab-princeton" / "SoFlow" / "XL-2-cond" / "ckpts"
    ckpts.mkdir(parents=True)
    for step in (0, 3):
        shutil.copy(place / "run" / "ckpts" / f"{step}.pt", ckpts)
    shutil.copy(place / "run" / "config.yaml", ckpts.parent)
    done, latents = fetched(hub, "zlab-princeton/SoFlow", tmp_path, "XL-2-cond")
    assert latents is not None and torch.equal(latents, expected), done.stderr
    assert hub.fetched() == {"config.yaml", "3.pt"}
    line = refusal(fetched(hub, "zlab-princeton/SoFlow", tmp_path)[0])
    assert "zlab-princeton/SoFlow: has no model; there are models in XL-2-cond" in line


def test_what_is_nowhere_is_a_line(hub, tmp_path):
    line = refusal(fetched(hub, "owner/none", tmp_path)[0])
    assert "owner/none: no such repository on the hub, or a private one" in line
    line = refusal(fetched(hub, "owner/none", tmp_path, HF_HUB_OFFLINE="1")[0])
    assert "owner/none: not on this machine, and not fetched: nothing of it is in the hub" in line
    line = refusal(fetched(hub, "owner/none", tmp_path, HF_ENDPOINT=NOBODY)[0])
    assert "owner/none: not on this machine, and not fetched (" in line
