"""Files made to do harm: nothing in them runs, they take no memory that is not there, and one line
names them.

Damage by accident, and what belongs to one format alone, is in the tests of the modules.
"""

import contextlib
import io
import json
import os
import pickle
import struct
import subprocess
import sys
import threading
import warnings
import zipfile
import zlib
from collections import OrderedDict
from pathlib import Path

import h5py
import loading
import numpy as np
import pytest
import torch
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from test_checkpoint import fresh_state, step
from test_latents import write_reference_form
from tiny_vae import make_tiny_vae

import train
from config import FIELDS, Config, config_from_dict, load_config
from evaluator import Results
from inference import data_of
from support.data.batches import BatchPlan
from support.data.cifar10 import read_batch
from support.data.images import read_image, refuse_non_pictures
from support.data.latent_parts import PartsFolder, Plan
from support.data.latents import LatentReader
from support.data.vae import find_vae, load_vae
from support.runs.checkpoint import (
    find_checkpoints,
    newest_checkpoint,
    read_checkpoint,
    save_checkpoint,
)
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


class Payload:
    """What unpickles to a call of `os.mkdir`, which leaves a trace."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


def write_structure(path, structure: bytes, compression=zipfile.ZIP_STORED, name="1/data.pkl"):
    """A checkpoint with a pickle of one's own and no tensors."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr(name, structure)
        archive.writestr("1/byteorder", "little")
        archive.writestr("1/version", "3\n")
    return path


def text(value) -> bytes:
    content = str(value).encode()
    return b"X" + struct.pack("<I", len(content)) + content


PICKLES = {
    "a global called": lambda trace: b"\x80\x02cos\nmkdir\n" + text(trace) + b"\x85R.",
    "a name from the stack": lambda trace: (
        b"\x80\x04" + text("os") + text("mkdir") + b"\x93" + text(trace) + b"\x85R."
    ),
    "an instance of old": lambda trace: b"(" + text(trace) + b"ios\nmkdir\n.",
    "an object of old": lambda trace: b"(cos\nmkdir\n" + text(trace) + b"o.",
    "eval": lambda trace: (
        b"\x80\x02c__builtin__\neval\n"
        + text(f"__import__('os').mkdir({str(trace)!r})")
        + b"\x85R."
    ),
    "a pickle in a storage": lambda trace: (
        b"\x80\x02ctorch.storage\n_load_from_bytes\n"
        + text(pickle.dumps(Payload(trace), 0).decode("latin1"))
        + b"\x85R."
    ),
    "a registered extension": lambda trace: b"\x80\x02\x82\x01" + text(trace) + b"\x85R.",
    "a persistent name": lambda trace: b"\x80\x02(" + text("storage") + b"cos\nmkdir\ntQ.",
}


@pytest.mark.parametrize("protocol", ["zip", "zip in a folder of its own", "bare"])
@pytest.mark.parametrize("kind", PICKLES)
def test_no_pickle_runs_anything_as_a_checkpoint(tmp_path, kind, protocol):
    trace, path = tmp_path / "trace", tmp_path / "1.pt"
    structure = PICKLES[kind](trace)
    if protocol == "bare":
        path.write_bytes(structure)
    else:
        write_structure(path, structure, name="data.pkl" if protocol == "zip" else "1/data.pkl")
    assert "not a readable checkpoint" in refused(read_checkpoint, path)
    assert not trace.exists()


PLACES = {
    "weights": lambda content, payload: content["model"].update(x=payload),
    "average": lambda content, payload: content["ema_model"].update(x=payload),
    "optimizer": lambda content, payload: content["optimizer"].update(state=payload),
    "optimizer's moments": lambda content, payload: content["optimizer"]["state"][0].update(
        exp_avg=payload
    ),
    "optimizer's settings": lambda content, payload: content["optimizer"]["param_groups"][0].update(
        lr=payload
    ),
    "steps": lambda content, payload: content.update(finished_steps=payload),
    "config": lambda content, payload: content.update(config={"seed": payload}),
    "key": lambda content, payload: content.update({payload: 1}),
    "further entry": lambda content, payload: content.update(further=[{"a": payload}]),
}


