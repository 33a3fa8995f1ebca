import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from training.run.config import TrainConfig
from training.train import main, train

pytestmark = pytest.mark.usefixtures("quick")

Options = dict[str, Any]


@pytest.mark.slow
@pytest.mark.filterwarnings("default::DeprecationWarning")
def test_tensorboard_gets_losses_and_hides_what_a_crash_left(tiny_options: Options) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = TrainConfig(**tiny_options | {"tensorboard": True})
    run = train(config)
    (run / "state-0000008.pt").unlink()
    train(config, resume=True)
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train_loss")] == [2, 4, 6, 8]
    assert [event.step for event in events.Scalars("validation_loss")] == [4, 8]
    assert {f"validation_loss/t_quartile_{i}" for i in (1, 2, 3, 4)} <= set(events.Tags()["scalars"])
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    logged = [line["train_loss"] for line in lines if "train_loss" in line]
    assert [event.value for event in events.Scalars("train_loss")] == pytest.approx(logged)
    assert [event.step for event in events.Images("samples")] == [4, 8]
    assert (events.Images("samples")[0].width, events.Images("samples")[0].height) == (96, 16)


@pytest.mark.slow
def test_wandb_offline_leaves_its_data_in_the_run(tiny_options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv(
        "WANDB_X_SERVICE_WAIT", "300"
    )  # for its own process to start; 30 s are too few on a busy machine
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "300")
    config = TrainConfig(**tiny_options | {"log_to_wandb": True, "project_name": "digits"})
    run = train(config)
    identity = (run / "wandb-id").read_text()
    (path,) = run.glob(f"wandb/offline-run-*/run-{identity}.wandb")
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    words = {"digits"}
    for name in ("train_loss", "validation_loss"):
        values = [line[name] for line in lines if name in line]
        assert values
        words |= {name, *(str(value)[:14] for value in values)}

    def missing() -> set[str]:
        data = path.read_bytes()  # records of protobuf, whose strings are plain
        return {word for word in words if word.encode() not in data}

    deadline = time.monotonic() + 300  # W&B's own process writes on after it was told that the run is over
    while missing() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not missing()
    assert len(list(run.glob("wandb/offline-run-*/files/media/images/samples_*.png"))) == 2
    (run / "state-0000008.pt").unlink()
    train(config, resume=True)
    assert len(list(run.glob(f"wandb/offline-run-*/run-{identity}.wandb"))) == 2  # the same run goes on


@pytest.mark.parametrize(("option", "module"), [("tensorboard", "torch.utils.tensorboard"), ("log_to_wandb", "wandb")])
def test_a_missing_package_is_told_and_leaves_no_run(
    option: str,
    module: str,
    command_line: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, module, None)  # as if it were not there
    assert main([*command_line, f"--{option}"]) == 2
    assert (
        f'--{option} needs a package that is not installed: pip install "ddpm-serve[track]"' in capsys.readouterr().err
    )
    assert main(command_line) == 0


def test_they_are_imported_only_when_asked_for(tiny_options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("torch.utils.tensorboard", "tensorboard", "wandb"):
        monkeypatch.setitem(sys.modules, module, None)
    assert Path(train(TrainConfig(**tiny_options))).exists()
