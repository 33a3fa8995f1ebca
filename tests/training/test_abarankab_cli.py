"""The command lines that a user of abarankab/DDPM has in their history (reference, §1 and §2), with ours in front."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from model import checkpoint
from tests.fixtures import theirs
from training.run.config import TrainConfig
from training.sample import main as sample_main
from training.train import main as train_main

pytestmark = pytest.mark.usefixtures("quick")

BOTH = (  # of training and of sampling
    "--num_timesteps 100 --schedule linear --schedule_low 1e-4 --schedule_high 0.02 --loss_type l1 --base_channels 12 "
    "--num_res_blocks 1 --time_emb_dim 16 --norm in --dropout 0.1 --activation mish --ema_decay 0.9999 "
    "--ema_update_rate 1 --use_labels True --device cpu"
)
TRAINING = (
    "--iterations 2 --batch_size 4 --learning_rate 2e-4 --log_rate 1 --checkpoint_rate 2 --project_name ddpm "
    "--run_name first --log_to_wandb False"
)
TUPLES = ["--channel_mults", "(1, 2)", "--attention_resolutions", "(1,)"]


@pytest.mark.slow
def test_every_flag_of_abarankabs_training_and_sampling(
    tiny_options: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here = ["--dataset", tiny_options["dataset"], "--log_dir", str(tmp_path / "not" / "yet")]
    assert train_main([*TRAINING.split(), *BOTH.split(), *TUPLES, *here, "--sample_steps", "2"]) == 0
    run = tmp_path / "not" / "yet" / "ddpm" / "first"
    saved = checkpoint.load(run / "best.safetensors").config
    assert (saved.unet.norm, saved.unet.activation, saved.unet.num_classes) == ("in", "mish", 2)
    assert (saved.unet.num_res_blocks, saved.unet.channel_mults, saved.unet.attention_levels) == (1, (1, 2), (1,))
    assert (saved.diffusion.num_timesteps, saved.diffusion.loss_type) == (100, "l1")

    images = ["--model_path", str(run), "--save_dir", str(tmp_path / "new" / "images"), "--num_images", "4"]
    assert sample_main([*images, *BOTH.split(), *TUPLES]) == 0
    assert {path.name for path in (tmp_path / "new" / "images").glob("*.png")} == {
        "0-0.png",
        "0-1.png",
        "1-0.png",
        "1-1.png",
    }
    assert (
        sample_main([*images[:-1], "5", *BOTH.split(), *TUPLES, "--weights", "raw"]) == 2
    )  # other weights, other images
    assert "other settings" in capsys.readouterr().err


def test_a_switch_alone_is_enough(tiny_options: dict[str, Any], tmp_path: Path) -> None:
    words = "--use_labels --iterations 1 --batch_size 4 --base_channels 12 --channel_mults 1,1 --num_res_blocks 1"
    here = [
        "--dataset",
        tiny_options["dataset"],
        "--log_dir",
        str(tmp_path / "runs"),
        "--sample_steps",
        "2",
        "--device",
        "cpu",
    ]
    assert train_main([*words.split(), *here]) == 0
    (run,) = (tmp_path / "runs").iterdir()
    assert run.name.startswith("ddpm-20")
    assert checkpoint.load(run / "best.safetensors").config.unet.num_classes == 2


def test_home_is_expanded(tiny_options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    options = {key: value for key, value in tiny_options.items() if key not in ("log_dir", "dataset")}
    assert TrainConfig(**options).run_dir == tmp_path / "home" / "ddpm_logs" / "run"


@pytest.mark.slow
def test_training_goes_on_from_the_originals_two_files(
    tmp_path: Path, image_folder: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    model = theirs("original/plain-cosine-model.pth")
    state = torch.load(model, weights_only=True)
    both = [state[name].requires_grad_() for p in ("model.", "ema_model.") for name in state if name.startswith(p)]
    adam = torch.optim.Adam(both, lr=2e-4)
    for parameter in both[: len(both) // 2]:
        parameter.grad = torch.full_like(parameter, 1e-3)
    adam.step()
    torch.save(adam.state_dict(), tmp_path / "a-optim.pth")
    pictures = image_folder(size=(16, 16), mode="RGB")
    words = (
        f"--dataset {pictures} --log_dir {tmp_path / 'runs'} --run_name on --base_channels 32 "
        f"--channel_mults 1,1 --num_res_blocks 1 --num_timesteps 40 --schedule cosine --time_emb_dim 32 "
        "--batch_size 2 --iterations 1 --sample_steps 1 --device cpu "
        f"--model_checkpoint {model} --optim_checkpoint {tmp_path / 'a-optim.pth'}"
    ).split()
    assert train_main(words) == 0
    run = tmp_path / "runs" / "on"
    saved = torch.load(run / "state-0000001.pt", weights_only=True)
    assert {float(s["step"]) for s in saved["optimizer"]["state"].values()} == {2.0}
    assert json.loads((run / "config.json").read_text())["model_checkpoint"] == str(model)
    moved = checkpoint.load(run / "best.safetensors").network.init_conv.weight - state["ema_model.init_conv.weight"]
    gap = state["model.init_conv.weight"] - state["ema_model.init_conv.weight"]
    assert moved.abs().max() < 0.01 * gap.abs().max()  # the average is where it was, not a copy of the network

    assert train_main([*words, "--run_name", "other", "--channel_mults", "1,2,2"]) == 2
    assert "channel_mults is 1,2,2 here, 1,1 there" in capsys.readouterr().err


def test_a_wrong_schedule_is_not_silently_linear(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train_main(["--schedule", "cosin"])
    assert "did you mean cosine?" in capsys.readouterr().err


def test_labels_for_a_network_without_them_are_refused(
    tiny_options: dict[str, Any], tmp_path: Path, command_line: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_main([*command_line, "--iterations", "1", "--use_labels", "no"]) == 0
    run = str(TrainConfig(**tiny_options).run_dir)
    assert sample_main(["--model_path", run, "--save_dir", str(tmp_path / "out"), "--use_labels"]) == 2
    assert "--use_labels True, where it has False" in capsys.readouterr().err
    assert sample_main(["--model_path", run, "--save_dir", str(tmp_path / "out"), "--class_label", "1"]) == 2
    assert "unconditional" in capsys.readouterr().err
