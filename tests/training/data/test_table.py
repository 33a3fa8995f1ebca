import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.training.data.conftest import Counts, Draw
from training import data

Counting = Callable[..., Counts]
Refusal = Callable[..., str]
NAMES = ("cat", "dog")


def csv_text(column: str = "label", delimiter: str = ",", count: int = 24) -> str:
    rows = [f"{i:03d}.png{delimiter}{NAMES[i % 2]}" for i in range(count)]
    return "\n".join([f"file_name{delimiter}{column}", *rows]) + "\n"


@pytest.mark.parametrize(
    "contents",
    [
        csv_text().encode(),
        csv_text().replace("\n", "\r\n").encode("utf-8-sig"),
        csv_text(delimiter=";").encode(),
        csv_text(delimiter="\t").encode("utf-16"),
        csv_text("Class").replace("0", ".\\0", 1).encode(),
    ],
    ids=["plain", "byte order mark", "semicolons", "UTF-16 and tabs", "slashes"],
)
def test_labels_in_a_csv(contents: bytes, draw: Draw, counts: Counting) -> None:
    dataset = draw(count=24)
    (dataset / "metadata.csv").write_bytes(contents)
    assert counts(dataset) == {"cat": (12, 0), "dog": (11, 1)}
    train, _ = data.load(str(dataset))
    assert train.labels is not None
    assert train.labels[:4].tolist() == [0, 1, 0, 1]


def test_labels_in_json_lines_and_parquet(draw: Draw, counts: Counting) -> None:
    import pyarrow
    import pyarrow.parquet

    draw("train", 24)
    dataset = draw("test", 4)
    rows = [{"file_name": f"train/{i:03d}.png", "digit": i % 12, "text": "x"} for i in range(24)]
    (dataset / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    table = pyarrow.table({"file_name": [f"{i:03d}.png" for i in range(4)], "digit": [0, 11, 2, 10]})
    pyarrow.parquet.write_table(table, dataset / "test" / "metadata.parquet")
    found = counts(dataset, label_column="digit")
    assert list(found) == [str(i) for i in range(12)]
    assert found["10"] == (2, 1)


def test_which_column_is_a_question(draw: Draw, refusal: Refusal, counts: Counting) -> None:
    dataset = draw(count=24)
    rows = [f"{i:03d}.png,{NAMES[i % 2]},{i % 3},{i % 4}" for i in range(24)]
    (dataset / "metadata.csv").write_text("\n".join(["file_name,label,class,view", *rows]))
    assert "metadata.csv has the columns label and class: choose one with --label_column" in refusal(dataset)
    assert data.load(str(dataset))[0].labels is None  # nobody asked for classes
    assert set(counts(dataset, label_column="view")) == set("0123")
    assert "has no column 'lable' (did you mean label?), only label, class, view" in refusal(
        dataset, label_column="lable"
    )
    (dataset / "metadata.csv").write_text(csv_text("breed"))
    assert "no column called label or class, only breed: choose with --label_column" in refusal(dataset)


def test_folders_and_a_table_are_a_question(draw: Draw, refusal: Refusal, counts: Counting) -> None:
    draw("a")
    dataset = draw("b")
    rows = [f"{folder}/{i:03d}.png,{NAMES[i % 2]}" for folder in "ab" for i in range(12)]
    (dataset / "metadata.csv").write_text("\n".join(["file_name,label", *rows]))
    why = refusal(dataset)
    assert (
        "both its folders and metadata.csv name classes: choose by --label_from folder or --label_column label" in why
    )
    assert set(counts(dataset, label_from="folder")) == {"a", "b"}
    assert set(counts(dataset, label_column="label")) == {"cat", "dog"}
    rows = [f"{folder}/{i:03d}.png,{folder}" for folder in "ab" for i in range(12)]
    (dataset / "metadata.csv").write_text("\n".join(["file_name,label", *rows]))
    assert set(counts(dataset)) == {"a", "b"}  # both say the same


def test_gaps_in_a_table_are_named(draw: Draw, refusal: Refusal, counts: Counting) -> None:
    dataset = draw(count=25)
    (dataset / "metadata.csv").write_text(csv_text())
    assert f"1 of 25 has none, such as {dataset}/024.png" in refusal(dataset)
    (dataset / "metadata.csv").write_text(csv_text(count=27))
    why = refusal(dataset)
    assert "metadata.csv names 2 images that are not there: 025.png, 026.png; --skip_broken leaves such rows out" in why
    assert counts(dataset, skip_broken=True) == {"cat": (13, 0), "dog": (11, 1)}


@pytest.mark.parametrize(
    ("values", "why"),
    [
        (["[1]", "2.5"] * 12, ""),
        (["", "cat"] * 12, "12 of 24 have none, such as"),
    ],
)
def test_values_of_a_column(values: list[str], why: str, draw: Draw, refusal: Refusal, counts: Counting) -> None:
    dataset = draw(count=24)
    rows = [f"{i:03d}.png,{value}" for i, value in enumerate(values)]
    (dataset / "metadata.csv").write_text("\n".join(["file_name,label", *rows]))
    if why:
        assert why in refusal(dataset)
    else:
        assert set(counts(dataset)) == set(values)  # in a csv all is text


def test_whole_numbers_that_pandas_wrote_are_whole(draw: Draw, counts: Counting) -> None:
    dataset = draw(count=24)
    rows = [f"{i:03d}.png,{i % 3}.0" for i in range(24)]
    (dataset / "metadata.csv").write_text("\n".join(["file_name,label", *rows]))
    assert list(counts(dataset)) == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("name", "contents", "why"),
    [
        ("metadata.csv", b"file_name,label\n000.png,caf\xe9\n", "metadata.csv is not UTF-8: save it again"),
        ("metadata.csv", b"id,label\n0,cat\n", "metadata.csv has no column file_name"),
        ("metadata.jsonl", b'{"file_name": "000.png"}\n{oops\n', "metadata.jsonl cannot be read: line 2 is not JSON"),
        ("metadata.parquet", b"PAR1", "metadata.parquet cannot be read"),
    ],
)
def test_a_table_that_cannot_be_used(name: str, contents: bytes, why: str, draw: Draw, refusal: Refusal) -> None:
    dataset = draw(count=20)
    (dataset / name).write_bytes(contents)
    assert why in refusal(dataset)
    assert refusal(dataset).count("\n") == 0


def test_a_column_without_a_table_is_refused(draw: Draw, refusal: Refusal) -> None:
    assert "--label_column breed, but" in refusal(draw("cat", 20), label_column="breed")


def test_two_ways_to_say_the_same_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="give one of them"):
        data.LoadOptions(label_from="folder", label_column="label")
