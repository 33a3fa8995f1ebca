"""The documents against the code: their commands, links and tables hold, or a test fails."""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import json
import re
import shlex
import sys
from collections.abc import Iterator
from itertools import dropwhile
from pathlib import Path

import pytest

from ddpm_serve.__main__ import COMMANDS as COMMANDS_OF_DDPM_SERVE
from training.cli import command
from training.run.config import TrainConfig

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
EXPLANATION = ROOT / "docs" / "explanation"
ENDS = ("|", "||", "&&", ";", "&", ">", ">>")  # of a command
ASSIGNMENT = re.compile(r"\w+=.*")  # of a variable, before a command
NOT_OURS = {"pip", "pytest", "venv", "zipfile", "torch.distributed.run"}  # of `-m`


class Parsed(BaseException):
    """The command line was understood; nothing was run."""


def shell_lines(text: str) -> Iterator[list[str]]:
    """The words of each command in the ```sh blocks, joined over their backslashes."""
    for block in re.findall(r"(?ms)^ *```(?:sh|bash|console)\n(.*?)^ *```", text):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words:
                end = next((i for i, word in enumerate(words) if word in ENDS), len(words))
                if named := [
                    *dropwhile(lambda word: re.fullmatch(r"\w+=.*", word), words[:end])
                ]:  # variables before it
                    yield named
                words = words[end + 1 :]


def modules(text: str) -> Iterator[tuple[str, list[str]]]:
    """(module, arguments) of each `python -m module …` and `ddpm-serve command …` in the ```sh blocks."""
    for words in shell_lines(text):
        if words[0].rpartition("/")[2] == "ddpm-serve":
            yield COMMANDS_OF_DDPM_SERVE[words[1]][0], words[2:]
        if "-m" in words and (words[0].rpartition("/")[2].startswith(("python", "torchrun"))):
            at = words.index("-m")
            if words[at + 1] not in NOT_OURS and not words[at + 1].startswith("docs."):
                yield words[at + 1], words[at + 2 :]


COMMANDS = [
    pytest.param(module, words, id=f"{path.stem}: {module} {' '.join(words)[:60]}")
    for path in DOCUMENTS
    for module, words in modules(path.read_text())
]


