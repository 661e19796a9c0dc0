"""A model as a folder that travels: the same weights, a card, one graph, and the way to a hub."""

import json
import math
import stat

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from standins import narrow_unet
from tiny_vae import make_tiny_vae
from torch import nn

import export
from config import config_from_dict
from models import build_model
from sampler import decoding
from sampling import assemble, load
from support.runs import graphs
from support.runs.checkpoint import read_checkpoint
from support.runs.stored import StoredModel, read_stored
from support.system.files import UserError


@pytest.fixture
def onnx():
    for name in ("onnxruntime", "onnxscript"):
        pytest.importorskip(name, reason=f"needs {name}")


def test_an_export_is_the_averaged_weights_bit_for_bit_and_loads(run, tmp_path):
    export.main([str(run), str(tmp_path / "out")])
    weights = load_file(tmp_path / "out" / "model.safetensors")
    expected = read_checkpoint(run / "ckpts" / "3.pt")["ema_model"]
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    loaded, whole = (load(place, device="cpu", report=None) for place in (tmp_path / "out", run))
    asked = {"labels": [1, 2], "seeds": [3, 4]}
    assert torch.equal(loaded.sample(**asked).latents, whole.sample(**asked).latents)
    assert loaded.class_names == whole.class_names == [str(digit) for digit in range(10)]
    mode = (tmp_path / "out" / "model.safetensors").stat().st_mode
    assert stat.S_IMODE(mode) == 0o644


RECORD = {
    "file": "3.npz", "num_images": 600, "step": 3, "NFE": 1, "distances": "exact",
    "scores": {"FD": 12.345678, "prec": 0.5}, "versions": {"soflow": "1.2", "tensorflow": "2.3"},
    "reference": {"sha256": "ab" * 32, "name": "/home/me/ref.npz", "num_images": 700},
}  # fmt: skip


@pytest.fixture
def scored(run):
    """A run with scores of its last checkpoint."""
    results = run / "evals" / "eval_results.jsonl"
    results.write_text(json.dumps(RECORD) + "\n")
    picture = run / "figs" / "3.png"
    picture.write_bytes(b"the run's own picture of this step")
    (run / "ckpts" / "3.json").write_text(json.dumps({"torch": "9.9", "code_version": "8.8"}))
    yield run
    for path in (results, picture, run / "ckpts" / "3.json"):
        path.unlink()


IN_CARD = (
    *("DiT-Nano-2, 1,323,780 parameters", "8 x 8 pixels", "| examples | 1,197 |", "samples.png"),
    *("3 of 3, 12 samples each", "license: unknown", "library_name: soflow", "10: 0, 1, 2"),
    *("| 1 | renoise | 600 | 12.35 | 0.5 |", f"ref.npz (SHA-256 {'ab' * 32}) of 700 images"),
    *("soflow 1.2", "TensorFlow 2.3", "exact distances", "| torch | 9.9 |", "| code | 8.8 |"),
)


