"""Imports lead one way, and the map of the modules is complete."""

from __future__ import annotations

import ast
import importlib
import re
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "singe"
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}


def for_types_only(tree: ast.Module) -> set[ast.AST]:
    """What stands under ``if TYPE_CHECKING``."""
    return {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }


def imported(name: str) -> set[str]:
    """Modules of the package that a module imports, at its head or on demand."""
    tree = ast.parse(MODULES[name].read_text())
    skipped = for_types_only(tree)
    found = set()
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name in MODULES}
        elif isinstance(node, ast.ImportFrom) and node.module in MODULES:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names & MODULES.keys()
            if names - MODULES.keys():
                found.add(node.module)
    return found - {name}


def test_no_module_needs_one_that_needs_it():
    needs = {name: imported(name) for name in MODULES}
    assert sum(map(len, needs.values())) > 200  # that the reading of imports finds them
    order = list(TopologicalSorter(needs).static_order())  # raises CycleError, which names them
    assert order.index("singe.errors") < order.index("singe.engine") < order.index("singe")


def test_benchmarks_and_examples_import_what_there_is():
    """They are run by hand: a name that has moved would be found by the next who needs it."""
    for path in (*ROOT.glob("benchmarks/*.py"), *ROOT.glob("examples/**/*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "singe":
                module = importlib.import_module(node.module)
                for name in node.names:
                    assert hasattr(module, name.name), f"{path.name}: {node.module}.{name.name}"


def test_every_module_is_on_the_map():
    text = (ROOT / "docs" / "architecture.md").read_text()
    named = set(re.findall(r"`(\w+)/?`", text))
    public = {path.stem for path in PACKAGE.glob("*.py") if not path.stem.startswith("_")}
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert sorted((public | folders) - named) == []
    rows = re.findall(r"^\| (`.*?) \|", text, re.MULTILINE)
    listed = {name for row in rows for name in re.findall(r"`(\w+)/?`", row)}
    assert len(listed) > 40
    assert sorted(listed - public - folders) == []
