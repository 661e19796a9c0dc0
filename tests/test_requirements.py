"""pyproject.toml, the requirement files and uv.lock list the same packages; make installs them."""

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from commands import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LOCK = tomllib.loads((ROOT / "uv.lock").read_text())
LISTS = {"": PROJECT["project"]["dependencies"]} | {
    f"_{group}": listed for group, listed in PROJECT["dependency-groups"].items()
}


def pins(lines: list[str]) -> dict[str, str]:
    """Package name, as indexes spell it, to pinned version."""
    pairs = (line.split("==") for line in lines if line.strip() and not line.startswith("#"))
    return {re.sub("[-_.]+", "-", name).lower(): version for name, version in pairs}


@pytest.mark.parametrize("end", LISTS)
def test_a_requirement_file_pins_the_versions_of_pyproject_and_the_lock(end):
    listed = pins(LISTS[end])
    assert pins((ROOT / f"requirements_soflow{end}.txt").read_text().splitlines()) == listed
    (project,) = (package for package in LOCK["package"] if package["name"] == "soflow")
    metadata = project["metadata"]
    locked = metadata["requires-dev"][end[1:]] if end else metadata["requires-dist"]
    assert {entry["name"]: entry["specifier"].removeprefix("==") for entry in locked} == listed
    versions = {package["name"]: package["version"] for package in LOCK["package"]}
    assert listed.items() <= versions.items()


def test_all_lists_are_compared_and_the_lock_names_the_public_index_alone():
    names = {path.name for path in ROOT.glob("requirements*.txt")}
    assert names == {f"requirements_soflow{end}.txt" for end in LISTS}
    assert LOCK["requires-python"] == PROJECT["project"]["requires-python"]
    hosts = set(re.findall('[a-z+]+://([^/"]+)', (ROOT / "uv.lock").read_text()))
    assert hosts == {"pypi.org", "files.pythonhosted.org"}


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["UV=uv"], r"^uv sync --locked --all-groups *$"),
        (["UV=", "PYTHON=python3.12"], r"^python3\.12 -m venv \.venv$"),
        (["UV="], r"^\.venv/bin/pip install .*-r requirements_soflow\.txt .*_dev\.txt$"),
    ],
)
def test_make_installs_with_uv_or_with_pip(flags, expected, tmp_path: Path):
    for name in ("Makefile", "pyproject.toml", "uv.lock", *(p.name for p in ROOT.glob("req*.txt"))):
        shutil.copy(ROOT / name, tmp_path)
    command = ["make", "-n", *flags, ".venv/installed"]
    shown = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert re.search(expected, shown, re.MULTILINE), shown
    assert ("uv sync" in shown) == ("UV=uv" in flags)
