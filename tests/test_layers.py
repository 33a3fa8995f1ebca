"""The import rules between the packages, read from the sources: app ← model → training, and no further."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def sources(folder: str) -> list[Path]:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files, f"{folder} has no sources: a rule about nothing"
    return files


def imports(path: Path, at_the_top: bool = False) -> set[str]:
    """Every module that a file imports, anywhere in it, by its full name: `from a import b` gives a and a.b."""
    package = list(path.relative_to(ROOT).parent.parts)
    found = set()
    tree = ast.parse(path.read_text())
    for node in tree.body if at_the_top else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return found


def packages(path: Path) -> set[str]:
    """The outermost package of each import."""
    return {module.split(".")[0] for module in imports(path)}


def environment_reads(path: Path) -> Iterator[str]:
    """Uses of the environment: os.environ, os.getenv and their kin, and a model of settings, which reads it too."""
    names = {"environ", "environb", "getenv", "getenvb", "putenv"}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and node.attr in names:
            yield f"{path.name}:{node.lineno} uses {node.attr}"
    yield from (
        f"{path.name} imports {module}"
        for module in imports(path)
        if module in {"pydantic_settings.BaseSettings", *(f"os.{name}" for name in names)}
    )


LAZY = {  # what a file of `model` may import besides, when it is asked to
    "model/backends/openvino.py": "openvino",
    "model/hub.py": "huggingface_hub",
}


def test_model_imports_nothing_else_of_ours_and_little_of_others() -> None:
    allowed = {"model", "torch", "numpy", "safetensors"} | sys.stdlib_module_names
    for path in sources("model"):
        lazy = LAZY.get(str(path.relative_to(ROOT)), "")
        assert packages(path) <= allowed | {lazy}, path
        assert lazy not in {name.split(".")[0] for name in imports(path, at_the_top=True)}, f"{path}: inside a function"


def test_no_circle_of_imports() -> None:
    files = {module_name(path): path for folder in ("app", "model", "training") for path in sources(folder)}
    graph = {name: {found for found in imports(path) if found in files} - around(name) for name, path in files.items()}
    assert not circle(graph), " → ".join(circle(graph))


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def around(name: str) -> set[str]:
    """Itself and the packages that it is in: their __init__ runs before it does, whatever it imports."""
    parts = name.split(".")
    return {".".join(parts[: i + 1]) for i in range(len(parts))}


def circle(graph: dict[str, set[str]]) -> list[str]:
    """A path that comes back to where it began; empty where there is none."""
    done: set[str] = set()

    def search(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        for other in sorted(graph[name]):
            if found := search(other, [*path, name]):
                return found
        done.add(name)
        return []

    return next((found for name in sorted(graph) if (found := search(name, []))), [])


def test_circles_are_found() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]


def test_only_the_console_command_knows_app_and_training() -> None:
    both = [path for path in sources("ddpm_serve") if {"app", "training"} & packages(path)]
    assert both == [], "it runs modules by name and imports none"


@pytest.mark.parametrize(("folder", "others"), [("training", {"app", "tests"}), ("app", {"training", "tests"})])
def test_training_and_app_do_not_know_each_other(folder: str, others: set[str]) -> None:
    for path in sources(folder):
        assert not packages(path) & others, path


def test_the_engine_knows_nothing_of_http() -> None:
    for path in sources("app/engine"):
        assert not packages(path) & {"fastapi", "starlette", "uvicorn", "pydantic"}, path


def test_only_the_settings_read_the_environment() -> None:
    """But for how OpenMP's threads wait, which torch reads when it is loaded: see tests/test_openmp.py."""
    openmp = ROOT / "app/__init__.py"
    others = [path for path in sources("app") if path not in (openmp, ROOT / "app/settings.py")]
    assert not [read for path in others for read in environment_reads(path)]
    words = {node.value for node in ast.walk(ast.parse(openmp.read_text())) if isinstance(node, ast.Constant)}
    names = {word for word in words if str(word).isupper() and word != "SIGHUP"}
    assert names == {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"}


def test_imports_are_found_wherever_and_however_they_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    path = tmp_path / "app" / "engine" / "one.py"
    path.parent.mkdir(parents=True)
    path.write_text(
        "import a.b as c\n"
        "from d import e\n"
        "from . import f\n"
        "from .. import g\n"
        "from ..h import i\n"
        "def late():\n    from fastapi.routing import APIRouter\n"
    )
    expected = {"a.b", "d", "d.e", "app.engine", "app.engine.f", "app", "app.g", "app.h", "app.h.i"}
    assert imports(path) == expected | {"fastapi.routing", "fastapi.routing.APIRouter"}
    assert packages(path) == {"a", "d", "app", "fastapi"}
    path.write_text("import os\nfrom os import getenv\nos.environ['X']\nfrom pydantic_settings import BaseSettings\n")
    assert len(list(environment_reads(path))) == 3
