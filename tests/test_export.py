"""A model as a folder that travels: the same weights, a card, one graph, and the way to a hub."""

import json
import math
import stat

import numpy as np
import pytest
import torch
from commands import digits_settings
from safetensors.torch import load_file
from tiny_vae import make_tiny_vae
from torch import nn

import export
import train
from config import config_from_dict
from models import build_model
from sampler import decoding
from sampling import assemble, load
from support.runs import graphs
from support.runs.checkpoint import read_checkpoint
from support.runs.stored import StoredModel, _wanted
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
    for said in ("DiT-Nano-2, 1,323,780 parameters", "8 x 8 pixels", "| examples | 1,197 |",
                 "3 of 3, 12 samples each", "license: unknown  # to", "samples.png"):  # fmt: skip
        assert said in card
    assert "| 1 | renoise | 600 | 12.35 | 0.5 |" in card
    assert f"SHA-256 {'ab' * 32}" in card and "10: 0, 1, 2" in card and "exact distances" in card
    text = card + (tmp_path / "out" / "config.json").read_text()
    assert str(run) not in text


def test_scores_of_other_weights_of_the_same_step_stay_out_of_the_card(run, tmp_path):
    record = {"file": "3.npz", "num_images": 6, "step": 3, "NFE": 1, "scores": {"FD": 7.5}}
    (run / "evals" / "eval_results.jsonl").write_text(json.dumps(record) + "\n")
    made = run / "evals" / "3.json"
    made.write_text(json.dumps({"weights_sha256": "0" * 64}))
    export.main([str(run), str(tmp_path / "out")])
    assert "None of these weights" in (tmp_path / "out" / "README.md").read_text()
    made.unlink()


def test_the_runs_own_picture_of_this_step_is_taken(run, tmp_path):
    picture = run / "figs" / "3.png"
    picture.write_bytes(b"a picture")
    export.main([str(run), str(tmp_path / "out")])
    assert (tmp_path / "out" / "samples.png").read_bytes() == b"a picture"
    picture.unlink()


