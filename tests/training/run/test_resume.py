"""A run that stops, is stopped or is killed goes on as if nothing had happened."""

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from model import checkpoint
from training import data
from training import train as module
from training.loop.optimizer import learning_rate
from training.run.config import TrainConfig
from training.train import main, train

pytestmark = pytest.mark.usefixtures("quick")

Options = dict[str, Any]
ReadLog = Callable[[Path], list[dict[str, Any]]]
SameRun = Callable[[Path, Path, int], None]

EVERY_DRAW = {"dropout": 0.2, "flip": True, "label_dropout": 0.3, "warmup": 3, "grad_clip": 1.0, "ema_decay": (0.9,)}
EVERY_STATE = EVERY_DRAW | {
    "schedule": "cosine",
    "num_timesteps": 6,  # so few that the importance of each is known when the run is resumed
    "sample_steps": 2,
    "timestep_sampler": "loss_second_moment",
    "ema_decay": (0.9, 0.5),
    "ema_power": (0.1, 0.2),
    "ema_update_rate": 2,
    "accumulate": 2,
    "optimizer": "adamw",
    "weight_decay": 0.1,
    "variance": "learned_range",
    "norm": "bn",
    "log_rate": 3,
}
MUON = EVERY_DRAW | {
    "optimizer": "muon",
    "weight_decay": 0.1,
    "timestep_sampler": "lognormal",
    "lr_schedule": "wsd",
    "patch_size": 2,
    "haar": True,
}


def assert_equal(a: Any, b: Any) -> None:
    """Equal to the bit, through dicts and lists."""
    assert type(a) is type(b)
    if isinstance(a, Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, list):
        for x, y in zip(a, b, strict=True):
            assert_equal(x, y)
    else:
        assert a == b


@pytest.fixture
def assert_same_run(read_log: ReadLog) -> SameRun:
    """Weights, EMA, optimiser, best and log are equal, and so are the checkpoints to the byte."""

    def compare(a: Path, b: Path, iteration: int) -> None:
        states = [torch.load(run / f"state-{iteration:07d}.pt", weights_only=True) for run in (a, b)]
        counted = {"tally", "iteration", "images_seen", "best", "data"}
        assert states[0].keys() == {"network", "ema", "optimizer", "importance", *counted}
        assert_equal(*states)
        for name in (f"checkpoint-{iteration:07d}.safetensors", "best.safetensors", f"samples-{iteration:07d}.png"):
            assert (a / name).read_bytes() == (b / name).read_bytes(), name
        assert read_log(a) == read_log(b)

    return compare


