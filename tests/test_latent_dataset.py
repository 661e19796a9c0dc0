"""From pictures to latents to a trained model to pictures, and through every interruption."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import h5py
import numpy as np
import pytest
import standins
import torch
from checkpoints import assert_equal, load, state_of
from commands import ROOT, forked
from killed_extraction import Killer
from packed_pictures import SOURCES
from PIL import Image
from tiny_vae import make_tiny_vae

import inference
import latent_dataset
import train
from support.data import latent_parts
from support.data.images import read_image
from support.data.latents import LATENT_FILE, LatentReader
from support.data.vae import decoder_notes, find_vae, load_vae
from support.system.files import UserError

SIZE = 64  # pixels
PER_CLASS = 9

# Forms that photographs come in: mode and extension.
FORMS = [("RGB", "jpg"), ("L", "png"), ("P", "png"), ("RGBA", "png"), ("CMYK", "jpg")]
FORMS += [("I;16", "png"), ("RGB", "webp"), ("LA", "png"), ("1", "png")]


def make_photos(folder):
    """Class folders of crops of photographs, in many forms and sizes."""
    source = np.random.default_rng(0)
    for name in ("cat", "china", "flower"):
        photograph = standins.photographs()[name]
        (folder / name).mkdir(parents=True)
        for index, (mode, extension) in enumerate(FORMS):
            size = int(source.integers(40, 200))
            picture = Image.fromarray(standins.crops(photograph, 1, size, seed=index)[0])
            if mode == "I;16":
                picture = Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257)
            else:
                picture = picture.convert(mode)
            exif = Image.Exif()
            exif[0x0112] = 6  # "turn me by 90 degrees"
            picture.save(folder / name / f"{index}.{extension}", exif=exif.tobytes())
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with photos, a VAE, and the latents of an unbroken extraction."""
    folder = tmp_path_factory.mktemp("latents")
    make_photos(folder / "photos")
    make_tiny_vae(folder / "vae")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latent_dataset, "PART_IMAGES", 4)
        latent_dataset.main(options(folder))
    return folder


def options(folder, save="latents", **changes):
    values = {
        "data-path": folder / "photos", "save-path": folder / save, "vae": folder / "vae",
        "image-size": SIZE, "device-batch-size": 3, "num-workers": 0, "device": "cpu", **changes,
    }  # fmt: skip
    return [f"--{key}={value}" for key, value in values.items() if value is not None]


@pytest.fixture
def scratch(made, tmp_path, monkeypatch):
    """A folder with the photos and the VAE, in which small parts are made."""
    monkeypatch.setattr(latent_dataset, "PART_IMAGES", 4)
    shutil.copytree(made / "photos", tmp_path / "photos")
    (tmp_path / "vae").symlink_to(made / "vae")
    return tmp_path


@pytest.fixture
def begun(scratch):
    """`scratch` with some of the parts, of an extraction that was killed."""
    killed, _ = extract_and_kill(options(scratch), 10)
    assert killed
    return scratch


def latents_of(folder, save="latents"):
    return (folder / save / LATENT_FILE).read_bytes()


def assert_same_latents(folder, other, tolerance=0.0):
    ours, theirs = (LatentReader(place / LATENT_FILE) for place in (folder, other))
    assert torch.equal(ours.labels, theirs.labels)
    assert (ours.read(range(27)) - theirs.read(range(27))).abs().max() <= tolerance


