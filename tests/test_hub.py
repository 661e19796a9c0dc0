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

CODE = """
import sys
from sampling import load
from support.system.command import run_command
def main():
    images = load(sys.argv[1], subfolder=sys.argv[2], device="cpu").sample([1, 2], [3, 4])
    import numpy; numpy.save(sys.argv[3], images.latents.numpy())
run_command(main)
"""


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
            "PYTHONPATH": str(ROOT),
        }
        yield server


def fetched(hub, name: str, tmp_path, subfolder: str = "", **env: str):
    """The finished process of a user who loads a model by name, and the images they have."""
    output = tmp_path / "latents.npy"
    output.unlink(missing_ok=True)
    done = run("-c", CODE, name, subfolder, output, folder=tmp_path, env={**hub.env, **env})
    return done, torch.from_numpy(np.load(output)) if output.exists() else None


def refusal(done) -> str:
    assert done.returncode == 1, done.stdout + done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert "Traceback" not in done.stderr
    return line


@pytest.mark.slow
def test_a_model_goes_to_the_hub_and_is_the_same_in_a_clean_process(exported, hub, tmp_path):
    place, expected = exported
    flags = [place / "run", tmp_path / "out", "--push", "owner/digits", "--private"]
    hub.token = "hf_secret"
    line = refusal(run("export.py", *flags, env={**hub.env, "HF_TOKEN": "hf_wrong"}))
    assert "--push owner/digits: not uploaded" in line
    assert not hub.files("owner/digits")
    pushed = run("export.py", *flags, "--overwrite", env={**hub.env, "HF_TOKEN": "hf_secret"})
    assert pushed.returncode == 0, pushed.stderr
    assert pushed.stdout.splitlines()[-1].endswith("/owner/digits")
    (made,) = hub.made
    assert made.get("private") or made.get("visibility") == "private"
    assert {"config.json", "model.safetensors", "README.md"} <= set(hub.files("owner/digits"))
    done, latents = fetched(hub, "owner/digits", tmp_path)
    assert done.returncode == 0, done.stderr
    assert torch.equal(latents, expected)
    fetched_files = {path for method, path in hub.asked if method == "GET" and "/resolve/" in path}
    assert {path.rsplit("/", 1)[1] for path in fetched_files} == {
        "config.json",
        "model.safetensors",
    }
    # Off-line, from the cache.
    done, latents = fetched(hub, "owner/digits", tmp_path, HF_HUB_OFFLINE="1")
    assert latents is not None and torch.equal(latents, expected), done.stderr


@pytest.mark.slow
def test_a_fetch_that_breaks_off_goes_on_and_a_wrong_digest_is_refused(exported, hub, tmp_path):
    place, expected = exported
    shutil.copytree(place / "out", hub.folder / "owner" / "digits")
    hub.cut_after = 1_000_000
    done, latents = fetched(hub, "owner/digits", tmp_path)
    if latents is None:  # the client did not go on by itself: the next start does
        refusal(done)
        done, latents = fetched(hub, "owner/digits", tmp_path)
    assert latents is not None and torch.equal(latents, expected), done.stderr
    with open(hub.folder / "owner" / "digits" / "model.safetensors", "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    shutil.rmtree(tmp_path / "cache")
    line = refusal(fetched(hub, "owner/digits", tmp_path)[0])
    assert "model.safetensors: damaged: its SHA-256 is not the one in" in line


@pytest.mark.slow
def test_what_is_not_there_and_no_network_are_a_line(exported, hub, tmp_path):
    place, _ = exported
    line = refusal(fetched(hub, "owner/none", tmp_path)[0])
    assert "owner/none: no such repository on the hub, or a private one" in line
    ckpts = hub.folder / "zlab-princeton" / "SoFlow" / "XL-2-cond" / "ckpts"
    ckpts.mkdir(parents=True)
    for step in (0, 3):
        shutil.copy(place / "run" / "ckpts" / f"{step}.pt", ckpts)
    shutil.copy(place / "run" / "config.yaml", ckpts.parent)
    line = refusal(fetched(hub, "zlab-princeton/SoFlow", tmp_path)[0])
    assert "zlab-princeton/SoFlow: has no model; there are models in XL-2-cond" in line
    done, latents = fetched(hub, "zlab-princeton/SoFlow", tmp_path, "XL-2-cond")
    assert latents is not None, done.stderr
    got = [path for method, path in hub.asked if method == "GET" and path.endswith(".pt")]
    assert {path.rsplit("/", 1)[1] for path in got} == {"3.pt"}
    line = refusal(fetched(hub, "owner/x", tmp_path, HF_ENDPOINT="http://127.0.0.1:9")[0])
    assert "owner/x: not on this machine, and not fetched" in line
