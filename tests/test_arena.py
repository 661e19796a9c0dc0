"""The arena's objectives: each has the true map as its optimum; and what runs and compares them."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import ROOT, succeed
from exact import ExactNetwork
from torch import Tensor, nn

from arena import tables
from arena.objectives import OBJECTIVES
from arena.plan import Job, Plan, read_plan
from arena.records import read_record, write_record
from arena.run import known_plan, main, train_one, write_results
from config import Config
from models import Batch, build_model
from support.system.files import UserError, sha256_of

# B batch; points of the plane are images [B, 2, 1, 1]

OTHERS = [name for name in OBJECTIVES if name != "SoFlow"]
SETTINGS = {**Config().to_dict(), "cfg_scale": 1.0, "p": 0.0}  # all samples weigh alike


def batch_of(x_0: Tensor, x_1: Tensor, t: Tensor, l: Tensor, s: Tensor) -> Batch:  # noqa: E741
    """The same samples and t for both parts."""
    x_0, x_1 = torch.cat([x_0, x_0]), torch.cat([x_1, x_1])
    t, l, s = (torch.cat([t, time]) for time in (t, l, s))  # noqa: E741
    return Batch(x_0, x_1, t, l, s, len(t) // 2, len(t) // 2, len(t) // 2, dropout_seeds=(1, 1))


@pytest.mark.parametrize("name", OTHERS)
def test_on_one_image_the_exact_network_has_no_loss_and_jumps_to_it(name):
    source = torch.Generator().manual_seed(0)
    c = torch.randn(1, 2, 4, 4, generator=source, dtype=torch.float64)
    x_1 = torch.randn(64, 2, 4, 4, generator=source, dtype=torch.float64)
    t = 0.1 + 0.9 * torch.rand(64, generator=source, dtype=torch.float64)
    method = OBJECTIVES[name](ExactNetwork(c))
    method.configure(SETTINGS)
    terms = method(batch_of(c.expand_as(x_1), x_1, t, 0.9 * t, 0.5 * t))
    assert all(value < 1e-20 for value in terms.metrics.values()), terms.metrics
    ones = torch.ones(64, dtype=torch.float64)
    torch.testing.assert_close(method.jump(x_1, ones, 0 * ones, None), c.expand_as(x_1))
    half = method.jump(x_1, ones, 0.5 * ones, None)
    torch.testing.assert_close(half, (c + x_1) / 2)


# Data from a Gaussian in the plane: the true velocity and its paths have a closed form

MEAN, STD = torch.tensor([-1.0, 0.5], dtype=torch.float64), 0.4


def spread(t: Tensor) -> Tensor:
    """The standard deviation of x_t, [B, 1]."""
    return (((1 - t) * STD).square() + t.square()).sqrt()[:, None]


def posterior_mean(x: Tensor, t: Tensor) -> Tensor:
    """E[x_0 | x_t = x], [B, 2]."""
    gain = (1 - t[:, None]) * STD**2 / spread(t).square()
    return MEAN + gain * (x - (1 - t[:, None]) * MEAN)


def velocity(x: Tensor, t: Tensor) -> Tensor:
    """v(x, t) = E[x_1 - x_0 | x_t = x], [B, 2]."""
    x_1 = t[:, None] / spread(t).square() * (x - (1 - t[:, None]) * MEAN)
    return x_1 - posterior_mean(x, t)


def flow(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """Where the path through x at t is at s, [B, 2]."""
    from_mean = (x - (1 - t[:, None]) * MEAN) / spread(t)
    return (1 - s[:, None]) * MEAN + spread(s) * from_mean


class TrueMap(nn.Module):
    """F(x, t, s), the mean velocity of the true path from t to s, and an offset whose best is 0."""

    null_label = None

    def __init__(self, is_true: bool):
        super().__init__()
        self.is_true = is_true
        self.offset = nn.Parameter(torch.zeros(2, dtype=torch.float64))

    def forward(self, x: Tensor, t: Tensor, gap: Tensor) -> Tensor:
        flat = x.flatten(1)
        instant = velocity(flat, t)
        # At a gap of 0 it is the velocity; there must be no 0 / 0 in the derivative either.
        safe = torch.where(gap > 1e-9, gap, torch.full_like(gap, 1e-4))
        mean = (flat - flow(flat, t, t - safe)) / safe[:, None]
        found = torch.where((gap > 1e-9)[:, None], mean, instant) if self.is_true else instant
        return (found + self.offset)[:, :, None, None]


def gradient(name: str, is_true: bool, gap: float) -> float:
    """The norm of the expected gradient of the offset, over all that may have led to one x_t."""
    t = torch.full((4000,), 0.75, dtype=torch.float64)
    x = torch.tensor([[0.2, 0.1]], dtype=torch.float64).expand(4000, 2)
    source = torch.Generator().manual_seed(3)
    noise = torch.randn(2000, 2, generator=source, dtype=torch.float64)
    # Each deviation with its opposite, so that the mean is exact.
    x_0 = posterior_mean(x, t) + STD * t[:, None] / spread(t) * torch.cat([noise, -noise])
    x_1 = (x - (1 - t)[:, None] * x_0) / t[:, None]
    network = TrueMap(is_true)
    method = OBJECTIVES[name](network)
    method.configure(SETTINGS)
    images = [one[:, :, None, None] for one in (x_0, x_1)]
    s = torch.full_like(t, 0.25)
    method(batch_of(*images, t, t - gap * (t - s), s)).loss.backward()
    return float(network.offset.grad.norm())


@pytest.mark.parametrize("name", ["MeanFlow", "ConsistencyTraining"])
def test_on_a_gaussian_the_true_map_is_where_the_gradient_vanishes(name):
    at_true, elsewhere = (gradient(name, is_true, gap=0.01) for is_true in (True, False))
    assert at_true < 0.05 * elsewhere, (at_true, elsewhere)


def test_on_a_gaussian_flow_matching_learns_the_velocity():
    # `False` is the velocity itself, which is all that flow matching asks for.
    assert gradient("FlowMatching", False, gap=0.01) < 0.01


def test_on_a_gaussian_two_true_half_steps_are_a_true_step():
    x = torch.randn(32, 2, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    d = torch.tensor([0.5, 0.25, 0.125, 0.0625], dtype=torch.float64).repeat(8)
    t = torch.where(d == 0.5, 1.0, 0.875)
    errors = {}
    for is_true in (True, False):
        method = OBJECTIVES["Shortcut"](TrueMap(is_true))
        method.interpolate = lambda x_0, x_1, t: (x_1, x_1)  # x_t as it is given
        errors[is_true] = method.self_consistency(Batch(x, x, t, t, t, 0, 0, len(x)), t, d)
    assert errors[True].max() < 1e-9
    assert errors[False].mean() > 1e-3


@pytest.mark.parametrize("name", ["MeanFlow", "ConsistencyTraining", "FlowMatching"])
def test_a_batch_in_two_parts_gives_the_gradient_of_the_whole_one(name):
    torch.manual_seed(0)
    method = OBJECTIVES[name](build_model("DiT-Nano-2", 1, 8, 3, 0.1).network.double())
    for parameter in method.parameters():
        nn.init.normal_(parameter, std=0.1)
    method.configure({**SETTINGS, "cfg_scale": 2.0, "mix_ratio": 0.25, "p": 1.0})
    x_0, x_1 = torch.randn(2, 6, 1, 8, 8, dtype=torch.float64)
    t = torch.linspace(0.5, 1, 6).double()
    labels, null_mask = torch.arange(6) % 3, torch.arange(6) % 4 == 1

    def gradients(*parts: slice) -> list[Tensor]:
        method.zero_grad()
        for rows in parts:
            batch = batch_of(x_0[rows], x_1[rows], t[rows], 0.9 * t[rows], 0.5 * t[rows])
            told = {"labels": labels[rows].repeat(2), "null_mask": null_mask[rows].repeat(2)}
            counts = {"global_flow_matching_count": 6, "global_consistency_count": 6}
            method(replace(batch, **told, **counts)).loss.backward()
        return [p.grad.clone() for p in method.parameters() if p.grad is not None]

    whole, halves = gradients(slice(None)), gradients(slice(4), slice(4, None))
    assert len(whole) > 10
    for one, other in zip(whole, halves, strict=True):
        torch.testing.assert_close(one, other)


def test_the_documents_show_the_tables_of_the_results_that_they_keep():
    shown = "".join((ROOT / "docs" / name).read_text() for name in ("arena.md", "log.md"))
    printed = succeed("arena/tables.py", "docs/arena").strip().split("\n\n")
    made = dict(zip(printed[::2], printed[1::2], strict=True))
    assert len(made) == 6
    # The log's table of ablations has columns on the paper beside these.
    assert [title for title, text in made.items() if text not in shown] == ["## Ablations"]
    assert all(line.rstrip("| ") in shown for line in made["## Ablations"].splitlines()[3:])


# Runs

TWIN = """
from models import SoFlow

