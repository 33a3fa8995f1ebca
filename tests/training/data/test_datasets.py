import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from training import data
from training.data.datasets import DataError

ImageFolder = Callable[..., Path]
MNIST = Path(__file__).parents[4] / "shared" / "data" / "mnist"


def counts(images: data.Images) -> list[int]:
    assert images.labels is not None
    return images.labels.bincount(minlength=len(images.class_names)).tolist()


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("RGB", 3)])
def test_a_folder_of_images_per_class(mode: str, channels: int, image_folder: ImageFolder) -> None:
    folder = image_folder(count=30, size=(8, 12), mode=mode)
    train, validation = data.load(str(folder))
    assert train.images.shape == (57, channels, 8, 12)
    assert train.images.dtype == torch.uint8
    assert train.class_names == validation.class_names == ("cat", "dog")
    assert (train.name, len(validation)) == ("pictures", 3)
    assert [a + b for a, b in zip(counts(train), counts(validation), strict=True)] == [30, 30]
    bright = train.images.float().mean(dim=(1, 2, 3)) > 100
    assert train.labels is not None
    assert torch.equal(bright, train.labels == 1)


def test_pixels_are_those_of_the_file(image_folder: ImageFolder) -> None:
    folder = image_folder(mode="RGB")
    train, _ = data.load(str(folder))
    pixels = np.asarray(Image.open(folder / "cat" / "000.png"))
    assert np.array_equal(train.images[0].permute(1, 2, 0).numpy(), pixels)


def test_every_twentieth_image_is_held_out_without_a_test_split(image_folder: ImageFolder) -> None:
    train, validation = data.load(str(image_folder(classes=("cat",), count=40)))
    assert (len(train), len(validation)) == (38, 2)
    held_out = np.asarray(Image.open(image_folder(classes=("cat",), count=40) / "cat" / "019.png"))
    assert np.array_equal(validation.images[0, 0].numpy(), held_out)


@pytest.mark.parametrize("held_out", ["test", "validation", "val"])
def test_folders_train_and_test_are_splits(held_out: str, image_folder: ImageFolder, tmp_path: Path) -> None:
    image_folder("pictures/train", count=20)
    image_folder(f"pictures/{held_out}", count=3)
    train, validation = data.load(str(tmp_path / "pictures"))
    assert (counts(train), counts(validation)) == ([20, 20], [3, 3])
    assert train.class_names == ("cat", "dog")


def test_validation_is_preferred_to_test(image_folder: ImageFolder, tmp_path: Path) -> None:
    for split, count in {"train": 20, "test": 3, "validation": 4}.items():
        image_folder(f"pictures/{split}", count=count)
    assert len(data.load(str(tmp_path / "pictures"))[1]) == 8


@pytest.mark.parametrize("name", ["train", "test", "a-dev"])
def test_a_class_may_be_called_like_a_split(name: str, image_folder: ImageFolder) -> None:
    train, _ = data.load(str(image_folder(classes=("car", name), count=20)))
    assert set(train.class_names) == {"car", name}
    assert len(train) == 38


def test_other_files_and_hidden_folders_are_passed_over(image_folder: ImageFolder) -> None:
    folder = image_folder(classes=("cat", ".ipynb_checkpoints", "dog"), count=20)
    (folder / "cat" / "Thumbs.db").write_bytes(b"x")
    (folder / "labels.csv").write_text("a,b")
    train, _ = data.load(str(folder))
    assert train.class_names == ("cat", "dog")


def test_images_without_folders_have_no_classes(image_folder: ImageFolder) -> None:
    folder = image_folder(classes=(".",), count=20)
    train, validation = data.load(str(folder))
    assert train.labels is None
    assert (len(train), len(validation), train.class_names) == (19, 1, ())


def test_different_sizes_need_an_image_size(image_folder: ImageFolder) -> None:
    folder = image_folder(count=20)
    Image.new("L", (30, 10)).save(folder / "dog" / "wide.png")
    with pytest.raises(DataError, match=r"12×8 and 30×10.*--image_size"):
        data.load(str(folder))
    train, _ = data.load(str(folder), (6, 5))
    assert train.images.shape[1:] == (1, 6, 5)


def test_a_test_split_of_another_size_needs_an_image_size_too(image_folder: ImageFolder, tmp_path: Path) -> None:
    image_folder("pictures/train", count=20)
    image_folder("pictures/test", count=3, size=(9, 9))
    with pytest.raises(DataError, match="--image_size"):
        data.load(str(tmp_path / "pictures"))


def test_image_size_crops_instead_of_stretching(tmp_path: Path) -> None:
    picture = np.zeros((8, 24), np.uint8)
    picture[:, 8:16] = 255  # the middle third
    for i in range(20):
        Image.fromarray(picture).save(tmp_path / f"{i}.png")
    train, _ = data.load(str(tmp_path), (8, 8))
    assert (train.images == 255).all()


def test_one_image_in_colour_makes_all_of_them_rgb(image_folder: ImageFolder) -> None:
    folder = image_folder(count=20, size=(8, 12))
    before, _ = data.load(str(folder))
    Image.new("RGB", (12, 8), (255, 0, 9)).save(folder / "dog" / "zzz.png")
    train, _ = data.load(str(folder))
    assert torch.equal(train.images[:38], before.images.expand(-1, 3, -1, -1))
    assert train.images[38, :, 0, 0].tolist() == [255, 0, 9]