def refusal(arguments):
    with pytest.raises(UserError) as caught:
        latent_dataset.main(arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# All the way.


def expected_moments(made, apply_exif=True):
    vae = load_vae(find_vae(str(made / "vae")), torch.device("cpu"))
    moments = []
    for name in ("cat", "china", "flower"):
        for path in sorted((made / "photos" / name).iterdir()):
            pixels = torch.from_numpy(read_image(path, SIZE, apply_exif).copy()).permute(2, 0, 1)[
                None
            ]
            posterior = vae.encode(pixels / 127.5 - 1).latent_dist
            moments.append(torch.cat([posterior.mean, posterior.std], dim=1))
    return torch.cat(moments)


def test_latents_are_the_vaes_in_order_with_their_labels(made):
    reader = LatentReader(made / "latents" / LATENT_FILE)
    assert torch.equal(reader.labels, torch.arange(3).repeat_interleave(PER_CLASS))
    assert (reader.read(range(27)) - expected_moments(made)).abs().max() < 1e-5
    assert reader.info.class_names == ("cat", "china", "flower")
    assert reader.info.class_counts == (9, 9, 9)
    assert reader.info.vae == str(made / "vae")
    assert reader.info.image_size == SIZE
    assert [path.name for path in (made / "latents").iterdir()] == [LATENT_FILE]


@pytest.mark.slow
def test_two_processes_make_the_same_file_and_go_on_when_one_is_killed(made, tmp_path):
    script = "tests/killed_extraction.py"
    arguments = options(made, **{"save-path": tmp_path})
    killed = forked(script, "1:4", *arguments, ranks=2)  # amid the second part of the process
    assert killed.returncode != 0
    assert not (tmp_path / LATENT_FILE).exists()
    there = [int(path.stem) for path in tmp_path.glob("*/0*.part")]
    num_parts = len(there)
    assert 1 <= num_parts < 7
    parts = latent_parts.PartsFolder(tmp_path)
    missing_images = 27 - sum(len(parts.read_header(index).labels) for index in there)
    done = forked(script, "none:0", *arguments, ranks=2)
    said = done.stdout
    assert done.returncode == 0, done.stderr
    assert f"in 7 parts; {7 - num_parts} of them are to be made" in said
    assert f"\n{missing_images} images in " in said  # each made by one of the processes
    assert said.count("images/s; the VAE took") == 1
    assert_same_latents(tmp_path, made / "latents", 1e-5)
    infos = [LatentReader(f / LATENT_FILE).info for f in (tmp_path, made / "latents")]
    assert infos[0] == infos[1]


def training_options(made, folder, config="imagenet.yaml", **values):
    settings = {
        "working_dir": folder, "model_type": "DiT-Nano-2", "data_size": SIZE // 8,
        "dataset_path": made / "latents", "vae": made / "vae", "device": "cpu",
        "total_steps": 6, "batch_size": 8, "num_workers": 0,
        "ckpt_saving_steps": 3, "logging_steps": 3, "eval_demo_steps": 6,
        "eval_demo_shape": "[3, 2]", "eval_steps": 6, "eval_num_samples": 5, **values,
    }  # fmt: skip
    options = (f"--set={key}={value}" for key, value in settings.items())
    return ["--config", str(ROOT / "configs" / config), *options]


LATENT_CONFIGS = [*ROOT.glob("configs/imagenet*.yaml"), ROOT / "configs" / "image_latents.yaml"]


@pytest.mark.parametrize("config", sorted(path.name for path in LATENT_CONFIGS))
def test_every_config_of_latents_trains_with_its_network_made_small(made, tmp_path, config):
    steps = {"total_steps": 1, "eval_demo_steps": 1, "eval_steps": 0}
    train.main(training_options(made, tmp_path / "run", config, **steps))
    assert (tmp_path / "run" / "figs" / "1.png").exists()


@pytest.mark.slow
def test_latents_train_resume_exactly_and_come_out_as_pictures(made, tmp_path, monkeypatch):
    train.main(training_options(made, tmp_path / "run"))
    with Image.open(tmp_path / "run" / "figs" / "6.png") as picture:
        assert picture.mode == "RGB"
        assert picture.size == (2 * (SIZE + 2), 3 * (SIZE + 2))
    with np.load(tmp_path / "run" / "evals" / "6.npz") as archive:
        assert archive["arr_0"].shape == (5, SIZE, SIZE, 3)
    record = json.loads((tmp_path / "run" / "evals" / "6.json").read_text())
    assert record["vae"] == str(made / "vae")

    shutil.copytree(tmp_path / "run", tmp_path / "again")
    (tmp_path / "again" / "ckpts" / "6.pt").unlink()
    train.main(training_options(made, tmp_path / "again", num_workers=2))
    assert_equal(state_of(load(tmp_path / "run", 6)), state_of(load(tmp_path / "again", 6)))
    assert load(tmp_path / "run", 6)["data"]["class_names"] == ["cat", "china", "flower"]

    sample = [*training_options(made, tmp_path / "run"), "--ckpt-steps=6", "--num-samples=4"]
    inference.main([*sample, "--eval-NFE=2", f"--grid={tmp_path / 'grid.png'}"])
    with np.load(tmp_path / "run" / "evals" / "6_2NFE_42.npz") as archive:
        assert archive["arr_0"].dtype == np.uint8
        assert archive["arr_0"].shape == (4, SIZE, SIZE, 3)
    assert (tmp_path / "grid.png").exists()


def test_training_without_pixels_needs_no_vae(made, tmp_path, monkeypatch):
    monkeypatch.setattr("support.data.vae._fetch", lambda name: pytest.fail("looked for a VAE"))
    shutil.copytree(made / "latents", tmp_path / "latents")
    with h5py.File(tmp_path / "latents" / LATENT_FILE, "r+") as file:
        file.attrs["vae"] = "stabilityai/sd-vae-ft-mse"  # the config's default
    nothing = {"eval_steps": 0, "eval_demo_steps": 0, "total_steps": 2}
    arguments = training_options(tmp_path, tmp_path / "run", **nothing)
    train.main([argument for argument in arguments if not argument.startswith("--set=vae=")])
    assert (tmp_path / "run" / "ckpts" / "2.pt").exists()


def test_training_tells_that_another_vae_decodes_than_made_the_latents(made, tmp_path):
    shutil.copytree(made / "latents", tmp_path / "latents")
    with h5py.File(tmp_path / "latents" / LATENT_FILE, "r+") as file:
        file.attrs["vae_sha256"] = "0" * 64
    few = {"total_steps": 1, "eval_demo_steps": 1, "eval_steps": 0}
    for place in (made, tmp_path):
        folder = tmp_path / place.name
        train.main(training_options(made, folder, dataset_path=place / "latents", **few))
        record = load(folder, 1)["data"]
        assert record["vae"] == str(made / "vae")
        notes = decoder_notes(find_vae(str(made / "vae")), record, (4, 8, 8))
        assert len(notes) == (place == tmp_path)
        assert all(note in (folder / "log.txt").read_text() for note in notes)


def without_attributes(made, folder):
    """The latents as the published code writes them, in `folder`."""
    folder.mkdir()
    with (
        h5py.File(made / "latents" / LATENT_FILE, "r") as ours,
        h5py.File(folder / LATENT_FILE, "w") as theirs,
    ):
        for name in ("labels", "amount", "latent_size"):
            theirs.create_dataset(name, data=ours[name][()])
        moments = ours["latents"][()]  # of random weights: brought to the deviation of real ones
        theirs.create_dataset("latents", data=moments * 5 / moments[:, :4].std())
    return folder


def test_file_of_the_published_code_trains_if_the_vae_is_there(made, tmp_path):
    plain = without_attributes(made, tmp_path / "latents")
    few = {"dataset_path": plain, "total_steps": 2, "eval_demo_steps": 2}
    with pytest.raises(UserError, match=r"^vae: /nowhere: "):
        train.main(training_options(made, tmp_path / "run", vae="/nowhere", **few))
    assert not (tmp_path / "run").exists()
    train.main(training_options(made, tmp_path / "run", **few))
    assert load(tmp_path / "run", 2)["data"]["num_classes"] == 1000


def test_half_the_room_on_request(made, tmp_path):
    latent_dataset.main(options(made, **{"save-path": tmp_path / "latents", "dtype": "float16"}))
    half, full = (LatentReader(f / "latents" / LATENT_FILE) for f in (tmp_path, made))
    assert half.dtype == np.float16
    assert half.is_plain
    assert torch.allclose(half.read([3, 1]).float(), full.read([3, 1]), rtol=1e-3, atol=1e-4)


def test_another_precision_says_once_how_far_it_is_off_and_is_recorded(made, tmp_path, capsys):
    latent_dataset.main(options(made, **{"save-path": tmp_path, "precision": "bf16"}))
    (line,) = (s for s in capsys.readouterr().out.splitlines() if s.startswith("precision bf16"))
    mean, most = map(float, re.search(r"off by (\S+) on average and (\S+) at most", line).groups())
    assert 0 < mean < most < 0.2
    coarse, exact = (LatentReader(f / LATENT_FILE) for f in (tmp_path, made / "latents"))
    assert (coarse.info.precision, exact.info.precision) == ("bf16", "fp32")
    off = (coarse.read(range(27)) - exact.read(range(27))).abs()
    assert off.mean() == pytest.approx(mean, rel=0.5)


@pytest.mark.slow
def test_512_pixels_give_latents_of_side_64(made, tmp_path):
    (tmp_path / "photos").mkdir()
    shutil.copytree(made / "photos" / "cat", tmp_path / "photos" / "cat")
    (tmp_path / "vae").symlink_to(made / "vae")
    latent_dataset.main(options(tmp_path, **{"image-size": 512}))
    assert LatentReader(tmp_path / "latents" / LATENT_FILE).shape == (9, 8, 64, 64)


def test_pictures_stay_as_they_lie_on_request_and_the_file_says_so(made, tmp_path):
    """Phones store a picture as it lay, and say in its EXIF data how to turn it."""
    latent_dataset.main(options(made, **{"save-path": tmp_path, "exif": "ignore"}))
    lying, upright = (LatentReader(f / LATENT_FILE) for f in (tmp_path, made / "latents"))
    assert (lying.read(range(27)) - expected_moments(made, False)).abs().max() < 1e-5
    assert (lying.read(range(27)) - upright.read(range(27))).abs().max() > 0.1
    assert (lying.info.exif, upright.info.exif) == ("ignore", "apply")


def test_files_that_are_not_read_are_said_at_the_start(scratch, capsys):
    for name in ("a.heic", "b.heic", "c.mov", ".hidden.mov"):
        (scratch / "photos" / "china" / name).touch()
    latent_dataset.main(options(scratch))
    said = capsys.readouterr().out
    assert "cat (9), china (9), flower (9)\n" in said
    assert all(named in said for named in ("china", "2 .heic", "1 .mov"))


@pytest.mark.parametrize("form", SOURCES)
def test_any_source_gives_the_same_latents_after_a_kill_too(made, scratch, tmp_path, form):
    (tmp_path / "packed").mkdir()
    source = SOURCES[form](made / "photos", tmp_path / "packed")
    arguments = options(scratch, **{"data-path": source})
    killed, _ = extract_and_kill(arguments, 12)
    assert killed and len([*(tmp_path / "latents").glob("*/0*.part")]) < 7
    latent_dataset.main(arguments)
    assert_same_latents(tmp_path / "latents", made / "latents")


# Killed.


def in_child(work):
    """The wait status of a fork that does `work`, quietly, and what it returned."""
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            result = work()
        os.write(writing, json.dumps(result).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read()
    return os.waitpid(child, 0)[1], json.loads(said or "null")


def extract_and_kill(arguments, at):
    """Extract in a fork; returns whether it was killed, and the calls that it made if not."""

    def work():
        killer = Killer(at)
        latent_dataset.main(arguments)
        return killer.events

    status, events = in_child(work)
    assert status in (0, signal.SIGKILL)
    return status == signal.SIGKILL, events


def assert_nothing_passes_for_complete(folder, whole):
    """Under the final name is the whole file or none; under those of parts, whole parts."""
    if (folder / LATENT_FILE).exists():
        assert (folder / LATENT_FILE).read_bytes() == whole
    parts = latent_parts.PartsFolder(folder)
    for path in parts.folder.glob("0*.part"):
        parts.read_latents(int(path.stem))


@pytest.mark.slow
def test_killed_at_every_write_it_goes_on_to_the_same_file(scratch):
    """SIGKILL at every sync, rename and deletion, and in the middle of every write of a merge."""
    for name in ("cat", "china"):  # two and a quarter parts are as good as seven
        shutil.rmtree(scratch / "photos" / name)
    latent_dataset.main(options(scratch, "unbroken"))
    whole = latents_of(scratch, "unbroken")
    killed, events = extract_and_kill(options(scratch, "counted"), None)
    assert not killed
    # No kill can show that parts are deleted after their rows are synced; a loss of power would.
    assert "pwrite fsync unlink pwrite fsync unlink" in " ".join(events)
    assert len(events) >= 20
    for at in range(len(events)):
        save = scratch / f"killed-{at}"
        killed, _ = extract_and_kill(options(scratch, save.name), at)
        assert killed
        assert_nothing_passes_for_complete(save, whole)
        killed, _ = extract_and_kill(options(scratch, save.name), None)
        assert not killed, f"could not go on after {events[:at]}"
        assert latents_of(scratch, save.name) == whole
        assert [path.name for path in save.iterdir()] == [LATENT_FILE]
        shutil.rmtree(save)


def test_finished_parts_are_not_made_again(begun, monkeypatch, capsys):
    there = sorted((begun / "latents").glob("*/0*.part"))
    assert there
    read = []
    monkeypatch.setattr(
        latent_dataset, "read_image", lambda path, *how: read.append(path) or read_image(path, *how)
    )
    latent_dataset.main(options(begun))
    assert len(read) == 27 - 4 * len(there)
    assert f"in 7 parts; {7 - len(there)} of them are to be made" in capsys.readouterr().out
    read.clear()
    latent_dataset.main(options(begun))
    assert not read
    assert f"{LATENT_FILE} was made before" in capsys.readouterr().out


def test_progress_says_rate_time_left_and_the_share_of_the_vae(scratch, monkeypatch, capsys):
    monkeypatch.setattr(latent_dataset, "SECONDS_BETWEEN_LINES", -1)
    latent_dataset.main(options(scratch))
    said = capsys.readouterr().out.splitlines()
    number = r"[0-9]+\.[0-9]"
    progress = rf"about 3 of 27 images, {number} images/s, ETA 0:00:0."
    assert any(re.fullmatch(progress, line) for line in said)
    summary = rf"27 images in 0:00:0., {number} images/s; the VAE took [0-9]+% of the time"
    assert any(re.fullmatch(summary, line) for line in said)


@pytest.mark.parametrize("name", ["plan.json", "merge.json"])
def test_damaged_notes_are_named(scratch, name):
    killed, events = extract_and_kill(options(scratch), 34)
    assert killed, events
    path = scratch / "latents" / "imagenet_latent.parts" / name
    assert (path.parent / "merged.hdf5").exists()
    path.write_text("no JSON")
    assert f"{path}: " in refusal(options(scratch))


def test_batch_size_and_processes_may_change_on_the_way(begun, made):
    latent_dataset.main(options(begun, **{"device-batch-size": 2, "num-workers": 2}))
    assert_same_latents(begun / "latents", made / "latents", 1e-5)


# Refused.


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"image-size": 128}, "image_size 64 there, 128 now"),
        ({"exif": "ignore"}, "exif apply there, ignore now"),
        ({"vae": "other"}, "vae_sha256 "),
        ({}, "images_sha256 "),
    ],
)
def test_parts_of_another_command_are_refused_and_kept(begun, changes, named):
    before = sorted((begun / "latents").rglob("*.*"))  # all but the lock
    if "vae" in changes:
        changes = {"vae": make_tiny_vae(begun / "other", seed=1)}
    if not changes:
        Image.new("RGB", (99, 99)).save(begun / "photos" / "cat" / "0.jpg")
    assert named in refusal(options(begun, **changes))
    assert sorted((begun / "latents").rglob("*.*")) == before


