"""What --model_path names: the original's files, runs and their states; and what a checkpoint is compared with."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from model import checkpoint
from model.checkpoint import CheckpointConfig
from model.convert.importer import import_path
from model.convert.layout import Flags
from model.diffusion import GaussianDiffusion
from model.images import to_uint8
from model.nn.unet import UNet
from model.sampling.noise import normals
from model.sampling.schedule import make_schedule
from model.sampling.step import sample
from tests.fixtures import theirs
from training.run import load_weights
from training.run.config import TrainConfig
from training.sample import main
from training.train import train

pytestmark = pytest.mark.usefixtures("quick")
LABELS, PLAIN = (str(theirs(f"original/{name}-model.pth")) for name in ("labels-linear", "plain-cosine"))
CPU = torch.device("cpu")


def images(folder: Path) -> dict[str, np.ndarray]:
    return {path.name: np.asarray(Image.open(path)).astype(int) for path in sorted(folder.glob("*.png"))}


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_the_originals_file_is_sampled_by_either_of_its_weights(weights: str, tmp_path: Path) -> None:
    words = f"--model_path {PLAIN} --num_images 2 --sampler ddpm --steps 4 --weights {weights} --device cpu"
    with pytest.warns(UserWarning, match="fixed_small is used"):
        assert main([*words.split(), "--save_dir", str(tmp_path)]) == 0
    imported = import_path(Path(PLAIN), Flags(weights=weights))
    network = UNet(imported.unet).eval()
    network.load_state_dict(imported.weights)
    schedule = make_schedule(GaussianDiffusion(imported.diffusion), "ddpm", 4, variance="fixed_small")
    expected = to_uint8(sample(network, schedule, (3, 32, 32), seeds=[0], indices=[1])).permute(0, 2, 3, 1).numpy()[0]
    assert np.abs(images(tmp_path)["1.png"] - expected).max() <= 1


@pytest.mark.slow
def test_the_originals_own_sampling_can_be_asked_for(tmp_path: Path) -> None:
    words = f"--model_path {PLAIN} --save_dir {tmp_path} --num_images 1 --sampler ddpm --steps 40 --limit none"
    assert main([*words.split(), "--device", "cpu"]) == 0
    found = import_path(Path(PLAIN), Flags())
    network = UNet(found.unet).eval()
    network.load_state_dict(found.weights)
    process = GaussianDiffusion(found.diffusion)
    x = normals([0], [0], [0], (3, 32, 32))
    for step, t in enumerate(range(39, -1, -1), start=1):  # theirs, of Ho et al., algorithm 2
        beta, alpha_bar = process.betas[t], process.alphas_cumprod[t]
        with torch.no_grad():
            eps = network(x, torch.tensor([t]))
        x = (x - beta / np.sqrt(1 - alpha_bar) * eps) / np.sqrt(1 - beta)
        if t > 0:
            x = x + np.sqrt(beta) * normals([0], [0], [step], (3, 32, 32))
    expected = to_uint8(x.float()).permute(0, 2, 3, 1).numpy()[0]
    assert np.abs(images(tmp_path)["0.png"] - expected).max() <= 1


def test_an_old_sampling_command_of_the_original_works(tmp_path: Path) -> None:
    words = (
        f"--model_path {LABELS} --save_dir {tmp_path}/new/images --num_images 11 --device cpu --num_timesteps 1000 "
        "--schedule linear --loss_type l2 --use_labels True --base_channels 32 --num_res_blocks 1 --time_emb_dim 32 "
        "--norm gn --dropout 0.1 --activation silu --ema_decay 0.9999 --ema_update_rate 1 "
        "--schedule_low 1e-4 --schedule_high 0.02 --steps 2"
    ).split()
    assert main([*words, "--channel_mults", "(1, 1)", "--attention_resolutions", "(1,)"]) == 0
    names = {f"{i % 10}-{i // 10}.png" for i in range(11)}  # balanced, and none is dropped
    assert images(tmp_path / "new" / "images").keys() == names


def test_all_options_that_contradict_the_file_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = f"--model_path {LABELS} --save_dir {tmp_path}/out --num_timesteps 500 --schedule cosine --use_labels no "
    words += "--base_channels 64 --channel_mults 1,2 --num_res_blocks 3 --time_emb_dim 512 --norm bn "
    words += "--attention_resolutions 0 --schedule_low 2e-4 --schedule_high 0.01"
    assert main(words.split()) == 2
    text = capsys.readouterr().err
    for name in words.split()[4::2]:
        assert f"{name} " in text
    assert "--channel_mults 1,2, where it has 1,1" in text
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_what_the_originals_file_does_not_know_is_as_told(tmp_path: Path) -> None:
    x, t = torch.randn(1, 3, 32, 32), torch.tensor([5])
    plain = load_weights.load(PLAIN, "ema", {}, CPU)[0]
    told = {"activation": "mish", "dropout": 0.3, "loss_type": "l1", "ema_decay": (0.5,)}
    other = load_weights.load(PLAIN, "ema", told, CPU)[0]
    assert (other.config.unet.activation, other.config.unet.dropout) == ("mish", 0.3)
    assert other.config.diffusion.loss_type == "l1"
    assert other.config.provenance["as_told"] == {"ema_decay": (0.5,)}
    with torch.no_grad():
        assert not torch.allclose(plain.network(x, t), other.network(x, t), atol=1e-3)


def test_instance_norm_of_an_abarankab_file_needs_an_option() -> None:
    found = load_weights.load(PLAIN, "ema", {"norm": "in"}, CPU)[0]
    assert found.config.unet.norm == "in"
    assert isinstance(found.network.downs[0].norm_1, torch.nn.InstanceNorm2d)
    with pytest.raises(ValueError, match="--norm bn, where it has gn"):
        load_weights.load(PLAIN, "ema", {"norm": "bn"}, CPU)


@pytest.mark.slow
def test_a_run_gives_its_best_raw_and_averaged_weights(tiny_options: dict[str, Any]) -> None:
    folder = train(TrainConfig(**tiny_options | {"ema_decay": (0.3, 0.2, 0.4), "ema_power": (0.1, 0.2)}))
    state = torch.load(folder / "state-0000008.pt", weights_only=True)

    def loaded(name: str, weights: str = "ema", **told: Any) -> dict[str, Tensor]:
        return load_weights.load(str(folder / name), weights, told, CPU)[0].network.state_dict()

    def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
        assert all(torch.equal(a[name], b[name]) for name in a)

    best = checkpoint.load(folder / "best.safetensors").network.state_dict()
    averages = list(state["ema"]["averages"].values())
    assert_same(loaded(""), best)
    assert_same(loaded("", ema_decay=(0.3,)), best)
    assert_same(loaded("", ema_decay=(0.2,)), averages[1])
    assert_same(loaded("", ema_decay=(0.4,)), averages[2])
    for name in ("0.3", "0.2", "power-0.1", "power-0.2"):
        assert_same(loaded("", name), state["ema"]["averages"][name])
    assert not torch.equal(averages[3]["out_conv.weight"], averages[4]["out_conv.weight"])
    with pytest.raises(
        ValueError, match=r"no weights 'power-0\.3'; it has: raw, 0\.3, 0\.2, 0\.4, power-0\.1, power-0\.2"
    ):
        loaded("", "power-0.3")
    assert_same(loaded("", "raw"), state["network"])
    early = torch.load(folder / "state-0000004.pt", weights_only=True)
    assert_same(loaded("checkpoint-0000004.safetensors", "raw"), early["network"])
    assert_same(loaded("checkpoint-0000004.safetensors", ema_decay=(0.4,)), list(early["ema"]["averages"].values())[2])
    assert not torch.equal(averages[1]["out_conv.weight"], averages[2]["out_conv.weight"])

    with pytest.raises(ValueError, match=r"--ema_decay 0.7, where it has 0.3,0.2,0.4"):
        loaded("", ema_decay=(0.7,))
    with pytest.raises(ValueError, match="--ema_update_rate 2, where it has 1"):
        loaded("", ema_update_rate=2)
    with pytest.raises(ValueError, match="the rest is in a run's folder"):
        loaded("best.safetensors", "raw")
    with pytest.raises(ValueError, match="not that of a run"):
        loaded("..")
    torch.save({"network": {}}, folder / "state-0000008.pt")
    with pytest.raises(ValueError, match="not a state of this run"):
        loaded("", "raw")


@pytest.mark.slow
def test_other_weights_come_with_what_is_known_of_them(tiny_options: dict[str, Any]) -> None:
    options = {"ema_decay": (0.3, 0.9), "ema_update_rate": 2, "ema_power": (0.1,)}
    folder = train(TrainConfig(**tiny_options | options))
    shutil.copyfile(folder / "checkpoint-0000004.safetensors", folder / "best.safetensors")
    for name in ("9999999", "10000000"):
        shutil.copyfile(folder / "state-0000004.pt", folder / f"state-{name}.pt")
        shutil.copyfile(folder / "checkpoint-0000004.safetensors", folder / f"checkpoint-{name}.safetensors")
    assert load_weights.load(str(folder), "raw", {}, CPU)[0].name == "state-10000000"
    for name in ("9999999", "10000000"):
        (folder / f"state-{name}.pt").unlink()

    best, _ = load_weights.load(str(folder), "ema", {}, CPU)
    assert best.config.provenance["iterations"] == 4
    state = torch.load(folder / "state-0000008.pt", weights_only=True)["ema"]["averages"]
    for name, number, words in (("0.9", 1, "ema 0.9"), ("power-0.1", 2, "ema power-0.1")):
        found, which = load_weights.load(str(folder), name, {}, CPU)
        assert which == words
        expected = list(state.values())[number]
        assert all(torch.equal(expected[key], tensor) for key, tensor in found.network.state_dict().items())
        provenance = found.config.provenance
        assert provenance["weights"] == words
        assert (provenance["iterations"], provenance["images_seen"]) == (8, 8 * TrainConfig(**tiny_options).batch_size)
        assert provenance["metrics"].keys() == {"train_loss"}
    (folder / "state-backup.pt").touch()
    first, _ = load_weights.load(str(folder), "0.3", {}, CPU)
    of_8 = checkpoint.load(folder / "checkpoint-0000008.safetensors")
    assert first.config.provenance["metrics"] == of_8.config.provenance["metrics"]
    (folder / "checkpoint-0000008.safetensors").unlink()
    alone = load_weights.load(str(folder), "raw", {}, CPU)[0].config.provenance
    assert (alone["iterations"], alone["images_seen"], alone["metrics"]) == (
        8,
        of_8.config.provenance["images_seen"],
        {},
    )
    with pytest.raises(ValueError, match=r"it has: raw, 0\.3, 0\.9, power-0\.1"):
        load_weights.load(str(folder), "0.5", {}, CPU)
    shutil.copyfile(folder / "best.safetensors", folder / "alone.safetensors")
    named, which = load_weights.load(str(folder / "alone.safetensors"), "0.3", {}, CPU)
    assert (which, named.sha256) == ("ema", checkpoint.load(folder / "alone.safetensors").sha256)
    old = torch.load(folder / "state-0000008.pt", weights_only=True)
    del old["images_seen"]
    torch.save(old, folder / "state-0000008.pt")
    uncounted = load_weights.load(str(folder), "raw", {}, CPU)[0].config.provenance
    assert uncounted["images_seen"] == of_8.config.provenance["images_seen"]


def test_every_known_option_is_compared(save_checkpoint: Callable[..., str]) -> None:
    config: CheckpointConfig = checkpoint.load(save_checkpoint()).config
    right = load_weights.known(config)
    load_weights.check(config, right, ())
    load_weights.check(config, {"schedule_low": right["schedule_low"] * (1 + 1e-6)}, ())  # a float32 of the file
    wrong = {"norm": "bn", "activation": "relu", "loss_type": "l1", "schedule": "cosine", "use_labels": False}
    for name, value in right.items():
        other = wrong.get(name) if name in wrong else (9,) if isinstance(value, tuple) else value + 0.5
        with pytest.raises(ValueError, match=f"--{name} .*, where it has"):
            load_weights.check(config, {name: other}, ())
