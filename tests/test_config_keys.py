"""Every key of the config does something: whoever adds one has to read it somewhere."""

import ast
import dataclasses
from collections.abc import Iterable, Iterator

import pytest
from commands import ROOT
from torch import nn

from config import FIELDS, Config
from models import Objective, SoFlow

SOURCES = [*sorted(ROOT.glob("*.py")), *sorted((ROOT / "support").rglob("*.py"))]
DECLARATION = ROOT / "config.py"  # and checks: what they look at has no effect by that


def reads(tree: ast.AST, owner: str) -> Iterator[str]:
    """The attributes that are read of what is called `owner`, by itself or as another's part."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            of = node.value
            if owner in (getattr(of, "id", None), getattr(of, "attr", None)):
                yield node.attr


def read_keys() -> set[str]:
    """All that the sources read of a config: its keys, and what it works out of them itself."""
    found = {part.name for part in dataclasses.fields(Objective)}
    for path in SOURCES:
        tree = ast.parse(path.read_text())
        if path == DECLARATION:
            (config,) = (n for n in ast.walk(tree) if getattr(n, "name", None) == "Config")
            found.update(reads(config, "self"))
        else:
            found.update(reads(tree, "config"))
    return found


def unread(keys: Iterable[str]) -> list[str]:
    found = read_keys()
    return [key for key in keys if key not in found]


def test_every_key_is_read_outside_of_its_declaration_and_checks():
    assert unread(FIELDS) == [], "a key that nothing reads: use it, or do not offer it"


def test_a_key_that_nothing_reads_is_found():
    assert unread([*FIELDS, "warmup_style"]) == ["warmup_style"]


@pytest.mark.parametrize("name", [part.name for part in dataclasses.fields(Objective)])
def test_what_is_minimised_is_what_the_config_says_under_the_same_name(name):
    model = SoFlow(nn.Identity())
    model.configure({**Config().to_dict(), name: 0.125})
    assert model.objective == dataclasses.replace(Objective(), **{name: 0.125})
