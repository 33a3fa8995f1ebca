import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from model import checkpoint
from model.images import from_uint8
from training.classifier import train
from training.classifier.network import Classifier, ClassifierConfig, Group
from training.evaluation import feature_extractor
from training.evaluation.feature_extractor import FeatureExtractorError

ImageFolder = Callable[..., Path]
PROVENANCE = {"accuracy": 0.75, "command": "python"}


@pytest.fixture
def network() -> Classifier:
    torch.manual_seed(0)
    return Classifier(ClassifierConfig(3, (8, 12), 2, width=4)).eval()


@pytest.fixture
def saved(network: Classifier, tmp_path: Path) -> Path:
    path = tmp_path / "extractor.safetensors"
    feature_extractor.save(path, network, ("cat", "dög"), PROVENANCE)
    return path


def images(n: int = 5) -> Tensor:
    return torch.randint(0, 256, (n, 3, 8, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_the_file_brings_back_everything(network: Classifier, saved: Path) -> None:
    loaded = feature_extractor.load(saved)
    assert (loaded.name, loaded.class_names, loaded.accuracy) == ("extractor", ("cat", "dög"), 0.75)
    assert loaded.provenance == PROVENANCE
    assert not loaded.network.training
    for mine, theirs in zip(network.extract(images()), loaded.network.extract(images()), strict=True):
        torch.testing.assert_close(mine, theirs)
    again = saved.with_name("again.safetensors")
    feature_extractor.save(again, loaded.network, loaded.class_names, loaded.provenance)
    assert feature_extractor.load(again).sha256 == loaded.sha256
    assert sorted(p.name for p in saved.parent.iterdir()) == ["again.safetensors", "extractor.safetensors"]


def test_features_are_what_the_logits_are_made_of(network: Classifier) -> None:
    features, logits = network.extract(images())
    assert (features.shape, logits.shape) == ((5, 16), (5, 2))
    assert features.dtype == logits.dtype == torch.float32
    torch.testing.assert_close(logits, network.head(features))
    torch.testing.assert_close(logits, network(images().float() / 127.5 - 1))


def test_features_do_not_depend_on_the_batch(network: Classifier) -> None:
    torch.testing.assert_close(network.extract(images())[0][:2], network.extract(images()[:2])[0])


def test_depth_and_width_make_the_network() -> None:
    network = Classifier(ClassifierConfig(1, (28, 28), 10, width=8, depth=3))
    assert [len(group.convs) for group in network.groups] == [3, 3, 3]
    assert network.head.in_features == 32
    x = torch.zeros(1, 1, 28, 28)
    assert network.groups(network.stem(x)).shape == (1, 32, 3, 3)
    assert Classifier(ClassifierConfig(1, (4, 9), 2, width=8)).eval()(x[:, :, :4, :9]).shape == (1, 2)


def test_the_stem_whitens_patches() -> None:
    torch.manual_seed(0)
    network = Classifier(ClassifierConfig(3, (16, 16), 2, width=4))
    smooth = torch.nn.functional.avg_pool2d(torch.rand(200, 3, 19, 19), 4, stride=1)  # neighbours are alike
    images = (smooth * 400).clamp(0, 255).byte()
    network.whiten(images)
    found = network.stem(from_uint8(images)).detach()
    assert torch.equal(network.stem.weight[:12], -network.stem.weight[12:])
    rows = found[:, :12].transpose(0, 1).flatten(1)
    assert rows.mean(dim=1).abs().max() < 1e-3
    covariance = rows @ rows.T / rows.shape[1]
    assert covariance.diagonal().max() == pytest.approx(1, abs=0.1)
    assert (covariance - covariance.diag().diag()).abs().max() < 1e-3


def test_convolutions_begin_as_the_identity() -> None:
    group, x = Group(4, 6, depth=2).eval(), torch.rand(2, 4, 5, 5)
    torch.testing.assert_close(group.convs[0](x)[:, :4], x)
    torch.testing.assert_close(group.convs[1](torch.cat([x, x[:, :2]], 1))[:, :4], x)


def damage(path: Path, what: str) -> None:
    tensors, metadata = (
        load_file(path),
        {"format": feature_extractor.FORMAT, "network": {}, "class_names": ["a", "b"], **PROVENANCE},
    )
    metadata["network"] = {"image_channels": 3, "image_size": [8, 12], "num_classes": 2, "width": 4, "depth": 2}
    name = "head.weight"
    match what:
        case "text":
            path.write_text("nothing of the kind")
            return
        case "cut":
            path.write_bytes(path.read_bytes()[:-10])
            return
        case "gone":
            path.unlink()
            return
        case "format":
            metadata["format"] = "ddpm-serve/1"
        case "list":
            metadata = ["no", "object"]
        case "bare":
            save_file(tensors, path)
            return
        case "names":
            metadata["class_names"] = ["a"]
        case "accuracy":
            metadata["accuracy"] = 1.5
        case "size":
            metadata["network"]["width"] = 10**9
        case "width":
            metadata["network"]["width"] = 8
        case "unknown":
            metadata["network"]["colour"] = "red"
        case "surplus":
            tensors["more"] = torch.zeros(1)
        case "missing":
            del tensors[name]
        case "type":
            tensors[name] = tensors[name].half()
        case "nan":
            tensors[name][0, 0] = torch.nan
    save_file(tensors, path, metadata={"classifier": json.dumps(metadata)})


@pytest.mark.parametrize(
    ("what", "why"),
    [
        ("text", "not a readable"),
        ("cut", "not a readable"),
        ("gone", "not a readable"),
        ("format", "not a classifier"),
        ("bare", "not a classifier"),
        ("list", "not a readable"),
        ("names", "contradict"),
        ("accuracy", "contradict"),
        ("size", "width must be a whole number from 1 to 1024"),
        ("width", "not those"),
        ("unknown", "colour"),
        ("surplus", "not those"),
        ("missing", "not those"),
        ("type", "head.weight.*float32"),
        ("nan", "head.weight.*finite"),
    ],
)
def test_what_is_no_classifier_is_refused_with_a_sentence(what: str, why: str, saved: Path) -> None:
    damage(saved, what)
    with pytest.raises(FeatureExtractorError, match=why) as caught:
        feature_extractor.load(saved)
    assert str(saved) in str(caught.value)


def test_the_damage_above_is_all_that_is_wrong(saved: Path) -> None:
    damage(saved, "nothing")
    assert feature_extractor.load(saved).class_names == ("a", "b")


def test_a_checkpoint_is_no_classifier_and_the_reverse(saved: Path, save_checkpoint: Callable[..., str]) -> None:
    with pytest.raises(FeatureExtractorError, match="not a classifier"):
        feature_extractor.load(save_checkpoint())
    with pytest.raises(checkpoint.CheckpointError):
        checkpoint.load(saved)


def test_augmentation_moves_and_mirrors_and_nothing_else() -> None:
    torch.manual_seed(0)
    picture = torch.arange(48.0).reshape(1, 1, 6, 8)
    many = picture.expand(200, -1, -1, -1)
    nobody = torch.zeros(200, dtype=torch.bool)
    assert torch.equal(train.augmented(many, 0, nobody), many)
    moved = train.augmented(many, 2, nobody)
    middles = {tuple(m[0, 2:4, 3:5].flatten().tolist()) for m in moved}
    y, x = torch.meshgrid(torch.arange(-2, 3), torch.arange(-2, 3), indexing="ij")
    shifts = zip(y.flatten(), x.flatten(), strict=True)
    assert middles == {tuple(picture[0, 0, 2 + b : 4 + b, 3 + a : 5 + a].flatten().tolist()) for b, a in shifts}
    mirrored = torch.rand(200) < 0.5
    flipped = train.augmented(many, 0, mirrored)
    assert (flipped[mirrored] == picture.flip(3)).all()
    assert (flipped[~mirrored] == picture).all()


def test_colours_stay_together_when_images_move() -> None:
    torch.manual_seed(0)
    x = torch.rand(20, 1, 6, 8)
    x = torch.cat([x, x + 1, x + 2], dim=1)
    moved = train.augmented(x, 2, torch.arange(20) % 2 == 0)
    torch.testing.assert_close(moved[:, :1] + torch.tensor([0.0, 1, 2]).reshape(1, 3, 1, 1), moved)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_command_trains_tests_and_saves(
    mode: str, image_folder: ImageFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = image_folder(classes=("cat", "dog", "emu"), count=40, mode=mode)
    words = ["--dataset", str(folder), "--out", str(tmp_path / "extractor.safetensors"), "--epochs", "12"]
    words += ["--batch_size", "19", "--width", "4", "--flip", "--device", "cpu"]
    assert train.main(words) == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    loaded = feature_extractor.load(tmp_path / "extractor.safetensors")
    assert printed.pop("parameters") == sum(p.numel() for p in loaded.network.parameters())
    assert printed == loaded.provenance
    assert loaded.accuracy == 1
    assert loaded.class_names == ("cat", "dog", "emu")
    assert (loaded.provenance["train_images"], loaded.provenance["test_images"]) == (114, 6)
    assert loaded.provenance["command"].startswith("python -m training.classifier --dataset")


def test_photos_of_different_sizes_are_brought_to_one(image_folder: ImageFolder, tmp_path: Path) -> None:
    image_folder(classes=("cat",), size=(8, 12))
    folder = image_folder(classes=("dog",), size=(20, 14))
    words = [
        "--dataset",
        str(folder),
        "--out",
        str(tmp_path / "extractor.safetensors"),
        "--epochs",
        "1",
        "--width",
        "4",
    ]
    assert train.main([*words, "--batch_size", "14", "--device", "cpu"]) == 2
    assert train.main([*words, "--batch_size", "14", "--device", "cpu", "--image_size", "9,7"]) == 0
    assert feature_extractor.load(tmp_path / "extractor.safetensors").network.config.image_size == (9, 7)
    with pytest.raises(SystemExit):
        train.main([*words, "--image_size", "9"])


def test_accuracy_is_that_of_the_held_out_images(
    image_folder: ImageFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The test split's names are exchanged: who is right on the train split is wrong on every one of them."""
    image_folder("pictures/train", classes=("cat", "dog"), count=30)
    image_folder("pictures/test", classes=("dog", "cat"), count=6)
    words = [
        "--dataset",
        str(tmp_path / "pictures"),
        "--out",
        str(tmp_path / "extractor.safetensors"),
        "--epochs",
        "12",
    ]
    assert train.main([*words, "--batch_size", "15", "--width", "4", "--device", "cpu"]) == 0
    assert feature_extractor.load(tmp_path / "extractor.safetensors").accuracy == 0


def test_the_seed_decides(image_folder: ImageFolder, tmp_path: Path) -> None:
    words = ["--dataset", str(image_folder()), "--epochs", "1", "--batch_size", "8", "--width", "4", "--device", "cpu"]
    files = []
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert train.main([*words, "--seed", seed, "--out", str(tmp_path / name)]) == 0
        files.append(load_file(tmp_path / name))
    assert all(torch.equal(files[0][k], files[1][k]) for k in files[0])
    assert not torch.equal(files[0]["head.weight"], files[2]["head.weight"])


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--epochs", "0"], "--epochs must be at least 1"),
        (["--batch_size", "1"], "--batch_size must be at least 2"),
        (["--label_smoothing", "1"], "--label_smoothing must be"),
        (["--learning_rate", "nan"], "--learning_rate must be"),
        (["--seed", "-1"], "--seed must be"),
        (["--out", "/nowhere/at/all"], "no folder"),
        (["--batch_size", "1000"], "only 29 images"),
        (["--shift", "8", "--batch_size", "8"], "less than the images' sides"),
        (["--dataset", "/nowhere"], "no folder"),
        (["--learningrate", "1"], "no option --learningrate; did you mean --learning_rate?"),
    ],
)
def test_what_cannot_be_is_said(
    words: list[str], why: str, image_folder: ImageFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--dataset", str(image_folder()), "--out", str(tmp_path / "extractor.safetensors"), *words]
    try:
        code = train.main(argv)
    except SystemExit as error:
        code = error.code
    assert code == 2
    assert why in capsys.readouterr().err
    assert not (tmp_path / "extractor.safetensors").exists()


def test_images_without_classes_are_refused(
    image_folder: ImageFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = image_folder(classes=(".",), count=40)
    assert train.main(["--dataset", str(folder), "--out", str(tmp_path / "extractor.safetensors")]) == 2
    assert "class of every image" in capsys.readouterr().err


@pytest.mark.slow
def test_a_killed_training_goes_on_to_the_same_bits(
    image_folder: ImageFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--dataset", str(image_folder()), "--epochs", "4", "--batch_size", "7", "--width", "4", "--flip"]
    words += ["--device", "cpu", "--out"]
    assert train.main([*words, str(tmp_path / "whole.safetensors")]) == 0
    steps = []

    def interrupted(images: Tensor, shift: int, mirrored: Tensor) -> Tensor:
        if len(steps) == 10:  # in the third pass of four steps
            raise KeyboardInterrupt
        steps.append(len(images))
        return augmented(images, shift, mirrored)

    augmented, killed = train.augmented, tmp_path / "killed.safetensors"
    monkeypatch.setattr(train, "augmented", interrupted)
    assert train.main([*words, str(killed)]) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert not killed.exists()
    steps.clear()
    assert train.main([*words, str(killed), "--seed", "1"]) == 130  # another command begins anew
    steps.clear()
    assert train.main([*words, str(killed)]) == 130
    steps.clear()
    assert train.main([*words, str(killed)]) == 0
    assert len(steps) == 8  # the last two passes
    whole, again = load_file(tmp_path / "whole.safetensors"), load_file(killed)
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert sorted(p.name for p in tmp_path.glob("killed*")) == ["killed.safetensors"]


def test_every_image_is_mirrored_in_every_second_pass(
    image_folder: ImageFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    def spy(images: Tensor, shift: int, mirrored: Tensor) -> Tensor:
        seen.append((images, mirrored))
        return images

    monkeypatch.setattr(train, "augmented", spy)
    words = ["--dataset", str(image_folder(count=16)), "--epochs", "2", "--batch_size", "31", "--width", "4"]
    words += ["--out", str(tmp_path / "extractor.safetensors"), "--device", "cpu"]
    assert train.main(words) == 0
    assert not torch.cat([mirrored for _, mirrored in seen]).any()
    seen.clear()
    assert train.main([*words, "--flip"]) == 0
    first, second = ({i.numpy().tobytes(): bool(m) for i, m in zip(*batch, strict=True)} for batch in seen)
    assert len(first) == 31
    assert {image: not mirrored for image, mirrored in first.items()} == second
    assert 0 < sum(first.values()) < 31


def test_the_norms_know_clean_images_at_the_end(network: Classifier) -> None:
    """In eval mode every norm sees, over the images that settled it, mean 0 and variance 1."""
    pictures = torch.randint(0, 256, (40, 3, 8, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    for norm in (module for module in network.modules() if isinstance(module, torch.nn.BatchNorm2d)):
        norm.running_mean.fill_(7)
    train.recalibrate_batchnorm(network, pictures)
    network.eval()
    norm, seen = network.groups[0].norms[1], []
    norm.register_forward_hook(lambda module, inputs, output: seen.append(output))
    network.extract(pictures)
    torch.testing.assert_close(seen[0].mean(dim=(0, 2, 3)), torch.zeros(4), rtol=0, atol=1e-2)
    torch.testing.assert_close(seen[0].var(dim=(0, 2, 3)), torch.ones(4), rtol=0, atol=2e-2)


def test_a_small_batch_takes_smaller_steps() -> None:
    def rates(size: str) -> list[float]:
        args = train.parse(["--dataset", "x", "--out", "x", "--batch_size", size])
        optimizer = train.make_optimizer(Classifier(ClassifierConfig(1, (8, 8), 2)), args)
        return [group["lr"] for group in optimizer.param_groups]

    assert rates("500") == rates("1000") == pytest.approx([0.75, 48])
    assert rates("125") == pytest.approx([0.375, 6])


def test_the_rate_goes_up_and_down() -> None:
    rates = [train.lr_schedule(i / 100) for i in range(101)]
    assert rates[0] == pytest.approx(0.2)
    assert max(rates) == rates[25] == 1
    assert rates[100] == pytest.approx(0.05)
