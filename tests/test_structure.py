"""How the project is built: the method on top, what supports it below, and nothing in a knot.

Found in the sources themselves, imports for types included.
"""

import ast
import graphlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

from commands import ROOT

LONGEST_FUNCTION_LINES = 60


def tracked() -> list[Path]:
    """The project's Python files, those just written too."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:  # an unpacked archive: then what lies there is the project
        folders = ["support", "training", "tests", "benchmarks", "quickstart", "examples", "docs"]
        found = [*ROOT.glob("*.py"), *(p for name in folders for p in (ROOT / name).rglob("*.py"))]
        return sorted(found)
    return [ROOT / name for name in listed.stdout.split() if (ROOT / name).exists()]


def name_of(path: Path) -> str:
    """support/data/vae.py -> support.data.vae."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


TREES = {path: ast.parse(path.read_text()) for path in tracked()}
MODULES = {
    name_of(path): tree
    for path, tree in TREES.items()
    if path.parent == ROOT or {ROOT / "support", ROOT / "training"} & {*path.parents}
}
SUPPORT = {name for name in MODULES if name.split(".")[0] == "support"}


def statements(tree: ast.AST, at_import: bool) -> Iterator[ast.AST]:
    """What may run of a module; with `at_import`, only what runs when it is imported."""
    for node in ast.iter_child_nodes(tree):
        if at_import and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if at_import and isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        yield node
        yield from statements(node, at_import)


def imports(name: str, at_import: bool = False) -> set[str]:
    """The modules that a module imports, ours and others; all packages that they lie in too."""
    found = set()
    for node in statements(MODULES[name], at_import):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: a relative import"
            inner = {f"{node.module}.{alias.name}" for alias in node.names} & MODULES.keys()
            found.update(inner or {str(node.module)})
    return {".".join(of.split(".")[: n + 1]) for of in found for n in range(of.count(".") + 1)}


def test_no_module_imports_itself_by_way_of_others():
    # A package's own modules import it first, and it none of them.
    graphlib.TopologicalSorter({name: imports(name) & MODULES.keys() for name in MODULES}).prepare()


def test_what_supports_the_method_imports_nothing_of_it():
    top = MODULES.keys() - SUPPORT
    assert {name: found for name in SUPPORT if (found := imports(name) & top)} == {}


def test_no_test_module_imports_another():
    modules = {path.stem for path in TREES if path.name.startswith("test_")}
    for path, tree in TREES.items():
        if path.stem in modules:
            names = {
                alias.name for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names
            }
            names |= {str(n.module) for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
            assert not names & modules, path.name


def test_what_scores_and_what_it_imports_come_without_torch():
    names = {"evaluator", *(name for name in MODULES if name.startswith("support.scores"))}
    waiting = [*names - {"support.scores.torch_graph"}]  # loaded where TensorFlow is missing
    seen: set[str] = set()
    while waiting:
        name = waiting.pop()
        found = imports(name, at_import=True)
        assert not found & {"torch", "torchvision", "tensorflow"}, name
        seen.add(name)
        waiting += (found & MODULES.keys()) - seen


def test_what_supports_the_method_takes_plain_values_and_no_config():
    taking = [
        f"{name}, line {node.lineno}"
        for name in SUPPORT
        for node in ast.walk(MODULES[name])
        if (isinstance(node, ast.arg) and node.arg == "config")
        or (isinstance(node, ast.Name) and node.id == "Config")
    ]
    assert taking == []


def test_no_function_is_longer_than_a_screen():
    lengths = {
        f"{path.relative_to(ROOT)}: {node.name}": node.end_lineno - node.lineno + 1
        for path, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert {where: n for where, n in lengths.items() if n > LONGEST_FUNCTION_LINES} == {}
