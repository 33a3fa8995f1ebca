import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from model import checkpoint
from model.checkpoint import CheckpointConfig
from model.diffusion import DiffusionConfig
from model.unet import UNet
from training.config import TrainConfig
from training.rundir import RunDir


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    return TrainConfig(log_dir=str(tmp_path), run_name="run", keep=2)


@pytest.fixture
def run(config: TrainConfig) -> RunDir:
    run = RunDir(config, resume=False)
    run.start(config, 0)
    return run


def save(run: RunDir, tiny: UNet, iteration: int, best: bool = False, **state: torch.Tensor) -> None:
    settings = CheckpointConfig(tiny.config, DiffusionConfig(), ("a", "b", "c"), provenance={"iterations": iteration})
    run.save(iteration, tiny.state_dict(), settings, {"iteration": iteration, **state}, best)


def names(run: RunDir) -> list[str]:
    return sorted(path.name for path in run.path.iterdir())


def test_a_run_that_exists_is_not_written_over(run: RunDir, config: TrainConfig) -> None:
    with pytest.raises(FileExistsError, match="--resume"):
        RunDir(config, resume=False)
    assert RunDir(config, resume=True).path == run.path


def test_a_run_that_did_not_start_leaves_its_name_free(config: TrainConfig) -> None:
    RunDir(config, resume=False)
    RunDir(config, resume=False)


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="choose another --log_dir"):
        RunDir(TrainConfig(log_dir=str(tmp_path / "file")), resume=False)


def test_the_last_few_and_the_best_stay(run: RunDir, tiny: UNet) -> None:
    for iteration in (9_999_998, 9_999_999, 10_000_000):  # by name the last one sorts first
        save(run, tiny, iteration, best=iteration == 9_999_998)
    assert names(run) == [
        "best.safetensors",
        "checkpoint-10000000.safetensors",
        "checkpoint-9999999.safetensors",
        "config.json",
        "state-10000000.pt",
        "state-9999999.pt",
    ]
    best = checkpoint.load(run.path / "best.safetensors")
    assert best.config.provenance["iterations"] == 9_999_998
    state = run.load_state()
    assert state is not None
    assert state["iteration"] == 10_000_000


def test_without_a_state_there_is_none(run: RunDir) -> None:
    assert run.load_state() is None


@contextmanager
def files_at_most(size: int) -> Iterator[None]:
    """Writes beyond `size` bytes of a file fail, as they do on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("room", [1_000, 1_000_000])  # for no checkpoint; for a checkpoint, but not for its state
def test_a_full_disk_is_told_and_leaves_every_file_whole(room: int, run: RunDir, tiny: UNet) -> None:
    save(run, tiny, 1, best=True)
    before = {name: (run.path / name).read_bytes() for name in names(run)}
    assert 1_000 < len(before["checkpoint-0000001.safetensors"]) < 1_000_000
    with files_at_most(room), pytest.raises(OSError, match="is the disk full"):
        save(run, tiny, 2, large=torch.zeros(1_000_000))
    assert {name: (run.path / name).read_bytes() for name in before} == before
    assert [name for name in names(run) if name.endswith(".part") or name.startswith("state-0000002")] == []
    for path in run.path.glob("*.safetensors"):
        checkpoint.load(path)


def test_the_log_has_one_json_object_a_line(run: RunDir) -> None:
    run.log(iteration=1, train_loss=0.5)
    run.log(iteration=2, train_loss=0.25)
    lines = (run.path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"iteration": 1, "train_loss": 0.5},
        {"iteration": 2, "train_loss": 0.25},
    ]


def test_going_on_drops_what_a_crash_left(run: RunDir, config: TrainConfig) -> None:
    run.log(iteration=1)
    run.log(iteration=2)
    with open(run.path / "log.jsonl", "a") as file:
        file.write('{"iterat')  # cut short
    (run.path / "state.part").touch()
    again = RunDir(config, resume=True)
    again.start(config, 1)
    again.log(iteration=2, again=True)
    lines = [json.loads(line) for line in (run.path / "log.jsonl").read_text().splitlines()]
    assert lines == [{"iteration": 1}, {"iteration": 2, "again": True}]
    assert names(run) == ["config.json", "log.jsonl"]


@pytest.mark.parametrize("channels", [1, 3])
def test_a_grid_is_a_png(channels: int, run: RunDir) -> None:
    picture = np.random.default_rng(0).integers(0, 255, (6, 4, channels), dtype=np.uint8)
    run.save_grid(5, picture)
    read = np.asarray(Image.open(run.path / "samples-0000005.png"))
    assert np.array_equal(read, picture.squeeze())
