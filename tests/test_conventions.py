"""SiT's and REPA's weights fold into our convention; what does not fold says so."""

import copy

import pytest
import torch
from commands import digits_settings
from torch import nn

import train
from config import CONVENTIONS
from models import build_model
from support.system.files import UserError
from training.conventions import start_network

CLASSES = "abc"
FORMS = [("SiT", 2, "DiT-Nano-2"), ("SiT", 1, "DiT-Nano-4"), ("REPA", 2, "DiT-Nano-2")]


def randomised(network):
    for parameter in network.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2)
    return network.double()


def ours(model_type="DiT-Nano-2", cfg_drop_rate=0.1, channels=2, size=8):
    return randomised(build_model(model_type, channels, size, 3, cfg_drop_rate).network)


def theirs(outputs=2, model_type="DiT-Nano-2"):
    """A network of SiT or REPA: without a gap embedding, with `outputs` times as many outputs."""
    network = ours(model_type)
    nn.init.zeros_(network.get_parameter("s_embedder.mlp.2.weight"))
    nn.init.zeros_(network.get_parameter("s_embedder.mlp.2.bias"))
    last = network.final_layer.linear
    network.final_layer.linear = nn.Linear(last.in_features, outputs * last.out_features)
    return randomised(network.final_layer) and network


def weights_of(network, projectors=0):
    kept = {n: t for n, t in network.state_dict().items() if not n.startswith("s_embedder")}
    return kept | {f"projectors.{n}.0.weight": torch.ones(4, 4) for n in range(projectors)}


def saved(folder, weights, prefix=""):
    """A checkpoint as such code writes it."""
    torch.save({"ema": {prefix + n: t for n, t in weights.items()}}, folder / "theirs.pt")
    return str(folder / "theirs.pt")


def evaluated(network, t, gap=None, labels=(0, 1, 2, 3)):
    """The network's first two channels at fixed points."""
    torch.manual_seed(0)
    x, t = torch.randn(4, 2, 8, 8, dtype=torch.float64), torch.tensor(t, dtype=torch.float64)
    gap = torch.zeros_like(t) if gap is None else gap
    with torch.no_grad():
        return network(x, t, gap, torch.tensor(labels))[:, :2]


TIMES = [0.0, 0.13, 0.77, 1.0]


def expected(reference, form):
    """F(x, t, t) by the other model's own formula."""
    if form == "REPA":
        return evaluated(reference, TIMES)
    return -evaluated(reference, [1 - t for t in TIMES])


@pytest.mark.parametrize(("form", "outputs", "model_type"), FORMS)
def test_the_start_is_the_other_model(tmp_path, form, outputs, model_type):
    reference, network = theirs(outputs, model_type), ours(model_type)
    source = saved(tmp_path, weights_of(reference), "module.")
    record, lines = start_network(source, network, CLASSES, form)
    wanted = expected(reference, form)
    assert wanted.abs().max() > 0.1
    for gap in (None, torch.tensor([0.0, 0.1, 0.5, 1.0]).double()):  # the gap adds nothing yet
        assert (evaluated(network, TIMES, gap) - wanted).abs().max() <= 1e-10
    assert record["folded_as"] == form and record["left"] == []
    assert CONVENTIONS[form] in lines[-1]
    turned = [line for line in lines if "t_embedder.mlp.0.weight" in line]
    assert len(turned) == (form == "SiT")
    network(torch.randn(1, 2, 8, 8).double(), *torch.rand(2, 1).double()).sum().backward()
    assert network.get_parameter("s_embedder.mlp.2.weight").grad.abs().max() > 0


def test_projectors_tell_a_repa(tmp_path):
    reference, network = theirs(), ours()
    source = saved(tmp_path, weights_of(reference, projectors=2))
    record, lines = start_network(source, network, CLASSES)
    difference = evaluated(network, TIMES) - expected(reference, "REPA")
    assert difference.abs().max() <= 1e-10 and record["folded_as"] == "REPA"
    assert any("projectors, 2 tensors" in line for line in lines)


