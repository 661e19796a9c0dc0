"""A model as a folder that travels: the same weights, a card, one graph, and the way to a hub."""

import json
import stat

import pytest
import torch
from commands import digits_settings
from safetensors.torch import load_file

import export
import train
from sampling import load
from support.runs.checkpoint import read_checkpoint
from support.runs.stored import _wanted
from support.system.files import UserError


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "digits"
    train.main([*digits_settings(folder, total_steps=3, ema_decay_rate=0.1), "--set=seed=5"])
    return folder


def test_an_export_is_the_averaged_weights_bit_for_bit_and_loads(run, tmp_path):
    export.main([str(run), str(tmp_path / "out")])
    weights = load_file(tmp_path / "out" / "model.safetensors")
    expected = read_checkpoint(run / "ckpts" / "3.pt")["ema_model"]
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    loaded, whole = (
        load(p, device="cpu", report=lambda line: None) for p in (tmp_path / "out", run)
    )
    asked = {"labels": [1, 2], "seeds": [3, 4]}
    assert torch.equal(loaded.sample(**asked).latents, whole.sample(**asked).latents)
    assert loaded.class_names == whole.class_names == [str(digit) for digit in range(10)]
    mode = (tmp_path / "out" / "model.safetensors").stat().st_mode
    assert stat.S_IMODE(mode) == 0o644


def test_the_card_says_what_the_records_say_and_nothing_of_this_machine(run, tmp_path):
    evals = run / "evals"
    record = {
        "file": "3.npz", "num_images": 600, "step": 3, "NFE": 1, "distances": "exact",
        "scores": {"FD": 12.345678, "prec": 0.5}, "reference": {"sha256": "ab" * 32},
    }  # fmt: skip
    (evals / "eval_results.jsonl").write_text(json.dumps(record) + "\n")
    export.main([str(run), str(tmp_path / "out")])
    card = (tmp_path / "out" / "README.md").read_text()
    for said in ("DiT-Nano-2, 1,323,780 parameters; 8 pixels a side, 10 classes", "1,197 images",
                 "3 of 3 steps of 12 images", "license: other  # fill", "samples.png"):  # fmt: skip
        assert said in card
    assert "FD 12.35, prec 0.5" in card
    text = card + (tmp_path / "out" / "config.json").read_text()
    assert str(run) not in text


def test_a_folder_that_is_there_is_replaced_on_request_and_left_where_the_export_fails(
    run, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="exists; say --overwrite to replace it"):
        export.main([str(run), str(out)])
    monkeypatch.setattr(export, "write_grid", lambda *given: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export.main([str(run), str(out), "--overwrite"])
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine.txt"]
    monkeypatch.undo()
    export.main([str(run), str(out), "--overwrite"])
    assert sorted(p.name for p in out.iterdir()) == [
        "README.md", "config.json", "model.safetensors", "samples.png",
    ]  # fmt: skip


@pytest.mark.slow
def test_the_graph_gives_the_images_of_torch_in_any_batch_size(run, tmp_path, capfd):
    pytest.importorskip("onnxruntime", reason="needs onnxruntime")
    pytest.importorskip("onnxscript", reason="needs onnxscript")
    export.main([str(run), str(tmp_path / "out"), "--onnx"])  # compares them itself
    out, err = capfd.readouterr()
    assert (tmp_path / "out" / "model.onnx").stat().st_size > 5_000_000
    assert out.count("\n") == 1
    assert err == ""


def test_a_graph_that_gives_other_images_is_refused(run, tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime", reason="needs onnxruntime")

    class Session:
        def __init__(self, path):
            pass

        def run(self, names, fed):
            return [fed["noise"] + 1]

    monkeypatch.setattr("onnxruntime.InferenceSession", Session)
    loaded = load(run, device="cpu", report=lambda line: None)
    with pytest.raises(UserError, match=r"--onnx: the graph's images are off by .*; nothing is"):
        export.check_onnx(
            loaded, export.Solution(loaded.model), tmp_path, ["noise", "t", "s", "label"]
        )


def test_packages_that_are_missing_are_said_before_any_work(run, tmp_path, monkeypatch):
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="--onnx: not installed: pip install onnx onnxscript onnxr"):
        export.main([str(run), str(tmp_path / "out"), "--onnx"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("files", "subfolder", "wanted"),
    [
        (
            ["model.safetensors", "config.json", "ckpts/9.pt"],
            "",
            ["model.safetensors", "config.json"],
        ),
        (
            [
                "XL-2-cond/config.yaml",
                "XL-2-cond/ckpts/4.pt",
                "XL-2-cond/ckpts/12.pt",
                "B/ckpts/1.pt",
            ],
            "XL-2-cond",
            ["XL-2-cond/config.yaml", "XL-2-cond/ckpts/12.pt"],
        ),
    ],
)
def test_of_a_repository_only_what_makes_up_one_model_is_fetched(files, subfolder, wanted):
    assert _wanted("owner/name", files, subfolder) == wanted


def test_a_repository_without_a_model_there_says_where_there_are_some():
    with pytest.raises(
        UserError, match="owner/name: has no model; there are models in B, XL-2-cond"
    ):
        _wanted("owner/name", ["XL-2-cond/ckpts/12.pt", "B/ckpts/1.pt"], "")