def understand(module: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the module's own parser read the words. SystemExit where it refuses them."""
    found = importlib.import_module(module)
    if hasattr(found, "__path__"):  # a package
        found = importlib.import_module(f"{module}.__main__")
    if module == "app":
        found.read_settings(words)
    elif module == "training.train":
        command.parse(words)
    elif parse := getattr(sys.modules[found.main.__module__], "parse", None):
        parse(words)
    else:
        parse_args = argparse.ArgumentParser.parse_args

        def stop(parser: argparse.ArgumentParser, argv: list[str] | None = None) -> None:
            parse_args(parser, argv)
            raise Parsed

        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
        monkeypatch.setattr(sys, "argv", [module, *words])
        with pytest.raises(Parsed):
            found.main(words) if inspect.signature(found.main).parameters else found.main()


@pytest.fixture
def after_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder where runs/NAME is what the documents' first commands leave."""
    monkeypatch.chdir(tmp_path)
    for name in ("photos", "cifar", "cifar-final"):
        Path("runs", name).mkdir(parents=True)
        Path("runs", name, "config.json").write_text(TrainConfig().to_json())


@pytest.mark.usefixtures("after_a_run")
@pytest.mark.parametrize(("module", "words"), COMMANDS)
def test_every_command_in_the_documents_is_understood(
    module: str, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    understand(module, words, monkeypatch)


@pytest.mark.usefixtures("after_a_run")
@pytest.mark.parametrize(
    "line",
    [
        "python -m training.train --use_lables",
        "python -m training.sample --checkpoint mnist",
        "python -m training.evaluate --checkpoint mnist --feature x --dataset x --out x",
        "python -m model.importers only-one",
        ".venv/bin/python -m app --chekpoint mnist",
        "python -m training.train --resume runs/none",
    ],
)
def test_a_wrong_command_would_be_noticed(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ((module, words),) = modules(f"```sh\n{line}  # a remark\n```\n")
    with pytest.raises(SystemExit):
        understand(module, words, monkeypatch)


def test_commands_are_found_over_backslashes_pipes_and_remarks() -> None:
    text = (
        "```sh\n.venv/bin/python -m a --b \\\n  'c d'  # e\ncurl x | python3 -m f && echo -m g\n```\n```py\n-m no\n```"
    )
    assert list(modules(text)) == [("a", ["--b", "c d"]), ("f", [])]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.stem)
def test_links_within_the_repository_lead_somewhere(path: Path) -> None:
    headings = {
        found: {slug(line) for line in found.read_text().splitlines() if line.startswith("#")} for found in DOCUMENTS
    }
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if re.match(r"\w+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        assert file.exists(), f"{target} in {path.name}"
        if anchor and file in headings:
            assert anchor in headings[file], f"{target} in {path.name}"


def slug(heading: str) -> str:
    """GitHub's anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lstrip("# ").lower()).replace(" ", "-")


def test_formulas_name_functions_where_they_are() -> None:
    chapter = (EXPLANATION / "diffusion.md").read_text()
    named = re.findall(r"((?:`[\w.]+`(?:, | and )?)+) in \[`([\w/]+\.py)`\]", chapter)
    assert len(named) > 10
    for names, path in named:
        tree = ast.parse((ROOT / path).read_text())
        defined = {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
        for name in re.findall(r"`([\w.]+)`", names):
            assert set(name.split(".")) <= defined, f"{name} in {path}"


def test_sampler_tables_are_what_the_code_computes() -> None:
    """Where this fails, run `python -m docs.explanation.diffusion`."""
    pytest.importorskip("matplotlib")
    from docs.explanation import diffusion
    from model import checkpoint

    text = diffusion.CHAPTER.read_text()
    assert diffusion.schedule_table() in text
    assert diffusion.origin(checkpoint.load("mnist-teacher")) in text


def test_generated_reference_is_what_the_code_says() -> None:
    """Where this fails, run `python -m docs.reference.generate`."""
    from docs.reference import generate

    assert set(generate.PAGES) == {"settings.md", "metrics.md"}
    for name, make in generate.PAGES.items():
        assert (ROOT / "docs" / "reference" / name).read_text() == make(), name


def test_panels_named_in_the_runbook_exist() -> None:
    named = set(re.findall(r'"([A-Z][^"]+)"', (ROOT / "docs" / "deploy" / "runbook.md").read_text()))
    board = json.loads((ROOT / "docker" / "grafana" / "dashboards" / "ddpm.json").read_text())
    assert len(named) > 5
    assert named <= {panel["title"] for panel in board["panels"]}


def test_metrics_and_settings_named_in_prose_exist() -> None:
    from app.metrics import ENGINE_GAUGES, MODEL_GAUGES, Metrics
    from app.ray import RaySettings

    families = Metrics().registry.collect()
    metrics = {family.name + "_total" * (family.type == "counter") for family in families}
    metrics |= {name for name, _ in (*ENGINE_GAUGES.values(), *MODEL_GAUGES.values())}
    metrics |= {"ddpm_pending_work_seconds", "ddpm_prometheus", "ddpm_serve"}  # the autoscaler's, a volume, a package
    settings = {f"DDPM_{name.upper()}" for name in RaySettings.model_fields}
    for path in DOCUMENTS:
        text = path.read_text()
        if not path.name.startswith("migrate"):  # other projects' options
            assert set(re.findall(r"\bddpm_[a-z0-9_]+(?<!_)", text)) <= metrics, path.name
        assert set(re.findall(r"\bDDPM_[A-Z0-9_]+(?<!_)", text)) <= settings, path.name


def test_every_page_is_in_the_table_of_the_readme() -> None:
    linked = set(re.findall(r"\]\((docs/[\w/-]+\.md)", (ROOT / "README.md").read_text()))
    assert linked == {str(path.relative_to(ROOT)) for path in DOCUMENTS} - {"README.md"}


def test_file_table_names_files_that_exist_once() -> None:
    table = (EXPLANATION / "architecture.md").read_text().partition("## Files")[2].partition("\n## ")[0]
    rows = re.findall(r"(?m)^\| (`[^|]+) \|", table)
    assert len(rows) > 30
    assert len(rows) == len(set(rows))
    for row in rows:
        first, *others = re.findall(r"`([^`]+)`", row)
        for path in (first, *others):  # the others stand beside the first, or have a path of their own
            assert list(ROOT.glob(path if "/" in path else str(Path(first).parent / path))), path