def test_the_card_tells_the_records_and_no_path_of_this_machine_and_an_export_of_it_too(
    scored, tmp_path
):
    export.main([str(scored), str(tmp_path / "out")])
    card = tmp_path / "out" / "README.md"
    assert [text for text in IN_CARD if text not in card.read_text()] == []
    assert "datasets:" not in card.read_text()  # the hub has no digits
    assert (tmp_path / "out" / "samples.png").read_bytes().startswith(b"the run's own")
    text = card.read_text() + (tmp_path / "out" / "config.json").read_text()
    assert str(scored) not in text and "/home/me" not in text
    again = tmp_path / "again"
    card.write_text(card.read_text().replace("license: unknown  # to be filled in", "license: mit"))
    export.main([str(tmp_path / "out"), str(again)])
    card = (again / "README.md").read_text()
    assert [text for text in IN_CARD[:5] + IN_CARD[6:] if text not in card] == []
    assert "\nlicense: mit\n" in card
    weights = [tmp_path / name / "model.safetensors" for name in ("out", "again")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_what_a_person_wrote_into_the_card_stays(run, tmp_path, capsys):
    out = tmp_path / "out"
    export.main([str(run / "ckpts" / "0.pt"), str(out)])
    card = out / "README.md"
    written = {
        "license: unknown  # to be filled in": "license: cc-by-4.0\nlanguage:\n- en",
        "To be filled in by the publisher": "CC BY 4.0, by me. To be filled in by the publisher",
        "## Files": "## How I chose the seed\n\nBy a die.\n\n## Files",
        "Makes images in one step": "My digits. Makes images in one step",
    }
    text = card.read_text()
    for made, mine in written.items():
        assert made in text
        text = text.replace(made, mine)
    card.write_text(text)
    for _ in range(2):
        export.main([str(run), str(out), "--overwrite"])
        text = card.read_text()
        for mine in ("license: cc-by-4.0", "- en", "by me.", "By a die.", "My digits."):
            assert text.count(mine) == 1, mine
        assert "3 of 3, 12 samples each" in text  # and not 0 of 3
        assert "license" in capsys.readouterr().out  # says what it keeps


def test_scores_of_other_weights_of_the_same_step_stay_out_of_the_card(scored, tmp_path):
    made = scored / "evals" / "3.json"
    made.write_text(json.dumps({"weights_sha256": "0" * 64}))
    export.main([str(scored), str(tmp_path / "out")])
    assert "12.35" not in (tmp_path / "out" / "README.md").read_text()
    made.unlink()


def test_the_weights_are_used_where_they_are_mapped(run):
    described, loaded = export.prepare_export(read_stored(run), None)
    for name, tensor in loaded.model.state_dict().items():
        assert tensor.data_ptr() == described.weights[name].data_ptr() != 0


def test_an_export_is_replaced_on_request_and_stays_if_the_next_one_fails(
    run, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    out.mkdir()  # an empty folder is in nobody's way
    export.main([str(run / "ckpts" / "0.pt"), str(out)])
    before = {path: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(UserError, match=f"{out}: .*--overwrite"):
        export.main([str(run), str(out)])
    monkeypatch.setattr(export, "write_grid", lambda *given: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export.main([str(run), str(out), "--overwrite"])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert {path: path.read_bytes() for path in out.iterdir()} == before
    monkeypatch.undo()
    export.main([str(run), str(out), "--overwrite"])
    assert json.loads((out / "config.json").read_text())["finished_steps"] == 3


def test_a_folder_that_is_no_export_is_never_replaced(run, tmp_path):
    mine = tmp_path / "mine"
    (mine / "soflow").mkdir(parents=True)
    for name in ("README.md", "requirements.txt", "app.py"):  # as an export calls them
        (mine / name).write_text("mine")
    (tmp_path / "file").touch()
    for place in (mine, run, tmp_path / "file"):
        before = {path: path.is_file() and path.read_bytes() for path in place.rglob("*")}
        with pytest.raises(UserError, match=f"^{place}: "):
            export.main([str(run), str(place), "--overwrite"])
        assert {path: path.is_file() and path.read_bytes() for path in place.rglob("*")} == before


def test_class_names_travel_even_if_they_are_numbers_or_no_text(run, tmp_path):
    content = read_checkpoint(run / "ckpts" / "3.pt")
    for step, names in ((1, map(str, range(1, 11))), (2, ["caf\udce9", *"123456789"])):
        content["data"]["class_names"] = names = list(names)
        path, out = tmp_path / f"{step}.pt", tmp_path / f"out{step}"
        torch.save(content, path)
        export.main([str(path), str(out), "--space"])
        loaded = load(out, device="cpu", report=None)
        assert list(loaded.class_names) == names
        assert len(loaded.sample(labels=names[0])) == 1
    assert "labels=['1', '1', '10']" in (tmp_path / "out1" / "README.md").read_text()
    assert "caf?" in (tmp_path / "out2" / "README.md").read_text()


class Halves(nn.Module):
    def forward(self, x):
        return x / 2


class Lengths(nn.Module):  # no graph of any batch size
    def forward(self, x):
        return x + torch.zeros(len(x), 2)


def test_a_graph_that_differs_from_torch_or_cannot_be_made_is_refused(onnx, tmp_path, monkeypatch):
    def write(name: str, module: nn.Module) -> None:
        graphs.write_graph(tmp_path / name, module, "y", lambda count: {"x": torch.ones(count, 2)})

    write("right.onnx", Halves())
    with pytest.raises(UserError, match=r"^lengths\.onnx: ") as caught:
        write("lengths.onnx", Lengths())
    assert "\n" not in str(caught.value)
    for value in (1.0, math.nan):
        session = type("Session", (), {"run": lambda *given, v=value: [np.full((1, 2), v)]})
        monkeypatch.setattr("onnxruntime.InferenceSession", lambda *g, s=session, **k: s())
        with pytest.raises(UserError, match=r"^wrong\.onnx: "):
            write("wrong.onnx", Halves())


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["DiT-Nano-2", "UNet"])
def test_the_graph_gives_the_images_of_torch_in_any_batch_size(
    onnx, tmp_path, monkeypatch, capfd, model_type
):
    narrow_unet(monkeypatch)
    settings = {"dataset_type": "Digits", "data_size": 8, "model_type": model_type}
    config = config_from_dict({"working_dir": "w", **settings}, "here")
    torch.manual_seed(0)
    weights = build_model(**config.model_arguments(1, 10)).state_dict()
    loaded = assemble(config, StoredModel(tmp_path, weights, config.to_dict()), export.CPU)
    export.write_solution(loaded, tmp_path / "model.onnx")  # compares them itself
    assert (tmp_path / "model.onnx").stat().st_size > sum(w.nbytes for w in weights.values()) / 2
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_the_decoder_of_latents_goes_into_a_second_graph(onnx, tmp_path):
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
    with pytest.raises(UserError, match=rf"7\.pt: .*{vae}.*--vae"):
        export.main(flags)
    export.main([*flags, "--vae", "somebody/vae"])
    text = "".join((tmp_path / "out" / name).read_text() for name in ("README.md", "config.json"))
    assert "somebody/vae" in text and str(tmp_path) not in text
    session = onnxruntime.InferenceSession(tmp_path / "out" / "decoder.onnx")
    x_0 = torch.randn(5, 4, 4, 4)
    (images,) = session.run(None, {"latents": x_0.numpy()})
    with decoding(config, {}, export.CPU) as decode:
        assert torch.allclose(torch.from_numpy(images), decode(x_0), atol=1e-4)


def test_graphs_that_cannot_be_are_refused_before_any_work(onnx, run, tmp_path, monkeypatch):
    for flag, named in (("--vae-onnx", "--vae-onnx"), ("--onnx", "onnx onnxscript onnxruntime")):
        with pytest.raises(UserError, match=named):
            export.main([str(run), str(tmp_path / "out"), flag])
        monkeypatch.setattr(graphs.importlib.util, "find_spec", lambda name: None)
    assert not (tmp_path / "out").exists()
