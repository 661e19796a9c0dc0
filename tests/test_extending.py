"""What docs/extending.md shows is true, and whoever follows it keeps green tests."""

import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from commands import ROOT, forked
from documents import SMALL, blocks, commands_of, copy_project

from models import Batch, Objective, build_model
from schedules import TIME_SAMPLING, guidance_decay

DOCUMENT = ROOT / "docs" / "extending.md"
# What `make test` runs of these is in the changed files, or follows from the tables.
TESTS = ("config", "config_errors", "config_keys", "structure", "readme", "extending", "slots")


def block_with(text: str) -> str:
    """The one block of Python code that has this text."""
    (block,) = (block for block in blocks(DOCUMENT, "python") if text in block)
    return block


def examples() -> dict[str, str]:
    """The code that goes into each file that the document names."""
    pattern = r"[Ii]n\s+`(\S+\.py)`:\n\n```python\n(.*?)^```"
    found: dict[str, str] = {}
    for name, code in re.findall(pattern, DOCUMENT.read_text(), re.M | re.S):
        found[name] = f"{found[name]}\n\n{code}" if name in found else code
    return found


def wide(values):
    return values.view(-1, 1, 1, 1)


def test_the_plain_losses_equal_the_real_ones():
    plain: dict = {"torch": torch}
    exec(block_with("def guided_target("), plain)
    model = build_model("DiT-Nano-4", 1, 8, 10, 0.1).double()
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.objective = Objective(cfg_scale=2.0, mix_ratio=0.25, cfg_decay_time=0.8)
    V, B, source = 8, 12, torch.Generator().manual_seed(0)
    times = (0.1, (-0.2, -1.0, 0.2), (1.0, 0.8, 0.8), lambda purpose: source)
    t, l, s = (x.double() for x in TIME_SAMPLING["LogitNormal"](V, B - V, *times))  # noqa: E741
    x_0, x_1 = torch.randn(2, B, 1, 8, 8).double()
    labels, is_dropped = torch.arange(B) % 10, torch.arange(B) % 3 == 0
    batch = Batch(x_0, x_1, t, l, s, V, V, B - V, labels, is_dropped)

    def F(x, t, s, label):  # noqa: N802
        return model.network(x, t.flatten(), (t - s).flatten(), labels=label)

    def kappa(t):
        return wide(guidance_decay(t.flatten(), 0.8))

    null = torch.full((B,), model.null_label)
    rows = [x_0, x_1, wide(t), wide(l), wide(s)]
    ends = [torch.where(is_dropped, null, labels), null, wide(~is_dropped)]
    first = [x[:V] for x in (*rows[:3], *ends)]
    others = [x[V:] for x in (*rows, *ends)]
    constants = (2.0, 0.25, kappa, 1.0, 0.01)
    loss = V * plain["flow_matching"](F, *first, *constants)
    loss = (loss + (B - V) * plain["consistency"](F, *others, *constants)) / B
    trained = [p for p in model.parameters() if p.requires_grad]
    expected = model(batch).loss
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(
        torch.autograd.grad(loss, trained), torch.autograd.grad(expected, trained)
    )


@pytest.mark.slow
def test_training_as_a_library_makes_its_steps_and_writes_nothing(tmp_path):
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    finished = forked("-c", block_with("build_run("), folder=tmp_path)
    assert len(re.findall(r"'Vel_MSE': \d", finished.stdout)) == 20, finished.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["configs"]


@pytest.fixture(scope="module")
def extended(tmp_path_factory):
    """A copy of the project in which somebody followed the document."""
    folder = tmp_path_factory.mktemp("extended")
    copy_project(folder)
    for name, code in examples().items():
        file = folder / name
        before = file.read_text() + "\n\n" if file.exists() else ""
        file.write_text(before + code)
    assert forked("docs/make_config.py", folder=folder).returncode == 0
    return folder


@pytest.mark.slow
def test_the_examples_train(extended):
    small = {"train.py": SMALL.split(), "inference.py": ["--num-samples", "2"]}
    for command in commands_of(DOCUMENT):
        if more := small.get(command.words[1]):
            finished = forked(*command.words[1:], *more, folder=extended)
            assert finished.returncode == 0, f"{command}\n{finished.stdout}{finished.stderr}"


@pytest.mark.slow
def test_make_test_stays_green_after_the_examples(extended):
    changed = list(examples())
    cache = ROOT / ".mypy_cache"  # `make lint` leaves it; without it mypy takes a minute
    if cache.exists():
        shutil.copytree(cache, extended / ".mypy_cache", dirs_exist_ok=True)
    tests = [f"tests/test_{name}.py" for name in TESTS]
    for command in (
        ["ruff", "check", *changed],
        ["ruff", "format", "--check", *changed],
        ["mypy", *changed],
        ["pytest", "-x", "-q", "-p", "no:cacheprovider", "-m", "not slow", *tests],
    ):
        finished = subprocess.run(
            [sys.executable, "-m", *command], cwd=extended, capture_output=True, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert finished.returncode == 0, f"{command}\n{finished.stdout}{finished.stderr}"