@pytest.mark.parametrize("place", PLACES)
def test_nothing_runs_wherever_in_a_checkpoint_it_hides(tmp_path, place):
    trace, content = tmp_path / "trace", state_dict()
    PLACES[place](content, Payload(trace))
    torch.save(content, tmp_path / "1.pt")
    assert "it asks for posix mkdir" in refused(read_checkpoint, tmp_path / "1.pt")
    assert not trace.exists()


def test_a_program_in_place_of_a_checkpoint_is_refused(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is old
        torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), tmp_path / "1.pt")
    refused(read_checkpoint, tmp_path / "1.pt")


@pytest.mark.parametrize("write", [torch.save, lambda what, path: path.write_bytes(what)])
def test_nothing_runs_as_the_weights_of_a_vae(tmp_path, write):
    make_tiny_vae(tmp_path / "vae")
    (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    payload, trace = Payload(tmp_path / "trace"), tmp_path / "trace"
    content = payload if write is torch.save else pickle.dumps(payload)
    write(content, tmp_path / "vae" / "diffusion_pytorch_model.bin")
    line = refused(
        lambda path: load_vae(find_vae(str(path)), torch.device("cpu")), tmp_path / "vae"
    )
    assert "cannot be loaded" in line
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
        assert "not valid YAML" in refused(load_config, path)
    path.write_text(f"working_dir: x\n{tag} [{trace}]: 1\n")
    refused(load_config, path)
    assert not trace.exists()


# Memory stays bounded: what is small and declares much is refused before it is unpacked


def deflated(size: int) -> bytes:
    """`size` zeros as zlib packs them, made without having them."""
    packer = zlib.compressobj(1)
    pieces = [packer.compress(bytes(MB)) for _ in range(size // MB)]
    return b"".join([*pieces, packer.compress(bytes(size % MB)), packer.flush()])


def structure_of_lists(path):
    write_structure(path, b"\x80\x02(" + b"]" * (9 * MB) + b"l.")


def inflated_structure(path):
    write_structure(path, b"\x80\x02" + b"]" + b"0]" * (64 * MB) + b".", zipfile.ZIP_DEFLATED)


def called_with_a_size(call: str):
    def write(path):
        size = struct.pack("<i", 256 * MB)
        write_structure(path, b"\x80\x02c" + call.encode() + b"\nJ" + size + b"\x85R.")

    return write


def nested_labels(path):
    labels: list = [0] * 16
    for _ in range(6):
        labels = [labels] * 16
    content = {"data": np.zeros((10, 3072), np.uint8), "labels": labels}
    path.write_bytes(pickle.dumps(content, protocol=2))


def text_encoded_again_and_again(path):
    again = b"c_codecs\nencode\nh\x00" + text("latin1") + b"\x86R"
    long = b"X" + struct.pack("<I", 8 * MB) + bytes(8 * MB) + b"q\x00"
    path.write_bytes(b"\x80\x02" + long + again * 32 + b".")


def declared_bytes(path):
    path.write_bytes(b"\x80\x05\x96" + struct.pack("<Q", 256 * MB) + b".")


def write_latents(path, shape, chunk, kind, label_chunk):
    """A file of zeros, all chunks of which are one and the same compressed one."""
    with h5py.File(path, "w") as file:
        options = {"compression": "gzip"}
        latents = file.create_dataset("latents", shape, kind, chunks=chunk, **options)
        labels = file.create_dataset("labels", shape[:1], "i8", chunks=(label_chunk,), **options)
        for data in (latents, labels):
            packed = deflated(int(np.prod(data.chunks)) * data.dtype.itemsize)
            for start in range(0, shape[0], data.chunks[0]):
                data.id.write_direct_chunk((start,) + (0,) * (data.ndim - 1), packed)
        file["amount"], file["latent_size"] = np.int64(shape[0]), np.int64(shape[2])


def one_enormous_chunk(path):
    rows = 36_864
    write_latents(path, (rows, 8, 16, 16), (rows, 8, 16, 16), "f4", rows // 9)


def labels_of_very_many_rows(path):
    write_latents(path, (16 * MB, 8, 1, 1), (MB, 8, 1, 1), "f2", MB)


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
    "lists.pt": structure_of_lists,
    "inflated.pt": inflated_structure,
    "bytearray.pt": called_with_a_size("builtins\nbytearray"),
    "tensor.pt": called_with_a_size("torch\nTensor"),
    "storage.pt": called_with_a_size("torch.storage\nUntypedStorage"),
    "data_batch_1": nested_labels,
    "data_batch_2": text_encoded_again_and_again,
    "data_batch_3": declared_bytes,
    "chunk.hdf5": one_enormous_chunk,
    "labels.hdf5": labels_of_very_many_rows,
    "text.npz": text_of_many_megabytes,
    "endless.yaml": lambda path: (path.touch(), os.truncate(path, 256 * MB)),
    "sides.png": lambda path: png(path, 60_000),
    "text.png": lambda path: png(path, 8, png_chunk(b"zTXt", b"a\0\0" + deflated(256 * MB))),
    "profile.png": lambda path: png(path, 8, png_chunk(b"iCCP", b"a\0\0" + deflated(256 * MB))),
    "sides.jpg": with_sides_at("JPEG", 5, ">HH", (60_000, 60_000), b"\xff\xc0"),
    "sides.bmp": with_sides_at("BMP", 18, "<ii", (60_000, 60_000)),
    "sides.gif": with_sides_at("GIF", 6, "<HH", (60_000, 60_000)),
    "frame.gif": with_sides_at("GIF", 5, "<HH", (60_000, 60_000), b",\0\0\0\0\x10"),
    "sides.jp2": with_sides_at("JPEG2000", 6, ">II", (60_000, 60_000), b"\xff\x51"),
    "sides.avif": with_sides_at("AVIF", 8, ">II", (60_000, 60_000), b"ispe"),
    "sides.qoi": with_sides_at("QOI", 4, ">II", (60_000, 60_000)),
    "sides.ppm": lambda path: path.write_bytes(b"P6 60000 60000 255\n" + bytes(100)),
}
READERS = {
    ".pt": read_checkpoint,
    "": read_batch,
    ".hdf5": read_latents,
    ".npz": read_all,
    ".yaml": load_config,
    ".png": read_image,
    ".jpg": read_image,
    ".bmp": read_image,
    ".ppm": read_image,
    ".gif": read_image,
    ".jp2": read_image,
    ".avif": read_image,
    ".qoi": read_image,
}
GROWTH_LIMIT_BYTES = 64 * MB


def peak_bytes() -> int:
    """Most memory that this process has held since it was last asked for."""
    status = Path("/proc/self/status").read_text()
    with contextlib.suppress(OSError):  # then the peak is that since the start
        Path("/proc/self/clear_refs").write_text("5")
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def read_every_bomb(folder: Path) -> None:
    """Print, for every file of `folder`, what reading it says and by how much memory grew."""
    read_image_once(folder)  # so that what is imported late does not count
    for path in sorted(folder.iterdir()):
        peak_bytes()
        before = peak_bytes()
        try:
            READERS[path.suffix](path)
            line = ""
        except UserError as error:
            line = str(error)
        print(json.dumps([path.name, line, peak_bytes() - before]), flush=True)


def read_image_once(folder: Path) -> None:
    for path in (folder.parent / "whole.png", folder.parent / "1.pt", folder.parent / "a.npz"):
        READERS[path.suffix](path)


@pytest.fixture(scope="module")
def explosions(tmp_path_factory):
    """What a process of its own says of each bomb, and how far its memory grew with it."""
    folder = tmp_path_factory.mktemp("bombs")
    (folder / "bombs").mkdir()
    for name, write in BOMBS.items():
        write(folder / "bombs" / name)
    Image.new("RGB", (8, 8)).save(folder / "whole.png")
    save_checkpoint(folder / "1.pt", state_dict())
    np.savez(folder / "a.npz", arr_0=np.zeros((1, 1, 1, 3), np.uint8), mu=np.zeros(3))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    run = subprocess.run(
        [sys.executable, __file__, str(folder / "bombs")],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    return {name: (line, growth) for name, line, growth in lines}, run.stderr


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="memory is looked up in /proc")
@pytest.mark.parametrize("name", BOMBS)
def test_what_unpacks_to_much_more_than_it_is_takes_no_memory(explosions, name):
    found, errors = explosions
    assert name in found, errors
    line, growth = found[name]
    assert name in line
    assert growth < GROWTH_LIMIT_BYTES, line


# Nothing is waited for


@contextlib.contextmanager
def reader_let_go(path, waits: list[bool]):
    """A block in which whoever waits for the other end of the pipe `path` is noted, and let go."""
    done = threading.Event()

    def let_go():
        while not done.wait(0.5):
            with contextlib.suppress(OSError):  # nobody has it open
                os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
                waits.append(True)

    thread = threading.Thread(target=let_go)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


@pytest.mark.parametrize(
    "read",
    [
        read_image,
        lambda path: refuse_non_pictures([path]),
        read_all,
        read_batch,
        read_latents,
        read_checkpoint,
    ],
    ids=["picture", "pictures", "archive", "batch", "latents", "checkpoint"],
)
def test_a_pipe_in_place_of_a_file_is_refused_and_not_waited_for(tmp_path, read):
    path = tmp_path / "a.png"
    os.mkfifo(path)
    waits: list[bool] = []
    with reader_let_go(path, waits):
        refused(read, path)
    assert not waits


# Odd content


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"finished_steps": True}, "finished_steps is bool, not a whole number"),
        ({"finished_steps": -1}, "finished_steps is -1, below 0"),
        ({"finished_steps": 1.0}, "finished_steps is float, not a whole number"),
        ({"finished_epochs": -(10**300)}, "finished_epochs is -1000"),
        ({"config": None}, "its entry `config` is damaged"),
        ({"config": [1]}, "its entry `config` is damaged"),
        ({"config": {"seed": torch.zeros(3)}}, "its entry `config` is damaged"),
        ({"config": {3: 1}}, "its entry `config` is damaged"),
        ({"config": {"seed": [[[1]]]}}, "its entry `config` is damaged"),
        ({"data": {"class_names": [["a"]]}}, "its entry `data` is damaged"),
        ({"data": {"channels": {}}}, "its entry `data` is damaged"),
        ({"parts": "12"}, "its entry `parts` is damaged"),
        ({"parts": {"batch_size": torch.tensor(3)}}, "its entry `parts` is damaged"),
    ],
)
def test_entries_of_a_checkpoint_that_are_not_what_they_must_be_are_named(tmp_path, entries, said):
    save_checkpoint(tmp_path / "1.pt", {**state_dict(), **entries})
    assert said in refused(read_checkpoint, tmp_path / "1.pt")


