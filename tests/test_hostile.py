"""Files made to do harm: nothing in them runs, they take no memory before their sizes were looked
at, and one line names them.

Damage by accident, and what belongs to one format alone, is in the tests of the modules.
"""

import contextlib
import io
import os
import pickle
import struct
import threading
import zipfile
import zlib
from collections import OrderedDict
from pathlib import Path

import h5py
import loading
import numpy as np
import pytest
import torch
from checkpoints import fresh_state, step
from damage import Payload, damaged, in_memory
from hypothesis import example, given, settings
from hypothesis import strategies as st
from latent_files import write_reference_form
from PIL import Image
from tiny_vae import make_tiny_vae

from config import FIELDS, Config, config_from_dict, load_config
from evaluator import Results
from support.data.folders import sizes_of_pictures
from support.data.images import read_image
from support.data.latent_parts import PartsFolder, Plan
from support.data.latents import LatentReader
from support.data.vae import find_vae, load_vae
from support.runs.checkpoint import read_checkpoint
from support.scores.npz import read_archive
from support.system.files import UserError

LONGEST_LINE = 500  # besides the name of the file
MB = 1 << 20


def refused(read, path) -> str:
    """The one line that `read(path)` is refused with."""
    with pytest.raises(UserError) as refusal:
        read(path)
    line = str(refusal.value)
    assert str(path) in line
    assert len(line.splitlines()) == 1
    assert len(line) < len(str(path)) + LONGEST_LINE
    return line


def state_dict(finished_steps: int = 1) -> dict:
    """The content of a small checkpoint after a step."""
    state = fresh_state()
    step(state)
    state.finished_steps = finished_steps
    return state.state_dict(1)


def read_all(path):
    """The images and the mean of an archive."""
    with read_archive(path) as archive:
        pixels = np.concatenate(list(archive.batches(2)))
        return pixels, archive.floats("mu", (3,))


def read_latents(path):
    return LatentReader(path).read([0])


# Nothing runs


