import json
import os
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from tests.training.data.conftest import Counts, Draw
from training import data
from training.data import DataError
from training.data import splits as splits_of
from training.run.config import TrainConfig

Counting = Callable[..., Counts]
Refusal = Callable[..., str]
Capsys = pytest.CaptureFixture[str]


def test_the_first_folder_is_the_class_at_any_depth(draw: Draw, counts: Counting) -> None:
    for folder in ("cat/images", "dog/images/old", "dog/images", "frog"):
        dataset = draw(folder)
    assert counts(dataset) == {"cat": (12, 0), "dog": (23, 1), "frog": (11, 1)}


@pytest.mark.parametrize(
    ("train", "held_out"),
    [("Train", "Test"), ("TRAINING", "Testing"), ("train", "Valid"), ("Training", "validation"), ("train", "dev")],
)
def test_splits_have_their_usual_names(train: str, held_out: str, draw: Draw, counts: Counting) -> None:
    for folder in (f"{train}/cat", f"{train}/dog", f"{held_out}/cat", f"{held_out}/dog"):
        dataset = draw(folder)
    assert counts(dataset) == {"cat": (12, 12), "dog": (12, 12)}


def test_two_folders_of_one_split_are_a_question(draw: Draw, refusal: Refusal) -> None:
    for folder in ("Train/cat", "training/cat", "test/cat"):
        dataset = draw(folder)
    assert "has both Train and training" in refusal(dataset)


def test_a_folder_beside_splits_is_a_question(draw: Draw, refusal: Refusal, counts: Counting) -> None:
    for folder in ("train/cat", "test/cat", "extra"):
        dataset = draw(folder)
    why = refusal(dataset)
    assert "has the folders test and train, which look like splits, and beside them extra" in why
    assert set(counts(dataset, label_from="folder")) == {"train", "test", "extra"}


@pytest.mark.parametrize(
    ("folders", "advice"),
    [
        (("cat/train", "cat/test", "dog/train", "dog/test"), "put the splits at the top"),
        (("photos/train/cat", "photos/test/cat"), "photos"),
    ],
)
def test_splits_within_folders_are_a_question(
    folders: tuple[str, ...], advice: str, draw: Draw, refusal: Refusal
) -> None:
    for folder in folders:
        dataset = draw(folder)
    assert "has splits within its folders" in refusal(dataset)
    assert refusal(dataset).endswith(advice)


def test_one_folder_too_many_is_told(draw: Draw, capsys: Capsys) -> None:
    for folder in ("photos/cat", "photos/dog"):
        dataset = draw(folder)
    assert data.load(str(dataset))[0].class_names == ("photos",)
    assert f"are the classes, give --dataset {dataset}/photos" in capsys.readouterr().err


def test_pictures_are_known_by_their_contents(draw: Draw, counts: Counting, capsys: Capsys) -> None:
    draw("frog", suffix=".avif")
    draw("dog", suffix=".jfif")
    dataset = draw("dog", suffix=".TIFF")
    for i in range(12):
        shutil.move(dataset / "dog" / f"{i:03d}.jfif", dataset / "dog" / f"{i:03d}.jpg_large")
    for name, text in {"notes.txt": "P5 is no picture here", "a.heic": "", "README": "x", "b.svg": "<svg/>"}.items():
        (dataset / "dog" / name).write_text(text)
    assert counts(dataset) == {"dog": (23, 1), "frog": (12, 0)}
    err = capsys.readouterr().err
    assert "4 files passed over that are no images" in err
    assert ".heic" in err
    assert "dog/README" in err


def test_a_class_folder_without_images_is_named(draw: Draw, counts: Counting, capsys: Capsys) -> None:
    dataset = draw("cat")
    draw("dog")
    (dataset / "frog").mkdir()
    (dataset / "frog" / "one.heic").write_bytes(b"x")
    assert set(counts(dataset)) == {"cat", "dog"}
    assert "no class for frog: no images in there" in capsys.readouterr().err


def test_a_pipe_in_the_folder_is_passed_over(draw: Draw, counts: Counting) -> None:
    dataset = draw("cat", 20)
    os.mkfifo(dataset / "cat" / "pipe")
    os.mkfifo(dataset / "cat" / "pipe.png")
    assert counts(dataset) == {"cat": (19, 1)}


