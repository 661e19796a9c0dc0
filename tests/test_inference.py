"""Sampling from checkpoints as a user does it."""

import contextlib
import json
import math
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import digits_settings
from PIL import Image
from released import release
from tiny_vae import make_tiny_vae

import export
import inference
import train
from config import Config, load_config
from models import build_model
from sampling import load, sample
from support.data.images import to_pixels
from support.data.vae import find_vae, vae_digest
from support.scores.npz import read_archive
from support.system.files import UserError


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run of six steps."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    train.main(digits_settings(folder))
    return folder


@pytest.fixture
def run(trained, tmp_path):
    """A copy of the run, and a function that samples from it in this process."""
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)

    def sample(*flags: str) -> np.ndarray:
        arguments = ["--config", str(trained / "config.yaml"), f"--set=working_dir={folder}"]
        if not any(flag.startswith("--ckpt") for flag in flags):
            arguments.append("--ckpt-steps=6")
        before = set((folder / "evals").glob("*.npz"))
        inference.main([*arguments, *flags])
        (made,) = set((folder / "evals").glob("*.npz")) - before or before
        with read_archive(made) as archive:
            return np.concatenate(list(archive.batches(100)))

    sample.folder = folder
    return sample


@contextlib.contextmanager
def edited(path: Path) -> Iterator[dict]:
    """A checkpoint's entries, which are written back after the block."""
    content = torch.load(path, weights_only=True)
    yield content
    torch.save(content, path)


def keep_published_entries(path: Path) -> None:
    with edited(path) as content:
        for name in list(content)[5:]:
            del content[name]


def test_archive_and_record_stand_under_the_name_of_the_reference(run):
    config = (run.folder / "config.yaml").read_bytes()
    pixels = run("--num-samples=7", "--eval-NFE=2", "--seed=5", "--set=logging_steps=1")
    assert (run.folder / "config.yaml").read_bytes() == config
    assert pixels.shape == (7, 8, 8, 1)
    path = run.folder / "evals" / "6_2NFE_5.npz"
    with np.load(path) as archive:
        assert np.array_equal(archive["arr_0"], pixels)
    record = json.loads(path.with_suffix(".json").read_text())
    assert (record["NFE"], record["seed"], record["num_images"]) == (2, 5, 7)
    assert record["checkpoint"].endswith("6.pt")
    weights = torch.load(run.folder / "ckpts" / "6.pt", weights_only=True)["ema_model"]
    assert record["weights_sha256"] == inference.weights_digest(weights)


def test_averaged_weights_are_sampled(run):
    before = run("--num-samples=3")
    for entry, is_used in (("model", False), ("ema_model", True)):
        with edited(run.folder / "ckpts" / "6.pt") as content:
            for tensor in content[entry].values():
                tensor.zero_()
        assert np.array_equal(run("--num-samples=3", "--overwrite"), before) != is_used


def test_seed_and_stream_choose_the_images_and_the_record_says_so(run):
    def record(name: str) -> dict:
        return json.loads((run.folder / "evals" / name).read_text())

    images = {
        flags: run("--num-samples=5", "--eval-batch-size=5", *flags)
        for flags in (("--seed=1",), ("--set=seed=3",), ("--seed=4", "--noise-stream=reference"))
    }
    assert len({pixels.tobytes() for pixels in images.values()}) == 3
    assert record("6_1NFE_3.json")["config"]["seed"] == record("6_1NFE_3.json")["seed"] == 3
    assert record("6_1NFE_4.json")["noise_stream"] == "reference"

    # The reference's draws, worked out: labels first, then the noise.
    source = torch.Generator().manual_seed(4)
    labels = torch.randint(10, (5,), generator=source)
    noise = torch.randn(5, 1, 8, 8, generator=source)
    config = load_config(run.folder / "config.yaml")
    loaded = inference.load_model(config, run.folder / "ckpts" / "6.pt", torch.device("cpu"))
    x_0 = sample(loaded.model, [noise], labels)
    expected = to_pixels(x_0).permute(0, 2, 3, 1).numpy().astype(int)
    assert np.abs(expected - images["--seed=4", "--noise-stream=reference"]).max() <= 1


