"""Data set to images, all the way, as a user of each data set goes."""

import pytest
import torch
from checkpoints import assert_equal, load, state_of
from commands import ROOT
from standins import CIFAR_NAMES, narrow_unet, write_cifar10

import inference
import train
from support.scores.npz import read_archive

pytestmark = pytest.mark.slow


def options(config: str, **values: object) -> list[str]:
    settings = [f"--set={key}={value}" for key, value in values.items()]
    return ["--config", str(ROOT / "configs" / config), *settings]


def test_cifar10_with_the_unet_trains_augmented_continues_exactly_and_samples(
    tmp_path, monkeypatch
):
    write_cifar10(tmp_path / "data", monkeypatch)
    narrow_unet(monkeypatch)
    folder = tmp_path / "run"
    command = options(
        "cifar.yaml", working_dir=folder, dataset_path=tmp_path / "data", total_steps=2,
        batch_size=2, num_workers=0, ckpt_saving_steps=1, logging_steps=1, eval_steps=2,
        eval_num_samples=2, eval_batch_size=2, eval_demo_steps=2, eval_demo_shape="[1, 2]",
    )  # fmt: skip
    train.main(command)
    whole = load(folder, 2)
    assert whole["config"]["augment_probability"] == 0.12
    assert whole["config"]["optimizer"] == "RAdam"
    assert whole["data"]["class_names"] == list(CIFAR_NAMES)
    eval_before = (folder / "evals" / "2.npz").read_bytes()
    for path in (folder / "ckpts/2.pt", folder / "evals/2.npz", folder / "figs/2.png"):
        path.unlink()
    train.main(command)
    assert_equal(state_of(whole), state_of(load(folder, 2)))
    assert (folder / "evals" / "2.npz").read_bytes() == eval_before
    # Dropout and augmentation took part: the weights moved, and the average after step 1 alone.
    first, second = load(folder, 1), load(folder, 2)
    assert not torch.equal(
        first["model"]["network.enc.32x32_conv.weight"],
        second["model"]["network.enc.32x32_conv.weight"],
    )
    assert_equal(first["ema_model"], second["ema_model"])

    inference.main([*command, "--ckpt-steps=2", "--eval-NFE=2", "--num-samples=3"])
    with read_archive(folder / "evals" / "2_2NFE_42.npz") as archive:
        assert archive.images_header().shape == (3, 32, 32, 3)
