"""What --checkpoint may say, and what the models are called."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

from app.checkpoints import Source, load, parse
from app.main import create_app
from app.model_registry import ModelRegistry
from app.settings import Settings
from model.checkpoint import PRETRAINED, CheckpointError
from tests.app.processes import run_to_its_end


@pytest.fixture
def runs(tmp_path: Path, grey_checkpoint: Path) -> Path:
    """A folder with what two training runs leave."""
    for name in ("photos", "birds"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "log.jsonl").touch()
        shutil.copyfile(grey_checkpoint, tmp_path / name / "best.safetensors")
        shutil.copyfile(grey_checkpoint, tmp_path / name / "checkpoint-0000002.safetensors")
    return tmp_path


def names(text: str) -> list[str]:
    return [source.name for source in parse(text)]


def refused(text: str) -> str:
    with pytest.raises(CheckpointError) as error:
        parse(text)
    return str(error.value)


def test_a_run_is_served_under_its_own_name(runs: Path) -> None:
    photos = Source("photos", runs / "photos" / "best.safetensors")
    assert parse(f"{runs}/photos") == parse(f"{runs}/photos/") == parse(f"{photos.path}") == [photos]
    assert load(photos).name == "photos"
    assert names(f"{runs}/photos/best.safetensors,{runs}/birds/best.safetensors") == ["photos", "birds"]
    assert names(f"{runs}/photos/checkpoint-0000002.safetensors") == ["checkpoint-0000002"]


def test_the_folder_one_is_in_has_a_name_too(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(runs / "photos")
    assert names(".") == names("best.safetensors") == ["photos"]
    assert names("../birds") == ["birds"]


def test_a_best_file_outside_a_run_keeps_its_name(runs: Path) -> None:
    (runs / "photos" / "config.json").unlink()
    assert names(f"{runs}/photos/best.safetensors") == ["best"]


def test_a_link_to_a_run_gives_its_name(runs: Path) -> None:
    os.symlink(runs / "photos", runs / "current")
    assert parse(f"{runs}/current") == [Source("current", runs / "current" / "best.safetensors")]


def test_a_name_can_be_chosen(runs: Path) -> None:
    found = parse(f"digits=mnist, old={runs}/photos,{runs}/photos")
    assert found[0] == Source("digits", PRETRAINED / "mnist.safetensors")
    assert [source.name for source in found] == ["digits", "old", "photos"]


def test_two_of_one_name_are_refused_with_a_way_out(runs: Path) -> None:
    shutil.copytree(runs / "photos", runs / "old" / "photos")
    said = refused(f"{runs}/photos,{runs}/old/photos")
    assert "would both be called photos" in said
    assert f"such as photos-2={runs}/old/photos/best.safetensors" in said
    assert names(f"{runs}/photos,{said.rsplit('such as ', 1)[1]}") == ["photos", "photos-2"]


def test_a_path_may_have_commas_and_signs(runs: Path) -> None:
    file = runs / "birds, v2" / "a=b" / "birds,2.safetensors"
    file.parent.mkdir(parents=True)
    shutil.copyfile(runs / "birds" / "best.safetensors", file)
    assert parse(str(file)) == [Source("birds,2", file)]
    assert names(f"mnist,{file},{runs}/photos") == ["mnist", "birds,2", "photos"]
    assert parse(f"mnist , x={file}")[1] == Source("x", file)
    there = "cifar10, cifar10-teacher, mnist, mnist-fast, mnist-teacher"
    assert refused(f"{runs}/a=b") == f"no checkpoint '{runs}/a=b': neither a file nor bundled ({there})"


@pytest.mark.parametrize("text", ["", "mnist,", ",mnist", "mnist,,cifar10", " "])
def test_nothing_between_commas_is_refused(text: str) -> None:
    assert "must be a checkpoint, or several by commas" in refused(text)


def test_a_folder_that_is_no_run_is_named_as_what_it_is(runs: Path) -> None:
    (runs / "photos" / "best.safetensors").unlink()
    assert refused(f"{runs}/photos") == f"{runs}/photos: this training run has not saved a checkpoint yet"
    (runs / "pipeline").mkdir()
    assert "not that of a training run: it has no best.safetensors" in refused(f"{runs}/pipeline")
    (runs / "pipeline" / "model_index.json").write_text("{}")
    assert "`python -m model.importers` makes a checkpoint of it" in refused(f"{runs}/pipeline")


def test_runs_in_the_folder_of_models_can_be_loaded(runs: Path) -> None:
    shutil.copyfile(runs / "birds" / "best.safetensors", runs / "one.safetensors")
    os.symlink("/", runs / "outside")
    settings = Settings(checkpoint=f"{runs}/one.safetensors", models_dir=str(runs), device="cpu", threads=1)
    models: ModelRegistry = create_app(settings).state.service.models
    try:
        assert models._names() == ["birds", "one", "photos"]
        assert models._file("photos") == runs / "photos" / "best.safetensors"
        (runs / "photos.safetensors").touch()
        assert models._file("photos") == runs / "photos.safetensors"
        assert [served.name for served in models] == ["one"]
    finally:
        models.close()


def test_without_its_signals_the_server_says_so_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import signal\ndel signal.SIGHUP\n")
    path = os.pathsep.join([str(tmp_path), *sys.path])
    ended = run_to_its_end("--port", "0", fresh=True, PYTHONPATH=path)
    assert ended.returncode == 1
    assert ended.stderr == "the server needs Linux or macOS: on Windows run it under WSL or in Docker (see README.md)\n"
