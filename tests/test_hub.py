"""Models go to a hub and come from it: what is needed and no more, whole or not at all."""

import shutil

import commands
import numpy as np
import pytest
import torch
from commands import ROOT, forked
from hub import serving

import export
from sampling import load

pytestmark = pytest.mark.slow

CODE = """
import sys
from sampling import load
from support.system.command import run_command
def main():
    images = load(sys.argv[1], subfolder=sys.argv[2], device="cpu").sample([1, 2], [3, 4])
    import numpy; numpy.save(sys.argv[3], images.latents.numpy())
run_command(main)
"""
NOBODY = "http://127.0.0.1:9"  # where nothing listens


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    """An exported run, and the images that it makes."""
    folder = tmp_path_factory.mktemp("hub") / "out"
    export.main([str(run), str(folder)])
    return folder, load(run, device="cpu", report=None).sample([1, 2], [3, 4]).latents


@pytest.fixture
def hub(tmp_path):
    with serving(tmp_path / "repositories") as (server, address):
        # Everything in the hub's own words, since its client reads them when it is imported anew.
        server.env = {
            "HF_ENDPOINT": address,
            "HF_HOME": str(tmp_path / "cache"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_TOKEN": "",
            "PYTHONPATH": str(ROOT),
        }
        yield server


def asked(hub, *words: object, folder=ROOT, **env: str):
    return forked(*words, folder=folder, env={**hub.env, **env})


def fetched(hub, name: str, tmp_path, subfolder: str = "", **env: str):
    """The finished process of a user who loads a model by name, and the images they have."""
    output = tmp_path / "latents.npy"
    output.unlink(missing_ok=True)
    done = asked(hub, "-c", CODE, name, subfolder, output, folder=tmp_path, **env)
    return done, torch.from_numpy(np.load(output)) if output.exists() else None


def pushed(hub, *words: object, **env: str):
    return asked(hub, "export.py", *words, **{"HF_TOKEN": "hf_secret", **env})


def refusal(done) -> str:
    """What a command that has to fail says: one line."""
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: "), done.stderr
    return done.stderr


def test_a_pushed_model_loads_elsewhere_and_from_the_cache(run, exported, hub, tmp_path):
    _, expected = exported
    done = pushed(hub, run, tmp_path / "out", "--push", "owner/digits", "--private")
    assert done.returncode == 0, done.stderr
    assert "/owner/digits" in done.stdout
    assert "README.md" in done.stdout  # whose licence is missing
    assert hub.private == {"owner/digits": True}
    files = hub.files("owner/digits")
    assert files == ["README.md", "config.json", "model.safetensors", "samples.png"]
    assert 'load("owner/digits")' in (hub.folder / "owner" / "digits" / "README.md").read_text()
    for settings in ({}, {"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": NOBODY}):
        done, latents = fetched(hub, "owner/digits", tmp_path, **settings)
        assert latents is not None and torch.equal(latents, expected), done.stderr
    assert hub.fetched() == {"README.md", "config.json", "model.safetensors"}
    assert "owner/digits: " in done.stderr  # that the cache is used


def test_a_folder_is_pushed_as_it_is_and_never_to_a_public_place_by_mistake(
    exported, hub, tmp_path
):
    out = shutil.copytree(exported[0], tmp_path / "out")
    card = out / "README.md"
    card.write_text(card.read_text().replace("license: unknown  # to be filled in", "license: mit"))
    done = pushed(hub, out, "--push", "owner/digits")
    assert done.returncode == 0, done.stderr
    assert "README.md" not in done.stdout
    sent = hub.folder / "owner" / "digits" / "README.md"
    assert sent.read_text() == card.read_text()
    card.write_text("secret")
    line = refusal(pushed(hub, out, "--push", "owner/digits", "--private"))
    assert "owner/digits" in line and "public" in line
    assert "secret" not in sent.read_text()


def test_a_failing_push_is_refused_early_where_possible(run, exported, hub, tmp_path):
    flags = [run, tmp_path / "out", "--push", "owner/digits"]
    assert "HF_TOKEN" in refusal(pushed(hub, *flags, HF_TOKEN=""))
    assert not (tmp_path / "out").exists()
    flags = [exported[0], "--push", "owner/digits"]
    hub.token = "hf_other"
    assert "owner/digits" in refusal(pushed(hub, *flags))
    assert not hub.folder.exists()
    assert "owner/digits" in refusal(pushed(hub, *flags, HF_ENDPOINT=NOBODY))


def test_of_a_released_repository_one_folders_config_and_newest_checkpoint_are_fetched(
    run, exported, hub, tmp_path
):
    _, expected = exported
    ckpts = hub.folder / "zlab-princeton" / "SoFlow" / "XL-2-cond" / "ckpts"
    ckpts.mkdir(parents=True)
    for step in (0, 3):
        shutil.copy(run / "ckpts" / f"{step}.pt", ckpts)
    shutil.copy(run / "config.yaml", ckpts.parent)
    repository = "zlab-princeton/SoFlow"
    for name, subfolder in ((repository, "XL-2-cond"), (f"{repository}/XL-2-cond", "")):
        done, latents = fetched(hub, name, tmp_path, subfolder)
        assert latents is not None and torch.equal(latents, expected), done.stderr
    assert hub.fetched() == {"config.yaml", "3.pt"}
    assert "XL-2-cond" in refusal(fetched(hub, repository, tmp_path)[0])
    # By the same name on the command line; the samples are not written into the hub's cache.
    flags = [f"--ckpt={repository}/XL-2-cond", "--num-samples=1", "--set=device=cpu"]
    done = commands.run(ROOT / "inference.py", *flags, folder=tmp_path, env=hub.env)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.glob("*.npz")] == ["XL-2-cond_1NFE_42.npz"]


@pytest.mark.parametrize("settings", [{}, {"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": NOBODY}])
def test_a_typo_in_a_path_is_first_called_a_path_that_is_not_here(hub, tmp_path, settings):
    (tmp_path / "runs" / "digits").mkdir(parents=True)
    line = refusal(fetched(hub, "runs/digts", tmp_path, **settings)[0])
    assert line.startswith("error: runs/digts: no such file or folder here")
    assert "runs/digits?" in line  # the name that was probably meant
