"""Names on the Hugging Face hub become checkpoints, once, from the files that are needed; a stand-in is the hub."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from huggingface_hub import constants
from safetensors.torch import save_file

from app import checkpoints
from model import checkpoint, hub
from model.convert.conversion import import_path
from model.convert.from_hub import cache_folder, from_hub
from model.convert.importer import main
from model.convert.layout import Flags, UnsupportedCheckpointError
from model.hub import HubError, HubName, HubUnreachableError
from tests.fixtures import theirs as fixture
from tests.hub import COMMIT, Hub, HubRepository
from tests.model.convert.test_diffusers import SCHEDULER, inputs
from tests.model.convert.test_diffusers import theirs as unet_of_diffusers
from training.run import load_weights

WEIGHTS = "diffusion_pytorch_model.safetensors"
HO = {"image_size": (8, 8), "num_timesteps": 1000, "schedule": "linear", "variance": "fixed_large"}
FLAT = "google/ddpm-cifar10-32"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The hub, empty, and caches of its own; the library reads its variables once, so they are set in it."""
    with Hub() as server:
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, server.endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.chdir(tmp_path)
        yield server


@pytest.fixture(scope="module")
def flat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As google/ddpm-cifar10-32 has it: all at the root, weights twice, and code."""
    folder = tmp_path_factory.mktemp("flat")
    model = unet_of_diffusers()
    model.save_pretrained(folder)
    model.save_pretrained(folder, safe_serialization=False)
    DDPMScheduler(**SCHEDULER).save_pretrained(folder)
    (folder / "modeling_ddpm.py").write_text("raise SystemExit")
    (folder / "README.md").write_text("# DDPM")
    return folder


def no_more(line: str) -> None:
    pass


def converted(name: str, flags: Flags = Flags(), allow_bin: bool = False) -> checkpoint.Checkpoint:  # noqa: B008
    found = hub.parse(name)
    assert found is not None
    return checkpoint.load(from_hub(found, flags, no_more, allow_bin=allow_bin))


def refusal(name: str, flags: Flags = Flags(), allow_bin: bool = False) -> str:  # noqa: B008
    with pytest.raises((HubError, UnsupportedCheckpointError)) as error:
        converted(name, flags, allow_bin)
    return str(error.value)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("google/ddpm-cifar10-32", HubName("google/ddpm-cifar10-32")),
        ("a/b@v1.0", HubName("a/b", "v1.0")),
        ("a/b@refs/pr/1", HubName("a/b", "refs/pr/1")),
        ("mnist", None),
        ("a/b/c", None),
        ("runs/best.safetensors", None),
        ("models/ema.pt", None),
        ("../b", None),
        ("/a/b", None),
        ("a/..", None),
        ("a/b@../c", None),
        ("-a/b", None),
        ("a/b@", None),
        ("a/b c", None),
    ],
)
def test_names_of_the_hub_are_told_from_paths(text: str, name: HubName | None) -> None:
    assert hub.parse(text) == name


def test_a_flat_repository_comes_in_as_its_folder(server: Hub, flat: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server.repositories[FLAT] = HubRepository(flat)
    assert main([FLAT, "ours.safetensors"]) == 0
    assert server.fetched() == {"config.json", "scheduler_config.json", WEIGHTS}
    assert all(f"/resolve/{COMMIT}/" in path for _, path in server.requests if "/resolve/" in path)
    warned, fetching, told = capsys.readouterr().err.splitlines()
    assert f"no commit is pinned, so {FLAT} may become another: {FLAT}@{COMMIT} is" in warned
    assert f"fetching {WEIGHTS} (0.7 MB) of {FLAT}@{COMMIT}" in fetching
    assert f"500 timesteps, cosine, prediction v, fixed_large, x0 clamped to ±1 (from DDPMScheduler in {FLAT}@" in told
    ours, folder = checkpoint.load("ours.safetensors"), import_path(flat, Flags())
    assert ours.config.diffusion == folder.diffusion
    provenance = ours.config.provenance
    assert provenance["imported_from"] == f"{FLAT}@{COMMIT}"
    assert len(provenance["files_sha256"][WEIGHTS]) == 64
    x, t, _ = inputs(unet_of_diffusers())
    with torch.no_grad():
        theirs = unet_of_diffusers()(x, t).sample
        torch.testing.assert_close(ours.network(x, t), theirs, rtol=0, atol=1e-5)


def test_a_second_time_fetches_nothing(server: Hub, flat: Path) -> None:
    server.repositories[FLAT] = HubRepository(flat)
    first = converted(FLAT)
    shutil.rmtree(constants.HF_HUB_CACHE)
    server.requests.clear()
    assert converted(FLAT).sha256 == first.sha256
    assert [path for _, path in server.requests] == [f"/api/models/{FLAT}"]


def test_a_commit_needs_no_hub_once_it_was_converted(
    server: Hub, flat: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.repositories[FLAT] = HubRepository(flat)
    assert main([f"{FLAT}@{COMMIT}", "first.safetensors"]) == 0
    assert "pinned" not in capsys.readouterr().err
    server.requests.clear()
    assert main([f"{FLAT}@{COMMIT}", "second.safetensors"]) == 0
    assert server.requests == []
    assert Path("first.safetensors").read_bytes() == Path("second.safetensors").read_bytes()
    assert "500 timesteps, cosine" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("how", ["offline", "stopped", "failing"])
def test_without_the_hub_the_converted_one_is_used(
    how: str, server: Hub, flat: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.repositories[FLAT] = HubRepository(flat, {"main": "f" * 40, "v1": COMMIT})
    first = converted(f"{FLAT}@v1")
    shutil.rmtree(constants.HF_HUB_CACHE)
    if how == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    elif how == "stopped":
        server.stop()
    else:
        server.status = 503
    lines: list[str] = []
    path = from_hub(HubName(FLAT, "v1"), Flags(), lines.append)
    assert checkpoint.load(path).sha256 == first.sha256
    assert f"using commit {COMMIT}, which was converted before" in lines[0]
    with pytest.raises(HubUnreachableError):
        converted(FLAT)  # another revision


def test_without_the_hub_the_librarys_cache_does(server: Hub, flat: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import snapshot_download

    server.repositories[FLAT] = HubRepository(flat)
    snapshot_download(FLAT, endpoint=server.endpoint)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    found = converted(FLAT)
    assert found.config.provenance["imported_from"] == f"{FLAT}@{COMMIT}"
    shutil.rmtree(cache_folder())
    server.stop()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert converted(FLAT).sha256 == found.sha256


def test_half_a_repository_fetched_before_is_named(server: Hub, flat: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import hf_hub_download

    server.repositories[FLAT] = HubRepository(flat)
    hf_hub_download(FLAT, "config.json", endpoint=server.endpoint)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises((HubUnreachableError, UnsupportedCheckpointError), match="not fetched before"):
        converted(FLAT)


def test_a_large_configuration_is_not_fetched(server: Hub, tmp_path: Path) -> None:
    (tmp_path / "repo").mkdir()
    with (tmp_path / "repo" / "config.json").open("wb") as content:
        content.truncate(2**24 + 1)
    server.repositories["a/b"] = HubRepository(tmp_path / "repo")
    assert "its config.json is larger than a configuration is" in refusal("a/b")
    assert server.fetched() == set()


def test_a_moved_branch_is_converted_again(server: Hub, flat: Path) -> None:
    server.repositories[FLAT] = HubRepository(flat)
    converted(FLAT)
    server.repositories[FLAT].revisions["main"] = "f" * 40
    assert converted(FLAT).config.provenance["imported_from"] == f"{FLAT}@{'f' * 40}"


@pytest.mark.slow
def test_other_flags_make_another_checkpoint(server: Hub, tmp_path: Path) -> None:
    unet_of_diffusers("classes").save_pretrained(tmp_path / "repo" / "unet")
    DDPMScheduler().save_pretrained(tmp_path / "repo" / "scheduler")
    server.repositories["a/b"] = HubRepository(tmp_path / "repo")
    assert converted("a/b").config.unet.num_classes == 5
    other = converted("a/b", Flags(null_class=True, class_names=("a", "b", "c", "d")))
    assert (other.config.unet.num_classes, other.config.unet.null_class) == (4, True)
    assert converted("a/b").config.unet.num_classes == 5
    assert "5 class names for" in refusal_of_names()


def refusal_of_names() -> str:
    with pytest.raises(ValueError, match="class names") as error:
        converted("a/b", Flags(null_class=True, class_names=("a", "b", "c", "d", "e")))
    return str(error.value)


@pytest.mark.parametrize("weights", [None, "raw"])
def test_the_average_is_fetched_unless_raw_is_asked_for(weights: str | None, server: Hub, tmp_path: Path) -> None:
    for name, seed in (("unet", 1), ("unet_ema", 2)):
        unet_of_diffusers(seed=seed).save_pretrained(tmp_path / "repo" / name)
    DDPMScheduler().save_pretrained(tmp_path / "repo" / "scheduler")
    server.repositories["a/b"] = HubRepository(tmp_path / "repo")
    found = converted("a/b", Flags(weights=weights))
    folder = "unet" if weights else "unet_ema"
    assert {file for file in server.fetched() if file.endswith("s")} == {f"{folder}/{WEIGHTS}"}
    theirs = import_path(tmp_path / "repo", Flags(weights=weights)).weights
    assert torch.equal(found.network.state_dict()["out_conv.weight"], theirs["out_conv.weight"])


def test_shards_are_fetched_whole(server: Hub, tmp_path: Path) -> None:
    unet_of_diffusers().save_pretrained(tmp_path / "repo", max_shard_size="30KB")
    DDPMScheduler().save_pretrained(tmp_path / "repo")
    server.repositories["a/b"] = HubRepository(tmp_path / "repo")
    converted("a/b")
    assert len([file for file in server.fetched() if "-of-" in file]) > 2


def test_pickles_are_read_where_they_are_allowed(server: Hub, flat: Path, tmp_path: Path) -> None:
    repo = shutil.copytree(flat, tmp_path / "repo")
    (repo / WEIGHTS).unlink()
    server.repositories["a/b"] = HubRepository(repo)
    assert "diffusion_pytorch_model.bin, a pickle" in refusal("a/b")
    assert "--allow_bin" in refusal("a/b")
    assert "diffusion_pytorch_model.bin" not in server.fetched()
    assert converted("a/b", allow_bin=True).config.diffusion.num_timesteps == 500


def test_a_pickle_with_code_is_not_run(server: Hub, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
            return Path.touch, (tmp_path / "trace",)

    (tmp_path / "repo").mkdir()
    torch.save({"model": Evil()}, tmp_path / "repo" / "model.pt")
    server.repositories["a/b"] = HubRepository(tmp_path / "repo")
    assert "holds code" in refusal("a/b", allow_bin=True)
    assert not (tmp_path / "trace").exists()


def test_a_file_of_another_project_comes_in(server: Hub, tmp_path: Path) -> None:
    (tmp_path / "repo").mkdir()
    shutil.copy(fixture("pytorch_diffusion/model-790000.ckpt"), tmp_path / "repo")
    server.repositories["a/ho"] = HubRepository(tmp_path / "repo")
    assert "--image_size 32,32 --num_timesteps 1000" in refusal("a/ho", allow_bin=True)
    found = converted("a/ho", Flags(**HO), allow_bin=True)
    assert found.config.provenance["flags"]["image_size"] == [8, 8]


@pytest.mark.slow
def test_a_checkpoint_of_ours_is_taken_as_it_is(server: Hub, tmp_path: Path) -> None:
    (tmp_path / "repo").mkdir()
    shutil.copy(checkpoint.PRETRAINED / "mnist.safetensors", tmp_path / "repo" / "best.safetensors")
    server.repositories["a/digits"] = HubRepository(tmp_path / "repo")
    assert converted("a/digits").sha256 == checkpoint.load("mnist").sha256
    assert "--null_class means nothing" in refusal("a/digits", Flags(null_class=True))


# What is refused

Change = Callable[[Path], Any]


def wrote(name: str, content: dict[str, Any]) -> Change:
    return lambda folder: (folder / name).write_text(json.dumps(content))


def network(name: str) -> Change:
    return lambda folder: save_file({"x": torch.zeros(1)}, folder / name)


OTHERS: dict[str, tuple[list[Change], str]] = {
    "latents": (
        [
            wrote(
                "model_index.json", {"_class_name": "StableDiffusionPipeline", "vae": ["diffusers", "AutoencoderKL"]}
            ),
            network("model.safetensors"),
        ],
        "it is a StableDiffusionPipeline: its network works on latents",
    ),
    "transformer": (
        [wrote("config.json", {"_class_name": "DiTTransformer2DModel"}), network(WEIGHTS)],
        "it is a DiTTransformer2DModel",
    ),
    "bert": (
        [wrote("config.json", {"architectures": ["BertModel"]}), network("model.safetensors")],
        "it is a BertModel of the library transformers",
    ),
    "lora": ([network("pytorch_lora_weights.safetensors")], "a LoRA"),
    "adapter": ([wrote("adapter_config.json", {}), network("adapter_model.safetensors")], "a LoRA or another adapter"),
    "gguf": ([wrote("model-q4.gguf", {})], "GGUF"),
    "pickle": ([wrote("edm-cifar10-32x32-cond-vp.pkl", {})], "`torch.save(net.state_dict(), 'network.pt')`"),
    "empty": ([wrote("README.md", {})], "it has no weights that can be imported"),
    "several": ([network("a.safetensors"), network("b.safetensors")], "several files of weights, a.safetensors, b"),
    "scheduler": (
        [lambda folder: unet_of_diffusers().save_pretrained(folder)],
        "add --num_timesteps 1000 --schedule linear --prediction eps",
    ),
    "list": ([lambda folder: (folder / "config.json").write_text("[]"), network(WEIGHTS)], "is not a JSON object"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_repositories_are_named(kind: str, server: Hub, tmp_path: Path) -> None:
    changes, message = OTHERS[kind]
    (tmp_path / "repo").mkdir()
    for change in changes:
        change(tmp_path / "repo")
    server.repositories["a/b"] = HubRepository(tmp_path / "repo")
    assert message in refusal("a/b")
    assert not [file for file in server.fetched() if file.endswith((".safetensors", ".pkl", ".gguf"))]
    assert not list(cache_folder().rglob("*.safetensors"))


def test_a_library_of_other_models_is_named(server: Hub, tmp_path: Path) -> None:
    (tmp_path / "repo").mkdir()
    (tmp_path / "repo" / "weights.onnx").touch()
    server.repositories["a/b"] = HubRepository(tmp_path / "repo", library="timm")
    assert "it is of the library timm" in refusal("a/b")


def test_what_the_hub_does_not_give_is_said(
    server: Hub, flat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.repositories[FLAT] = HubRepository(flat)
    server.repositories["a/gated"] = HubRepository(flat, is_gated=True)
    assert "there is no file or folder a/absent here, and no such repository" in refusal("a/absent")
    assert "HF_TOKEN" in refusal("a/absent")
    assert f"{FLAT} has no revision v9" in refusal(f"{FLAT}@v9")
    assert "a/gated is gated: accept its terms" in refusal("a/gated")
    for status, message in (
        (403, "does not accept your token"),
        (418, "answers with status 418"),
        (502, "there is no file or folder a/other here"),
    ):
        server.status = status
        assert message in refusal("a/other")
    server.status = None
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "here, it was not fetched before, and HF_HUB_OFFLINE is set" in refusal(FLAT)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    server.stop()
    assert "the Hugging Face hub cannot be reached" in refusal(FLAT)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "install huggingface_hub" in refusal(FLAT)


def test_a_damaged_table_of_commits_is_no_trouble(server: Hub, flat: Path) -> None:
    server.repositories[FLAT] = HubRepository(flat)
    converted(FLAT)
    (table,) = cache_folder().rglob("commits.json")
    table.write_text("[")
    converted(FLAT)
    assert json.loads(table.read_bytes()) == {"main": COMMIT}


@pytest.mark.slow
@pytest.mark.parametrize("name", [FLAT, f"{FLAT}@{COMMIT}"])
@pytest.mark.parametrize("how", ["a bit", "cut"])
def test_a_damaged_conversion_is_made_again(name: str, how: str, server: Hub, flat: Path) -> None:
    server.repositories[FLAT] = HubRepository(flat)
    first = converted(name)
    (kept,) = cache_folder().rglob("*.safetensors")
    content = bytearray(kept.read_bytes())
    content[-1] ^= 1
    kept.write_bytes(content[:-100] if how == "cut" else content)
    lines: list[str] = []
    found = hub.parse(name)
    assert found is not None
    assert checkpoint.load(from_hub(found, Flags(), lines.append)).sha256 == first.sha256
    (line,) = [line for line in lines if "damaged" in line]
    assert "it was converted before, and is removed to be converted again" in line


def test_a_damaged_conversion_is_named_without_the_hub(server: Hub, flat: Path) -> None:
    server.repositories[FLAT] = HubRepository(flat)
    converted(FLAT)
    shutil.rmtree(constants.HF_HUB_CACHE)
    (kept,) = cache_folder().rglob("*.safetensors")
    kept.write_bytes(kept.read_bytes()[:1000])
    server.stop()
    lines: list[str] = []
    with pytest.raises(HubUnreachableError):
        from_hub(HubName(FLAT), Flags(), lines.append)
    assert "is removed to be converted again" in "".join(lines)


# The command and the server


def test_a_path_wins_over_the_hub(server: Hub, flat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server.repositories["google/ddpm"] = HubRepository(flat)
    shutil.copytree(flat, tmp_path / "google" / "ddpm")
    assert main(["google/ddpm", "ours.safetensors"]) == 0
    assert server.requests == []
    assert "it is here, so the Hugging Face hub is not asked" in capsys.readouterr().err
    assert main(["google/ddpm", "ours.safetensors", "--allow_bin"]) == 2
    assert "--allow_bin is for names on the hub" in capsys.readouterr().err


def test_the_command_says_what_is_wrong(server: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["a/absent", "ours.safetensors"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("model.importers: a/absent: there is no file or folder a/absent here")
    assert not Path("ours.safetensors").exists()


def test_an_unwritable_cache_is_named(server: Hub, flat: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server.repositories[FLAT] = HubRepository(flat)
    Path(os.environ["XDG_CACHE_HOME"]).write_text("a file")
    assert main([FLAT, "ours.safetensors"]) == 2
    assert "cache" in capsys.readouterr().err.splitlines()[-1]


def test_the_server_takes_names_of_the_hub(server: Hub, flat: Path) -> None:
    server.repositories[FLAT] = HubRepository(flat)
    mnist, plain, named = checkpoints.parse(f"mnist,{FLAT},mine={FLAT}@{COMMIT}")
    assert [source.name for source in (mnist, plain, named)] == ["mnist", "ddpm-cifar10-32", "mine"]
    assert plain.path == named.path
    assert checkpoints.load(named).name == "mine"
    assert cache_folder() in plain.path.parents


def test_a_path_wins_in_the_server(server: Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "runs" / "digits").mkdir(parents=True)
    (tmp_path / "runs" / "digits" / "config.json").write_text("{}")
    shutil.copy(checkpoint.PRETRAINED / "mnist.safetensors", tmp_path / "runs" / "digits" / "best.safetensors")
    with caplog.at_level("INFO", "ddpm.models"):
        (source,) = checkpoints.parse("runs/digits")
    assert source.name == "digits"
    assert "runs/digits is here, so the Hugging Face hub is not asked for it" in caplog.text
    assert server.requests == []


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("a/absent", "a/absent: there is no file or folder a/absent here"),
        ("a/network", "flags are for `ddpm-serve import`, whose file is served"),
        ("a/b@v9", "a/b has no revision v9"),
    ],
)
def test_the_server_says_what_is_wrong(item: str, message: str, server: Hub, flat: Path, tmp_path: Path) -> None:
    unet_of_diffusers().save_pretrained(tmp_path / "repo")  # without a scheduler
    server.repositories |= {"a/b": HubRepository(flat), "a/network": HubRepository(tmp_path / "repo")}
    with pytest.raises(checkpoint.CheckpointError, match=message):
        checkpoints.parse(item)


def test_sampling_takes_names_of_the_hub(server: Hub, flat: Path) -> None:
    server.repositories[FLAT] = HubRepository(flat)
    found, which = load_weights.load(FLAT, "ema", {}, torch.device("cpu"))
    assert (found.config.diffusion.num_timesteps, which) == (500, "ema")
    with pytest.raises(ValueError, match="a/absent: there is no file or folder a/absent here"):
        load_weights.load("a/absent", "ema", {}, torch.device("cpu"))


def test_clients_cannot_name_the_hub() -> None:
    assert not checkpoints.MODEL_NAME.fullmatch(FLAT)


@pytest.mark.slow
def test_the_librarys_variables_hold_in_a_process(server: Hub, flat: Path, tmp_path: Path) -> None:
    server.repositories[FLAT] = HubRepository(flat)
    root = str(Path(__file__).parents[3])
    variables = {"HF_ENDPOINT": server.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "hf_secret"}
    words = [sys.executable, "-m", "model.importers", FLAT]

    def run(target: str, **more: str) -> subprocess.CompletedProcess[str]:
        environment = os.environ | variables | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"} | more
        return subprocess.run([*words, target], env=environment, capture_output=True, text=True, check=False)

    first = run("first.safetensors")
    assert first.returncode == 0, first.stderr
    assert "Bearer hf_secret" in server.tokens
    assert (tmp_path / "home" / "hub" / "models--google--ddpm-cifar10-32").is_dir()
    server.stop()
    second = run("second.safetensors", HF_HUB_OFFLINE="1")
    assert second.returncode == 0, second.stderr
    assert Path("first.safetensors").read_bytes() == Path("second.safetensors").read_bytes()