def test_finished_file_of_another_command_is_not_replaced(scratch, made):
    shutil.copytree(made / "latents", scratch / "latents")
    said = refusal(options(scratch, seed=1, precision="bf16"))
    assert all(named in said for named in (LATENT_FILE, "seed 42", "precision fp32"))
    with h5py.File(scratch / "latents" / LATENT_FILE, "r+") as file:
        del file.attrs["precision"]  # as in older files
    before = latents_of(scratch)
    latent_dataset.main(options(scratch, precision="bf16"))
    assert latents_of(scratch) == before
    with h5py.File(scratch / "latents" / LATENT_FILE, "r+") as file:
        for name in list(file.attrs):
            del file.attrs[name]
    assert LATENT_FILE in refusal(options(scratch))


def test_unreadable_picture_stops_the_run_or_is_left_out(scratch, made):
    bad = scratch / "photos" / "china" / "3.png"
    bad.write_bytes(bad.read_bytes()[:300])
    said = refusal(options(scratch))
    assert str(bad) in said
    assert "--skip-bad" in said
    finished = len(list((scratch / "latents").glob("*/0*.part")))
    assert finished == 3  # the picture is the 13th
    latent_dataset.main([*options(scratch), "--skip-bad"])
    reader, whole = (LatentReader(f / "latents" / LATENT_FILE) for f in (scratch, made))
    kept = [row for row in range(27) if row != 12]
    assert torch.equal(reader.labels, whole.labels[kept])
    assert (reader.read(range(26)) - whole.read(kept)).abs().max() < 1e-5
    assert reader.info.class_counts == (9, 8, 9)
    assert (scratch / "latents" / "skipped_images.txt").read_text() == "china/3.png\n"


