"""What is saved is what is loaded, and whatever else is loaded is refused with a sentence."""

from __future__ import annotations

import hashlib
import json
import os
import random
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from model import checkpoint
from model.checkpoint import CheckpointConfig, CheckpointError, find, load, save
from model.diffusion import DiffusionConfig
from model.nn.config import UNetConfig
from model.nn.unet import UNet
from model.sampling.schedule import SamplingParams
from tests.model.broken import BROKEN, HUGE, NOT_READABLE, flipped, hostile


@pytest.fixture
def config(tiny_config: UNetConfig) -> CheckpointConfig:
    return CheckpointConfig(
        unet=tiny_config,
        diffusion=DiffusionConfig(num_timesteps=400, schedule="cosine", prediction="v", loss_type="l1"),
        class_names=("T-shirt/top", "Ärmel", "靴"),
        sampling=SamplingParams("dpmpp_2m", 15, 0.0, 2.5, (0.1, 0.9), "logsnr", "dynamic"),
        provenance={"dataset": "none", "metrics": {"loss": 0.03}, "git_revision": None, "list": [1, 2]},
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "some.safetensors"


def test_a_checkpoint_comes_back_exactly_and_needs_no_flags(tiny: UNet, config: CheckpointConfig, path: Path) -> None:
    save(path, tiny.state_dict(), config)
    loaded = load(path)
    assert loaded.config == config
    assert loaded.name == "some"
    assert loaded.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert loaded.network.state_dict().keys() == tiny.state_dict().keys()
    for name, weight in tiny.state_dict().items():
        assert torch.equal(loaded.network.state_dict()[name], weight)
    assert loaded.diffusion.config == config.diffusion
    x, t, y = torch.randn(1, 1, 8, 8), torch.tensor([7]), torch.tensor([1])
    assert torch.equal(loaded.network(x, t, y), tiny(x, t, y))


def test_a_checkpoint_without_spacing_limit_and_interval_loads(
    tiny: UNet, config: CheckpointConfig, path: Path
) -> None:
    data = json.loads(config.to_json())
    for name in ("guidance_interval", "spacing", "limit"):
        del data["sampling"][name]
    save_file(tiny.state_dict(), path, metadata={"ddpm": json.dumps(data)})
    assert load(path).config == replace(config, sampling=SamplingParams("dpmpp_2m", 15, 0.0, 2.5))


def test_a_loaded_network_is_ready_for_sampling(tiny: UNet, config: CheckpointConfig, path: Path) -> None:
    save(path, tiny.train().state_dict(), config)
    network = load(path).network
    assert not network.training
    assert not any(p.requires_grad for p in network.parameters())


def test_a_loaded_network_does_not_change_with_the_file(tiny: UNet, config: CheckpointConfig, path: Path) -> None:
    save(path, tiny.state_dict(), config)
    network = load(path).network
    with path.open("r+b") as file:  # as `cp` does: the same file, other bytes
        file.write(bytes(path.stat().st_size))
    assert all(torch.equal(network.state_dict()[name], weight) for name, weight in tiny.state_dict().items())


def test_a_file_that_is_replaced_while_it_is_read_is_refused(
    tiny: UNet, config: CheckpointConfig, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the hash would be one file's and the weights another's."""
    digest = hashlib.file_digest

    def late(*args: Any) -> Any:
        save(path, tiny.state_dict(), config)
        return digest(*args)

    save(path, tiny.state_dict(), config)
    monkeypatch.setattr(hashlib, "file_digest", late)
    with pytest.raises(CheckpointError, match="the file changed while it was read"):
        load(path)


def test_a_file_cut_while_it_is_read_ends_no_process(
    tiny: UNet, config: CheckpointConfig, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mapped file has no bytes there any more: that is SIGBUS, and no exception."""
    digest = checkpoint._digest

    def late(*args: Any) -> str:
        os.truncate(path, 0)  # as `cp` begins
        return digest(*args)

    save(path, tiny.state_dict(), config)
    monkeypatch.setattr(checkpoint, "_digest", late)
    with pytest.raises(CheckpointError, match="the file changed while it was read"):
        load(path)


def test_an_unconditional_checkpoint_has_no_class_names(tiny_config: UNetConfig, path: Path) -> None:
    config = CheckpointConfig(replace(tiny_config, num_classes=None, null_class=False), DiffusionConfig())
    save(path, UNet(config.unet).state_dict(), config)
    assert load(path).config == config


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_loaded_as_float32(
    tiny: UNet, config: CheckpointConfig, path: Path, dtype: torch.dtype
) -> None:
    save(path, {name: weight.to(dtype) for name, weight in tiny.state_dict().items()}, config)
    for name, weight in load(path).network.state_dict().items():
        assert torch.equal(weight, tiny.state_dict()[name].to(dtype).float())


def test_saving_replaces_the_old_file_and_leaves_nothing_else(tiny: UNet, config: CheckpointConfig, path: Path) -> None:
    path.write_bytes(b"old")
    with path.open("rb") as reader:
        save(path, tiny.state_dict(), config)
        assert reader.read() == b"old"  # whoever reads the old file reads it to its end
    assert load(path).config == config
    assert list(path.parent.iterdir()) == [path]


def test_others_may_read_it_where_the_umask_lets_them(tiny: UNet, config: CheckpointConfig, path: Path) -> None:
    before = os.umask(0o022)
    try:
        for umask, mode in ((0o022, 0o644), (0o077, 0o600)):
            os.umask(umask)
            save(path, tiny.state_dict(), config)
            assert path.stat().st_mode & 0o777 == mode
    finally:
        os.umask(before)


def test_a_failed_save_keeps_the_old_file_and_leaves_no_other(tiny: UNet, config: CheckpointConfig, path: Path) -> None:
    path.write_bytes(b"old")
    shared = dict.fromkeys(("one", "other"), tiny.out_conv.weight)  # safetensors refuses shared memory
    with pytest.raises(RuntimeError):
        save(path, shared, config)
    assert path.read_bytes() == b"old"
    folder = path.with_name("folder")
    folder.mkdir()
    with pytest.raises(OSError, match="folder"):
        save(folder, tiny.state_dict(), config)
    assert sorted(path.parent.iterdir()) == [folder, path]


def test_checkpoints_are_found_by_bundled_name_and_by_path(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundled = tmp_path / "bundled"
    bundled.mkdir()
    (bundled / "digits.safetensors").touch()
    path.touch()
    monkeypatch.setattr(checkpoint, "PRETRAINED", bundled)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert find("digits") == bundled / "digits.safetensors"
    assert find(path) == find(str(path)) == find("~/some.safetensors") == path
    assert find("some.safetensors") == Path("some.safetensors")
    for name in ("letters", "", ".", "..", "../bundled/digits", "digits\0", "~nobody-here/x", "x" * 5000):
        with pytest.raises(CheckpointError, match="no checkpoint"):
            find(name)
    with pytest.raises(CheckpointError, match="digits"):  # it says what there is
        find("letters")


def test_every_bundled_checkpoint_loads() -> None:
    bundled = sorted(checkpoint.PRETRAINED.glob("*.safetensors"))
    if not bundled:
        pytest.skip("no checkpoint is bundled")
    sums = (checkpoint.PRETRAINED / checkpoint.CHECKSUMS_FILE).read_text().splitlines()
    for file in bundled:
        assert f"{load(file.stem).sha256}  {file.name}" in sums
        assert load(file.stem).config.provenance


def assert_refused(path: Path, message: str) -> None:
    started = time.process_time()  # of this process: a busy machine does not matter
    with pytest.raises(CheckpointError, match=message) as caught:
        load(path)
    assert path.name in str(caught.value)
    assert time.process_time() - started < 5


def test_a_pickle_in_disguise_is_refused_and_not_run(path: Path) -> None:
    trace = path.with_name("trace")
    for content in hostile(trace).values():
        path.write_bytes(content)
        assert_refused(path, NOT_READABLE)
    assert not trace.exists()


@pytest.mark.slow
@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_refused(tiny: UNet, config: CheckpointConfig, path: Path, case: str) -> None:
    save(path, tiny.state_dict(), config)
    broken, message = BROKEN[case]
    path.write_bytes(broken(path.read_bytes()))
    assert_refused(path, message)


@pytest.mark.slow
def test_no_flipped_bit_changes_what_is_loaded(tiny: UNet, config: CheckpointConfig, path: Path) -> None:
    """Some do no harm: of the name of the digest's field, for one."""
    save(path, tiny.state_dict(), config)
    good, rng, refused = path.read_bytes(), random.Random(0), 0
    for place in [*rng.sample(range(len(good) - 8), 200), *rng.sample(range(3000), 200)]:  # many in the header
        path.write_bytes(flipped(good, place, rng.randrange(8)))
        try:
            loaded = load(path)
        except CheckpointError:
            refused += 1
        else:
            assert loaded.config == config
            assert all(torch.equal(loaded.network.state_dict()[k], v) for k, v in tiny.state_dict().items())
    assert refused > 380


def test_a_checkpoint_without_a_digest_loads(tiny: UNet, config: CheckpointConfig, path: Path) -> None:
    """As all did that were saved before there was one."""
    save_file(tiny.state_dict(), path, metadata={"ddpm": config.to_json()})
    assert load(path).config == config


def test_trained_betas_come_back_bit_for_bit(tiny: UNet, config: CheckpointConfig, path: Path) -> None:
    assert "trained_betas" not in config.to_json()  # so releases without them read what has none
    betas = tuple(np.random.default_rng(0).uniform(1e-4, 0.1, 50).tolist())
    diffusion = replace(config.diffusion, num_timesteps=50, schedule="trained", trained_betas=betas)
    save(path, tiny.state_dict(), replace(config, diffusion=diffusion))
    loaded = load(path)
    assert loaded.config.diffusion == diffusion
    assert loaded.diffusion.betas.tolist() == list(betas)


def test_a_checkpoint_with_fields_of_a_later_version_loads(tiny: UNet, config: CheckpointConfig, path: Path) -> None:
    """The digest is of what the file says, and not of what this version understands of it."""
    data = json.loads(config.to_json()) | {"later": [1, {"b": 0.1, "a": "é"}]}
    save_file(tiny.state_dict(), path, metadata={"ddpm": json.dumps(data)})
    data["sha256"] = checkpoint._digest(data, tiny.state_dict())
    save_file(tiny.state_dict(), path, metadata={"ddpm": json.dumps(data)})
    assert load(path).config == config
    data["later"] = None
    save_file(tiny.state_dict(), path, metadata={"ddpm": json.dumps(data)})
    assert_refused(path, "the file is damaged")


def test_the_same_contents_are_saved_as_the_same_bytes(tiny: UNet, config: CheckpointConfig, path: Path) -> None:
    save(path, tiny.state_dict(), config)
    once = path.read_bytes()
    for _ in range(5):
        save(path, dict(reversed(tiny.state_dict().items())), config)
        assert path.read_bytes() == once


def test_a_bundled_checkpoint_is_the_one_that_shipped(
    tiny: UNet, config: CheckpointConfig, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if it is one without a digest."""
    monkeypatch.setattr(checkpoint, "PRETRAINED", path.parent)
    save_file(tiny.state_dict(), path, metadata={"ddpm": config.to_json()})
    path.with_name(checkpoint.CHECKSUMS_FILE).write_text(f"{load('some').sha256}  some.safetensors\n")
    assert load("some").config == config
    path.write_bytes(flipped(path.read_bytes(), path.stat().st_size - 2, 0))
    assert_refused(path, "the file is damaged: its SHA-256 is not the one in SHA256SUMS")
    path.with_name(checkpoint.CHECKSUMS_FILE).unlink()
    assert load("some").config == config


@pytest.mark.parametrize("metadata", [None, {}, {"format": "pt"}])
def test_somebody_elses_safetensors_are_refused(path: Path, metadata: dict[str, str] | None) -> None:
    save_file({"weight": torch.zeros(3)}, path, metadata=metadata)
    assert_refused(path, "not a ddpm-serve checkpoint")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("out_conv.bias"), "1 tensors are missing, 'out_conv.bias'"),
        (lambda w: w.update(extra=torch.zeros(1)), "1 tensors are not part of the network, 'extra'"),
        (lambda w: w.update({"out_conv.bias": torch.zeros(2)}), r"'out_conv.bias' has shape \[2\].* \[1\]"),
        (lambda w: w.update({"out_conv.bias": torch.zeros(1, 1)}), r"'out_conv.bias' has shape \[1, 1\]"),
        (lambda w: w.update({"out_conv.bias": torch.tensor([torch.nan])}), "'out_conv.bias' .* not finite"),
        (lambda w: w.update({"out_conv.bias": torch.tensor([torch.inf])}), "'out_conv.bias' .* not finite"),
        (lambda w: w.update({"out_conv.bias": torch.tensor([1e300], dtype=torch.float64)}), "not finite"),
        (lambda w: w.update({"out_conv.bias": torch.tensor([1])}), "torch.int64, not floating point"),
    ],
    ids=["missing", "surplus", "length", "rank", "nan", "infinite", "infinite in float32", "whole numbers"],
)
def test_weights_that_are_not_the_networks_are_refused(
    tiny: UNet, config: CheckpointConfig, path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    weights = dict(tiny.state_dict())
    change(weights)
    save(path, weights, config)
    assert_refused(path, message)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "values", "message"),
    [
        ("unet", HUGE, "tensors are missing"),
        ("unet", {"base_channels": 10**9}, "base_channels"),
        ("unet", {"base_channels": 16}, "has shape"),
        ("unet", {"base_channels": "12"}, "base_channels"),
        ("unet", {"image_size": []}, "image_size"),
        ("unet", {"image_size": [8.0, 8.0]}, "image_size"),
        ("unet", {"num_classes": 5}, "3 class names for 5 classes"),
        ("unet", {"num_classes": None, "null_class": False}, "3 class names for 0 classes"),
        ("unet", {"null_class": False}, "null class"),
        ("unet", {"surprise": 1}, "surprise"),
        ("unet", {"dropout": None}, "NoneType"),
        ("diffusion", {"num_timesteps": 10**15}, "num_timesteps"),
        ("diffusion", {"num_timesteps": 400.0}, "num_timesteps"),
        ("diffusion", {"schedule": "quadratic"}, "schedule must be"),
        ("diffusion", {"schedule": ["linear"]}, "schedule must be one of"),
        ("diffusion", {"schedule": "linear", "schedule_low": "0"}, "cannot be used"),
        ("sampling", {"sampler": "euler"}, "sampler must be"),
        ("sampling", {"steps": 0}, "steps must be"),
        ("sampling", {"steps": 401}, "steps must be"),
        ("sampling", {"steps": 10.5}, "steps must be a whole number"),
        ("sampling", {"eta": 2}, "eta must be"),
        ("sampling", {"guidance_scale": float("nan")}, "guidance_scale must be"),
        ("sampling", {"guidance_interval": [0.5]}, "must be two numbers"),
        ("sampling", {"guidance_interval": [0.5, 0.1]}, "guidance_interval must be"),
        ("sampling", {"spacing": "even"}, "spacing must be"),
        ("sampling", {"limit": "soft"}, "limit must be"),
    ],
    ids=str,
)
def test_a_dishonest_configuration_is_refused(
    tiny: UNet, config: CheckpointConfig, path: Path, part: str, values: dict[str, Any], message: str
) -> None:
    data = json.loads(config.to_json())
    data[part].update(values)
    save_file(tiny.state_dict(), path, metadata={"ddpm": json.dumps(data)})
    assert_refused(path, message)


@pytest.mark.parametrize(
    "metadata",
    ["", "{", "[]", "null", "1" * 5000, "[" * 100_000, '{"format": "ddpm-serve/1"}'],
    ids=["empty", "half", "list", "null", "long", "deep", "bare"],
)
def test_metadata_that_is_no_configuration_is_refused(tiny: UNet, path: Path, metadata: str) -> None:
    save_file(tiny.state_dict(), path, metadata={"ddpm": metadata})
    assert_refused(path, "configuration that cannot be used")


def test_names_that_are_no_text_are_refused(tiny: UNet, config: CheckpointConfig, path: Path) -> None:
    metadata = config.to_json().replace("T-shirt/top", "\\ud800")
    save_file(tiny.state_dict(), path, metadata={"ddpm": metadata})
    assert_refused(path, "half of a surrogate pair")


def test_a_newer_format_is_refused(tiny: UNet, config: CheckpointConfig, path: Path) -> None:
    newer = config.to_json().replace("ddpm-serve/1", "ddpm-serve/2")
    save_file(tiny.state_dict(), path, metadata={"ddpm": newer})
    assert_refused(path, "ddpm-serve/2")


def test_a_configuration_is_checked_when_it_is_made(config: CheckpointConfig, tiny_config: UNetConfig) -> None:
    with pytest.raises(ValueError, match="2 class names for 3 classes"):
        replace(config, class_names=("one", "two"))
    with pytest.raises(ValueError, match="steps must be between 1 and 400"):
        replace(config, sampling=SamplingParams(steps=500))
    with pytest.raises(ValueError, match="null class"):
        replace(config, unet=replace(tiny_config, null_class=False))
