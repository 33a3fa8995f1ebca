"""A run that stops, is stopped or is killed goes on as if nothing had happened."""

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from model import checkpoint
from training import train as module
from training.run.config import TrainConfig
from training.train import learning_rate, main, train

pytestmark = pytest.mark.usefixtures("quick")

Options = dict[str, Any]
ReadLog = Callable[[Path], list[dict[str, Any]]]
SameRun = Callable[[Path, Path, int], None]

EVERY_DRAW = {"dropout": 0.2, "flip": True, "label_dropout": 0.3, "warmup": 3, "grad_clip": 1.0, "ema_decay": 0.9}
EVERY_STATE = EVERY_DRAW | {
    "schedule": "cosine",
    "num_timesteps": 6,  # so few that the importance of each is known when the run is resumed
    "sample_steps": 2,
    "timestep_sampler": "loss_second_moment",
    "ema_decay": (0.9, 0.5),
    "ema_update_rate": 2,
    "accumulate": 2,
    "optimizer": "adamw",
    "weight_decay": 0.1,
    "variance": "learned_range",
    "norm": "bn",
    "log_rate": 3,
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
        assert states[0].keys() == {"network", "ema", "optimizer", "importance", "tally", "iteration", "best"}
        assert_equal(*states)
        for name in (f"checkpoint-{iteration:07d}.safetensors", "best.safetensors", f"samples-{iteration:07d}.png"):
            assert (a / name).read_bytes() == (b / name).read_bytes(), name
        assert read_log(a) == read_log(b)

    return compare


@pytest.mark.parametrize(("more", "total"), [(EVERY_DRAW, 8), (EVERY_STATE, 24)])
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
    if "timestep_sampler" in more:  # or this would not test the state of the importance sampling
        state = torch.load(unbroken / f"state-{total // 2:07d}.pt", weights_only=True)
        assert (state["importance"]["counts"][:-1] >= 10).all()
        assert len(state["ema"]["averages"]) == 2


def test_n_steps_and_then_n_more_are_2n(assert_same_run: SameRun, tiny_options: Options) -> None:
    unbroken = train(TrainConfig(**tiny_options | EVERY_DRAW))
    half = TrainConfig(**tiny_options | EVERY_DRAW | {"run_name": "halves", "iterations": 4})
    train(half)
    assert_same_run(unbroken, train(replace(half, iterations=8), resume=True), 8)


def test_a_state_from_before_there_were_tallies_and_importance_goes_on(tiny_options: Options) -> None:
    config = TrainConfig(**tiny_options | {"iterations": 4})
    path = train(config) / "state-0000004.pt"
    state = torch.load(path, weights_only=True)
    torch.save({key: state[key] for key in ("network", "ema", "optimizer", "iteration", "best")}, path)
    assert (train(replace(config, iterations=6), resume=True) / "state-0000006.pt").exists()


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


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_anew(
    assert_same_run: SameRun, tiny_options: Options
) -> None:
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
    after = {path.name: path.read_bytes() for path in run.iterdir()}
    assert before.keys() == after.keys()
    assert [name for name in before if before[name] != after[name]] in ([], ["config.json"])
    assert "Done" in capsys.readouterr().out


def test_ctrl_c_before_the_first_step_is_no_traceback(
    command_line: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module.data, "load", interrupt)
    assert main(command_line) == 130
    assert capsys.readouterr().err == "training.train: interrupted\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_after_the_step_and_leaves_the_handlers_as_they_were(
    read_log: ReadLog, number: signal.Signals, tiny_options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rate(config: TrainConfig, iteration: int) -> float:
        if iteration == 4:
            os.kill(os.getpid(), number)
        return learning_rate(config, iteration)

    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.setattr(module, "learning_rate", rate)
    run = train(TrainConfig(**tiny_options))
    assert (run / "checkpoint-0000005.safetensors").exists()
    assert read_log(run)[-1]["iteration"] == 5
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before


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
