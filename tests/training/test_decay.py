"""A learning rate that stays and then falls, from any saved state, while the run can go on from before."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from training import decay
from training import train as module
from training.loop.optimizer import learning_rate
from training.run.config import TrainConfig
from training.run.run_dir import read_config
from training.train import train

pytestmark = pytest.mark.usefixtures("quick")
Options = dict[str, Any]


def test_the_rate_stays_and_falls_over_the_last_share() -> None:
    config = TrainConfig(learning_rate=1e-3, warmup=10, iterations=100, lr_schedule="wsd")
    rates = [learning_rate(config, i) for i in range(100)]
    assert rates[0] == pytest.approx(1e-4)
    assert rates[9:81] == [1e-3] * 72
    assert rates[90] == pytest.approx(5e-4)
    assert rates[99] == pytest.approx(5e-5)
    assert learning_rate(replace(config, decay_share=0.5), 75) == pytest.approx(5e-4)


@pytest.mark.slow
def test_a_decay_begins_at_a_state_and_leaves_the_run(
    tiny_options: Options, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"lr_schedule": "wsd", "iterations": 100, "keep": 9, "ema_power": (0.1,), "optimizer": "muon"}
    short = TrainConfig(**tiny_options | options)
    monkeypatch.setattr(module, "StopSignals", stopping_after(8))
    run = train(short)
    state = torch.load(run / "state-0000004.pt", weights_only=True)
    torch.save(state | {"best": 0.0}, run / "state-0000004.pt")  # no loss of the copy's is as low
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    rates: list[float] = []

    def spy(config: TrainConfig, iteration: int) -> float:
        rates.append(learning_rate(config, iteration))
        return rates[-1]

    monkeypatch.undo()
    monkeypatch.setattr(module, "learning_rate", spy)
    assert decay.main([str(run), "end", "--iteration", "4", "--share", "0.5"]) == 0
    folder = run.with_name("end")
    assert f"8 steps in all; go on with: python -m training.train --resume {folder}" in capsys.readouterr().out
    assert module.main(["--resume", str(folder)]) == 0
    assert rates == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])
    assert (folder / "checkpoint-0000008.safetensors").exists()
    assert (folder / "best.safetensors").exists()
    logged = [json.loads(line)["iteration"] for line in (folder / "log.jsonl").read_text().splitlines()]
    assert logged == [2, 4, 4, 6, 8, 8]
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before
    states = [torch.load(where / "state-0000008.pt", weights_only=True) for where in (run, folder)]
    assert not torch.equal(*(state["network"]["out_conv.bias"] for state in states))


def stopping_after(steps: int) -> Callable[..., Any]:
    """Instead of StopSignals: a signal before step number `steps`."""

    class Stop:
        save = False

        def __init__(self, **_: object) -> None:
            self.asked = 0

        @property
        def stop(self) -> bool:
            self.asked += 1
            return self.asked > steps

        def __enter__(self) -> "Stop":
            return self

        def __exit__(self, *_: object) -> None:
            pass

    return Stop


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run that has states of iterations 70 and 90, of 100 steps."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text(TrainConfig(iterations=100, lr_schedule="wsd").to_json())
    for iteration in (70, 90):
        torch.save({"iteration": iteration, "best": 1.0}, folder / f"state-{iteration:07d}.pt")
    return folder


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("end --iteration 80", "no state of iteration 80; it has: 70, 90"),
        ("end", "falling since iteration 80: choose a state before"),
        ("run --iteration 70", "exists already: choose another name"),
        ("a/b --iteration 70", "not a path"),
        ("end --iteration 70 --share 1", "above 0 and below 1"),
        ("end --iteration 70 --share 1e-17", "a step at least"),
    ],
)
def test_a_decay_that_cannot_be_is_refused(
    words: str, message: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert decay.main([str(run), *words.split()]) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in run.parent.iterdir()] == ["run"]


@pytest.mark.parametrize("content", [b"", b"nothing", b"a", "a list"])
def test_a_damaged_state_is_told_with_the_others(
    content: bytes | str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if isinstance(content, bytes):
        (run / "state-0000080.pt").write_bytes(content)
    else:
        torch.save([content], run / "state-0000080.pt")
    (run / "state-backup.pt").touch()
    assert decay.main([str(run), "end"]) == 2  # 90 is too late
    assert decay.main([str(run), "end", "--iteration", "80"]) == 2
    assert "state-0000080.pt cannot be read: choose another --iteration of 70, 80, 90" in capsys.readouterr().err
    assert [path.name for path in run.parent.iterdir()] == ["run"]


def test_an_interrupted_copy_leaves_nothing_and_no_other_folder_goes(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = run.with_name("end.part")
    other.mkdir()
    save = torch.save

    def interrupted(*words: object) -> None:
        save(*words)
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupted)
    assert decay.main([str(run), "end", "--iteration", "70"]) == 130
    assert "training.decay: interrupted" in capsys.readouterr().err
    assert {path.name for path in run.parent.iterdir()} == {"run", "end.part"}
    monkeypatch.undo()
    assert decay.main([str(run), "end", "--iteration", "70"]) == 0
    assert {path.name for path in run.parent.iterdir()} == {"run", "end.part", "end"}
    assert run.with_name("end").stat().st_mode == run.stat().st_mode


@pytest.mark.slow
def test_a_rate_that_rises_again_is_told(
    tiny_options: Options, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"lr_schedule": "wsd", "decay_share": 0.5, "iterations": 8}
    monkeypatch.setattr(module, "StopSignals", stopping_after(6))
    run = train(TrainConfig(**tiny_options | options))
    monkeypatch.setattr(module, "StopSignals", stopping_after(1))
    assert module.main(["--resume", str(run)]) == 0
    assert "learning rate" not in capsys.readouterr().err
    assert module.main(["--resume", str(run), "--iterations", "100"]) == 0
    told = "at step 7 with these options the learning rate is 0.001, where the run's own would be 0.00025"
    assert told in capsys.readouterr().err
    assert module.main(["--resume", str(run), "--lr_schedule", "constant"]) == 0
    config, _ = read_config(run)
    assert (config.lr_schedule, config.decay_share) == ("constant", 0.2)


@pytest.mark.parametrize(("config", "message"), [(None, "no run there"), ("{", "cannot be used")])
def test_a_folder_that_is_no_run_is_refused(config: str | None, message: str, run: Path) -> None:
    (run / "config.json").unlink()
    if config:
        (run / "config.json").write_text(config)
    with pytest.raises(ValueError, match=message):
        decay.branch(run, "end")


def test_a_rate_that_still_rises_has_no_decay(run: Path) -> None:
    (run / "config.json").write_text(TrainConfig(iterations=100, warmup=80).to_json())
    with pytest.raises(ValueError, match="rises until iteration 80: choose a state after"):
        decay.branch(run, "end", 70)
    assert decay.branch(run, "end", 90).iterations == 113


@pytest.mark.parametrize("share", [0.1, 0.3, 0.7, 0.9])
def test_a_copy_can_be_copied_at_the_iteration_where_its_fall_begins(run: Path, share: float) -> None:
    (run / "config.json").write_text(TrainConfig(iterations=1000, lr_schedule="constant").to_json())
    for count in (3, 7, 63):
        torch.save({"iteration": count, "best": 1.0}, run / f"state-{count:07d}.pt")
        decay.branch(run, f"end-{count}", count, share)
        if math.isclose((1 - share) * math.ceil(count / (1 - share)), count):  # not rounded up by much
            decay.branch(run.with_name(f"end-{count}"), f"again-{count}", count, share)


def test_a_rate_that_fell_from_the_start_has_no_decay(run: Path) -> None:
    (run / "config.json").write_text(TrainConfig(iterations=100, lr_schedule="cosine").to_json())
    with pytest.raises(ValueError, match="cosine"):
        decay.branch(run, "end", 70)
