"""Every public function, method and class says what it does, read from the sources."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# What every reader knows: command lines' entry points and parts of torch's and argparse's own interfaces
KNOWN = {"forward", "main", "parse", "state_dict", "load_state_dict"}


def undocumented(node: ast.AST, prefix: str = "") -> Iterator[str]:
    """Names of public definitions without a docstring; what stands inside a function is its own matter."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            if child.name.startswith("_") or child.name in KNOWN:
                continue
            if ast.get_docstring(child) is None:
                yield f"{prefix}{child.name}"
            if isinstance(child, ast.ClassDef):
                yield from undocumented(child, f"{prefix}{child.name}.")


@pytest.mark.parametrize("package", ["model", "training", "app"])
def test_everything_public_has_a_docstring(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    missing = [
        f"{path.relative_to(ROOT)}: {name}" for path in files for name in undocumented(ast.parse(path.read_text()))
    ]
    assert not missing, "no docstring: " + ", ".join(missing)


def test_what_has_none_is_found() -> None:
    source = 'class A:\n    """It."""\n    def b(self): ...\n    def _c(self): ...\nasync def d():\n    def e(): ...\n'
    assert list(undocumented(ast.parse(source))) == ["A.b", "d"]
