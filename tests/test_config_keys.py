"""Every key of the config has an effect: some module reads it, and the objective gets its value."""

import ast
import dataclasses
from collections.abc import Iterable, Iterator

import pytest
from commands import ROOT
from torch import nn

from config import FIELDS, Config
from models import Objective, SoFlow
from support.data.datasets import DataRequest

SOURCES = [
    *ROOT.glob("*.py"),
    *(path for folder in ("support", "training") for path in (ROOT / folder).rglob("*.py")),
]
DECLARATION = ROOT / "config.py"  # its checks read keys too, which gives them no effect


def reads(tree: ast.AST, owner: str) -> Iterator[str]:
    """The attributes that are read from `owner` or from `something.owner`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            of = node.value
            if owner in (getattr(of, "id", None), getattr(of, "attr", None)):
                yield node.attr


def unread(keys: Iterable[str]) -> list[str]:
    """The keys that no source reads."""
    found = {part.name for kind in (Objective, DataRequest) for part in dataclasses.fields(kind)}
    for path in SOURCES:
        tree = ast.parse(path.read_text())
        if path == DECLARATION:
            (config,) = (n for n in ast.walk(tree) if getattr(n, "name", None) == "Config")
            found.update(reads(config, "self"))
        else:
            found.update(reads(tree, "config"))
    return [key for key in keys if key not in found]


def test_every_key_is_read_outside_of_its_declaration_and_checks():
    assert unread([*FIELDS, "warmup_style"]) == ["warmup_style"]


@pytest.mark.parametrize("name", [part.name for part in dataclasses.fields(Objective)])
def test_the_objective_gets_the_value_of_the_key_with_its_name(name):
    model = SoFlow(nn.Identity())
    model.configure({**Config().to_dict(), name: 0.125})
    assert model.objective == dataclasses.replace(Objective(), **{name: 0.125})
