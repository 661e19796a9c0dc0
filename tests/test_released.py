"""Folders laid out like the released ones are sampled and trained on as they stand."""

import numpy as np
import pytest
import torch
from checkpoints import load
from released import LATENT_KEYS, UNET_KEYS, release
from standins import narrow_unet, write_cifar10

import inference
import train
from models import build_model

pytestmark = pytest.mark.slow


def test_released_unet_is_sampled(tmp_path, monkeypatch, capsys):
    narrow_unet(monkeypatch)
    model = build_model("UNet", 3, 32, 10, 0.0)
    release(tmp_path, "UNet-uncond", UNET_KEYS, 800_000, model, torch.optim.RAdam([torch.ones(1)]))
    monkeypatch.chdir(tmp_path)
    flags = ["--config", "SoFlow/UNet-uncond/config.yaml", "--ckpt-steps", "800000"]
    inference.main([*flags, "--num-samples", "3"])
    path = tmp_path / "SoFlow" / "UNet-uncond" / "evals" / "800000_1NFE_42.npz"
    assert str(path.relative_to(tmp_path)) in capsys.readouterr().out
    with np.load(path) as archive:
        assert archive["arr_0"].shape == (3, 32, 32, 3)


def test_a_file_of_the_reference_goes_on_in_training_and_ours_has_its_keys(
    tmp_path, monkeypatch, capsys
):
    write_cifar10(tmp_path / "data", monkeypatch)
    monkeypatch.chdir(tmp_path)
    model = build_model("DiT-Nano-8", 3, 32, 10, 0.1)
    optimizer = torch.optim.RAdam(model.parameters(), lr=3e-4)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    keys = LATENT_KEYS.replace("Imagenet", "CIFAR10\ndataset_path: data")
    keys = keys.replace("DiT-Nano-4", "DiT-Nano-8").replace("1200000", "5\nbatch_size: 4")
    release(tmp_path, "Ref", keys, 4, model, optimizer)
    config = tmp_path / "SoFlow" / "Ref" / "config.yaml"
    recorded = config.read_text()

    train.main(["--config", str(config), "--set=num_workers=0"])

    said = capsys.readouterr().out
    assert "resumed at step 4 from SoFlow/Ref/ckpts/4.pt" in said
    assert "lr is 0.0001 now; it was 0.0003 in SoFlow/Ref/ckpts/4.pt" in said
    assert config.read_text() == recorded
    ours, theirs = load(config.parent, 5), load(config.parent, 4)
    assert ours["finished_steps"] == 5
    for entry in ("model", "ema_model"):
        assert list(ours[entry]) == list(theirs[entry]) == list(model.state_dict())
    state = ours["optimizer"]["state"]
    assert state.keys() == theirs["optimizer"]["state"].keys()
    assert all(entry["step"] == 2 for index, entry in state.items() if index > 0)
    # A step of the optimizer with what the file had accumulated, not with nothing.
    assert state[2]["exp_avg"].abs().min() > 0
