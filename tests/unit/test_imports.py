"""Modules stand on floors: none imports, anywhere in it, what imports it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

SRC = Path(__file__).parents[2] / "src"


def imported(tree: ast.AST) -> Iterator[str]:
    """Names that may be modules, those within functions and for type checkers among them."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def order(sources: dict[str, str]) -> list[str]:
    """Modules, the ground floor's first.

    Raises:
        CycleError: some import each other.
    """
    graph = {
        name: {other for other in imported(ast.parse(source)) if other in sources and other != name}
        for name, source in sources.items()
    }
    return list(TopologicalSorter(graph).static_order())


def test_no_modules_import_each_other() -> None:
    sources = {
        ".".join(path.relative_to(SRC).with_suffix("").parts): path.read_text()
        for path in SRC.glob("lmexp/**/*.py")
        if path.name != "__init__.py"
    }
    found = order(sources)
    assert found.index("lmexp.errors") < found.index("lmexp.projection") < found.index("lmexp.cli")


def test_a_circle_is_found_wherever_the_imports_stand() -> None:
    late = "def f():\n    from lmexp import a"
    with pytest.raises(CycleError, match=r"lmexp\.b"):
        order({"lmexp.a": "import lmexp.b", "lmexp.b": late})