class Twin(SoFlow):
    def forward(self, batch):
        terms = super().forward(batch)
        return terms._replace(metrics={"Twin": terms.metrics["Vel_MSE"]})

class Other(SoFlow):
    pass
"""


@pytest.fixture
def mine(tmp_path):
    """The file of a user's objectives."""
    file = tmp_path / "mine.py"
    file.write_text(TWIN)
    return file


def job_of(plan: Plan, name: str) -> Job:
    """The first job of that name without guidance."""
    plan = replace(plan, best=dict.fromkeys(plan.values["guided"], 2.0))
    return next(job for job in plan.jobs("objectives") if job.name == name and not job.guided)


@pytest.mark.slow
def test_a_users_subclass_of_soflow_is_sampled_like_it_and_trained_anew_when_a_source_changes(
    mine, tmp_path
):
    plan = read_plan("digits").with_objective(f"{mine}:Twin")
    jobs = {}
    for name in ("Twin", "SoFlow"):
        job = job_of(plan, name)
        settings = {**job.settings, "total_steps": 2, "logging_steps": 1, "batch_size": 8}
        job = replace(job, settings=settings, checkpoints=1, images=10, nfe=(1, 2))
        train_one(job, plan, tmp_path)
        jobs[name] = job
    (logged, *_) = (tmp_path / jobs["Twin"].file_name / "metrics.jsonl").read_text().splitlines()
    assert "Twin" in json.loads(logged)
    for file in ("2_1.npz", "2_2.npz"):
        twin, soflow = (
            np.load(tmp_path / job.file_name / "samples" / file) for job in jobs.values()
        )
        np.testing.assert_array_equal(twin["arr_0"], soflow["arr_0"])

    def records() -> dict:
        found = {name: read_record(tmp_path, jobs[name], "job.json") for name in jobs}
        return {name: record for name, record in found.items() if record}

    used = {Path(file).name for file in records()["Twin"]["sources"]}
    assert used >= {"models.py", "schedules.py", "dit.py", "train.py", "sampling.py"}
    assert used >= {"digits.yaml", "mine.py"}
    mine.write_text(TWIN + "# changed")
    assert [*records()] == ["SoFlow"]
    jobs["SoFlow"] = replace(jobs["SoFlow"], settings={"total_steps": 3})
    assert not records()


