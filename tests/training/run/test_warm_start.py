"""A run that begins with another's weights begins exactly there; what does not fit is told by name."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from model import checkpoint
from model.convert.abarankab import import_abarankab
from model.convert.importer import import_path
from model.convert.importer import main as import_main
from model.convert.layout import Flags
from model.nn.ema import EMA
from model.nn.unet import UNet
from tests.fixtures import theirs
from training.loop.optimizer import make_optimizer
from training.run.config import TrainConfig
from training.run.warm_start import warm_start
from training.train import main, train

pytestmark = pytest.mark.usefixtures("quick")
PLAIN: dict[str, Any] = {  # of plain-cosine-model.pth
    "model_checkpoint": str(theirs("original/plain-cosine-model.pth")),
    "base_channels": 32,
    "channel_mults": (1, 1),
    "num_res_blocks": 1,
    "time_emb_dim": 32,
    "num_timesteps": 40,
    "schedule": "cosine",
    "optimizer": "adamw",
    "ema_decay": (0.999, 0.9),
}
Parts = tuple[UNet, EMA, torch.optim.Optimizer]


def parts(config: TrainConfig) -> Parts:
    torch.manual_seed(0)
    network = UNet(config.unet((3, 32, 32), 10))
    return network, EMA(network, *config.ema_decay), torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.0)


def original_state() -> dict[str, Tensor]:
    state: dict[str, Tensor] = torch.load(PLAIN["model_checkpoint"], weights_only=True)
    return state


def adam_of_the_original(state: dict[str, Tensor]) -> tuple[torch.optim.Adam, list[Tensor]]:
    """Their optimizer: over the network's parameters and then, as a mistake, the average's."""
    trained = [state[name].requires_grad_() for name in state if name.startswith("model.")]
    average = [state[name].requires_grad_() for name in state if name.startswith("ema_model.")]
    return torch.optim.Adam([*trained, *average], lr=1e-3), trained


def step(optimizer: torch.optim.Optimizer, parameters: list[Tensor], gradients: list[Tensor]) -> None:
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    optimizer.step()


def imported(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return import_abarankab({k: v.detach().clone() for k, v in state.items()}, Flags(weights="raw")).weights


def test_the_originals_weights_and_their_average_are_both_taken() -> None:
    config = TrainConfig(**PLAIN)
    network, ema, optimizer = parts(config)
    warm_start(config, network, ema, optimizer)
    for flags, found in ((Flags(weights="raw"), network.state_dict()), *((Flags(), a) for a in ema.averages.values())):
        expected = import_path(Path(config.model_checkpoint), flags).weights
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_instance_norm_is_taken_at_the_options_word() -> None:
    config = TrainConfig(**PLAIN | {"norm": "in"})
    network, ema, optimizer = parts(config)
    warm_start(config, network, ema, optimizer)
    expected = original_state()["model.downs.0.norm_1.weight"]
    assert torch.equal(network.state_dict()["downs.0.norm_1.weight"], expected)


def test_the_average_is_not_destroyed_by_the_first_steps() -> None:
    config = TrainConfig(**PLAIN)
    network, ema, optimizer = parts(config)
    warm_start(config, network, ema, optimizer)
    before = {name: tensor.clone() for name, tensor in ema.weights.items()}
    ema.update()
    for name, tensor in network.state_dict().items():
        torch.testing.assert_close(ema.weights[name], before[name].lerp(tensor, 1 - 0.999))


@pytest.mark.slow
def test_the_originals_optimizer_goes_on_where_it_was(tmp_path: Path) -> None:
    state = original_state()
    adam, trained = adam_of_the_original(state)
    names = [name for name in state if name.startswith("model.")]
    torch.manual_seed(1)
    gradients = [[torch.randn_like(p) for p in trained] for _ in range(2)]
    step(adam, trained, gradients[0])
    torch.save({name: tensor.detach() for name, tensor in state.items()}, tmp_path / "a-model.pth")
    torch.save(adam.state_dict(), tmp_path / "a-optim.pth")
    assert len(adam.state_dict()["param_groups"][0]["params"]) == 2 * len(adam.state_dict()["state"]) == 2 * len(names)

    paths = {"model_checkpoint": str(tmp_path / "a-model.pth"), "optim_checkpoint": str(tmp_path / "a-optim.pth")}
    config = TrainConfig(**PLAIN | paths)
    network, ema, optimizer = parts(config)
    warm_start(config, network, ema, optimizer)
    assert optimizer.param_groups[0]["decoupled_weight_decay"]  # the settings are the run's own
    step(adam, trained, gradients[1])
    under_our_names = imported(state | dict(zip(names, gradients[1], strict=True)))
    ours = dict(network.named_parameters())
    step(optimizer, list(ours.values()), [under_our_names[name] for name in ours])
    for name, expected in imported(state).items():
        torch.testing.assert_close(ours[name].detach(), expected, rtol=1e-6, atol=1e-7)
    assert all(float(s["step"]) == 2 for s in optimizer.state_dict()["state"].values())


@pytest.mark.slow
def test_ours_go_on_with_their_optimizer(tiny_options: dict[str, Any]) -> None:
    first = train(TrainConfig(**tiny_options))
    paths = {
        "model_checkpoint": str(first / "best.safetensors"),
        "optim_checkpoint": str(first / "state-0000008.pt"),
        "ema_decay": (0.9, 0.99),
        "dropout": 0.3,
    }
    config = TrainConfig(**tiny_options | paths | {"run_name": "second"})
    network = UNet(config.unet((1, 8, 12), 2))
    ema, optimizer = EMA(network, *config.ema_decay), torch.optim.Adam(network.parameters(), lr=7.0)
    warm_start(config, network, ema, optimizer)
    expected = checkpoint.load(first / "best.safetensors").network.state_dict()
    assert all(torch.equal(expected[name], tensor) for name, tensor in network.state_dict().items())
    assert all(torch.equal(expected[name], tensor) for a in ema.averages.values() for name, tensor in a.items())
    saved = torch.load(first / "state-0000008.pt", weights_only=True)["optimizer"]["state"]
    found = optimizer.state_dict()
    assert all(torch.equal(saved[i][key], found["state"][i][key]) for i in saved for key in ("exp_avg", "exp_avg_sq"))
    assert found["param_groups"][0]["lr"] == 7.0


@pytest.mark.slow
@pytest.mark.parametrize("theirs_decay", [0.0, 0.1])
@pytest.mark.parametrize("ours_decay", [0.0, 0.1])
def test_moments_reach_their_parameters_whatever_decays(
    theirs_decay: float, ours_decay: float, tiny_options: dict[str, Any]
) -> None:
    adamw = tiny_options | {"optimizer": "adamw", "iterations": 2}
    first = train(TrainConfig(**adamw | {"weight_decay": theirs_decay}))
    paths = {"model_checkpoint": str(first / "best.safetensors"), "optim_checkpoint": str(first / "state-0000002.pt")}
    config = TrainConfig(**adamw | paths | {"weight_decay": ours_decay, "run_name": "second"})
    networks = [UNet(config.unet((1, 8, 12), 2)) for _ in range(2)]
    theirs = make_optimizer(networks[0], replace(config, weight_decay=theirs_decay))
    theirs.load_state_dict(torch.load(first / "state-0000002.pt", weights_only=True)["optimizer"])
    ours = make_optimizer(networks[1], config)
    assert isinstance(theirs, torch.optim.AdamW)
    assert isinstance(ours, torch.optim.AdamW)
    warm_start(config, networks[1], EMA(networks[1], *config.ema_decay), ours)
    for their_p, our_p in zip(networks[0].parameters(), networks[1].parameters(), strict=True):
        for key in ("exp_avg", "exp_avg_sq", "step"):
            assert torch.equal(theirs.state[their_p][key], ours.state[our_p][key])
    assert {group["weight_decay"] for group in ours.param_groups} == {0.0, ours_decay}


@pytest.mark.slow
def test_a_state_of_muon_is_refused(tiny_options: dict[str, Any]) -> None:
    first = train(TrainConfig(**tiny_options | {"optimizer": "muon", "iterations": 1}))
    paths = {"model_checkpoint": str(first / "best.safetensors"), "optim_checkpoint": str(first / "state-0000001.pt")}
    config = TrainConfig(**tiny_options | paths | {"run_name": "second"})
    network = UNet(config.unet((1, 8, 12), 2))
    with pytest.raises(ValueError, match="it is of Muon, whose state goes on by --resume only"):
        warm_start(config, network, EMA(network, *config.ema_decay), make_optimizer(network, config))


def test_classes_that_get_another_name_are_told(
    tiny_options: dict[str, Any], image_folder: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    first = train(TrainConfig(**tiny_options | {"iterations": 2}))
    more = {"iterations": 1, "model_checkpoint": str(first / "best.safetensors")}
    train(TrainConfig(**tiny_options | more | {"run_name": "same"}))
    assert "classes" not in capsys.readouterr().err
    train(TrainConfig(**tiny_options | more | {"run_name": "new", "dataset": str(image_folder("x", ("ant", "cat")))}))
    assert "the classes cat, dog become ant, cat, in this order" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_that_begins_so_has_their_loss_at_once(
    tiny_options: dict[str, Any], read_log: Callable[[Path], list[dict[str, Any]]], command_line: list[str]
) -> None:
    first = train(TrainConfig(**tiny_options | {"iterations": 60, "learning_rate": 5e-3, "ema_decay": (0.9,)}))
    words = ["--run_name", "second", "--iterations", "1", "--model_checkpoint", str(first / "best.safetensors")]
    assert main([*command_line, *words]) == 0
    second = read_log(first.with_name("second"))[-1]["validation_loss"]
    best = checkpoint.load(first / "best.safetensors").config.provenance["metrics"]["validation_loss"]
    assert second == pytest.approx(best, rel=0.05)
    assert second < 0.7 * next(line["validation_loss"] for line in read_log(first) if "validation_loss" in line)


def refused(options: dict[str, Any]) -> str:
    config = TrainConfig(**options)
    with pytest.raises(ValueError, match=r"\w") as error:
        warm_start(config, *parts(config))
    return str(error.value)


@pytest.mark.slow
def test_another_network_is_told_by_the_names_of_its_fields() -> None:
    other = {"base_channels": 48, "channel_mults": (1, 3), "attention_resolutions": (), "norm": "bn"}
    text = refused(PLAIN | other)
    for part in ("base_channels is 48 here, 32 there", "channel_mults is 1,3 here, 1,1 there", "norm is bn here, gn"):
        assert part in text
    assert "attention_resolutions is () here, 1 there" in text
    text = refused(PLAIN | {"use_labels": True, "label_dropout": 0.1, "schedule": "linear", "prediction": "v"})
    for part in ("num_classes is 10 here, None there", "label_dropout is True here", "prediction is v here, eps there"):
        assert part in text
    assert "schedule is linear here, cosine there" in text
    assert "base_channels" not in text
    assert "variance is True here, False there" in refused(PLAIN | {"variance": "learned_range"})


@pytest.mark.slow
def test_files_that_are_something_else_are_told(tmp_path: Path) -> None:
    assert "neither a file nor bundled" in refused(PLAIN | {"model_checkpoint": "no-such"})
    w86 = str(theirs("w86763777/small.pt"))
    assert "not the original's; python -m model.importers" in refused(PLAIN | {"model_checkpoint": w86})
    (tmp_path / "x-model.pth").write_bytes(b"nothing")
    assert "x-model.pth is damaged" in refused(PLAIN | {"model_checkpoint": str(tmp_path / "x-model.pth")})
    model = PLAIN["model_checkpoint"]
    assert "neither a state of ours" in refused(PLAIN | {"optim_checkpoint": model})
    assert "no.pth is not there" in refused(PLAIN | {"optim_checkpoint": str(tmp_path / "no.pth")})
    adam = torch.optim.Adam([torch.zeros(3, requires_grad=True)])
    torch.save(adam.state_dict(), tmp_path / "optim.pth")
    assert "it is of 1 parameters" in refused(PLAIN | {"optim_checkpoint": str(tmp_path / "optim.pth")})
    torch.save({"network": {}, "optimizer": {"state": {}}}, tmp_path / "state-0000001.pt")
    text = refused(PLAIN | {"optim_checkpoint": str(tmp_path / "state-0000001.pt")})
    assert "of 0 parameters, where the network has" in text


def test_a_network_that_is_not_trained_here_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "lucid.safetensors"
    assert import_main([str(theirs("lucidrains/small.pt")), str(path), "--image_size", "8,12"]) == 0
    config = TrainConfig(**PLAIN | {"model_checkpoint": str(path)})
    with pytest.raises(ValueError, match="is a lucidrains network, which is sampled here and not trained"):
        warm_start(config, *parts(config))