@pytest.mark.parametrize("write", [torch.save, lambda what, path: path.write_bytes(what)])
def test_nothing_runs_as_the_weights_of_a_vae(tmp_path, write):
    make_tiny_vae(tmp_path / "vae")
    (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    payload, trace = Payload(tmp_path / "trace"), tmp_path / "trace"
    content = payload if write is torch.save else pickle.dumps(payload)
    write(content, tmp_path / "vae" / "diffusion_pytorch_model.bin")
    refused(lambda path: load_vae(find_vae(str(path)), torch.device("cpu")), tmp_path / "vae")
    assert not trace.exists()


@pytest.mark.parametrize(
    "tag",
    ["!!python/object/apply:os.mkdir", "!!python/object/new:os.mkdir", "!!python/name:os.mkdir",
     "!<tag:yaml.org,2002:python/object/apply:os.mkdir>", "!!python/module:os"],
)  # fmt: skip
def test_no_tag_of_a_config_runs_anything(tmp_path, tag):
    trace, path = tmp_path / "trace", tmp_path / "c.yaml"
    for seed in (f"{tag} [{trace}]", f"{tag} {trace}", f"[{tag} [{trace}]]"):
        path.write_text(f"working_dir: x\nseed: {seed}\n")
        refused(load_config, path)
    path.write_text(f"working_dir: x\n{tag} [{trace}]: 1\n")
    refused(load_config, path)
    assert not trace.exists()


# Memory stays bounded: what is small and declares much is refused before it is unpacked


def deflated(size: int) -> bytes:
    """`size` zeros as zlib packs them, made without having them."""
    packer = zlib.compressobj(1)
    pieces = [packer.compress(bytes(MB)) for _ in range(size // MB)]
    return b"".join([*pieces, packer.compress(bytes(size % MB)), packer.flush()])


def packed_checkpoint(path):
    torch.save(state_dict() | {"further": torch.zeros(128 * MB, dtype=torch.uint8)}, path)
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in content.items():
            archive.writestr(name, data)


def text_of_many_megabytes(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        np.lib.format.write_array(buffer := io.BytesIO(), np.zeros((), f"U{32 * MB}"))
        archive.writestr("arr_0.npy", buffer.getvalue())


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(path, side, *chunks):
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    pixels = png_chunk(b"IDAT", deflated(128 * MB))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + pixels)


def with_sides_at(extension: str, place: int, layout: str, sides: tuple, after: bytes = b""):
    """A picture whose header is told that it is larger."""

    def write(path):
        Image.new("RGB", (16, 16)).save(buffer := io.BytesIO(), extension)
        data = bytearray(buffer.getvalue())
        start = data.index(after) + place
        data[start : start + struct.calcsize(layout)] = struct.pack(layout, *sides)
        path.write_bytes(data)

    return write


BOMBS = {
    "packed.pt": packed_checkpoint,
    "text.npz": text_of_many_megabytes,
    "endless.yaml": lambda path: (path.touch(), os.truncate(path, 256 * MB)),
    "sides.png": lambda path: png(path, 60_000),
    "text.png": lambda path: png(path, 8, png_chunk(b"zTXt", b"a\0\0" + deflated(256 * MB))),
    "sides.jpg": with_sides_at("JPEG", 5, ">HH", (60_000, 60_000), b"\xff\xc0"),
    "frame.gif": with_sides_at("GIF", 5, "<HH", (60_000, 60_000), b",\0\0\0\0\x10"),
}
READERS = {
    ".pt": read_checkpoint, ".hdf5": read_latents, ".npz": read_all, ".yaml": load_config,
    ".png": read_image, ".jpg": read_image, ".gif": read_image,
}  # fmt: skip
GROWTH_LIMIT_BYTES = 64 * MB


def peak_bytes() -> int:
    """Most memory that this process has held since it was last asked for."""
    status = Path("/proc/self/status").read_text()
    Path("/proc/self/clear_refs").write_text("5")
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="memory is read in /proc")
@pytest.mark.parametrize("name", BOMBS)
def test_what_unpacks_to_much_more_than_it_is_takes_no_memory(tmp_path, name):
    path = tmp_path / name
    path.touch()
    refused(READERS[path.suffix], path)  # so that what is imported late does not count
    BOMBS[name](path)
    peak_bytes()
    before = peak_bytes()
    refused(READERS[path.suffix], path)
    assert peak_bytes() - before < GROWTH_LIMIT_BYTES


# Nothing is waited for


def let_go(path, waits: list):
    """Note and end the wait of whoever has the pipe open; OSError where nobody has."""
    os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
    waits.append(path)


@pytest.mark.parametrize(
    "read",
    [read_image, lambda path: sizes_of_pictures([path]), read_latents, read_checkpoint],
    ids=["picture", "pictures", "latents", "checkpoint"],
)
def test_a_pipe_in_place_of_a_file_is_refused_and_not_waited_for(tmp_path, read):
    path = tmp_path / "a.png"
    os.mkfifo(path)
    waits: list = []
    timer = threading.Timer(10, let_go, (path, waits))
    timer.start()
    refused(read, path)
    timer.cancel()
    assert not waits


# Odd content


@pytest.mark.parametrize("content", ["[]", '{"a": 1}', "3", "[" * 100_000, "", "\0"])
def test_a_plan_of_latents_that_is_none_is_a_line(tmp_path, content):
    parts = PartsFolder(tmp_path)
    parts.folder.mkdir()
    (parts.folder / "plan.json").write_text(content)
    plan = Plan(
        num_images=1, images_sha256="0", image_size=32, vae_sha256="0", dtype="float32", seed=42,
        part_images=1,
    )  # fmt: skip
    refused(lambda path: parts.begin(plan), parts.folder / "plan.json")


def test_scores_that_are_no_numbers_are_passed_over(tmp_path):
    records = [
        '{"file": "a.npz", "scores": {"IS": [1]}}',
        '{"file": "a.npz", "scores": [1]}',
        '{"file": "a.npz"}',
        "3",
    ]
    (tmp_path / "eval_results.jsonl").write_text("\n".join(records) + "\n")
    assert Results.open(tmp_path).records == {}


@pytest.mark.parametrize("name", ["latents", "labels"])
def test_no_entry_of_a_latent_file_leads_elsewhere(tmp_path, name):
    write_reference_form(tmp_path / "secret").rename(tmp_path / "secret.hdf5")
    path = write_reference_form(tmp_path)
    with h5py.File(path, "r+") as file:
        del file[name]
        file[name] = h5py.ExternalLink("secret.hdf5", name)
    assert f"{name} " in refused(read_latents, path)


# Configs


ODD_VALUES = (
    ["!!bool x", "!!timestamp x", "!!int ''", "!!float ''", "!!int x", "!!int '-'", "!!int '0x'",
     "!!float '1:x'", "!!binary é", "!!binary x", "!!set {a}", "!!omap [a: 1]", "!!str {}",
     "!!merge x", "!!value x", "!<a%0Ab> x", "2001-99-99", "2001-01-01 00:00:00 +99:99",
     "'\\ud800'", '"\\ud800"', '"a\\nb"', "{? [1]: 2}", "[[[[1]]]]", "1" * 5000, "x" * 100_000,
     "[" * 1000, "{a: " * 1000, "&a [*a]", "&a [x]\np: *a", "-.inf", "1_0e", "\t1", "a\x07b", "@"]
)  # fmt: skip
ODD_CONFIGS = (
    ["working_dir: ü".encode("latin1"), "working_dir: x".encode("utf-16"),
     "working_dir: x".encode("utf-32"), b"working_dir: a\0b", b"working_dir: \xed\xa0\x80",
     b'working_dir: x\n"a\\nb": 1', b'working_dir: x\n"a\\nb": 1\n"a\\nb": 2', b"<<: {seed: 1}",
     b"? " * 1000, b"- " * 1000, b"--- 1\n--- 2", b"%YAML 9.9\n---\nseed: 1", b"1: 2", b"null: 1",
     b'working_dir: "a\\0b"', b'working_dir: x\ndataset_path: "a\\0b"',
     b'working_dir: x\nvae: "\\ud800"', b"working_dir: x\n" + b"k" * 1000 + b": 1",
     b"working_dir: x\nmodel_type: DiT-B-" + b"1" * 5000,
     b"working_dir: x\nmodel_type: " + b"a" * 100_000, b"a: &a x\nb: &b [*a, *a]"]
)  # fmt: skip
ODD_CONFIGS += [f"working_dir: x\nseed: {value}\n".encode() for value in ODD_VALUES]


@pytest.mark.parametrize("content", ODD_CONFIGS, ids=lambda content: str(content[:40]))
def test_odd_configs_are_one_line(tmp_path, content):
    (tmp_path / "c.yaml").write_bytes(content)
    refused(load_config, tmp_path / "c.yaml")


def test_values_that_only_a_program_can_give_are_one_line():
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    for value in (deep, torch.zeros(9, 9), b"x", object(), {1: 2}, OrderedDict(), np.zeros(3)):
        for key in FIELDS:
            refused(lambda source, bad=value, at=key: config_from_dict({at: bad}, source), "c.pt")


def test_the_home_of_nobody_is_a_folder_that_is_not_there(tmp_path):
    values = {"working_dir": "x", "dataset_type": "ImageFolder", "dataset_path": "~nobody-here/x"}
    refused(lambda path: loading.data_of(config_from_dict(values, "c")), "~nobody-here/x")
    refused(find_vae, "~nobody-here/x")


@contextlib.contextmanager
def one_line_at_most():
    """Passes over a UserError of one line; anything else that is raised goes on."""
    try:
        yield
    except UserError as error:
        assert len(str(error).splitlines()) == 1


@pytest.fixture(scope="module")
def config_path(tmp_path_factory):
    return tmp_path_factory.mktemp("config") / "c.yaml"


texts = st.text(st.characters(exclude_categories=()))  # halves of characters too
keys = st.sampled_from(list(FIELDS)) | texts
pieces = st.sampled_from(
    ["working_dir: x", "seed", ": ", "\n", "- ", "[", "]", "{", "}", "!!int ", "!!bool ", "&a ",
     "*a", "'", '"', "|", ">", "#", "%YAML", "---", "...", "?", "<<: ", "~", "1", "e5", "\\", "\t"]
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(content=st.binary() | st.lists(pieces).map(lambda parts: "".join(parts).encode()))
@example(content=b"working_dir: x\nseed: !!int ''")
def test_any_bytes_are_a_config_or_one_line(config_path, content):
    config_path.write_bytes(content)
    with one_line_at_most():
        assert isinstance(load_config(config_path), Config)


@settings(max_examples=200, deadline=None)
@given(overrides=st.lists(texts | st.builds("{}={}".format, keys, texts), max_size=3))
def test_any_overrides_are_a_config_or_one_line(config_path, overrides):
    config_path.write_text("working_dir: x")
    with one_line_at_most():
        assert isinstance(load_config(config_path, overrides), Config)


# Damage of any kind


CHECKPOINT = in_memory(lambda file: torch.save(state_dict(), file))


@settings(max_examples=200, deadline=None)
@given(content=damaged(CHECKPOINT))
@example(content=CHECKPOINT)
def test_a_damaged_checkpoint_is_loaded_or_one_line(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "1.pt"
    path.write_bytes(content)
    with one_line_at_most():
        read = read_checkpoint(path)
        fresh_state().load_state_dict(read, str(path))