def test_pictures_left_out_before_are_named_to_who_does_not_want_that(scratch):
    (scratch / "photos" / "cat" / "1.png").write_text("")
    killed, _ = extract_and_kill([*options(scratch), "--skip-bad"], 10)
    assert killed
    said = refusal(options(scratch))
    assert "cat/1.png: " in said
    assert "--skip-bad" in said


def test_pictures_none_of_which_can_be_read_are_refused(scratch):
    for path in (scratch / "photos").glob("*/*"):
        path.write_text("no picture")
    said = refusal([*options(scratch), "--skip-bad"])
    assert "27" in said
    assert not (scratch / "latents" / LATENT_FILE).exists()


@pytest.mark.parametrize("is_merging", [False, True])
def test_damaged_part_is_named_set_aside_and_made_again(scratch, made, is_merging):
    _, events = extract_and_kill(options(scratch, "counted"), None)
    merged = [at for at, event in enumerate(events) if event == "pwrite"]
    killed, _ = extract_and_kill(options(scratch), merged[2] if is_merging else merged[0] - 9)
    assert killed
    parts = sorted((scratch / "latents").glob("*/0*.part"))
    assert is_merging == (parts[0].stem != "000000")
    damaged = bytearray(parts[1].read_bytes())
    damaged[len(damaged) // 3] ^= 1
    parts[1].write_bytes(damaged)
    assert str(parts[1]) in refusal(options(scratch))
    assert not (scratch / "latents" / LATENT_FILE).exists()
    latent_dataset.main(options(scratch))
    assert_same_latents(scratch / "latents", made / "latents")
    assert [path.name for path in (scratch / "latents").iterdir()] == [LATENT_FILE]


def test_merged_file_that_reads_back_otherwise_gets_no_final_name(scratch, made, monkeypatch):
    write = latent_parts._write_at

    def flip(descriptor, values, offset):
        write(descriptor, values, offset)
        os.pwrite(descriptor, bytes([values[5] ^ 1]), offset + 5)

    with monkeypatch.context() as patch:
        patch.setattr(latent_parts, "_write_at", flip)
        said = refusal(options(scratch))
    assert "merged.hdf5: " in said
    assert "part 0 " in said
    assert not (scratch / "latents" / LATENT_FILE).exists()
    latent_dataset.main(options(scratch))  # on a disk that works again
    assert_same_latents(scratch / "latents", made / "latents")


def test_two_commands_do_not_work_on_one_folder(scratch, monkeypatch):
    parts = latent_parts.PartsFolder(scratch / "latents")
    with parts.owned():
        assert str(parts.folder) in refusal(options(scratch))
    refused = []

    def tried(function):
        def trying(*args):
            with pytest.raises(UserError), parts.owned():
                pass
            refused.append(function.__name__)
            return function(*args)

        return trying

    monkeypatch.setattr(latent_dataset, "encode", tried(latent_dataset.encode))
    monkeypatch.setattr(latent_parts, "write_frame", tried(latent_parts.write_frame))
    latent_dataset.main(options(scratch))
    assert {"encode", "write_frame"} <= set(refused)


def test_other_mistakes_are_named_before_anything_is_made(scratch):
    assert "vae: /nowhere: " in refusal(options(scratch, vae="/nowhere"))
    (scratch / "empty").mkdir()
    assert f"vae: {scratch / 'empty'}: " in refusal(options(scratch, vae=scratch / "empty"))
    inside = scratch / "photos" / "latents"
    nowhere = scratch / "nowhere"
    assert f"{nowhere}: " in refusal(options(scratch, **{"data-path": nowhere}))
    assert f"--save-path {inside}: " in refusal(options(scratch, **{"save-path": inside}))
    below = scratch / "vae" / "config.json" / "x"
    assert str(below) in refusal(options(scratch, **{"save-path": below}))
    assert not (scratch / "latents").exists()


@pytest.mark.parametrize("wrong", ["x", "0", "-8"])
def test_size_that_is_none_is_refused(scratch, capsys, wrong):
    with pytest.raises(SystemExit):
        latent_dataset.main(options(scratch, **{"image-size": wrong}))
    assert f"'{wrong}'" in capsys.readouterr().err


def test_vae_that_gives_no_numbers_is_refused(scratch, monkeypatch):
    monkeypatch.setattr(
        latent_dataset, "encode", lambda vae, images, *how: torch.full((len(images), 8, 8, 8), 1e6)
    )
    said = refusal(options(scratch, dtype="float16"))
    assert all(named in said for named in (str(scratch / "vae"), "float16", "0 to 3"))
    assert not list((scratch / "latents").glob("*/0*.part"))


# A full disk.

GROWING_DISK = """
import os, sys
import latent_dataset
from support.system.files import UserError

latent_dataset.PART_IMAGES = 4
disk, options, kilobytes = sys.argv[1], sys.argv[2:], 16
os.system(f"mount -t tmpfs -o size={kilobytes}k tmpfs {disk}")
while kilobytes < 400:
    try:
        latent_dataset.main(options)
        print("done", os.listdir(disk), flush=True)
        os.system(f"mkdir {disk}.copy; cp {disk}/imagenet_latent.hdf5 {disk}.copy")
        break
    except UserError as error:
        assert chr(10) not in str(error)
        assert not os.path.exists(f"{disk}/imagenet_latent.hdf5")
        print("full", len(os.listdir(f"{disk}/imagenet_latent.parts")), error, flush=True)
    kilobytes += 4
    os.system(f"mount -o remount,size={kilobytes}k {disk}")
"""


@pytest.mark.slow
def test_full_disk_is_said_and_with_more_room_the_same_command_goes_on(scratch, made):
    """On a disk that grows by 4 kB each time: it fills up in the plan, in parts, in the merge."""
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("no namespaces here")
    (scratch / "disk").mkdir()
    command = [sys.executable, "-c", GROWING_DISK, scratch / "disk"]
    finished = subprocess.run(
        ["unshare", "-rm", *command, *options(scratch, "disk")],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # as the other file was made: bit for bit
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert finished.returncode == 0, finished.stderr
    said = finished.stdout.splitlines()
    assert f"done ['{LATENT_FILE}']" in said
    full = [line for line in said if line.startswith("full")]
    assert all("No space left on device" in line for line in full)
    assert sum(".part: not written" in line for line in full) >= 5
    assert sum("merged.hdf5: not written" in line for line in full) >= 1
    assert_same_latents(scratch / "disk.copy", made / "latents")
