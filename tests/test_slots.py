"""A data set, network or schedule is an entry in one table; every network keeps its promises.

Each is added from outside, and trained with; docs/extending.md shows objectives.
"""

import re

import goldens
import pytest
import torch
from commands import digits_settings
from standins import narrow_unet
from torch import Tensor, nn
from torch.nn import functional as F

import train
from backbone import Backbone, NetworkRequest
from config import config_from_dict
from models import BACKBONES
from schedules import GAP_SCHEDULES
from support.data.datasets import DATASETS, DataRequest, DataSet, PixelData, TrainingData
from support.system.files import UserError

# B batch, C channels, H = W side


def load_stripes(request: DataRequest) -> TrainingData:
    """Sixteen images of stripes: upright in one class, lying in the other."""
    stripes = (torch.arange(8) % 2 * 255).to(torch.uint8).expand(8, 1, 8, 8)
    pixels = torch.cat([stripes, stripes.mT])
    return PixelData(pixels, torch.arange(16) // 8, ("upright", "lying"))


class Tiny(Backbone):
    """Two convolutions; the class and the times shift what is between them."""

    written = "Tiny"
    examples = ("Tiny",)
    uses_dropout_seed = True

    def __init__(self, data_channels: int, num_classes: int, null_class: bool, dropout: float):
        super().__init__()
        self.into = nn.Conv2d(data_channels, 8, 3, padding=1)
        self.out = nn.Conv2d(8, data_channels, 3, padding=1)
        self.times = nn.Linear(2, 8)
        self.table = nn.Embedding(num_classes + null_class, 8)
        self.null_label = num_classes if null_class else None
        self.dropout = dropout

    @classmethod
    def build(cls, request: NetworkRequest) -> "Tiny":
        return cls(*request[2:])

    def forward(self, x, t, gap, labels=None, dropout_seed=None) -> Tensor:
        if labels is None:
            labels = torch.full((len(x),), self.null_label)
        shift = self.table(labels) + self.times(torch.stack([t, gap], dim=1))
        hidden = F.silu(self.into(x) + shift[:, :, None, None])
        if self.training:
            source = dropout_seed and torch.Generator().manual_seed(int(dropout_seed))
            hidden = hidden * (torch.rand(hidden.shape, generator=source) >= self.dropout)
        return self.out(hidden)


@pytest.mark.parametrize(
    ("table", "key", "name", "entry", "logged"),
    [
        (DATASETS, "dataset_type", "Stripes",
         DataSet(channels=1, num_classes=2, load=load_stripes),
         [r"16 examples of 2 classes, in order: upright \(8\), lying \(8\)"]),
        (BACKBONES, "model_type", "Tiny", Tiny, ["Tiny, 265 parameters"]),
        (GAP_SCHEDULES, "l_schedule", "Step", lambda x, init, end: init if x < 0.5 else end,
         ["Step: 1/2 .*Gap_Fraction: 0.1,", "Step: 2/2 .*Gap_Fraction: 0.002,"]),
    ],
)  # fmt: skip
def test_an_entry_in_a_table_is_known_to_configs_and_trained_with(
    monkeypatch, tmp_path, table, key, name, entry, logged
):
    monkeypatch.setitem(table, name, entry)
    with pytest.raises(UserError, match=f"{key}: .*{name.lower()}.*{name}"):
        config_from_dict({"working_dir": "x", key: name.lower()}, "c.yaml")
    settings = {"total_steps": 2, "logging_steps": 1, "eval_demo_steps": 2, key: name}
    train.main(digits_settings(tmp_path, **settings))
    assert (tmp_path / "figs" / "2.png").exists()
    log = (tmp_path / "log.txt").read_text()
    for words in logged:
        assert re.search(words, log)


# What every backbone has to be


@pytest.fixture(scope="module", params=[*BACKBONES.values(), Tiny], ids=lambda kind: kind.__name__)
def shared_network(request) -> Backbone:
    """A small network of each kind, in which every weight matters."""
    with pytest.MonkeyPatch.context() as patch:
        narrow_unet(patch)
        network = build(request.param, null_class=True)
    goldens.fill_weights(network)
    return network


@pytest.fixture
def network(shared_network) -> Backbone:
    return shared_network.train()


def build(kind: type[Backbone], null_class: bool) -> Backbone:
    return kind.build(NetworkRequest(kind.examples[0], 8, 3, 4, null_class, dropout=0.3))


def output_of(network: Backbone, **conditions: Tensor) -> Tensor:
    """The network's output for two random images at random times."""
    source = torch.Generator().manual_seed(0)
    x, (t, share) = torch.randn(2, 3, 8, 8, generator=source), torch.rand(2, 2, generator=source)
    return network(x, t, t * share, **conditions)


def conditions_of(network: Backbone) -> dict[str, Tensor]:
    """A value of each condition that a network takes."""
    told = {"labels": torch.tensor([0, 3])}
    if not network.is_conditional:
        told = {"augment_labels": torch.ones(2, 6)}
    return told | ({"dropout_seed": torch.tensor(7)} if network.uses_dropout_seed else {})


def test_output_is_shaped_like_x_with_each_condition_with_all_and_with_none(network):
    every = conditions_of(network)
    for given in ({}, *({name: value} for name, value in every.items()), every):
        output = output_of(network, **given)
        assert output.shape == (2, 3, 8, 8)
        assert output.isfinite().all()


def test_no_labels_mean_the_null_class_of_networks_that_take_labels(network):
    network.eval()
    if not network.is_conditional:
        assert network.null_label is None
        return
    without = output_of(network)
    for label in (*range(4), network.null_label):
        given = output_of(network, labels=torch.full((2,), label))
        assert torch.equal(without, given) == (label == network.null_label)
    assert build(type(network), null_class=False).null_label is None


def test_equal_dropout_seeds_give_equal_masks_and_touch_no_other_random_state(network):
    if not network.uses_dropout_seed:
        return
    outputs = []
    for seed in (7, 7, 8):
        torch.rand(1)  # another draw from the global state
        before = torch.get_rng_state()
        outputs.append(output_of(network, dropout_seed=torch.tensor(seed)))
        assert torch.equal(torch.get_rng_state(), before)
    one, same, other = outputs
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_without_a_seed_masks_come_from_the_global_generator(network):
    torch.manual_seed(1)
    first, second = output_of(network), output_of(network)
    torch.manual_seed(1)
    assert torch.equal(output_of(network), first)
    assert torch.equal(second, first) != network.uses_dropout_seed


@pytest.mark.parametrize("is_seeded", [True, False])
def test_activation_checkpointing_changes_no_gradient(network, is_seeded):
    given = conditions_of(network)
    if not is_seeded:
        given.pop("dropout_seed", None)
    found = []
    for network.activation_checkpointing in (True, False):
        network.zero_grad()
        torch.manual_seed(1)
        output_of(network, **given).square().mean().backward()
        found.append([p.grad.clone() for p in network.parameters() if p.grad is not None])
    assert found[0]
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