SPOILT_OPTIMIZERS = {
    "no mapping": lambda optimizer: optimizer.update(state=[1, 2]),
    "state of a text": lambda optimizer: optimizer["state"].update(a={}),
    "state of nobody": lambda optimizer: optimizer["state"].update({4: optimizer["state"][0]}),
    "state before the first": lambda optimizer: optimizer["state"].update({-1: {}}),
    "entry no mapping": lambda optimizer: optimizer["state"].update({0: [1]}),
    "step a text": lambda optimizer: optimizer["state"][0].update(step="1"),
    "step missing": lambda optimizer: optimizer["state"][0].pop("step"),
    "many steps": lambda optimizer: optimizer["state"][0].update(step=torch.zeros(2)),
    "moments of whole numbers": lambda optimizer: optimizer["state"][0].update(
        exp_avg=torch.zeros(3, 2, dtype=torch.int64)
    ),
    "moments of one value": lambda optimizer: optimizer["state"][0].update(
        exp_avg_sq=torch.zeros(1).expand(3, 2)
    ),
    "moments of a text": lambda optimizer: optimizer["state"][0].update(exp_avg="x"),
    "groups no list": lambda optimizer: optimizer.update(param_groups=3),
    "parameters a number": lambda optimizer: optimizer["param_groups"][0].update(params=3),
    "parameters of texts": lambda optimizer: optimizer["param_groups"][0].update(params=["a"]),
    "parameters of arrays": lambda optimizer: optimizer["param_groups"][0].update(
        params=[torch.zeros(2)]
    ),
    "endless parameter": lambda optimizer: optimizer["param_groups"][0].update(
        params=[float("inf")]
    ),
}


