"""Nothing that a file can do ends in a traceback, in gigabytes or in code being run; what it is, is said."""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from model.checkpoint import CheckpointError, load
from model.convert.importer import import_path, load_weights, main
from model.convert.layout import Flags, UnsupportedCheckpointError
from tests.fixtures import theirs

ORIGINAL, GUIDED = "original/plain-cosine-model.pth", "guided-diffusion/imagenet-like.pt"
GUIDED_FLAGS = Flags(
    head_channels=16, new_attention_order=True, num_timesteps=1000, schedule="linear", prediction="eps"
)
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:07\nsize 1400000\n"


def saved(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def refusal(path: Path, flags: Flags = Flags()) -> str:  # noqa: B008
    with pytest.raises(UnsupportedCheckpointError) as error:
        import_path(path, flags)
    return str(error.value)


class Evil:
    """A pickle that would leave a trace if anyone opened it."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self.trace,)


class Large:
    """What a pickle asks for that is small and makes something large."""

    def __reduce__(self) -> tuple[type, tuple[int]]:
        return bytearray, (2**34,)


# What it is


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ({"step": 1, "model": {"model.mid_attn.mem_kv": 0}, "opt": {}, "ema": {}, "version": "1"}, "a lucidrains"),
        ({"null_classes_emb": torch.zeros(1)}, "a lucidrains"),
        ({"model": {"model.final_res_block.mlp.1.weight": torch.zeros(1)}}, "a lucidrains"),
        ({"model": {"x": 0}, "opt": {}, "ema": {}}, "not a checkpoint of a project known here"),
        ({"state": {}, "param_groups": []}, "optimiser's state"),
        ([{"module.temb.dense.0.weight": torch.zeros(1)}, {}, 1, 2], "ermongroup/ddim"),
        ({"temb.dense.0.weight": torch.zeros(1)}, "pesser/pytorch_diffusion"),
        ([{}, {}, 1], "a list, and not of a project known"),
        ([1, 2, 3], "not a table of tensors"),
        (torch.zeros(3), "not a table of tensors"),
        ({"model": {"middle.1.project_in.weight": 0}, "optimizer": {}, "ema": {}}, "tqch"),
        ({"ema": {"shadow": {"middle.1.project_in.weight": 0}}}, "tqch"),
        ({"model": {"module.all_modules.0.weight": 0}, "optimizer": {}, "ema": {}, "step": 1}, "score_sde_pytorch"),
        ({"model": {}, "optimizer": {}, "ema": {}}, "not a checkpoint of a project known here"),
        ({"x_embedder.proj.weight": torch.zeros(1)}, "DiT"),
        ({"model": {"x_embedder.proj.weight": 0}, "ema": {}, "opt": {}}, "DiT"),
        ({"state_dict": {"model.diffusion_model.input_blocks.0.0.weight": 0}}, "latent diffusion"),
        ({"network": {}, "ema": {}, "optimizer": {}}, "state of a training here"),
        ({"time_mlp.0.weight": torch.zeros(1)}, "of this project already"),
        ({"weight": torch.zeros(1)}, "not a checkpoint of a project known here"),
        ({"net_model": {}, "ema_model": {}}, "not a checkpoint of a project known here"),
        ({"conv_in.weight": 0, "time_embedding.linear_1.weight": 0}, "give the folder with config.json"),
        ({"betas": torch.full((10,), 0.1), "ema_model.downs.0.x": torch.zeros(1)}, "'init_conv.weight' is missing"),
    ],
    ids=str,
)
def test_other_files_are_named_and_refused(content: Any, what: str, tmp_path: Path) -> None:
    assert what in refusal(saved(tmp_path / "x.pt", content))


OPENAI: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "consistency": (
        lambda s: {k: v[..., None] if k.endswith("qkv.weight") else v for k, v in s.items()},
        "add --image_size 64,64",
    ),
    "classifier": (lambda s: {k: v for k, v in s.items() if not k.startswith("output_blocks.")}, "a classifier"),
    "upsampler": (lambda s: s | {"input_blocks.0.0.weight": torch.zeros(32, 6, 3, 3)}, "an upsampler"),
    "upsampler with variance": (
        lambda s: s | {"input_blocks.0.0.weight": torch.zeros(32, 6, 3, 3), "out.2.weight": torch.zeros(6, 32, 3, 3)},
        "an upsampler",
    ),
    "grey upsampler": (
        lambda s: s | {"input_blocks.0.0.weight": torch.zeros(32, 2, 3, 3), "out.2.weight": torch.zeros(1, 32, 3, 3)},
        "an upsampler",
    ),
    "512": (lambda s: s | {"time_embed.0.weight": torch.zeros(128, 64)}, "512 × 512"),
    "no middle": (lambda s: {k: v for k, v in s.items() if not k.startswith("middle")}, "middle_block.1.qkv.weight"),
    "one missing": (lambda s: {k: v for k, v in s.items() if k != "out.2.weight"}, "'out.2.weight' is missing"),
    "a block missing": (
        lambda s: {k: v for k, v in s.items() if not k.startswith("input_blocks.1.")},
        "equal numbers of residual blocks",
    ),
}


@pytest.mark.parametrize("kind", OPENAI)
def test_relatives_of_guided_diffusion_are_named(kind: str, tmp_path: Path) -> None:
    change, what = OPENAI[kind]
    path = saved(tmp_path / "x.pt", change(load_weights(theirs(GUIDED))))
    assert what in refusal(path, GUIDED_FLAGS)


def test_two_channels_are_a_question(tmp_path: Path) -> None:
    state = load_weights(theirs(GUIDED)) | {
        "input_blocks.0.0.weight": torch.zeros(32, 2, 3, 3),
        "out.2.weight": torch.zeros(2, 32, 3, 3),
        "out.2.bias": torch.zeros(2),
    }
    path, flags = saved(tmp_path / "x.pt", state), vars(GUIDED_FLAGS)
    assert "--variance fixed_large" in refusal(path, GUIDED_FLAGS)
    unet = import_path(path, Flags(**flags | {"variance": "fixed_large"})).unet
    assert (unet.image_channels, unet.learned_variance) == (2, False)


def test_objects_in_a_file_are_named_where_known(tmp_path: Path) -> None:
    content = {"model": {"x_embedder.proj.weight": torch.zeros(1)}, "args": argparse.Namespace(lr=1)}
    assert "diffusion transformer (DiT)" in refusal(saved(tmp_path / "dit.pt", content))
    edm = b"\x80\x03ctorch_utils.persistence\n_reconstruct_persistent_obj\nq\x00."
    (tmp_path / "edm.pkl").write_bytes(edm)
    assert "NVlabs' (EDM)" in refusal(tmp_path / "edm.pkl")


def test_tensorflow_is_named(tmp_path: Path) -> None:
    for name in ("model.ckpt-790000.index", "model.ckpt-790000.data-00000-of-00001", "model.ckpt-790000.meta"):
        (tmp_path / name).write_bytes(b"\x00" * 9)
        assert "a TensorFlow checkpoint" in refusal(tmp_path / name)
    assert "a TensorFlow checkpoint" in refusal(tmp_path / "model.ckpt-790000")  # what TensorFlow calls all three
    (tmp_path / "checkpoint").write_text('model_checkpoint_path: "model.ckpt-790000"\n')
    assert "a TensorFlow checkpoint" in refusal(tmp_path / "checkpoint")
    (tmp_path / "weights.h5").write_bytes(b"\x89HDF\r\n\x1a\n")
    assert "HDF5" in refusal(tmp_path / "weights.h5")


NOT_DATA: dict[str, tuple[Callable[[Path], Any], str]] = {
    "pointer": (lambda path: path.write_text(LFS), "a Git LFS pointer, not the file that it stands for"),
    "page": (lambda path: path.write_text("\n<!DOCTYPE html><html>"), "a web page"),
    "empty": (lambda path: path.touch(), "empty"),
    "pipe": (os.mkfifo, "not a file"),
}


@pytest.mark.parametrize("kind", NOT_DATA)
@pytest.mark.parametrize("name", ["x.pt", "x.safetensors"])
def test_files_that_are_none_are_named_as_that(kind: str, name: str, tmp_path: Path) -> None:
    make, what = NOT_DATA[kind]
    make(tmp_path / name)
    assert f"{name} is {what}" in refusal(tmp_path / name)
    with pytest.raises(CheckpointError, match=f"is {what}"):
        load(tmp_path / name)


def test_what_is_not_there_or_a_folder_is_said(tmp_path: Path) -> None:
    assert "absent.pt is not there" in refusal(tmp_path / "absent.pt")
    with pytest.raises(CheckpointError, match="is a folder, not a file"):
        load(tmp_path)
    with pytest.raises(UnsupportedCheckpointError, match="is a folder, not a file"):
        load_weights(tmp_path)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file_is_named_as_that(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.pt", {})
    path.chmod(0)
    assert "x.pt is not readable: permission denied" in refusal(path)


def test_a_file_that_fails_to_be_read_is_named_as_that() -> None:
    path = Path("/proc/self/mem")  # reads of its beginning fail
    if not path.is_file():
        pytest.skip("no /proc here")
    assert "mem is not readable: input/output error" in refusal(path)
    with pytest.raises(CheckpointError, match="is not readable: input/output error"):
        load(path)


# What it does


def test_nothing_that_is_loaded_is_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"ema": Evil(tmp_path / "trace")}, tmp_path / "edm.pkl")
    assert main([str(tmp_path / "edm.pkl"), str(tmp_path / "out.safetensors")]) == 2
    assert "holds code" in capsys.readouterr().err
    (tmp_path / "x.pt").write_bytes(b"no such thing")
    assert main([str(tmp_path / "x.pt"), str(tmp_path / "out.safetensors")]) == 2
    assert main([str(tmp_path / "absent.pt"), str(tmp_path / "out.safetensors")]) == 2
    assert not (tmp_path / "trace").exists()
    assert not (tmp_path / "out.safetensors").exists()


BIAS = "model.out_conv.bias"
TENSORS: dict[str, tuple[Callable[[], Any], str]] = {
    "sparse": (lambda: torch.eye(3).to_sparse(), "is sparse"),
    "quantised": (lambda: torch.quantize_per_tensor(torch.zeros(3), 0.1, 0, torch.qint8), "is quantised"),
    "meta": (lambda: torch.zeros(3, device="meta"), "is without its numbers"),
    "complex": (lambda: torch.zeros(3, dtype=torch.complex64), "is complex"),
    "integers": (lambda: torch.zeros(3, dtype=torch.int64), "is int64 in the file, not floating point"),
    "repeated": (lambda: torch.zeros(1).expand(2**34), "larger than the file"),
    "no tensor": (lambda: "three", "not a checkpoint of a project known here"),
    "not finite": (lambda: torch.tensor([0.0, torch.inf, 0.0]), "not finite"),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", TENSORS)
@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's, of quantised tensors
def test_tensors_of_other_kinds_are_refused(kind: str, tmp_path: Path) -> None:
    make, what = TENSORS[kind]
    state = load_weights(theirs(ORIGINAL)) | {BIAS: make()}
    assert what in refusal(saved(tmp_path / "x.pt", state), Flags(weights="raw"))


def peak() -> int:
    """Of this process's memory so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


@pytest.mark.slow
def test_memory_is_not_more_than_the_file(tmp_path: Path) -> None:
    saved(tmp_path / "plain.pt", {"x": torch.zeros(2**26)})  # 256 MiB
    with zipfile.ZipFile(tmp_path / "plain.pt") as plain, zipfile.ZipFile(tmp_path / "x.pt", "w") as packed:
        for entry in plain.infolist():
            name = zipfile.ZipInfo(entry.filename)
            name.compress_type = zipfile.ZIP_DEFLATED
            with plain.open(entry) as source, packed.open(name, "w", force_zip64=True) as target:
                shutil.copyfileobj(source, target, 2**20)
    (tmp_path / "plain.pt").unlink()
    before = peak()
    assert "a compressed archive" in refusal(tmp_path / "x.pt")
    assert peak() < before + 100
    for is_zip in (True, False):
        torch.save({"x": Large()}, tmp_path / "large.pt", _use_new_zipfile_serialization=is_zip)
        assert "objects besides tensors" in refusal(tmp_path / "large.pt")
    assert peak() < before + 100


def test_a_flipped_bit_is_noticed(tmp_path: Path) -> None:
    content = bytearray(theirs(ORIGINAL).read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "x.pt").write_bytes(content)
    assert "damaged: the checksum of" in refusal(tmp_path / "x.pt")


@pytest.mark.parametrize("name", ["x.pt", "x.safetensors"])
def test_a_cut_file_is_damaged(name: str, tmp_path: Path) -> None:
    if name == "x.pt":
        whole = theirs(ORIGINAL).read_bytes()
    else:
        save_file({"x": torch.zeros(500)}, tmp_path / "whole")
        whole = (tmp_path / "whole").read_bytes()
    for length in (3, 60, len(whole) // 2, len(whole) - 9):
        (tmp_path / name).write_bytes(whole[:length])
        assert f"{name} is damaged, or no" in refusal(tmp_path / name)


def test_files_of_old_versions_of_torch_are_read(tmp_path: Path) -> None:
    torch.save(load_weights(theirs(ORIGINAL)), tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    new, old = import_path(theirs(ORIGINAL), Flags()), import_path(tmp_path / "x.pt", Flags())
    assert all(torch.equal(new.weights[name], old.weights[name]) for name in new.weights)


def test_deep_tables_are_refused(tmp_path: Path) -> None:
    content: Any = {}
    for _ in range(300):
        content = {"model": content}
    assert "not a checkpoint of a project known here" in refusal(saved(tmp_path / "x.pt", content))