def test_results_of_an_objective_given_before_stay_until_a_source_changes(mine, tmp_path):
    folder, source = tmp_path / "runs", tmp_path / "models.py"
    source.write_text("")
    plan = read_plan("digits").with_objective(f"{mine}:Twin")
    for name in ("Twin", "SoFlow"):
        job = job_of(plan, name)
        (folder / job.file_name).mkdir(parents=True)
        for file in ("job.json", "scores.json"):
            rows = [{"step": 500, "nfe": 1, "FD": 1.0}]
            files = {str(source): sha256_of(source)}
            write_record(folder, job, file, files, rows=rows)

    def names() -> set[str]:
        plan = known_plan("digits", [f"{mine}:Other"], folder)
        plan = replace(plan, best=dict.fromkeys(plan.values["guided"], 2.0))
        write_results(plan, folder)
        return {row["name"] for row in tables.read_rows(folder / "results.jsonl")}

    assert names() == {"Twin", "SoFlow"}
    source.write_text("changed")
    assert names() == set()


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--data", "cats"], ["cats", "digits", "fashion"]),
        (["--parts", "all"], ["all", "scales", "objectives", "ablations", "costs"]),
        (["--objective", "mine.py"], ["mine.py", "FILE.py:NAME"]),
        (["--objective", f"{__file__}:Yot"], ["Yot", __file__]),
        (["--objective", f"{__file__}:SoFlow"], ["SoFlow"]),
    ],
)
def test_a_wrong_option_is_refused_by_its_name(flags, named, tmp_path):
    with pytest.raises(UserError) as refusal:
        main(["--folder", str(tmp_path), *flags])
    for name in (flags[0], *named):
        assert name in str(refusal.value)