@pytest.mark.parametrize("kind", SPOILT_OPTIMIZERS)
def test_an_odd_optimizer_state_is_a_line_and_leaves_the_model_alone(tmp_path, kind):
    content, state = state_dict(), fresh_state()
    SPOILT_OPTIMIZERS[kind](content["optimizer"])
    save_checkpoint(tmp_path / "1.pt", content)
    before = [parameter.clone() for parameter in state.model.parameters()]
    content = read_checkpoint(tmp_path / "1.pt")
    assert "optimizer" in refused(
        lambda path: state.load_state_dict(content, str(path)), tmp_path / "1.pt"
    )
    assert all(map(torch.equal, before, state.model.parameters()))
    assert state.finished_steps == 0


def test_weights_that_are_no_floats_are_refused(tmp_path):
    content = state_dict()
    content["model"]["0.bias"] = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(UserError, match=r"1\.pt: .*1 not in floating point \(0\.bias\)"):
        fresh_state().load_state_dict(content, "1.pt")
    content["model"] = OrderedDict({"x" * 10_000: torch.zeros(1), "a\nb": torch.zeros(1)})
    refused(lambda path: fresh_state().load_state_dict(content, str(path)), "1.pt")


@pytest.mark.parametrize(
    "parts",
    [{}, {"batch_size": 8}, {"a": 1}, dict.fromkeys(vars(BatchPlan(8, 6, 1, 1)), "x"),
     {"batch_size": 8, "flow_matching_count": 6, "world_size": 0, "accumulation_steps": 1}],
)  # fmt: skip
def test_parts_of_a_batch_that_cannot_be_are_a_line(parts):
    with pytest.raises(UserError, match=r"1\.pt: its entry `parts` is damaged"):
        train.compare_parts(BatchPlan(8, 6, 1, 1), {"parts": parts}, Path("1.pt"))


