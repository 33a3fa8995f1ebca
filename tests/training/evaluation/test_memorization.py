"""Whether copies of training images are told from images that are new."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from model.images import from_uint8
from training import data, evaluate
from training.evaluation import memorization
from training.evaluation.memorization import nearest, report

Evaluated = Callable[..., dict[str, Any]]


@pytest.mark.parametrize("parts", [7, 1000])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_the_nearest_are_those_of_a_plain_search(
    parts: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memorization, "BATCH_SIZE", parts)
    draw = torch.Generator().manual_seed(0)
    queries, points = (torch.randint(0, 256, (n, 12), generator=draw).to(dtype) for n in (9, 50))
    points[13] = queries[4]
    distances, which = nearest(queries, points, 3)
    plain = (queries.double()[:, None] - points.double()).norm(dim=2)
    expected = plain.sort(dim=1)
    torch.testing.assert_close(distances, expected.values[:, :3])
    assert torch.equal(which, expected.indices[:, :3])
    assert (distances[4, 0], which[4, 0]) == (0, 13)
    for count in (1, 3, 4):  # fewer points than are asked for
        assert nearest(queries, points[:count], 5)[1].sort(dim=1).values.tolist() == [list(range(count))] * 9


def test_a_copy_far_from_the_others_is_at_no_distance() -> None:
    """|q|² + |p|² - 2·q·p alone would put it anywhere within 50 in float32."""
    points = torch.full((5, 100), 20_000.0) + torch.arange(5.0)[:, None]
    distances, which = nearest(torch.cat([points[2:3], -points[:1]]), points, 3)
    assert distances[0].tolist() == [0, 10, 10]
    assert which[0, 0] == 2
    assert which[1].tolist() == [0, 1, 2]


def test_a_report_says_how_much_nearer_samples_are() -> None:
    held_out = torch.arange(1.0, 1001.0)
    same = report(held_out, held_out)
    assert same["ratio"] == 1
    assert (same["nearer_than_1_percent"], same["nearer_than_5_percent"]) == (0.01, 0.05)
    assert same["held_out"] == {
        "minimum": 1,
        "1_percent": pytest.approx(11, abs=0.1),
        "5_percent": pytest.approx(51, abs=0.1),
        "median": 500.5,
    }
    copies = report(torch.cat([held_out[:500], torch.zeros(500)]), held_out)
    assert copies["nearer_than_1_percent"] == pytest.approx(0.51, abs=0.01)
    assert copies["generated"]["minimum"] == 0
    assert copies["ratio"] < 0.01


def faces(n: int, seed: int) -> Tensor:
    """Smooth images of which no two are alike, uint8 [n, 1, 8, 8]."""
    coarse = torch.rand(n, 1, 3, 3, generator=torch.Generator().manual_seed(seed))
    return (torch.nn.functional.interpolate(coarse, 8, mode="bilinear") * 255).byte()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for split, count, seed in (("train", 200, 0), ("test", 60, 1)):
        for i, image in enumerate(faces(3 * count, seed)):
            path = tmp_path / "faces" / split / ("cat", "dog", "emu")[i % 3] / f"{i:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image[0].numpy()).save(path)
    return tmp_path / "faces"


@pytest.mark.slow
@pytest.mark.parametrize("copies", [True, False])
def test_a_network_that_copies_is_found_out(
    copies: bool,
    folder: Path,
    evaluation: list[str],
    evaluated: Evaluated,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    train, _ = data.load(str(folder))
    images = train.images[torch.randperm(600, generator=torch.Generator().manual_seed(3))] if copies else faces(600, 2)

    def fake(network: object, schedule: object, shape: tuple[int, ...], **kwargs: Any) -> Tensor:
        chosen = from_uint8(images[kwargs["indices"]])
        return chosen + 0.01 * torch.randn(chosen.shape, generator=torch.Generator().manual_seed(0))

    monkeypatch.setattr(evaluate, "sample", fake)
    words = [*evaluation, "--dataset", str(folder), "--num_images", "180", "--neighbours", "150"]
    found = evaluated(words)["neighbours"]
    assert (found["images"], found["train_images"]) == (150, 600)
    for space in ("pixels", "features"):
        if copies:
            assert found[space]["ratio"] < 0.5
            assert found[space]["nearer_than_1_percent"] > 0.8
        else:
            assert 0.85 < found[space]["ratio"] < 1.15
            assert found[space]["nearer_than_1_percent"] < 0.06
    assert "nearest train image, by pixels: " in capsys.readouterr().out
    with Image.open(tmp_path / "result-neighbours.png") as picture:
        times = 8
        assert picture.size == (13 * 8 * times, 16 * 8 * times)
        shown = np.asarray(picture)[::times, ::times].reshape(16, 8, 13, 8).transpose(0, 2, 1, 3).astype(int)
    assert (shown[:, (1, 7)] == 255).all()
    drawn = fake(None, None, (), indices=list(range(5)))  # the noise is that of each batch of five
    np.testing.assert_allclose(shown[:5, 0], ((drawn[:, 0] + 1) * 127.5).clamp(0, 255), atol=0.51)
    gaps = [np.abs(shown[:, column] - shown[:, 0]).mean() for column in (2, 6)]
    assert gaps[0] < gaps[1]  # the nearest is first
    if copies:
        np.testing.assert_allclose(shown[:, 2], images[:16, 0].numpy())
        assert gaps[0] < 2


def test_nobody_is_asked_for_neighbours_unless_wanted(
    evaluation: list[str], evaluated: Evaluated, tmp_path: Path
) -> None:
    assert "neighbours" not in evaluated(evaluation)
    assert not (tmp_path / "result-neighbours.png").exists()
