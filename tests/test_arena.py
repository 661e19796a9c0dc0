"""The arena's objectives: each has the true map as its optimum; and what runs and compares them."""

import dataclasses
import json
import re
from dataclasses import replace

import pytest
import torch
from commands import ROOT, run
from exact import ExactNetwork
from torch import Tensor, nn

from arena import tables
from arena.objectives import OBJECTIVES
from arena.plan import read_plan
from arena.results import FILES, add_rows, read_rows
from arena.run import recorded_of
from config import Config
from models import Batch, build_model
from support.system.files import UserError

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


# A mixture of two Gaussians in the plane, whose velocity is known in closed form

MEANS = torch.tensor([[-1.0, 0.5], [1.5, -0.5]], dtype=torch.float64)
WEIGHTS = torch.tensor([0.3, 0.7], dtype=torch.float64)
STD = 0.4


def posterior(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of x_0 given x [B, 2] at t [B]: components' weights [B, K], means [B, K, 2], std [B, 1]."""
    variance = ((1 - t) * STD) ** 2 + t**2
    offsets = x[:, None] - (1 - t)[:, None, None] * MEANS
    logits = WEIGHTS.log() - offsets.square().sum(2) / (2 * variance[:, None])
    gain = (1 - t) * STD**2 / variance
    means = MEANS + gain[:, None, None] * offsets
    return logits.softmax(1), means, STD * (t / variance.sqrt())[:, None]


def velocity(x: Tensor, t: Tensor) -> Tensor:
    """v(x, t) = E[x_1 - x_0 | x_t = x], [B, 2]."""
    weights, means, _ = posterior(x, t)
    variance = ((1 - t) * STD) ** 2 + t**2
    offsets = x[:, None] - (1 - t)[:, None, None] * MEANS
    # E[x_1 | x_t, component] = t (x_t - (1 - t) mean) / variance
    x_1 = (t / variance)[:, None, None] * offsets
    return (weights[:, :, None] * (x_1 - means)).sum(1)


def flow(x: Tensor, t: Tensor, s: Tensor, steps: int = 60) -> Tensor:
    """Where the path through x at t is at s: Runge and Kutta's fourth-order method."""
    h = (s - t) / steps
    for k in range(steps):
        now = t + k * h
        k_1 = velocity(x, now)
        k_2 = velocity(x + h[:, None] / 2 * k_1, now + h / 2)
        k_3 = velocity(x + h[:, None] / 2 * k_2, now + h / 2)
        k_4 = velocity(x + h[:, None] * k_3, now + h)
        x = x + h[:, None] / 6 * (k_1 + 2 * k_2 + 2 * k_3 + k_4)
    return x


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
    source = torch.Generator().manual_seed(3)
    count = 4000
    t = torch.full((count,), 0.75, dtype=torch.float64)
    x = torch.tensor([[0.2, 0.1]], dtype=torch.float64).expand(count, 2)
    weights, means, std = posterior(x[:1], t[:1])
    # As many of each component as its weight says, and each deviation with its opposite.
    of_first = round(float(weights[0, 0]) * count / 2) * 2
    means = torch.cat([means[0, :1].expand(of_first, 2), means[0, 1:].expand(count - of_first, 2)])
    noise = torch.randn(count // 2, 2, generator=source, dtype=torch.float64)
    x_0 = means + std * torch.stack([noise, -noise], 1).flatten(0, 1)
    x_1 = (x - (1 - t)[:, None] * x_0) / t[:, None]
    network = TrueMap(is_true)
    method = OBJECTIVES[name](network)
    method.configure(SETTINGS)
    images = [one[:, :, None, None] for one in (x_0, x_1)]
    s = torch.full_like(t, 0.25)
    method(batch_of(*images, t, t - gap * (t - s), s)).loss.backward()
    return float(network.offset.grad.norm())


@pytest.mark.parametrize("name", ["MeanFlow", "ConsistencyTraining"])
def test_on_a_gaussian_mixture_the_true_map_is_where_the_gradient_vanishes(name):
    at_true, elsewhere = (gradient(name, is_true, gap=0.01) for is_true in (True, False))
    assert at_true < 0.05 * elsewhere, (at_true, elsewhere)


def test_on_a_gaussian_mixture_flow_matching_learns_the_velocity():
    # `False` is the velocity itself, which is all that flow matching asks for.
    assert gradient("FlowMatching", False, gap=0.01) < 0.01


def test_on_a_gaussian_mixture_two_true_half_steps_are_a_true_step():
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


def test_mean_flows_derivative_is_that_of_finite_differences():
    torch.manual_seed(0)
    network = build_model("DiT-Nano-2", 1, 8, 3, 0.1).network.double()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)
    method = OBJECTIVES["MeanFlow"](network)
    x, v = torch.randn(2, 5, 1, 8, 8, dtype=torch.float64)
    t, s = torch.linspace(0.5, 1, 5).double(), torch.linspace(0, 0.4, 5).double()
    labels = torch.tensor([0, 1, 2, 3, 0])
    u, du_dt = method.with_derivative(x, s, t, v, labels)
    h = 1e-5
    with torch.no_grad():
        ahead = network(x + h * v, t + h, t + h - s, labels=labels)
        behind = network(x - h * v, t - h, t - h - s, labels=labels)
        torch.testing.assert_close(u, network(x, t, t - s, labels=labels))
    torch.testing.assert_close(du_dt, (ahead - behind) / (2 * h), atol=1e-6, rtol=1e-5)


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


def test_the_documents_tables_are_made_of_the_results_that_are_kept():
    rows, costs = (read_rows(tables.KEPT / name) for name in FILES)
    text = tables.DOCUMENT.read_text()
    assert tables.with_tables(text, rows, costs) == text
    assert sum((tables.KEPT / name).stat().st_size for name in FILES) < 1_000_000
    # One cell by hand: SoFlow, guided, after the last step, by one jump.
    last = max(row["step"] for row in rows if row["part"] == "objectives")
    found = [
        row["FD"]
        for row in rows
        if row["part"] == "objectives" and row["name"] == "SoFlow" and row["guided"]
        and (row["step"], row["jumps"]) == (last, 1)
    ]  # fmt: skip
    cell = f"{sum(found) / len(found):.1f} ({min(found):.1f} to {max(found):.1f})"
    (line,) = re.findall(r"^\| SoFlow, guided \| (.*) \|$", tables.steps_table(rows), re.M)
    assert line.split(" | ")[0] == cell


def test_a_change_has_a_direction_where_all_seeds_agree():
    rows = [
        {"part": "ablations", "name": name, "seed": seed, "FD": fd}
        for name, fds in (
            ("as it is", (10, 14)),
            ("p 0", (11, 16)),
            ("no guidance", (8, 13)),
            ("mix_ratio 1", (9, 15)),
            ("p 0.5", (30, 31)),
        )
        for seed, fd in enumerate(fds)
    ]
    cells = [line.split(" | ")[2:] for line in tables.ablations_table(rows).splitlines()[3:]]
    assert cells == [
        ["+1.5 (+1.0 to +2.0)", "worse", "worse", "agrees |"],
        ["-1.5 (-2.0 to -1.0)", "better", "worse", "**does not agree** |"],
        ["+0.0 (-1.0 to +1.0)", "undecided", "worse", " |"],
        ["+18.5 (+17.0 to +20.0)", "worse", "", " |"],
    ]


def test_results_of_other_parts_and_data_stay(tmp_path):
    path = tmp_path / "r.jsonl"
    first = [{"data": "digits", "part": "objectives", "FD": 1}, {"data": "digits", "part": "a"}]
    add_rows(path, first)
    add_rows(path, [{"data": "digits", "part": "objectives", "FD": 2}])
    add_rows(path, [{"data": "fashion", "part": "objectives", "FD": 3}])
    assert [row.get("FD") for row in read_rows(path)] == [None, 2, 3]


@pytest.mark.parametrize("damaged", ['{"data": "dig', "[]", "{}", "\\x00"])
def test_a_damaged_line_of_results_is_named(tmp_path, damaged):
    path = tmp_path / FILES[0]
    path.write_text(f'{{"data": "digits"}}\n{damaged}\n')
    with pytest.raises(UserError, match=f"{FILES[0]}: line 2 is damaged; delete the file"):
        read_rows(path)


def test_tables_on_other_data_lie_beside_their_runs(tmp_path):
    kept, document = [(tables.KEPT / name).read_bytes() for name in FILES], tables.DOCUMENT
    before = document.read_bytes()
    rows, costs = (
        [{**row, "data": "fashion"} for row in read_rows(tables.KEPT / name)] for name in FILES
    )
    add_rows(tmp_path / FILES[0], [row for row in rows if row["part"] == "scales"])
    tables.main(["--folder", str(tmp_path)])
    assert (tmp_path / "tables.md").read_text().count("## ") == 1
    add_rows(tmp_path / FILES[0], rows)
    add_rows(tmp_path / FILES[1], costs)
    tables.main(["--folder", str(tmp_path)])
    text = (tmp_path / "tables.md").read_text()
    for made in (
        tables.scales_table(rows),
        tables.costs_table(costs),
        tables.ablations_table(rows),
    ):
        assert made in text
    assert (tmp_path / "fd.svg").exists()
    add_rows(tmp_path / FILES[0], read_rows(tables.KEPT / FILES[0]))
    with pytest.raises(UserError, match="results on digits and fashion; one folder each"):
        tables.main(["--folder", str(tmp_path)])
    assert [(tables.KEPT / name).read_bytes() for name in FILES] == kept
    assert document.read_bytes() == before


def test_an_objective_that_has_changed_is_trained_anew(tmp_path):
    file = tmp_path / "mine.py"
    found = []
    for text in (TOY, TOY + "# changed"):
        file.write_text(text)
        plan = dataclasses.replace(read_plan("digits").with_objective(f"{file}:Toy"), best=BEST)
        (job, *_) = (job for job in plan.jobs("objectives") if job.name == "Toy")
        found.append(recorded_of(job))
    assert found[0] != found[1]
    for wrong, said in (("Yot", "has no class Yot"), ("SoFlow", "SoFlow is there already")):
        with pytest.raises(UserError, match=said):
            read_plan("digits").with_objective(f"{file}:{wrong}")


BEST = dict.fromkeys(("SoFlow", "MeanFlow", "Shortcut", "FlowMatching"), 2.0)

TOY = """
from arena.objectives.flow_matching import FlowMatching

class Toy(FlowMatching):
    def forward(self, batch):
        terms = super().forward(batch)
        return terms._replace(metrics={"Toy": 2 * terms.loss.detach()})
"""


def test_a_users_objective_goes_through_the_same_slot(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(TOY)
    plan = read_plan("digits").with_objective(f"{file}:Toy")
    plan = dataclasses.replace(plan, best=BEST)
    job = next(job for job in plan.jobs("objectives") if job.name == "Toy")
    settings = {**job.settings, "total_steps": 2, "logging_steps": 1, "batch_size": 8}
    job = dataclasses.replace(job, settings=settings, checkpoints=1, images=10, jumps=(1, 2))
    given = {"folder": str(tmp_path / "run"), "config": plan.config, "methods": [f"{file}:Toy"]}
    done = run(ROOT / "arena" / "job.py", json.dumps({**given, "job": dataclasses.asdict(job)}))
    assert done.returncode == 0, done.stderr
    assert "Toy" in json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert sorted(p.name for p in (tmp_path / "run" / "samples").iterdir()) == [
        "2_1.npz", "2_2.npz",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--data", "cats"], "--data cats: there is digits, fashion"),
        (["--parts", "all"], "--parts all: there are scales, objectives, ablations and costs"),
        (["--objective", "mine.py"], "--objective mine.py: must be FILE.py:NAME"),
    ],
)
def test_mistakes_are_a_line(flags, said, tmp_path):
    done = run("arena/run.py", "--folder", tmp_path, *flags)
    assert done.returncode == 1
    assert said in done.stderr and done.stderr.count("\n") == 1
