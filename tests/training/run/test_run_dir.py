import errno
import json
import os
import re
import resource
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from model import checkpoint
from model.checkpoint import CheckpointConfig
from model.diffusion import DiffusionConfig
from model.nn.unet import UNet
from tests.forked import Forked
from training.run.config import TrainConfig
from training.run.run_dir import RunDir, saved_states


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    return TrainConfig(log_dir=str(tmp_path), run_name="run", keep=2)


@pytest.fixture
def run(config: TrainConfig) -> Iterator[RunDir]:
    with RunDir(config, resume=False) as run:
        run.start(config, 0)
        yield run


def save(run: RunDir, tiny: UNet, iteration: int, best: bool = False, **state: torch.Tensor) -> None:
    settings = CheckpointConfig(tiny.config, DiffusionConfig(), ("a", "b", "c"), provenance={"iterations": iteration})
    run.save(iteration, tiny.state_dict(), settings, {"iteration": iteration, **state}, best)


def names(run: RunDir) -> list[str]:
    return sorted(path.name for path in run.path.iterdir() if path.name != ".lock")


def test_copies_under_names_of_your_own_stay_and_are_not_taken_for_the_runs(run: RunDir, tiny: UNet) -> None:
    for iteration in (1, 2):
        save(run, tiny, iteration)
    yours = {"state-0000002 (copy).pt", "state-best.pt", "checkpoint-0000002-mine.safetensors", "samples-good.png"}
    for name in yours:
        (run.path / name).write_bytes(b"mine")
    run.log(iteration=1, train_loss=0.5)
    for iteration in (3, 4, 5):
        save(run, tiny, iteration)
        run.save_pictures(iteration, np.zeros((8, 8, 3), np.uint8), np.zeros((3, 2, 1, 3, 8, 8), np.uint8))
    kept = {name for name in names(run) if name.startswith(("state-", "checkpoint-", "samples-"))}
    own = {f"{kind}-000000{i}.{end}" for kind, end in (("state", "pt"), ("checkpoint", "safetensors")) for i in (4, 5)}
    assert kept == yours | own | {f"samples-000000{i}.png" for i in (3, 4, 5)}
    assert run.load_state() is not None
    assert list(saved_states(run.path)) == [4, 5]


def test_a_run_that_exists_is_not_written_over(config: TrainConfig) -> None:
    with RunDir(config, resume=False) as run:
        run.start(config, 0)
    for _ in range(2):
        with pytest.raises(FileExistsError, match="--resume"):
            RunDir(config, resume=False)
    with RunDir(config, resume=True) as again:
        assert again.path == run.path


def test_a_run_that_did_not_start_leaves_its_name_free(config: TrainConfig) -> None:
    for _ in range(2):
        with RunDir(config, resume=False):
            pass


@pytest.mark.parametrize("resume", [False, True])
def test_two_processes_cannot_train_in_one_folder(
    resume: bool, run: RunDir, config: TrainConfig, start: Callable[..., Forked]
) -> None:
    words = ("tests.training.take_run", config.log_dir, str(resume))
    assert "is in use: another process is training in it" in start(*words).communicate(300)[1]
    run.__exit__()
    free = start(*words)
    _, err = free.communicate(300)
    assert (free.returncode == 0) == resume, err
    run._lock = os.open(os.devnull, os.O_RDONLY)  # for the fixture to close