@pytest.mark.parametrize("channels", [None, "3", -1, 0, 2**62, float("inf"), [3]])
def test_numbers_of_channels_and_classes_that_cannot_be_are_a_line(channels):
    content = {"data": {"channels": channels, "num_classes": 10}}
    with pytest.raises(UserError, match=r"1\.pt: its entry `data` is damaged"):
        data_of(Config(), content, Path("1.pt"))


@pytest.mark.parametrize("content", ["[]", '{"a": 1}', "3", "[" * 100_000, "", "\0"])
def test_a_plan_of_latents_that_is_none_is_a_line(tmp_path, content):
    parts = PartsFolder(tmp_path)
    parts.folder.mkdir()
    (parts.folder / "plan.json").write_text(content)
    plan = Plan(1, "0", 32, "0", "float32", 42, 1)
    refused(lambda path: parts.begin(plan), parts.folder / "plan.json")


def test_scores_that_are_no_numbers_are_passed_over(tmp_path):
    records = [
        '{"file": "a.npz", "scores": {"IS": 1' + "0" * 400 + "}}",
        '{"file": "a.npz", "scores": {"IS": [1]}}',
        '{"file": "a.npz", "scores": [1]}',
        '{"file": "a.npz"}',
        "[" * 100_000,
        "3",
    ]
    (tmp_path / "eval_results.jsonl").write_text("\n".join(records) + "\n")
    assert Results.open(tmp_path).records == {}


def test_an_array_that_stands_twice_is_refused(tmp_path):
    np.savez(tmp_path / "a.npz", arr_0=np.zeros((1, 2, 2, 3), np.uint8), mu=np.zeros(3))
    read_all(tmp_path / "a.npz")
    with zipfile.ZipFile(tmp_path / "a.npz", "a") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile notices, and does it
        archive.writestr("arr_0.npy", archive.read("arr_0.npy"))
    assert "arr_0: stands in this file more than once" in refused(read_all, tmp_path / "a.npz")


