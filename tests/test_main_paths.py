"""Data set to images, all the way, as a user of each data set goes."""

import numpy as np
import pytest
import torch
from commands import ROOT, succeed
from PIL import Image
from standins import CIFAR_NAMES, write_cifar10, write_image_folder
from test_train import assert_equal, load, state_of

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


def test_a_folder_of_photographs_becomes_a_grid_by_the_commands_of_the_readme(tmp_path):
    write_image_folder(tmp_path / "my-images")
    shrink = [
        f"--set={setting}"
        for setting in (
            "model_type=DiT-Nano-8", "batch_size=8", "total_steps=3", "num_workers=2",
            "eval_steps=0", "eval_demo_steps=3", "eval_demo_shape=[4,2]", "logging_steps=1",
        )
    ]  # fmt: skip
    config = ROOT / "configs" / "image_folder.yaml"
    said = succeed(
        ROOT / "train.py", "--config", config, "--set", "dataset_path=my-images", *shrink,
        folder=tmp_path,
    )  # fmt: skip
    assert "fresh run" in said
    run = tmp_path / "runs" / "image-folder"
    assert load(run, 3)["data"]["class_names"] == ["cat", "china", "cup", "flower"]
    with Image.open(run / "figs" / "3.png") as picture:
        assert picture.mode == "RGB"
        assert picture.size == (2 * 66, 4 * 66)
    said = succeed(
        ROOT / "inference.py", "--config", run / "config.yaml", "--ckpt-steps", 3,
        "--num-samples", 5, "--labels", "3,0", "--grid", "grid.png", folder=tmp_path,
    )  # fmt: skip
    assert "5 images in runs/image-folder/evals/3_1NFE_42.npz" in said
    with np.load(run / "evals" / "3_1NFE_42.npz") as archive:
        assert archive["arr_0"].shape == (5, 64, 64, 3)
    assert (tmp_path / "grid.png").exists()
