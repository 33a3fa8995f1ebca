import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from model import checkpoint
from model.checkpoint import CheckpointConfig
from model.convert.importer import main as import_main
from model.diffusion import DiffusionConfig
from model.images import to_uint8
from model.nn.config import UNetConfig
from model.sampling.schedule import make_schedule
from model.sampling.step import sample
from tests.fixtures import theirs
from training.sample import batch_size, main

SaveCheckpoint = Callable[..., str]


def images(folder: Path) -> dict[str, np.ndarray]:
    return {path.name: np.asarray(Image.open(path)).astype(int) for path in sorted(folder.glob("*.png"))}


@pytest.fixture
def sampled(save_checkpoint: SaveCheckpoint, tmp_path: Path) -> Callable[..., dict[str, np.ndarray]]:
    """Samples the tiny checkpoint into tmp_path/`folder`."""
    path = save_checkpoint()

    def run(words: str, folder: str = "out") -> dict[str, np.ndarray]:
        options = ["--checkpoint", path, "--save_dir", str(tmp_path / folder), "--device", "cpu"]
        assert main([*options, *words.split()]) == 0
        return images(tmp_path / folder)

    return run


def largest_difference(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> int:
    assert a.keys() == b.keys()
    return max(int(np.abs(a[name] - b[name]).max()) for name in a)


def test_images_are_balanced_and_none_is_dropped(sampled: Callable[..., dict[str, np.ndarray]]) -> None:
    names = sampled("--num_images 11 --batch_size 4").keys()
    assert sorted(names) == sorted([f"{k}-{i}.png" for k in range(3) for i in range(4) if (k, i) != (2, 3)])


def test_an_image_is_the_same_at_any_batch_size(sampled: Callable[..., dict[str, np.ndarray]]) -> None:
    one_by_one = sampled("--num_images 7 --batch_size 1", "a")
    at_once = sampled("--num_images 7 --batch_size 64", "b")
    assert largest_difference(one_by_one, at_once) <= 1
    assert len({image.tobytes() for image in at_once.values()}) == 7


def test_an_image_is_the_same_among_more_and_alone(
    sampled: Callable[..., dict[str, np.ndarray]],
) -> None:
    all_classes = sampled("--num_images 9", "a")
    more = sampled("--num_images 12", "b")
    dogs = sampled("--num_images 3 --class_label dog", "c")
    assert largest_difference(all_classes, {name: more[name] for name in all_classes}) <= 1
    assert largest_difference(dogs, {name: all_classes[name] for name in ("1-0.png", "1-1.png", "1-2.png")}) <= 1


def test_an_image_is_that_of_the_naive_sampler(
    sampled: Callable[..., dict[str, np.ndarray]], save_checkpoint: SaveCheckpoint
) -> None:
    found = sampled("--num_images 9 --seed 5 --sampler ddim --eta 0.7 --steps 3 --guidance_scale 2")["2-1.png"]
    loaded = checkpoint.load(save_checkpoint())
    schedule = make_schedule(loaded.diffusion, "ddim", 3, eta=0.7, guidance_scale=2.0)
    x = sample(loaded.network, schedule, (1, 8, 8), seeds=[5], indices=[5], classes=[2], null_class=3)
    assert np.abs(found - to_uint8(x)[0, 0].numpy().astype(int)).max() <= 1


def test_a_class_by_index_is_the_class_by_name(sampled: Callable[..., dict[str, np.ndarray]]) -> None:
    by_name, by_index = (
        sampled("--num_images 2 --class_label emu", "a"),
        sampled("--num_images 2 --class_label 2", "b"),
    )
    assert list(by_name) == ["2-0.png", "2-1.png"]
    assert largest_difference(by_name, by_index) == 0


def test_defaults_are_the_checkpoints(sampled: Callable[..., dict[str, np.ndarray]]) -> None:
    default = sampled("--num_images 3", "a")
    same = sampled("--num_images 3 --sampler ddim --steps 2 --eta 0.5 --guidance_scale 1 --seed 0", "b")
    other = sampled("--num_images 3 --eta 0.4", "c")
    assert largest_difference(default, same) == 0
    assert largest_difference(default, other) > 1


def test_another_seed_gives_other_images(sampled: Callable[..., dict[str, np.ndarray]]) -> None:
    assert largest_difference(sampled("--num_images 1", "a"), sampled("--num_images 1 --seed 1", "b")) > 1


def test_a_second_time_only_what_is_missing_is_made(
    sampled: Callable[..., dict[str, np.ndarray]], tmp_path: Path
) -> None:
    first = sampled("--num_images 5")
    (tmp_path / "out" / "0-1.png").unlink()
    kept = {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in first if name != "0-1.png"}
    second = sampled("--num_images 6 --batch_size 2")
    assert len(second) == 6
    assert largest_difference(first, {name: second[name] for name in first}) <= 1
    assert {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in kept} == kept


def test_an_unconditional_checkpoint_gives_numbered_images(save_checkpoint: SaveCheckpoint, tmp_path: Path) -> None:
    path = save_checkpoint(UNetConfig(3, (8, 12), 12, (1,), 1, (), 16))
    assert main(["--checkpoint", path, "--save_dir", str(tmp_path / "a" / "b"), "--num_images", "3"]) == 0
    found = images(tmp_path / "a" / "b")
    assert {name: image.shape for name, image in found.items()} == {f"{i}.png": (8, 12, 3) for i in range(3)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--class_label cow", "one of 0 (cat), 1 (dog), 2 (emu), not 'cow'"),
        ("--class_label 3", "one of 0 (cat), 1 (dog), 2 (emu), not '3'"),
        ("--class_label -1", "one of 0 (cat)"),
        ("--steps 1001", "steps must be between 1 and 1000"),
        ("--sampler ddpm --eta 0.5", "--eta belongs to the ddim sampler"),
        ("--guidance_interval 0.2 --guidance_scale 2", "--guidance_interval must be two numbers"),
        ("--guidance_interval 0.2,0.8 --guidance_scale 1", "--guidance_interval says where guidance acts"),
        ("--eta 2", "eta must be between 0 and 1"),
        ("--device cuda:99", "--device cuda:99"),
        ("--guidance_scale 2 --guidance_interval 0.8,0.2", "lower end first"),
        ("--weights raw", "only the first average is in it"),
        ("--base_channels 128", "--base_channels 128, where it has 12"),
        ("--use_labels false", "--use_labels False, where it has True"),
        ("--ema_decay 0.9", "does not tell its --ema_decay: leave it out"),
    ],
)
def test_what_makes_no_sense_is_refused_with_a_sentence(
    words: str, message: str, save_checkpoint: SaveCheckpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--checkpoint", save_checkpoint(), "--save_dir", str(tmp_path / "out"), "--num_images", "1"]
    assert main([*options, *words.replace("--class_label ", "--class_label=").split()]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_unconditional_checkpoint_takes_no_class_or_guidance(
    save_checkpoint: SaveCheckpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--checkpoint", save_checkpoint(UNetConfig(1, (8, 8), 12, (1,), 1, (), 16)), "--save_dir", str(tmp_path)]
    assert main([*options, "--class_label", "0"]) == 2
    assert "unconditional" in capsys.readouterr().err
    assert main([*options, "--guidance_scale", "2"]) == 2
    assert "no null class" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--num_images 0", "--num_images must be at least 1"),
        ("--batch_size 0", "--batch_size must be at least 1"),
        ("--sequence 0", "--sequence must be at least 1"),
        ("--seed -1", "--seed must be at least 0"),
        ("--sampler euler", "--sampler: must be one of ddpm, ddim, dpmpp_2m"),
        ("--sampler dpmpp2m", "did you mean dpmpp_2m?"),
        ("--spacing uniform", "--spacing: must be one of leading, trailing"),
        ("--limit clip", "--limit: must be one of none, clamp, dynamic"),
        ("--weights emma", "did you mean ema?"),
        ("--schedule cosin", "did you mean cosine?"),
        ("--ema_decay 0.9,0.99", "give one number"),
        ("--num_image 3", "there is no option --num_image; did you mean --num_images?"),
        ("--image-size 3", "did you mean --image_size?"),
    ],
)
def test_what_is_wrong_on_the_command_line_ends_it(
    words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["--checkpoint", "x", "--save_dir", "y", *words.split()])
    assert message in capsys.readouterr().err


def test_a_folder_with_other_images_is_left_alone(
    sampled: Callable[..., dict[str, np.ndarray]],
    save_checkpoint: SaveCheckpoint,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = sampled("--num_images 3")
    options = ["--checkpoint", save_checkpoint(), "--num_images", "3", "--save_dir"]
    assert main([*options, str(tmp_path / "out"), "--seed", "1"]) == 2
    assert "choose another --save_dir" in capsys.readouterr().err
    assert largest_difference(images(tmp_path / "out"), before) == 0
    (tmp_path / "photos").mkdir()
    Image.new("L", (3, 3)).save(tmp_path / "photos" / "0-0.png")
    assert main([*options, str(tmp_path / "photos")]) == 2
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["0-0.png"]


def test_a_checkpoint_that_is_none_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--checkpoint", "no-such", "--save_dir", str(tmp_path)]) == 2
    assert "no checkpoint 'no-such'" in capsys.readouterr().err


def test_the_command_shows_rate_and_time_left(
    save_checkpoint: SaveCheckpoint, start: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    words = f"--checkpoint {save_checkpoint()} --save_dir {tmp_path}/out --num_images 7 --batch_size 2 --device cpu"
    out, err = (process := start("training.sample", *words.split())).communicate(timeout=300)
    assert process.returncode == 0, err
    assert re.search(r"7/7 \[\d\d:\d\d<00:00, .*(image/s|s/image)\]", err)  # time gone, time left, rate
    assert out == f"7 images in {tmp_path}/out\n"


def test_large_images_are_made_few_at_a_time() -> None:
    sides = {8: 64, 64: 64, 128: 16, 256: 4, 1024: 1}
    for side, expected in sides.items():
        config = CheckpointConfig(UNetConfig(3, (side, side), 12, (1,), 1, (), 16), DiffusionConfig())
        assert batch_size(config) == expected


def test_spacing_limit_and_interval_are_the_plans(
    sampled: Callable[..., dict[str, np.ndarray]], save_checkpoint: SaveCheckpoint
) -> None:
    words = "--sampler ddim --eta 0 --steps 4 --guidance_scale 3 --guidance_interval 0.3,0.7 --spacing leading"
    found = sampled(f"--num_images 3 {words} --limit dynamic")["2-0.png"]
    loaded = checkpoint.load(save_checkpoint())
    settings = {"guidance_interval": (0.3, 0.7), "spacing": "leading", "limit": "dynamic"}
    schedule = make_schedule(loaded.diffusion, "ddim", 4, guidance_scale=3.0, **settings)
    x = sample(loaded.network, schedule, (1, 8, 8), seeds=[0], indices=[2], classes=[2], null_class=3)
    assert np.abs(found - to_uint8(x)[0, 0].numpy().astype(int)).max() <= 1


def test_a_sequence_ends_with_the_images(
    sampled: Callable[..., dict[str, np.ndarray]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = sampled("--num_images 4 --steps 3 --sequence 2 --spacing leading")
    assert len(found) == 4
    strip = np.asarray(Image.open(tmp_path / "out" / "sequence" / "strip.png")).astype(int)
    step = strip.shape[1] // 4  # noise, two steps between, the image
    assert np.unique(strip[:, -step:]).size > 2
    with Image.open(tmp_path / "out" / "sequence" / "animation.gif") as animation:
        assert animation.n_frames == 4
    assert "how 2 of them come to be" in capsys.readouterr().out
    again = sampled("--num_images 4 --steps 3 --sequence --spacing leading")
    assert largest_difference(found, again) == 0


def test_lucidrains_network_makes_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, folder = tmp_path / "lucid.safetensors", tmp_path / "out"
    assert import_main([str(theirs("lucidrains/small.pt")), str(path), "--image_size", "8,12"]) == 0
    argv = ["--checkpoint", str(path), "--save_dir", str(folder), "--num_images", "2", "--steps", "2"]
    assert main(argv) == 0
    assert {image.shape for image in images(folder).values()} == {(8, 12, 3)}
    assert main([*argv, "--base_channels", "8"]) != 0
    assert "does not tell its --base_channels" in capsys.readouterr().err