@pytest.mark.parametrize("target", ["secret.hdf5", "/etc/hostname", "imagenet_latent.hdf5"])
@pytest.mark.parametrize("name", ["latents", "labels", "amount", "latent_size"])
def test_no_entry_of_a_latent_file_leads_elsewhere(tmp_path, name, target):
    write_reference_form(tmp_path / "secret").rename(tmp_path / "secret.hdf5")
    path = write_reference_form(tmp_path)
    with h5py.File(path, "r+") as file:
        del file[name]
        file[name] = h5py.ExternalLink(target, name)
    assert f"{name} is not an array in this file" in refused(read_latents, path)


def test_a_filter_that_is_not_there_is_a_line(tmp_path):
    path = write_reference_form(tmp_path)
    with h5py.File(path, "r+") as file:
        del file["latents"]
        layout = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        layout.set_chunk((12, 8, 4, 4))
        layout.set_filter(305, h5py.h5z.FLAG_OPTIONAL)  # of nobody's
        space = h5py.h5s.create_simple((12, 8, 4, 4))
        latents = h5py.h5d.create(file.id, b"latents", h5py.h5t.IEEE_F32LE, space, layout)
        latents.write_direct_chunk((0, 0, 0, 0), bytes(12 * 512))
    refused(read_latents, path)


# Configs


@pytest.mark.parametrize(
    "seed",
    ["!!bool x", "!!timestamp x", "!!int ''", "!!float ''", "!!int x", "!!int '-'", "!!int '0x'",
     "!!float '1:x'", "!!binary é", "!!binary x", "!!set {a}", "!!omap [a: 1]", "!!str {}",
     "!!merge x", "!!value x", "!<a%0Ab> x", "2001-99-99", "2001-01-01 00:00:00 +99:99",
     "'\\ud800'", '"\\ud800"', '"a\\nb"', "{? [1]: 2}", "[[[[1]]]]", "1" * 5000, "x" * 100_000,
     "[" * 1000, "{a: " * 1000, "&a [*a]", "&a [x]\np: *a", "-.inf", "1_0e", "\t1", "a\x07b", "@"],
)  # fmt: skip
def test_odd_values_in_a_config_are_one_line(tmp_path, seed):
    (tmp_path / "c.yaml").write_text(f"working_dir: x\nseed: {seed}\n")
    refused(load_config, tmp_path / "c.yaml")


@pytest.mark.parametrize(
    "content",
    [
        "working_dir: ü".encode("latin1"), "working_dir: x".encode("utf-16"),
        "working_dir: x".encode("utf-32"), b"working_dir: a\0b", b"working_dir: \xed\xa0\x80",
        b'working_dir: x\n"a\\nb": 1', b'working_dir: x\n"a\\nb": 1\n"a\\nb": 2', b"<<: {seed: 1}",
        b"? " * 1000, b"- " * 1000, b"--- 1\n--- 2", b"%YAML 9.9\n---\nseed: 1", b"1: 2",
        b"null: 1",
        b'working_dir: "a\\0b"', b'working_dir: x\ndataset_path: "a\\0b"',
        b'working_dir: x\nvae: "\\ud800"', b"working_dir: x\n" + b"k" * 1000 + b": 1",
        b"working_dir: x\nmodel_type: DiT-B-" + b"1" * 5000,
        b"working_dir: x\nmodel_type: " + b"a" * 100_000, b"a: &a x\nb: &b [*a, *a]",
    ],
    ids=lambda content: str(content[:30]),
)  # fmt: skip
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
scalars = st.none() | st.booleans() | st.integers() | st.floats() | texts | st.binary()
values = st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(scalars, inner))
keys = st.sampled_from(list(FIELDS)) | texts
plausible = st.sampled_from(["x", 1, 2, 0.5, [1, 2], "DiT-B-2"])
mappings = st.dictionaries(keys, scalars | values | plausible, max_size=3)
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


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(values=mappings, written=st.booleans())
def test_any_keys_and_values_are_a_config_or_one_line(config_path, values, written):
    values = {"working_dir": "x", **values}
    with one_line_at_most():
        if written:
            config_path.write_text(yaml.safe_dump(values), encoding="utf-8")
            assert isinstance(load_config(config_path), Config)
        else:
            config = config_from_dict(values, "c.pt")
            assert config_from_dict(config.to_dict(), "c.pt") == config