def test_an_export_is_replaced_on_request_and_stays_where_the_next_one_fails(
    run, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    out.mkdir()  # an empty folder is in nobody's way
    export.main([str(run), str(out)])
    (out / "README.md").write_text("mine")
    with pytest.raises(UserError, match="exists; say --overwrite to replace it"):
        export.main([str(run), str(out)])
    monkeypatch.setattr(export, "write_grid", lambda *given: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export.main([str(run), str(out), "--overwrite"])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out / "README.md").read_text() == "mine"
    monkeypatch.undo()
    export.main([str(run), str(out), "--overwrite"])
    assert (out / "README.md").read_text() != "mine"


def test_a_folder_of_files_that_are_merely_called_so_is_no_export(run, tmp_path):
    mine = tmp_path / "mine"
    (mine / "soflow").mkdir(parents=True)
    for name in ("README.md", "requirements.txt", "app.py"):
        (mine / name).write_text("mine")
    with pytest.raises(UserError, match="mine: is not empty and holds no export"):
        export.main([str(run), str(mine), "--overwrite"])
    assert (mine / "app.py").read_text() == "mine"


def test_what_is_no_export_is_never_replaced(run, tmp_path):
    before = sorted(run.rglob("*"))
    with pytest.raises(
        UserError, match=r"run0/digits: holds what an export does not write \(ckpts"
    ):
        export.main([str(run), str(run), "--overwrite"])
    assert sorted(run.rglob("*")) == before
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file: is a file; name a folder"):
        export.main([str(run), str(tmp_path / "file"), "--overwrite"])


def test_classes_are_asked_for_by_name_where_numbers_could_mean_others(run, tmp_path):
    content = read_checkpoint(run / "ckpts" / "3.pt")
    content["data"]["class_names"] = [str(digit) for digit in range(1, 11)]  # folders 1, ..., 10
    torch.save(content, tmp_path / "3.pt")
    export.main([str(tmp_path / "3.pt"), str(tmp_path / "out")])
    assert "labels=['1', '1', '10']" in (tmp_path / "out" / "README.md").read_text()


def test_class_names_that_are_no_text_travel(run, tmp_path):
    names = ["caf\udce9", *"123456789"]
    path = tmp_path / "1.pt"
    content = read_checkpoint(run / "ckpts" / "3.pt")
    torch.save({**content, "data": {**content["data"], "class_names": names}}, path)
    export.main([str(path), str(tmp_path / "exported"), "--space"])
    loaded = load(tmp_path / "exported", device="cpu", report=lambda line: None)
    assert list(loaded.class_names) == names
    assert "caf?" in (tmp_path / "exported" / "README.md").read_text()
    assert len(loaded.sample(labels=names[0])) == 1


@pytest.mark.slow
def test_the_graph_gives_the_images_of_torch_in_any_batch_size(run, tmp_path, capfd):
    pytest.importorskip("onnxruntime", reason="needs onnxruntime")
    pytest.importorskip("onnxscript", reason="needs onnxscript")
    export.main([str(run), str(tmp_path / "out"), "--onnx"])  # compares them itself
    out, err = capfd.readouterr()
    assert (tmp_path / "out" / "model.onnx").stat().st_size > 5_000_000
    assert out.count("\n") == 1
    assert err == ""


class Halves(nn.Module):
    """A tiny module, for graphs."""

    def forward(self, x):
        return x / 2


def test_a_graph_that_gives_other_values_is_refused(tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime", reason="needs onnxruntime")
    pytest.importorskip("onnxscript", reason="needs onnxscript")
    inputs = lambda count: {"x": torch.ones(count, 2)}  # noqa: E731
    graphs.write_graph(tmp_path / "right.onnx", Halves(), "y", inputs)
    for value in (1.0, math.nan):
        session = type("Session", (), {"run": lambda *given, v=value: [np.full((1, 2), v)]})
        monkeypatch.setattr("onnxruntime.InferenceSession", lambda *g, s=session, **k: s())
        with pytest.raises(UserError, match=r"^wrong.onnx: gives by onnxruntime other values than"):
            graphs.write_graph(tmp_path / "wrong.onnx", Halves(), "y", inputs)


class Lengths(nn.Module):
    """What no graph of any batch size can be made of."""

    def forward(self, x):
        return x + torch.zeros(len(x), 2)


def test_what_cannot_be_a_graph_is_a_line(tmp_path):
    pytest.importorskip("onnxruntime", reason="needs onnxruntime")
    pytest.importorskip("onnxscript", reason="needs onnxscript")
    with pytest.raises(UserError, match=r"^g.onnx: cannot be made of this network \(") as caught:
        graphs.write_graph(tmp_path / "g.onnx", Lengths(), "y", lambda n: {"x": torch.ones(n, 2)})
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["UNet", "DiT-Nano-2"])
def test_every_backbone_can_be_a_graph(model_type, tmp_path):
    pytest.importorskip("onnxruntime", reason="needs onnxruntime")
    pytest.importorskip("onnxscript", reason="needs onnxscript")
    settings = {"working_dir": "w", "dataset_type": "Digits", "data_size": 8}
    config = config_from_dict({**settings, "model_type": model_type}, "here")
    torch.manual_seed(0)
    weights = build_model(**config.model_arguments(1, 10)).state_dict()
    data = {"channels": 1, "num_classes": 10}
    stored = StoredModel(tmp_path, weights, config.to_dict(), data)
    export.write_solution(assemble(config, stored, export.CPU), tmp_path / "model.onnx")
    assert (tmp_path / "model.onnx").stat().st_size > 1_000_000


@pytest.mark.slow
def test_the_decoder_of_latents_goes_into_a_second_graph(tmp_path):
    pytest.importorskip("onnxruntime", reason="needs onnxruntime")
    pytest.importorskip("onnxscript", reason="needs onnxscript")
    import onnxruntime

    vae = make_tiny_vae(tmp_path / "vae")
    settings = {"working_dir": "w", "dataset_type": "Imagenet", "data_size": 4, "vae": str(vae)}
    config = config_from_dict({**settings, "model_type": "DiT-Nano-2"}, "here")
    torch.manual_seed(0)
    weights = build_model(**config.model_arguments(4, 1000)).state_dict()
    record = {"config": config.to_dict(), "finished_steps": 7, "finished_epochs": 0}
    content = {"model": weights, "ema_model": weights, "optimizer": {}, **record}
    torch.save(content, tmp_path / "7.pt")
    flags = [str(tmp_path / "7.pt"), str(tmp_path / "out"), "--vae-onnx"]
    with pytest.raises(UserError, match=r"decoder is .*vae, a folder of this machine; say --vae"):
        export.main(flags)
    export.main([*flags, "--vae", "somebody/vae"])
    text = "".join((tmp_path / "out" / name).read_text() for name in ("README.md", "config.json"))
    assert "somebody/vae" in text and str(tmp_path) not in text
    session = onnxruntime.InferenceSession(tmp_path / "out" / "decoder.onnx")
    x_0 = torch.randn(5, 4, 4, 4)
    (images,) = session.run(None, {"latents": x_0.numpy()})
    with decoding(config, export.CPU) as decode:
        assert torch.allclose(torch.from_numpy(images), decode(x_0), atol=1e-4)


def test_pixels_have_no_decoder(run, tmp_path):
    pytest.importorskip("onnxruntime", reason="needs onnxruntime")
    pytest.importorskip("onnxscript", reason="needs onnxscript")
    with pytest.raises(UserError, match=r"--vae-onnx: .* makes pixels, which nothing has"):
        export.main([str(run), str(tmp_path / "out"), "--vae-onnx"])
    assert not (tmp_path / "out").exists()


def test_packages_that_are_missing_are_said_before_any_work(run, tmp_path, monkeypatch):
    monkeypatch.setattr(graphs.importlib.util, "find_spec", lambda name: None)
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
    assert sorted(_wanted("owner/name", subfolder, files)) == sorted(wanted)


def test_a_repository_without_a_model_there_says_where_there_are_some():
    with pytest.raises(
        UserError, match="owner/name: has no model; there are models in B, XL-2-cond"
    ):
        _wanted("owner/name", "", ["XL-2-cond/ckpts/12.pt", "B/ckpts/1.pt"])