def test_a_network_without_a_null_label_takes_the_classes(tmp_path):
    reference, network = theirs(), ours(cfg_drop_rate=0.0)
    _, lines = start_network(saved(tmp_path, weights_of(reference)), network, CLASSES, "REPA")
    difference = evaluated(network, TIMES, labels=[0, 1, 2, 2]) - evaluated(
        reference, TIMES, labels=[0, 1, 2, 2]
    )
    assert difference.abs().max() <= 1e-10 and CONVENTIONS["REPA"] in lines[-1]


@pytest.mark.parametrize(
    ("network", "drop", "add", "names", "named"),
    [
        (ours(), (), {}, "abcd", "y_embedder"),
        (ours(channels=3), (), {}, CLASSES, "final_layer"),
        (ours(size=16), (), {}, CLASSES, "pos_embed"),
        (ours(), (), {"pos_embed": torch.ones(1, 16, 128)}, CLASSES, "pos_embed"),
        (ours(), (), {"blocks.0.attn.q_norm.weight": torch.ones(32)}, CLASSES, "q_norm"),
        (ours(), ("blocks.1.mlp.fc1.bias",), {}, CLASSES, "blocks.1.mlp.fc1.bias"),
    ],
)
def test_a_start_that_differs_is_no_model_and_names_what_differs(
    tmp_path, network, drop, add, names, named
):
    weights = {n: t for n, t in (weights_of(theirs()) | add).items() if n not in drop}
    _, lines = start_network(saved(tmp_path, weights), network, names, "SiT")
    assert named in lines[-1] and CONVENTIONS["SiT"] not in lines[-1]


@pytest.mark.parametrize(
    ("projectors", "is_velocity", "named"), [(0, True, "DiT"), (1, False, "noising_type")]
)
def test_what_does_not_fold_stays_a_beginning(tmp_path, projectors, is_velocity, named):
    reference, network = theirs(), ours()
    source = saved(tmp_path, weights_of(reference, projectors))
    record, lines = start_network(source, network, CLASSES, None, is_velocity)
    assert named in lines[-1] and "folded_as" not in record
    for name in ("t_embedder.mlp.0.weight", "blocks.0.attn.qkv.weight"):
        assert torch.equal(network.get_parameter(name), reference.get_parameter(name))
    assert network.get_parameter("s_embedder.mlp.2.weight").abs().max() > 0


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"s_embedder.mlp.0.bias": torch.zeros(128)}, "s_embedder"),
        ({"final_layer.linear.bias": torch.zeros(17)}, "final_layer.linear.weight"),
        ({"x_embedder.proj.weight": torch.zeros(128)}, "x_embedder.proj.weight"),
        ({"t_embedder.mlp.0.weight": torch.zeros(128, 64)}, "t_embedder.mlp.0.weight"),
        ({"x_embedder.proj.weight": None}, "x_embedder.proj.weight"),
    ],
)
def test_weights_of_no_such_model_are_refused(tmp_path, change, named):
    weights, network = weights_of(theirs()) | change, ours()
    before = copy.deepcopy(network.state_dict())
    source = saved(tmp_path, {n: t for n, t in weights.items() if t is not None})
    with pytest.raises(UserError, match=rf"^init_from_as: .*theirs\.pt.*{named}"):
        start_network(source, network, CLASSES, "SiT")
    assert all(torch.equal(one, before[name]) for name, one in network.state_dict().items())


def test_a_run_logs_what_was_turned(tmp_path, capsys):
    reference = build_model("DiT-Nano-2", 1, 8, 10, 0.1).network
    source = saved(tmp_path, weights_of(reference))
    words = digits_settings(tmp_path / "run", total_steps=1, init_from=source, init_from_as="SiT")
    train.main(words)
    assert CONVENTIONS["SiT"] in capsys.readouterr().out
