"""Whoever adds a data set, a backbone, a schedule, a method or a metric touches one place.

Here each of them is added from outside, by its table alone, and trained with; and every backbone
is held to what `backbone.Backbone` says of them.
"""

from pathlib import Path
from typing import Self

import goldens
import pytest
import torch
from commands import digits_settings
from torch import Tensor, nn
from torch.nn import functional as F

import train
from backbone import Backbone, NetworkRequest
from config import config_from_dict
from models import BACKBONES, METHODS, Batch, Method, SoFlow, StepTerms
from schedules import GAP_SCHEDULES
from support.data.datasets import DATASETS, DataRequest, DataSet, PixelData, TrainingData
from support.system.files import UserError

# B batch, C channels, H = W side


@pytest.fixture
def log_of(tmp_path):
    """A function that trains two steps with some settings, to a picture, and returns the log."""

    def trained(**settings) -> str:
        settings = {"total_steps": 2, "logging_steps": 1, "eval_demo_steps": 2, **settings}
        train.main(digits_settings(tmp_path / "run", **settings))
        assert Path(tmp_path / "run" / "figs" / "2.png").exists()
        return (tmp_path / "run" / "log.txt").read_text()

    return trained


def assert_known(key: str, name: str) -> None:
    """Whoever misspells the name in a config is pointed to it."""
    with pytest.raises(UserError, match=f"{key}: .*{name.lower()}.*{name}"):
        config_from_dict({"working_dir": "x", key: name.lower()}, "c.yaml")


def load_stripes(request: DataRequest) -> TrainingData:
    """Sixteen images of stripes, upright in one class and lying in the other."""
    stripes = (torch.arange(8) % 2 * 255).to(torch.uint8).expand(8, 1, 8, 8)
    pixels = torch.cat([stripes, stripes.mT])
    return PixelData(pixels, torch.arange(16) // 8, ("upright", "lying"))


def test_a_data_set_is_an_entry_in_its_table(monkeypatch, log_of):
    monkeypatch.setitem(DATASETS, "Stripes", DataSet(channels=1, num_classes=2, load=load_stripes))
    assert_known("dataset_type", "Stripes")
    assert "16 examples of 2 classes, in order: upright (8), lying (8)" in log_of(
        dataset_type="Stripes"
    )
    with pytest.raises(UserError, match=r"model_type: .*Stripes"):
        config_from_dict({"working_dir": "x", "model_type": "UNet"}, "c.yaml")


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
    def build(cls, request: NetworkRequest) -> Self:
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


def test_a_backbone_is_an_entry_in_its_table(monkeypatch, log_of):
    monkeypatch.setitem(BACKBONES, "Tiny", Tiny)
    assert_known("model_type", "Tiny")
    assert "Tiny, 265 parameters" in log_of(model_type="Tiny")


def test_a_schedule_is_an_entry_in_its_table(monkeypatch, log_of):
    monkeypatch.setitem(GAP_SCHEDULES, "Step", lambda x, init, end: init if x < 0.5 else end)
    assert_known("l_schedule", "Step")
    log = log_of(l_schedule="Step", l_init_ratio=0.5, l_end_ratio=0.25)
    first, second = (line for line in log.splitlines() if "Step: " in line)
    assert "Gap_Fraction: 0.5," in first
    assert "Gap_Fraction: 0.25," in second


class FlowMatching(Method):
    """Flow matching without guidance; it jumps along the velocity."""

    def forward(self, batch: Batch) -> StepTerms:
        vel, _ = self.drop_labels(batch).parts()
        x_t, v_t = self.interpolate(vel.x_0, vel.x_1, vel.t)
        v = self.evaluate(x_t, vel.t, vel.t, vel.labels, dropout_seed=vel.dropout_seeds[0])
        error = (v - v_t).square().flatten(1).mean(1)
        loss = error.sum() / batch.global_flow_matching_count
        return StepTerms(loss, {"Error": loss.detach()})

    def jump(self, x_t: Tensor, t: Tensor, s: Tensor, labels: Tensor | None) -> Tensor:
        v = self.evaluate(x_t, t, t, labels)
        return x_t + (s - t).view(-1, 1, 1, 1) * v


def test_a_method_is_an_entry_in_its_table(monkeypatch, log_of):
    monkeypatch.setitem(METHODS, "FlowMatching", FlowMatching)
    assert_known("method", "FlowMatching")
    log = log_of(method="FlowMatching", velocity_loss_ratio=1)
    assert ", Error: " in log
    assert "Con_MSE" not in log


class Watched(SoFlow):
    """SoFlow, with one more number to watch."""

    def forward(self, batch: Batch) -> StepTerms:
        terms = super().forward(batch)
        count = batch.global_flow_matching_count
        vel, _ = batch.parts()
        brightness = vel.x_0.flatten(1).mean(1).sum() / count
        return terms._replace(metrics={**terms.metrics, "Brightness": brightness})


def test_a_metric_is_logged_by_the_name_that_the_method_gives_it(monkeypatch, log_of):
    monkeypatch.setitem(METHODS, "SoFlow", Watched)
    for line in log_of().splitlines():
        if "Step: " in line:
            (brightness,) = (part for part in line.split(", ") if part.startswith("Brightness: "))
            assert -1 < float(brightness.split()[1]) < 0  # digits are bright on black


# What every backbone has to be


@pytest.fixture(scope="module", params=[*BACKBONES.values(), Tiny], ids=lambda kind: kind.__name__)
def shared_network(request) -> Backbone:
    """A small network of each kind, every weight of which matters."""
    network = build(request.param, null_class=True)
    goldens.fill_weights(network)
    return network


@pytest.fixture
def network(shared_network) -> Backbone:
    return shared_network.train()


def build(kind: type[Backbone], null_class: bool) -> Backbone:
    return kind.build(NetworkRequest(kind.examples[0], 8, 3, 4, null_class, dropout=0.3))


def output_of(network: Backbone, **conditions: Tensor) -> Tensor:
    """What a network makes of two random images at random times."""
    source = torch.Generator().manual_seed(0)
    x, (t, share) = torch.randn(2, 3, 8, 8, generator=source), torch.rand(2, 2, generator=source)
    return network(x, t, t * share, **conditions)


def conditions_of(network: Backbone) -> dict[str, Tensor]:
    """One value of each condition that a network takes: pictures are augmented without labels."""
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
    null_labels = torch.full((2,), network.null_label)
    assert torch.equal(output_of(network), output_of(network, labels=null_labels))
    for label in range(4):
        assert not torch.equal(
            output_of(network), output_of(network, labels=torch.full((2,), label))
        )
    assert build(type(network), null_class=False).null_label is None


def test_equal_dropout_seeds_give_equal_masks_and_touch_no_other_random_state(network):
    seeds = [torch.tensor(seed) for seed in (7, 7, 8)] if network.uses_dropout_seed else []
    outputs = []
    for seed in seeds:
        torch.rand(1)  # whatever else is drawn
        before = torch.get_rng_state()
        outputs.append(output_of(network, dropout_seed=seed))
        assert torch.equal(torch.get_rng_state(), before)
    if seeds:
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