def test_flags_win_over_settings_over_defaults_and_no_data_are_opened(run, monkeypatch):
    monkeypatch.setattr("support.data.digits.load_training_set", lambda: pytest.fail("opened"))
    run("--num-samples=2", "--set=eval_NFE=2")
    run("--num-samples=2", "--set=eval_NFE=2", "--eval-NFE=3")
    names = sorted(path.name for path in (run.folder / "evals").glob("*.npz"))
    assert names == ["6_2NFE_42.npz", "6_3NFE_42.npz"]


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--ckpt-steps=5"], r"5\.pt: .* 0, 6"),
        (["--labels=3,10"], "--labels: '10' .* 0 to 9"),
        (["--cfg-scale=4"], "guidance"),
        (["--set=working_dir=nowhere"], "working_dir: nowhere"),
        (["--num-samples=0"], "^--num-samples: 0"),
        (["--times=1,x,0"], "^--times: .*x"),
        (["--eval-NFE=2,"], "^--eval-NFE: null"),
        (["--eval-NFE=1,2", "--grid=g.png"], "--grid.*--eval-NFE 1,2"),
        (["--set=coefficient_type=Trig"], "coefficient_type 'Euler' .*'Trig'"),
        (["--set=dataset_type=ImageFolder"], "dataset_type 'Digits' .*'ImageFolder'"),
        (["--times=1,0.5,0", "--eval-NFE=2"], "--eval-NFE: --times"),
        (["--grid=/x.png/y.jpg"], r"--grid /x\.png/y\.jpg: .*\.png"),
        (["--ckpt=/nowhere/3.pt"], r"^/nowhere/3\.pt: "),
        (["--ckpt="], "MODEL|not the name"),
    ],
)
def test_an_impossible_request_is_refused_in_one_line(run, flags, named):
    with pytest.raises(UserError, match=named) as refusal:
        run(*flags)
    assert "\n" not in str(refusal.value)
    assert not list(run.folder.glob("evals/*"))


def test_a_checkpoint_of_another_model_without_a_record_is_refused(run):
    keep_published_entries(run.folder / "ckpts" / "6.pt")
    assert run("--num-samples=1").shape == (1, 8, 8, 1)  # Digits: one channel, ten classes
    with pytest.raises(UserError, match=r"6\.pt: .*network\."):
        run("--num-samples=1", "--seed=1", "--set=model_type=DiT-Nano-4")


# Samples that are there already


def test_pictures_of_others_are_not_replaced_by_a_grid(run, tmp_path):
    photograph, grid = tmp_path / "photograph.png", tmp_path / "grid.png"
    Image.new("RGB", (8, 8)).save(photograph)
    before = photograph.read_bytes()
    with pytest.raises(UserError, match=r"photograph\.png: .*--overwrite"):
        run("--num-samples=4", f"--grid={photograph}")
    assert photograph.read_bytes() == before
    for _ in range(2):
        run("--num-samples=4", f"--grid={grid}")
    run("--num-samples=4", f"--grid={photograph}", "--overwrite")
    assert photograph.read_bytes() == grid.read_bytes()


def test_images_that_are_not_numbers_are_refused_and_nothing_is_written(run):
    with edited(run.folder / "ckpts" / "6.pt") as content:
        next(iter(content["ema_model"].values())).fill_(math.nan)
    with pytest.raises(UserError, match="4 of 4"):
        run("--num-samples=4")
    assert not list(run.folder.glob("evals/*"))


def test_samples_of_another_request_are_not_replaced(run):
    run("--num-samples=4", "--labels=0,1,2")
    path = run.folder / "evals" / "6_1NFE_42.npz"
    before = path.read_bytes()
    for flags, named in (
        (["--labels=2"], r"labels \[0, 1, 2\] there, \[2\] "),
        ([], r"labels \[0, 1, 2\] there, .uniform. "),
        (["--labels=0,1,2", "--num-samples=3"], "num_images 4 there, 3 "),
        (["--labels=0,1,2", "--noise-stream=reference"], "noise_stream .*reference"),
        (["--labels=0,1,2", "--ckpt-steps=0", f"--output={path}"], "weights_sha256 .{66} there"),
    ):
        with pytest.raises(UserError, match=rf"6_1NFE_42\.npz: .*{named}.*--overwrite"):
            run("--num-samples=4", *flags)
        assert path.read_bytes() == before
    assert len(run("--num-samples=4", "--labels=0,1,2", "--eval-batch-size=3")) == 4
    run("--num-samples=4", "--noise-stream=reference", "--overwrite")
    with pytest.raises(UserError, match="eval_batch_size 32 there, 3 "):  # it decides these draws
        run("--num-samples=4", "--noise-stream=reference", "--eval-batch-size=3")


