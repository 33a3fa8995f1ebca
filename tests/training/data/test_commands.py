"""Every command that loads a data set reads it in the same way."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from model import checkpoint
from tests.training.data.conftest import Draw
from training import evaluate, train
from training.classifier import train as classifier
from training.cli import command
from training.run.config import TrainConfig


def class_names(path: Path) -> list[str]:
    """Of a classifier."""
    with safe_open(path, "pt") as file:
        names: list[str] = json.loads(file.metadata()["classifier"])["class_names"]
    return names


def test_training_reads_classes_from_file_names(
    draw: Draw, tiny_options: dict[str, Any], quick: None, capsys: pytest.CaptureFixture[str]
) -> None:
    draw(stem="cat_")
    dataset = draw(stem="dog_")
    (dataset / "dog_003.png").write_bytes(b"")
    config = TrainConfig(
        **tiny_options | {"dataset": str(dataset), "label_from": "filename", "skip_broken": True, "iterations": 2}
    )
    run = train.train(config)
    assert checkpoint.load(run / "best.safetensors").config.class_names == ("cat", "dog")
    assert "--label_from filename --skip_broken" in config.command()
    assert "left out 1 broken image: " in capsys.readouterr().err


def test_a_classifier_reads_classes_from_a_table(draw: Draw, tmp_path: Path) -> None:
    dataset = draw(count=40)
    rows = [f"{i:03d}.png,{i % 2 * 10 + 2}" for i in range(40)]
    (dataset / "metadata.csv").write_text("\n".join(["file_name,breed", *rows]))
    out = tmp_path / "extractor.safetensors"
    words = ["--dataset", str(dataset), "--out", str(out), "--epochs", "1", "--batch_size", "8", "--width", "4"]
    assert classifier.main([*words, "--label_column", "breed"]) == 0
    assert class_names(out) == ["2", "12"]
    assert classifier.main(words) == 2
    assert classifier.main([*words, "--label_column", "breed", "--label_from", "folder"]) == 2


def test_an_evaluation_keeps_the_order_of_its_checkpoint(
    evaluation: list[str], save_extractor: Callable[..., str], evaluated: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    names = ("emu", "cat", "dog")
    loaded = checkpoint.load(evaluation[1])
    checkpoint.save(Path(evaluation[1]), loaded.network.state_dict(), replace(loaded.config, class_names=names))
    save_extractor(names)
    assert list(evaluated([*evaluation, "--label_from", "folder"])["test"]["accuracy_by_class"]) == list(names)


def test_where_classes_stand_matters_only_for_classes() -> None:
    for options in ({"label_from": "filename"}, {"label_column": "breed"}):
        with pytest.raises(ValueError, match="needs --use_labels"):
            TrainConfig(**options)
    with pytest.raises(ValueError, match="give one of them"):
        TrainConfig(use_labels=True, label_from="folder", label_column="breed")
    with pytest.raises(SystemExit):
        command.parse(["--use_labels", "--label_from", "file"])
    with pytest.raises(SystemExit):
        evaluate.parse(["--label_from", "file"])