def test_archives_beside_class_folders_are_passed_over(draw: Draw, counts: Counting, capsys: Capsys) -> None:
    dataset = draw("cat")
    draw("dog")
    shutil.move(shutil.make_archive(str(dataset.parent / "photos"), "zip", dataset), dataset)
    (dataset / "train.parquet").write_bytes(b"PAR1")
    (dataset / "metadata.csv").write_text("a,b\n1,2\n")
    assert counts(dataset) == {"cat": (12, 0), "dog": (11, 1)}
    err = capsys.readouterr().err
    assert "photos.zip, train.parquet" in err
    assert "passed over: metadata.csv has no column file_name" in err


def test_loose_images_beside_parquet_are_a_question(draw: Draw, refusal: Refusal) -> None:
    dataset = draw(count=20)
    (dataset / "train.parquet").write_bytes(b"PAR1")
    assert "has images, such as 000.png, and train.parquet" in refusal(dataset)


def test_links_that_lead_round_are_followed_once(draw: Draw, counts: Counting, capsys: Capsys) -> None:
    dataset = draw("cat")
    draw("dog")
    draw("../elsewhere/bird")
    os.symlink("..", dataset / "cat" / "all")
    os.symlink("../..", dataset / "cat" / "above")
    os.symlink("dog", dataset / "a dog")  # comes first, and yet the folder itself is the class
    os.symlink("../elsewhere/bird", dataset / "bird")
    os.symlink("itself", dataset / "cat" / "itself")
    assert counts(dataset) == {"bird": (12, 0), "cat": (11, 1), "dog": (12, 0)}
    assert "3 folders passed over, links that lead round: a dog, cat/above, cat/all" in capsys.readouterr().err


def test_what_a_run_wrote_is_no_data(draw: Draw, counts: Counting, refusal: Refusal, capsys: Capsys) -> None:
    dataset = draw("cat")
    draw("dog")
    draw("runs/one", 6)
    (dataset / "runs" / "one" / "config.json").write_text(TrainConfig().to_json())
    (dataset / "runs" / "d-0123.pixels").write_bytes(b"x")
    assert counts(dataset) == {"cat": (12, 0), "dog": (11, 1)}
    assert capsys.readouterr().err == "d: 1 folder passed over, written by a training run: runs/one\n"
    assert "is the folder of a training run" in refusal(dataset / "runs" / "one")
    (dataset / "dog" / "config.json").write_text(json.dumps({"dataset": "mine"}))
    assert set(counts(dataset)) == {"cat", "dog"}


def test_folders_of_systems_are_no_data(draw: Draw, counts: Counting) -> None:
    for folder in ("cat", "dog", "__MACOSX/cat", "@eaDir", ".cache/x"):
        dataset = draw(folder)
    assert set(counts(dataset)) == {"cat", "dog"}


def test_a_stray_image_is_named(draw: Draw, refusal: Refusal) -> None:
    dataset = draw("cat")
    draw("dog")
    Image.new("RGB", (8, 8)).save(dataset / "preview.png")
    assert f"1 of 25 has none, such as {dataset}/preview.png: move what has none away" in refusal(dataset)
    assert len(data.load(str(dataset))[0]) == 24  # without classes it is an image like any


def test_a_test_split_without_classes_is_named(draw: Draw, refusal: Refusal) -> None:
    draw("train/cat")
    dataset = draw("test", 5)
    assert f"5 of 17 have none, those that are held out, such as {dataset}/test/000.png: move" in refusal(dataset)


def test_a_stray_image_beside_splits_is_passed_over(draw: Draw, counts: Counting, capsys: Capsys) -> None:
    draw("train/cat")
    draw("test/cat", 3)
    assert counts(draw(count=1)) == {"cat": (12, 3)}
    assert "1 image passed over beside the splits" in capsys.readouterr().err


@pytest.mark.parametrize("label_from", ["filename", "prefix"])
def test_classes_by_file_name(label_from: str, draw: Draw, counts: Counting, capsys: Capsys) -> None:
    draw(stem="cat_")
    dataset = draw(stem="basset_hound_")
    name = {"filename": "basset_hound", "prefix": "basset"}[label_from]
    assert counts(dataset, label_from=label_from) == {name: (12, 0), "cat": (11, 1)}
    hint = "basset_hound_000.png is of the class basset_hound; by --label_from prefix it would be basset\n"
    assert (hint in capsys.readouterr().err) == (label_from == "filename")


