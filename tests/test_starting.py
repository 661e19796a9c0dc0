"""A run that starts from another model: what is copied, what is new, what is refused."""

import copy
import json

import pytest
import torch
from checkpoints import assert_equal, load
from commands import ROOT, digits_settings, forked
from safetensors.torch import save_file

import train
from models import build_model
from support.runs.starting import match
from support.runs.stored import StoredModel
from support.system.files import UserError, sha256_of
from training.conventions import start_network

TABLE = "y_embedder.embedding_table.weight"


def network(names="ab", channels=1, size=8, model_type="DiT-Nano-2"):
    """A fresh network, whose weights are all other than those of the one before."""
    built = build_model(model_type, channels, size, len(names), 0.1).network
    for parameter in built.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    return built


def matched(source, target, names="ab", target_names="ab"):
    stored = StoredModel(ROOT / "none.pt", source.state_dict(), {}, {"class_names": list(names)})
    return match(stored, target, target_names)


@pytest.mark.parametrize("size", [8, 16])  # of the source's images
def test_of_the_same_network_and_classes_all_but_the_positions_is_copied(size):
    source, target = network(size=size), network()
    expected = {**source.state_dict(), "pos_embed": target.pos_embed.clone()}
    found = matched(source, target)
    assert (found.new, found.left) == ([], [])
    target.load_state_dict(found.copied, strict=False)
    assert_equal({**target.state_dict()}, expected)


def test_rows_of_the_label_table_are_those_of_the_same_name():
    source, target = network("abc"), network("xcad")
    found = matched(source, target, "abc", "xcad")
    table = found.copied[TABLE]
    old, new = source.state_dict()[TABLE], target.state_dict()[TABLE]
    for row, expected in enumerate((new[0], old[2], old[0], new[3], old[3])):
        assert torch.equal(table[row], expected), row
    assert "2 of 4 classes by name" in found.notes[0]


def test_without_trusted_names_as_many_classes_are_matched_by_number():
    target = network("xyz")
    for names in ((), "abcdefg"):  # none, or more than rows
        source = network("abc")
        found = matched(source, target, names, "xyz")
        assert torch.equal(found.copied[TABLE], source.state_dict()[TABLE])
        found = matched(network("abcd"), target, names, "xyz")
        assert TABLE in found.new and TABLE not in found.copied


def test_of_images_with_other_channels_what_touches_them_is_new():
    found = matched(network(channels=1), network(channels=3))
    assert [name.split()[0] for name in found.new] == [
        "x_embedder.proj.weight", "final_layer.linear.weight", "final_layer.linear.bias",
    ]  # fmt: skip


def test_of_a_network_without_the_gap_its_embedding_is_new(tmp_path):
    source, target = network(), network()
    weights = {n: t for n, t in source.state_dict().items() if not n.startswith("s_embedder")}
    gap = {n: t.clone() for n, t in target.state_dict().items() if n.startswith("s_embedder")}
    path = tmp_path / "published.pt"
    published = {f"module.{n}": t for n, t in weights.items()}
    torch.save({"ema": {**published, "epoch": 3}}, path)
    record, _ = start_network(str(path), target, "ab")
    assert record["new"] == [*gap]
    assert record["file_sha256"] == sha256_of(path)
    assert_equal({**target.state_dict()}, weights | gap)
    save_file(weights, tmp_path / "published.safetensors")
    again = network()
    start_network(str(tmp_path / "published.safetensors"), again, "ab")
    assert torch.equal(again.blocks[0].attn.qkv.weight, source.blocks[0].attn.qkv.weight)


@pytest.mark.parametrize("model_type", ["UNet", "DiT-Ti-2"])
def test_what_fits_nowhere_is_refused(tmp_path, model_type):
    source = network(model_type=model_type, size=32 if model_type == "UNet" else 8)
    torch.save(source.state_dict(), tmp_path / "m.pt")
    target = network()
    before = copy.deepcopy(target.state_dict())
    with pytest.raises(UserError, match=r"m\.pt"):
        start_network(str(tmp_path / "m.pt"), target, "ab")
    assert_equal(target.state_dict(), before)


@pytest.mark.parametrize("content", [{"model": {1: 2, "b": 3}}, {"a": 1}, [1], None])
def test_a_source_without_weights_is_refused(tmp_path, content):
    if content is not None:
        torch.save(content, tmp_path / "m.pt")
    with pytest.raises(UserError, match=r"^init_from: .*m\.pt"):
        start_network(str(tmp_path / "m.pt"), network(), "ab")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "run"
    train.main(digits_settings(folder, total_steps=2, ema_decay_rate=0.5))
    return folder


def test_a_run_starts_from_the_average_and_never_looks_again(source, tmp_path, capsys):
    folder = tmp_path / "run"
    words = digits_settings(folder, total_steps=2, init_from=source, ema_decay_rates="[0.5]")
    train.main([*words, "--set=ckpt_saving_steps=1"])
    said = capsys.readouterr().out
    assert f"starts from {source / 'ckpts' / '2.pt'} (SHA-256 " in said
    assert "label table: 10 of 10 classes by name and the null class" in said
    start, origin = load(folder, 0), load(source, 2)["ema_model"]
    for part in (start["model"], start["ema_model"], start["averages"]["0.5"]):
        assert_equal(part, origin)
    record = start["started_from"]
    assert record["file_sha256"] == sha256_of(source / "ckpts" / "2.pt")
    assert (record["finished_steps"], record["new"], record["left"]) == (2, [], [])
    whole = load(folder, 2)
    (folder / "ckpts" / "2.pt").unlink()
    source.rename(source.with_name("moved"))
    try:
        train.main([*words, "--set=ckpt_saving_steps=1"])
    finally:
        source.with_name("moved").rename(source)
    assert load(folder, 2)["started_from"] == record
    assert_equal(load(folder, 2)["model"], whole["model"])


@pytest.mark.slow
def test_every_process_starts_from_the_same_weights(source, tmp_path):
    folder = tmp_path / "run"
    values = {"total_steps": 1, "init_from": source, "logging_steps": 1}
    words = digits_settings(folder, **values)
    done = forked("train.py", *words, ranks=2)
    assert done.returncode == 0, done.stderr
    alone = tmp_path / "alone"
    # Cut alike, the batch has the same noise.
    train.main(digits_settings(alone, accumulation_steps=2, **values))
    norms = [
        json.loads((place / "metrics.jsonl").read_text())["Grad_Norm"] for place in (folder, alone)
    ]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