@settings(max_examples=200, deadline=None)
@given(overrides=st.lists(texts | st.builds("{}={}".format, keys, texts), max_size=3))
def test_any_overrides_are_a_config_or_one_line(config_path, overrides):
    config_path.write_text("working_dir: x")
    with one_line_at_most():
        assert isinstance(load_config(config_path, overrides), Config)


# Damage of any kind


def damaged(data: bytes):
    """Copies of `data` with bytes replaced, cut out, put in, and cut off."""
    places = st.integers(0, len(data) - 1)
    edit = st.tuples(places, st.integers(0, 40), st.binary(max_size=8))

    def apply(edits, end):
        changed = bytearray(data)
        for start, length, new in edits:
            changed[start : start + length] = new
        return bytes(changed[:end] if end else changed)

    return st.builds(apply, st.lists(edit, min_size=1, max_size=3), st.none() | places)


def in_memory(write) -> bytes:
    write(buffer := io.BytesIO())
    return buffer.getvalue()


PIXELS = np.random.default_rng(0).integers(0, 256, (5, 3, 4, 3), np.uint8)
MEAN = np.arange(3.0)
STORED = in_memory(lambda file: np.savez(file, arr_0=PIXELS, mu=MEAN))
DEFLATED = in_memory(lambda file: np.savez_compressed(file, arr_0=PIXELS, mu=MEAN))
CHECKPOINT = in_memory(lambda file: torch.save(state_dict(), file))


@settings(max_examples=300, deadline=None)
@given(content=damaged(STORED) | damaged(DEFLATED))
@example(content=STORED)
@example(content=DEFLATED)
def test_a_damaged_archive_gives_what_it_held_or_one_line(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "damaged.npz"
    path.write_bytes(content)
    with one_line_at_most():
        pixels, mean = read_all(path)
        np.testing.assert_array_equal(pixels, PIXELS)
        np.testing.assert_array_equal(mean, MEAN)


@settings(max_examples=200, deadline=None)
@given(content=damaged(CHECKPOINT))
@example(content=CHECKPOINT)
def test_a_damaged_checkpoint_is_loaded_or_one_line(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "1.pt"
    path.write_bytes(content)
    with one_line_at_most():
        read = read_checkpoint(path)
        assert read["finished_steps"] >= 0
        fresh_state().load_state_dict(read, str(path))


names = st.text(max_size=20).filter(lambda name: name and "/" not in name and "\0" not in name)
names = names.filter(lambda name: name not in (".", "..") and name.isprintable())
numbered = st.integers(0, 10**30).map("{}.pt".format) | st.from_regex(
    r"[+-]?0?\d{1,3}\.pt\.?", fullmatch=True
)
contents = st.just(CHECKPOINT) | damaged(CHECKPOINT) | st.binary(max_size=20) | st.none()


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(files=st.dictionaries(names | numbered, contents, max_size=4))
def test_of_any_folder_the_newest_whole_checkpoint_is_taken(tmp_path_factory, files):
    folder = tmp_path_factory.mktemp("ckpts")
    for name, content in files.items():
        with contextlib.suppress(UnicodeEncodeError):
            if content is None:
                (folder / name).mkdir()
            else:
                (folder / name).write_bytes(content)
    found = find_checkpoints(folder)
    assert {path.name for path in found.values()} == {f"{steps}.pt" for steps in found}
    said: list[str] = []
    with one_line_at_most():
        newest = newest_checkpoint(folder, lambda path, content: None, said.append)
        assert (newest is None) == (not found)
        whole = [steps for steps, path in found.items() if files[path.name] == CHECKPOINT]
        assert newest is None or not whole or int(newest[0].stem) >= max(whole)
    assert all(len(line.splitlines()) == 1 for line in said)


if __name__ == "__main__":
    read_every_bomb(Path(sys.argv[1]))