def test_a_flat_folder_says_how_classes_are_told(draw: Draw, refusal: Refusal) -> None:
    why = refusal(draw(count=20, stem="cat_"))
    assert "a metadata.csv with the columns file_name and label, or by --label_from filename (20 of 20 have" in why


def test_a_folder_that_is_not_utf8_is_refused(draw: Draw, refusal: Refusal) -> None:
    dataset = draw("cat")
    draw("dog")
    os.rename(os.fsencode(dataset) + b"/dog", os.fsencode(dataset) + b"/caf\xe9")
    assert f"the name of the folder {dataset}/caf\\xe9 is not UTF-8" in refusal(dataset)
    with pytest.raises(DataError, match=r"caf\\xe9 is not UTF-8"):
        data.load(os.fsdecode(os.fsencode(dataset) + b"/caf\xe9"))


def test_a_file_that_is_not_utf8_is_an_image(draw: Draw, counts: Counting, refusal: Refusal) -> None:
    dataset = draw("cat", 20)
    os.rename(dataset / "cat" / "000.png", os.fsencode(dataset) + b"/cat/\xe9.png")
    assert counts(dataset) == {"cat": (19, 1)}
    Path(os.fsdecode(os.fsencode(dataset) + b"/cat/\xe9.png")).write_bytes(b"")
    assert r"cat/\xe9.png is not a readable image: the file is empty" in refusal(dataset)


def test_class_names_are_composed(draw: Draw, counts: Counting, capsys: Capsys) -> None:
    dataset = draw(unicodedata.normalize("NFD", "café"))
    draw("thé")
    assert set(counts(dataset)) == {"caf\u00e9", "th\u00e9"}
    draw("caf\u00e9", 1)
    assert counts(dataset)["caf\u00e9"] == (13, 0)
    assert "2 folders are called café" in capsys.readouterr().err


def test_numbers_are_classes_in_natural_order(draw: Draw, counts: Counting) -> None:
    for i in range(12):
        dataset = draw(str(i), 2)
    assert list(counts(dataset)) == [str(i) for i in range(12)]
    assert list(counts(draw("x", 2))) == [*sorted(map(str, range(12))), "x"]


def test_an_older_order_of_classes_is_kept(draw: Draw) -> None:
    for i in (2, 10):
        dataset = draw(str(i), level=i * 10)
    train, _ = data.load(str(dataset))
    assert train.class_names == ("2", "10")
    old = train.ordered_as(("10", "2"))
    assert old.labels is not None
    assert old.class_names == ("10", "2")
    assert ((old.images[:, 0, 0, 0] > 60) == (old.labels == 0)).all()
    assert train.ordered_as(("10", "3")) is train
    decomposed = data.Images(train.images, train.labels, ("caf\u00e9", "x"), "d").ordered_as(("x", "cafe\u0301"))
    assert decomposed.class_names == ("x", "cafe\u0301")


def test_held_out_images_are_drawn_by_class(draw: Draw, counts: Counting, capsys: Capsys) -> None:
    draw("ant", 9)
    draw("bee", 9)
    draw("cow", 1)
    assert counts(draw("zebra", 1)) == {"ant": (9, 0), "bee": (8, 1), "cow": (1, 0), "zebra": (1, 0)}
    assert "classes of one image, which is trained on and not held out: cow, zebra" in capsys.readouterr().err


@pytest.mark.parametrize("sizes", [(1, 1, 18), (2,) * 10, (1,) * 30 + (2,) * 5, (400, 100, 20), (19, 1, 3, 500)])
def test_no_class_loses_its_last_image(sizes: tuple[int, ...]) -> None:
    labels = [str(k) for k, size in enumerate(sizes) for _ in range(size)][::-1]
    which = splits_of.drawn(labels)
    assert len(set(which)) == len(which) == min(sum(sizes) // 20, sum(size for size in sizes if size > 1) // 2)
    for k, size in enumerate(sizes):
        held_out = sum(labels[i] == str(k) for i in which)
        assert held_out < size
        assert abs(held_out - size / 20) <= max(1, 0.06 * size)


def test_a_class_without_training_images_is_refused(draw: Draw, refusal: Refusal) -> None:
    draw("train/cat")
    draw("test/cat", 3)
    dataset = draw("test/dog", 3)
    assert "has no image to train on of the class dog" in refusal(dataset)
    assert len(data.load(str(dataset))[1]) == 6  # nothing is wrong with it where classes are not asked for