def test_a_kill_while_overwriting_leaves_no_record_of_others_beside_old_samples(run, monkeypatch):
    run("--num-samples=4")
    path = run.folder / "evals" / "6_1NFE_42.npz"
    monkeypatch.setattr("support.system.files.os.replace", lambda source, target: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # at the record, whose turn comes first
        run("--num-samples=3", "--overwrite")
    assert not path.exists()


def test_samples_that_no_record_describes_are_not_replaced(run):
    run("--num-samples=4")
    record = run.folder / "evals" / "6_1NFE_42.json"
    for text in ("", "3", "{}", None):
        record.unlink() if text is None else record.write_text(text)
        with pytest.raises(UserError, match=r"6_1NFE_42\.npz"):
            run("--num-samples=4")
    run("--num-samples=4", "--overwrite")
    run("--num-samples=4")


def test_samples_go_where_output_says_and_spare_what_is_no_record_there(run, tmp_path):
    inference.main([f"--ckpt={run.folder / 'ckpts' / '6.pt'}", "--num-samples=2",
                    f"--output={tmp_path / 'new' / 'two.npz'}"])  # fmt: skip
    assert json.loads((tmp_path / "new" / "two.json").read_text())["num_images"] == 2
    (tmp_path / "mine.json").write_text("[1, 2]")
    with pytest.raises(UserError, match=r"mine\.json"):
        run("--num-samples=2", f"--output={tmp_path / 'mine.npz'}")
    assert (tmp_path / "mine.json").read_text() == "[1, 2]"


# Classes by name


def labels_of(text: str, names: list[str]) -> list[int]:
    data = {"class_names": names}
    loaded = inference.LoadedModel(None, Config(), (1, 8, 8), len(names) or 4, data=data)
    return inference.choose_labels(text, loaded)


@pytest.mark.parametrize(
    ("text", "names", "labels"),
    [
        ("cat, dog,3", ["ant", "cat", "dog", "eel"], [1, 2, 3]),
        ("3,0", [], [3, 0]),
        ("07,7", [f"{number:02}" for number in range(10)], [7, 7]),
        ("6,0", ["5", "6"], [1, 0]),  # 5 and 6 are names, 0 and 1 numbers
        ("2,10", ["1", "2", "10"], [1, 2]),  # names alone: 1 would be the number of 2
    ],
)
def test_classes_are_asked_for_by_name_or_number(text, names, labels):
    assert labels_of(text, names) == labels


@pytest.mark.parametrize(
    ("text", "names", "named"),
    [
        ("cta", ["ant", "cat"], "'cta' .*0 to 1, .*ant, cat; .*cat?"),
        ("cat", [], "'cat' .*0 to 3"),
        ("0", ["1", "2", "10"], "'0' .*1, 2, 10"),
        ("x", [f"n{number:08}" for number in range(1000)], "'x' .*0 to 999, .*n00000000, "),
    ],
)
def test_an_unknown_class_is_refused_and_the_known_ones_are_named(text, names, named):
    with pytest.raises(UserError, match=f"^--labels: {named}") as refusal:
        labels_of(text, names)
    assert len(str(refusal.value)) < 250


def test_class_names_come_from_the_checkpoint(run, tmp_path, capsys):
    with edited(run.folder / "ckpts" / "6.pt") as content:
        content["data"]["class_names"] = ["nought", *"123456789"]
    run("--num-samples=4", "--labels=nought,7", f"--grid={tmp_path / 'grid.png'}")
    with np.load(run.folder / "evals" / "6_1NFE_42.npz") as archive:
        assert archive["arr_1"].tolist() == [0, 7, 0, 7]
    assert "(nought, 7)" in capsys.readouterr().out  # the rows of the picture
    with Image.open(tmp_path / "grid.png") as picture:
        assert picture.size == (100, 100)  # eval_demo_shape [2, 2]


# Which run, which checkpoint, which config


def sample_two(*flags: object) -> None:
    inference.main([*map(str, flags), "--num-samples=2"])


def made(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*.npz"))


@pytest.fixture
def elsewhere(trained, tmp_path, monkeypatch):
    """An empty current directory, with a copy of the run's folder as shared/ beside it."""
    shutil.copytree(trained, tmp_path / "shared")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    shared = tmp_path / "shared"
    (shared / "config.yaml").write_text(
        (shared / "config.yaml").read_text().replace(str(trained), "runs/digits")
    )
    return tmp_path


def test_a_config_elsewhere_means_its_working_dir_and_one_beside_checkpoints_those(
    elsewhere, trained
):
    shutil.copy("../shared/config.yaml", "mine.yaml")
    with pytest.raises(UserError, match=r"mine\.yaml: working_dir: runs/digits "):
        sample_two("--config=mine.yaml", "--ckpt-steps=6")
    shutil.move("../shared", "../my shared")
    command = ("--config=../my shared/config.yaml", "--ckpt-steps=6")
    sample_two(*command)
    assert made(elsewhere) == ["my shared/evals/6_1NFE_42.npz"]
    shutil.copytree(trained, "runs/digits")
    sample_two("--config=mine.yaml", "--ckpt-steps=6")
    assert made(elsewhere / "here") == ["runs/digits/evals/6_1NFE_42.npz"]
    shutil.rmtree("runs/digits/evals")
    with pytest.raises(UserError, match=r"\.\./my shared/ckpts.* runs/digits ") as refusal:
        sample_two(*command)
    for chosen in re.findall("--set (working_dir=(?:'.*?'|[^ ]*))", str(refusal.value)):
        sample_two(*command, f"--set={shlex.split(chosen)[0]}", "--seed=1")
    assert made(elsewhere)[:1] == ["here/runs/digits/evals/6_1NFE_1.npz"]
    assert made(elsewhere)[1:] == [f"my shared/evals/6_1NFE_{seed}.npz" for seed in (1, 42)]
    shutil.rmtree("runs/digits")
    Path("runs/digits").symlink_to(elsewhere / "my shared")  # one and the same is no question
    sample_two(*command, "--seed=2")
    assert "my shared/evals/6_1NFE_2.npz" in made(elsewhere)


def test_a_checkpoint_without_config_takes_that_of_its_run_or_asks_for_one(elsewhere):
    path = elsewhere / "shared" / "ckpts" / "6.pt"
    keep_published_entries(path)
    sample_two(f"--ckpt={path}")
    assert made(elsewhere) == ["shared/evals/6_1NFE_42.npz"]
    shutil.copy(path, "mine.pt")
    with pytest.raises(UserError, match=r"mine\.pt: .*--config"):
        sample_two("--ckpt=mine.pt")
    sample_two("--ckpt=mine.pt", "--config=../shared/config.yaml")
    assert "here/mine_1NFE_42.npz" in made(elsewhere)
    with pytest.raises(UserError, match=r"^--config: .*--ckpt-steps"):
        sample_two("--ckpt-steps=6")


def test_every_place_of_a_model_that_load_takes_is_sampled(elsewhere, monkeypatch):
    (elsewhere / "shared" / "config.yaml").unlink()  # the checkpoint holds it
    for folder in ("../shared", "../shared/ckpts", "../shared/ckpts/6.pt"):
        sample_two(f"--ckpt={folder}")
        assert made(elsewhere) == ["shared/evals/6_1NFE_42.npz"]
    export.main(["../shared", "exported"])
    shutil.copy("../shared/ckpts/6.pt", "mine.pt")
    for name in ("exported", "mine.pt"):
        sample_two(f"--ckpt={name}")
        assert f"here/{Path(name).stem}_1NFE_42.npz" in made(elsewhere)
    for folder, named in (("..", "shared"), ("../shard", "shared"), ("../shared/ckpts/5.pt", "pt")):
        with pytest.raises(UserError, match=rf"^{re.escape(folder)}.*{named}"):
            sample_two(f"--ckpt={folder}")
    monkeypatch.chdir("../shared/ckpts")
    sample_two("--ckpt=6.pt", "--seed=1")
    assert "shared/evals/6_1NFE_1.npz" in made(elsewhere)


def test_keys_of_a_published_config_that_are_not_known_are_named_and_passed_over(elsewhere, capsys):
    with open("../shared/config.yaml", "a") as file:
        file.write("use_fp16: false\nvae_scale: 1.0\n")
    sample_two("--config=../shared/config.yaml", "--ckpt-steps=6")
    assert re.match(r"../shared/config\.yaml: .*use_fp16, vae_scale", capsys.readouterr().err)


# Latents


@pytest.fixture
def released(tmp_path):
    """Options for a folder like a released one: a config, and a checkpoint of the five entries."""
    torch.manual_seed(0)
    model = build_model("DiT-Nano-2", 4, 4, 1000, 0.0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    vae = make_tiny_vae(tmp_path / "vae")
    keys = f"\nmodel_type: DiT-Nano-2\ndata_size: 4\nvae: {vae}\neval_demo_shape: [2, 2]\n"
    release(tmp_path, "tiny", keys, 9, model, torch.optim.SGD(model.parameters()))
    config = tmp_path / "SoFlow" / "tiny" / "config.yaml"
    return ["--config", str(config), "--ckpt-steps=9", "--num-samples=5"]


def test_latents_are_decoded_to_rgb_and_the_record_says_by_what(released, tmp_path):
    inference.main([*released, "--eval-NFE=2", f"--grid={tmp_path / 'grid.png'}"])
    path = tmp_path / "SoFlow" / "tiny" / "evals" / "9_2NFE_42.npz"
    with np.load(path) as archive:
        pixels = archive["arr_0"]
    assert pixels.shape == (5, 32, 32, 3)
    assert pixels.std() > 1
    record = json.loads(path.with_suffix(".json").read_text())
    assert (record["vae"], record["latent_scale"]) == (str(tmp_path / "vae"), 0.18215)
    assert record["vae_sha256"] == vae_digest(find_vae(str(tmp_path / "vae")))
    with Image.open(tmp_path / "grid.png") as picture:
        assert picture.mode == "RGB"
    inference.main([*released, "--eval-NFE=2", "--seed=42", "--set=vae_batch_size=1"])
    with np.load(path) as archive:
        assert np.abs(archive["arr_0"].astype(int) - pixels).max() <= 1


def test_absent_vae_is_noticed_before_the_checkpoint_is_read(released, monkeypatch):
    monkeypatch.setattr("inference.read_file", lambda *given: pytest.fail("read it"))
    with pytest.raises(UserError, match="vae: /nowhere"):
        inference.main([*released, "--set=vae=/nowhere"])


def test_another_vae_than_the_one_of_the_training_data_is_reported_wherever_it_decodes(
    released, tmp_path, capsys
):
    path = tmp_path / "SoFlow" / "tiny" / "ckpts" / "9.pt"
    other = make_tiny_vae(tmp_path / "other", seed=1)
    digest = vae_digest(find_vae(str(tmp_path / "vae")))
    data = {"vae": "the/vae", "vae_sha256": digest, "channels": 4, "num_classes": 1000}
    config = load_config(path.parent.parent / "config.yaml").to_dict()
    with edited(path) as content:
        content |= {"data": data, "config": {**config, "vae": str(other)}}

    def reports(command) -> bool:
        command()
        said = capsys.readouterr()
        return "the/vae" in said.out + said.err

    assert reports(lambda: load(path, device="cpu").sample(seeds=1))
    assert not reports(lambda: inference.main(released))  # its --config names the right one
    assert reports(lambda: inference.main([f"--ckpt={path}", "--num-samples=1", "--seed=1"]))
    assert reports(lambda: export.main([str(path), str(tmp_path / "out"), f"--vae={other}"]))
    with pytest.raises(UserError, match=f"vae_sha256 .*{digest}"):
        inference.main([*released, f"--set=vae={other}"])  # in place of the other's samples
    shutil.copytree(tmp_path / "vae", tmp_path / "copy")
    inference.main([*released, f"--set=vae={tmp_path / 'copy'}"])  # the same by another name