@pytest.mark.slow
@pytest.mark.parametrize(("more", "total"), [(EVERY_DRAW, 8), (EVERY_STATE, 24), (MUON, 8)])
def test_a_resumed_run_equals_an_unbroken_one_to_the_bit(
    more: Options, total: int, assert_same_run: SameRun, tiny_options: Options
) -> None:
    options = tiny_options | more | {"iterations": total, "checkpoint_rate": total // 2}
    unbroken = train(TrainConfig(**options))
    half = TrainConfig(**options | {"run_name": "halves"})
    shutil.copytree(unbroken, half.run_dir)  # as a kill after the first checkpoint leaves it
    for path in half.run_dir.glob(f"*-{total:07d}.*"):
        path.unlink()
    (half.run_dir / "best.safetensors").unlink()
    shutil.copyfile(half.run_dir / f"checkpoint-{total // 2:07d}.safetensors", half.run_dir / "best.safetensors")
    resumed = train(half, resume=True)
    command = checkpoint.load(resumed / "best.safetensors").config.provenance["command"]
    assert command == TrainConfig(**options).command()
    assert_same_run(unbroken, resumed, total)
    if more is EVERY_STATE:  # or this would not test the state of the importance sampling
        state = torch.load(unbroken / f"state-{total // 2:07d}.pt", weights_only=True)
        assert (state["importance"]["counts"][:-1] >= 10).all()
        assert len(state["ema"]["averages"]) == 4


@pytest.mark.slow
def test_n_steps_and_then_n_more_are_2n(assert_same_run: SameRun, tiny_options: Options) -> None:
    unbroken = train(TrainConfig(**tiny_options | EVERY_DRAW))
    half = TrainConfig(**tiny_options | EVERY_DRAW | {"run_name": "halves", "iterations": 4})
    train(half)
    assert_same_run(unbroken, train(replace(half, iterations=8), resume=True), 8)


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_as_if_it_had_not_been(assert_same_run: SameRun, tiny_options: Options) -> None:
    config = TrainConfig(**tiny_options | EVERY_DRAW | {"lr_schedule": "cosine", "checkpoint_rate": 3, "log_rate": 3})
    run = train(config)
    killed = run.with_name("killed")
    shutil.copytree(run, killed)
    for path in killed.glob("*0000008*"):
        path.unlink()
    for path in killed.glob("*-0000006*"):
        path.unlink()  # so that the log knows later iterations than the state does
    (killed / "best.safetensors").unlink()
    shutil.copyfile(killed / "checkpoint-0000003.safetensors", killed / "best.safetensors")
    train(replace(config, run_name="killed"), resume=True)
    assert_same_run(run, killed, 8)


@pytest.mark.slow
def test_a_run_killed_before_its_first_checkpoint_starts_over(assert_same_run: SameRun, tiny_options: Options) -> None:
    config = TrainConfig(**tiny_options)
    run = train(config)
    killed = TrainConfig(**tiny_options | {"run_name": "killed"})
    killed.run_dir.mkdir()
    shutil.copyfile(run / "config.json", killed.run_dir / "config.json")
    assert_same_run(run, train(killed, resume=True), 8)


def test_a_finished_run_is_left_as_it_is(tiny_options: Options, capsys: pytest.CaptureFixture[str]) -> None:
    run = train(TrainConfig(**tiny_options))
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    assert main(["--resume", str(run)]) == 0
    assert f"Nothing to do: {run} has done its 8 iterations" in capsys.readouterr().out
    assert main(["--resume", str(run), "--iterations", "5"]) == 2
    said = capsys.readouterr()
    assert "--iterations 5: " in said.err
    assert "has done 8 already" in said.err
    assert "Done" not in said.out
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


def test_ctrl_c_before_the_first_step_is_no_traceback(
    command_line: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(data, "load", interrupt)
    assert main(command_line) == 130
    assert capsys.readouterr().err == "training.train: interrupted\n"


@pytest.fixture
def hangups_count() -> Iterator[None]:
    """Even where pytest was begun with nohup, whose processes ignore them."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("hangups_count")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_signal_stops_after_the_step_and_restores_handlers(
    read_log: ReadLog, number: signal.Signals, tiny_options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rate(config: TrainConfig, iteration: int) -> float:
        if iteration == 4:
            os.kill(os.getpid(), number)
        return learning_rate(config, iteration)

    before = [signal.getsignal(s) for s in (signal.SIGINT, number)]
    monkeypatch.setattr(module, "learning_rate", rate)
    run = train(TrainConfig(**tiny_options))
    assert (run / "checkpoint-0000005.safetensors").exists()
    assert read_log(run)[-1]["iteration"] == 5
    assert [signal.getsignal(s) for s in (signal.SIGINT, number)] == before


def test_usr1_saves_and_goes_on(tiny_options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    def rate(config: TrainConfig, iteration: int) -> float:
        if iteration == 5:
            os.kill(os.getpid(), signal.SIGUSR1)
        return learning_rate(config, iteration)

    monkeypatch.setattr(module, "learning_rate", rate)
    run = train(TrainConfig(**tiny_options | {"keep": 9}))
    saved = sorted(int(path.stem[-7:]) for path in run.glob("checkpoint-*"))
    assert saved == [4, 6, 8]


def test_what_a_standing_bar_waits_for_is_said(command_line: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command_line) == 0
    shown = capsys.readouterr().err
    for what in ("validating", "saving", "drawing samples"):
        assert f"checkpoint: {what}]" in shown
    assert re.search(r"8/8 .*, loss \d", shown.rpartition("drawing samples")[2])


def test_a_step_that_does_not_fit_into_memory_is_told(
    command_line: list[str], tiny_options: Options, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def rate(config: TrainConfig, iteration: int) -> float:
        if iteration == 6:
            torch.empty(2**52, dtype=torch.uint8)
        return learning_rate(config, iteration)

    monkeypatch.setattr(module, "learning_rate", rate)
    assert main([*command_line, "--log_rate", "100"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(
        "training.train: there is not enough memory for a step of 8 images (it asked for 4194304.0 GiB"
    )
    assert "--accumulate 2 does the same in smaller parts" in said
    assert f"--resume {TrainConfig(**tiny_options).run_dir}" in said


def test_a_second_ctrl_c_ends_at_once(
    command_line: list[str], tiny_options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    def twice(*_: object) -> float:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        return 0.0

    monkeypatch.setattr(module, "learning_rate", twice)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for what it starts with &
    try:
        assert main(command_line) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert not list(TrainConfig(**tiny_options).run_dir.glob("checkpoint-*"))


@pytest.mark.slow
def test_ctrl_c_leaves_a_checkpoint_to_go_on_from(
    read_log: ReadLog, command_line: list[str], tiny_options: Options, start: Callable[..., subprocess.Popen[str]]
) -> None:
    run = TrainConfig(**tiny_options).run_dir
    process = start("training.train", *command_line, "--iterations", "1000000", "--checkpoint_rate", "1000000")
    deadline = time.monotonic() + 300
    while not (run / "log.jsonl").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)  # for the bar to be drawn
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert re.search(r"\[\d\d:\d\d<[\d:]+, .*(it/s|s/it), loss \d", err)  # time gone, time left, rate
    (path,) = run.glob("checkpoint-*.safetensors")
    iteration = checkpoint.load(path).config.provenance["iterations"]
    assert f"Stopped at iteration {iteration}; go on with: python -m training.train --resume {run}" in out
    assert main(["--resume", str(run), "--iterations", str(iteration + 3)]) == 0
    assert read_log(run)[-1]["iteration"] == iteration + 3