def one_image(picture: Image.Image, folder: Path, **options: Any) -> list[int]:
    """The first pixel of a data set of twenty copies of `picture`."""
    for i in range(20):
        picture.save(folder / f"{i:02d}.png", **options)
    return data.load(str(folder))[0].images[0, :, 0, 0].tolist()


def palette() -> Image.Image:
    picture = Image.new("P", (4, 4), 1)
    picture.putpalette([0, 0, 0, 10, 20, 30])
    return picture


@pytest.mark.parametrize(
    ("picture", "options", "pixel"),
    [
        (Image.new("1", (4, 4), 1), {}, [255]),
        (Image.fromarray(np.full((4, 4), 51_400, np.uint16)), {}, [200]),
        (Image.new("LA", (4, 4), (40, 255)), {}, [40]),
        (Image.new("LA", (4, 4), (40, 0)), {}, [255]),
        (Image.new("RGBA", (4, 4), (10, 20, 30, 0)), {}, [255, 255, 255]),
        (Image.new("RGBA", (4, 4), (0, 100, 200, 51)), {}, [204, 224, 244]),
        (palette(), {}, [10, 20, 30]),
        (palette(), {"transparency": 1}, [255, 255, 255]),
    ],
    ids=["1 bit", "16 bits", "LA", "LA clear", "RGBA clear", "RGBA", "palette", "palette clear"],
)
def test_pictures_of_every_kind_become_eight_bits(
    picture: Image.Image, options: dict[str, Any], pixel: list[int], tmp_path: Path
) -> None:
    assert one_image(picture, tmp_path, **options) == pixel


def test_a_photo_is_turned_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    for i in range(20):
        Image.new("RGB", (6, 4)).save(tmp_path / f"{i}.jpg", exif=exif)
    assert data.load(str(tmp_path))[0].images.shape[2:] == (6, 4)


def parquet(folder: Path, labels: dict[str, list[int]], names: tuple[str, ...] = ("cat", "dog")) -> Path:
    """A folder as the hub lays it out: data/SPLIT-00000-of-00001.parquet; image i of a split is of shade i."""
    import datasets

    (folder / "data").mkdir(parents=True)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(names))})
    for split, values in labels.items():
        pictures = [Image.new("L", (5, 4), i) for i in range(len(values))]
        table = datasets.Dataset.from_dict({"image": pictures, "label": values}, features=features)
        table.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    return folder


def test_parquet_in_the_layout_of_the_hub(tmp_path: Path) -> None:
    folder = parquet(tmp_path / "toy", {"train": [0, 1] * 12, "test": [1, 1, 0]})
    train, validation = data.load(str(folder))
    assert train.images.shape == (24, 1, 4, 5)
    assert train.images[:, 0, 0, 0].tolist() == list(range(24))
    assert (counts(train), counts(validation)) == ([12, 12], [1, 2])
    assert (train.class_names, train.name) == (("cat", "dog"), "toy")


def test_labels_that_are_not_told_are_none(tmp_path: Path) -> None:
    train, validation = data.load(str(parquet(tmp_path / "toy", {"train": [0, 1] * 12, "test": [-1, -1]})))
    assert train.labels is not None
    assert validation.labels is None


def test_what_cannot_be_read_is_told(image_folder: ImageFolder, tmp_path: Path) -> None:
    def why(dataset: str | Path) -> str:
        with pytest.raises(DataError) as error:
            data.load(str(dataset))
        return str(error.value)

    assert "there is no folder './nowhere'" in why("./nowhere")
    assert "there is no folder '/nowhere/at/all'" in why("/nowhere/at/all")
    assert "there is no such folder, and the Hugging Face hub" in why("nobody/nothing")
    (tmp_path / "empty").mkdir()
    assert "doesn't contain any data files" in why(tmp_path / "empty")
    assert "is a file" in why(__file__)
    assert "at least 20 are needed" in why(image_folder("few", count=5))
    (tmp_path / "table").mkdir()
    (tmp_path / "table" / "train.csv").write_text("a,b\n1,2\n")
    assert "no column of images, only a, b" in why(tmp_path / "table")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "train.parquet").write_bytes(b"not parquet at all")
    assert "cannot read the data set" in why(tmp_path / "broken")
    folder = image_folder("bad", count=20)
    whole = (folder / "cat" / "003.png").read_bytes()
    (folder / "cat" / "003.png").write_bytes(whole[: len(whole) // 2])
    assert "bad/cat/003.png is not a readable image" in why(folder)


@pytest.mark.slow
def test_a_name_that_the_hub_cannot_give_ends_in_one_sentence(
    start: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    process = start("training.train", "--log_dir", str(tmp_path), "--device", "cpu")  # CIFAR-10 from the hub
    _, err = process.communicate(timeout=300)
    assert process.returncode == 2
    assert err.splitlines() == [err.strip()]
    assert err.startswith(
        "training.train: cannot read the data set 'uoft-cs/cifar10': there is no such folder, and the Hugging"
    )


@pytest.mark.skipif(not MNIST.is_dir(), reason="no ../shared/data/mnist here")
def test_the_real_digits(tmp_path: Path) -> None:
    os.symlink(MNIST / "test-00000-of-00001.parquet", tmp_path / "test-00000-of-00001.parquet")
    train, validation = data.load(str(tmp_path))  # with no other split, the test split is it
    assert train.images.shape == (9500, 1, 28, 28)
    assert len(validation) == 500
    assert train.class_names == tuple("0123456789")
    assert [a + b for a, b in zip(counts(train), counts(validation), strict=True)] == [
        *(980, 1135, 1032, 1010, 982),
        *(892, 958, 1028, 974, 1009),
    ]