def test_without_file_locks_a_run_goes_on_with_one_warning(
    config: TrainConfig, tiny: UNet, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As on Lustre without -o flock, and some FUSE: neither locks nor fsync of folders."""
    import fcntl

    def unknown(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", unknown)
    monkeypatch.setattr(os, "fsync", unknown)
    with RunDir(config, resume=False) as run:
        run.start(config, 0)
        save(run, tiny, 1, best=True)
    sentence = "its file system locks no files (Function not implemented): see to it that no other process trains in it"
    assert capsys.readouterr().err == f"{run.path}: {sentence}\n"


def test_a_folder_that_cannot_be_flushed_is_told_once(
    run: RunDir, tiny: UNet, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fsync = os.fsync

    def only_files(file: int) -> None:  # as CIFS
        if stat.S_ISDIR(os.fstat(file).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fsync(file)

    monkeypatch.setattr(os, "fsync", only_files)
    for iteration in (1, 2):
        save(run, tiny, iteration, best=True)
    assert names(run) == [
        "best.safetensors",
        "checkpoint-0000001.safetensors",
        "checkpoint-0000002.safetensors",
        "config.json",
        "state-0000001.pt",
        "state-0000002.pt",
    ]
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "does not tell when a file is on the disk (Invalid argument): a power failure may lose files" in said


def test_a_disk_that_fails_is_not_passed_over(run: RunDir, tiny: UNet, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(OSError, match="Input/output error"):
        save(run, tiny, 1)
    assert "state-0000001.pt" not in names(run)


def test_without_the_module_for_locks_a_run_goes_on(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("training.run.run_dir.fcntl", None)  # Windows
    with RunDir(config, resume=False):
        pass
    assert "locks no files (this system has none)" in capsys.readouterr().err


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
    (run.path / "state-0000002.pt.0a1b2c3d.part").touch()
    run.start(config, 1)
    run.log(iteration=2, again=True)
    lines = [json.loads(line) for line in (run.path / "log.jsonl").read_text().splitlines()]
    assert lines == [{"iteration": 1}, {"iteration": 2, "again": True}]
    assert names(run) == ["config.json", "log.jsonl"]


def test_a_state_that_cannot_be_read_gives_way_to_the_one_before(
    run: RunDir, tiny: UNet, capsys: pytest.CaptureFixture[str]
) -> None:
    for iteration in (1, 2):
        save(run, tiny, iteration)
    newest = run.path / "state-0000002.pt"
    newest.write_bytes(newest.read_bytes()[:-100])
    state = run.load_state()
    assert state is not None
    assert state["iteration"] == 1
    assert "state-0000002.pt cannot be read" in capsys.readouterr().err
    (run.path / "state-0000001.pt").write_bytes(b"")
    with pytest.raises(OSError, match="none of the states"):
        run.load_state()


def test_what_is_written_is_on_the_disk_before_it_has_its_name(
    run: RunDir, tiny: UNet, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[tuple[str, str]] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(
        os, "fsync", lambda file: (events.append(("fsync", os.readlink(f"/proc/self/fd/{file}"))), fsync(file))
    )
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append(("replace", str(b))), replace(a, b)))
    save(run, tiny, 1, best=True)
    folder = str(run.path)
    expected = []
    for name in ("checkpoint-0000001.safetensors", "best.safetensors", "state-0000001.pt"):
        expected += [("fsync", f"{folder}/{name}"), ("replace", f"{folder}/{name}"), ("fsync", folder)]
    assert [(what, re.sub(r"\.\w+\.part$", "", path)) for what, path in events] == expected


@pytest.mark.slow
def test_the_last_pictures_stay(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.run.run_dir.GRIDS", 3)
    run.log(iteration=1, train_loss=0.5)
    rng = np.random.default_rng(0)
    for iteration in range(1, 6):
        grid = rng.integers(0, 255, (6, 4, 3), dtype=np.uint8)
        run.save_pictures(iteration, grid, rng.integers(0, 255, (3, 2, 1, 3, 8, 8), dtype=np.uint8))
    expected = [f"samples-{i:07d}.png" for i in (3, 4, 5)]
    expected += [f"sequence-{i:07d}.{kind}" for i in (4, 5) for kind in ("gif", "png")]
    assert sorted(set(names(run)) - {"config.json", "log.jsonl", "loss.png"}) == sorted(expected)
    assert np.array_equal(np.asarray(Image.open(run.path / "samples-0000005.png")), grid)
