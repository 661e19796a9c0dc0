"""Every key of the config has an effect: some module reads it, and the objective gets its value."""

import dataclasses
import inspect
import re

import pytest
from commands import ROOT
from torch import nn

from config import FIELDS, Config
from models import Objective, SoFlow
from support.data.datasets import DataRequest


def read_keys() -> set[str]:
    """What the sources read of a config. Checks in config.py do not count."""
    sources = [*ROOT.glob("*.py"), *ROOT.glob("support/**/*.py"), *ROOT.glob("training/*.py")]
    text = "".join(path.read_text() for path in sources if path.name != "config.py")
    found = re.findall(r"\bconfig\.(\w+)", text)
    found += re.findall(r"\bself\.(\w+)", inspect.getsource(Config))
    requests = [part.name for kind in (Objective, DataRequest) for part in dataclasses.fields(kind)]
    return {*found, *requests}


def test_every_key_is_read_outside_of_its_declaration_and_checks():
    assert [key for key in (*FIELDS, "warmup_style") if key not in read_keys()] == ["warmup_style"]


@pytest.mark.parametrize("name", [part.name for part in dataclasses.fields(Objective)])
def test_the_objective_gets_the_value_of_the_key_with_its_name(name):
    model = SoFlow(nn.Identity())
    model.configure({**Config().to_dict(), name: 0.125})
    assert model.objective == dataclasses.replace(Objective(), **{name: 0.125})
