import base64
import io
import json
import zipfile
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import httpx
import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image as Pillow

from model.images import Image
from tests.app.conftest import BEETLE, GREY, serving, write_checkpoint
from tests.app.processes import metric

PNG, JSON, ZIP = "image/png", "application/json", "application/zip"


def generate(client: TestClient, accept: str = PNG, /, **body: Any) -> httpx.Response:
    answer = client.post("/generate", json=body, headers={"Accept": accept})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == accept
    return answer


def picture(data: bytes) -> Image:
    return np.array(Pillow.open(io.BytesIO(data)))


def text_of(data: bytes) -> dict[str, str]:
    return dict(Pillow.open(io.BytesIO(data)).text)


def tiles(grid: Image, n: int, size: tuple[int, int] = (8, 12)) -> list[Image]:
    h, w = size
    columns = grid.shape[1] // w
    return [grid[i // columns * h :, i % columns * w :][:h, :w] for i in range(n)]


def unzipped(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as opened:
        return {name: opened.read(name) for name in opened.namelist()}


@pytest.mark.parametrize(
    ("n", "columns", "rows_by_columns"),
    [
        (1, None, (1, 1)),
        (5, None, (2, 3)),
        (9, None, (3, 3)),
        (5, 2, (3, 2)),
        (5, 5, (1, 5)),
        (3, 99, (1, 3)),
        (2, 1, (2, 1)),
    ],
)
def test_the_grid_is_as_square_as_can_be_or_as_wide_as_asked(
    client: TestClient, n: int, columns: int | None, rows_by_columns: tuple[int, int]
) -> None:
    rows, across = rows_by_columns
    grid = picture(generate(client, n=n, columns=columns, steps=1).content)
    assert grid.shape == (8 * rows, 12 * across)
    assert all(tile.std() > 1 for tile in tiles(grid, n))
    assert not np.any(tiles(grid, rows * across)[n:])  # places that nobody asked for are black


def test_a_grid_of_colours(colour_client: TestClient) -> None:
    assert picture(generate(colour_client, n=3).content).shape == (16, 16, 3)


@pytest.mark.parametrize("accept", [PNG, JSON, ZIP])
def test_a_drawn_seed_sent_back_gives_the_same_bytes(client: TestClient, accept: str) -> None:
    first = generate(client, accept, n=3, class_label=1)
    again = generate(client, accept, n=3, class_label=1, seed=int(first.headers["x-ddpm-seed"]))
    assert again.content == first.content
    assert generate(client, accept, n=3, class_label=1).content != first.content


@pytest.mark.parametrize("accept", [PNG, ZIP])
def test_equal_requests_give_equal_bytes_with_other_request_ids(client: TestClient, accept: str) -> None:
    body = {"n": 3, "seed": 4}
    answers = [
        client.post("/generate", json=body, headers={"Accept": accept, "X-Request-Id": name}) for name in ("a", "b")
    ]
    assert answers[0].content == answers[1].content


@pytest.mark.parametrize("label", [1, None])
def test_json_zip_and_grid_hold_the_same_images(client: TestClient, label: int | None) -> None:
    body = {"n": 5, "seed": 11, "class_label": label, "index": 2}
    wanted = tiles(picture(generate(client, **body).content), 5)
    listed = generate(client, JSON, **body).json()["images"]
    for image, tile in zip(listed, wanted, strict=True):
        np.testing.assert_array_equal(picture(base64.b64decode(image["png"])), tile)
    files = unzipped(generate(client, ZIP, **body).content)
    assert list(files) == [f"{image['class_label']}-{image['index']}.png" for image in listed]
    for data, tile in zip(files.values(), wanted, strict=True):
        np.testing.assert_array_equal(picture(data), tile)


@pytest.mark.slow
@pytest.mark.parametrize("i", [0, 3])
def test_one_image_of_a_grid_can_be_had_again_alone(client: TestClient, i: int) -> None:
    grid = generate(client, n=4, seed=6, class_label=2, sampler="ddpm")
    alone = generate(client, n=1, seed=6, class_label=2, sampler="ddpm", index=i)
    np.testing.assert_array_equal(picture(alone.content), tiles(picture(grid.content), 4)[i])


def test_images_differ_by_seed_index_class_and_schedule(client: TestClient) -> None:
    base: dict[str, Any] = {"seed": 1, "class_label": 0, "steps": 4}
    changes: list[dict[str, Any]] = [
        {},
        {"seed": 2},
        {"index": 1},
        {"class_label": 1},
        {"steps": 5},
        {"sampler": "ddpm"},
        {"sampler": "dpmpp_2m"},
        {"eta": 0.5},
        {"guidance_scale": 3.0},
    ]
    seen = {picture(generate(client, **(base | change)).content).tobytes() for change in changes}
    assert len(seen) == len(changes)


def test_a_random_mix_is_reproducible_and_its_classes_are_told(client: TestClient) -> None:
    listed = generate(client, JSON, n=24, seed=3).json()["images"]
    assert {image["class_label"] for image in listed} == {"plain", 1, 2}  # 0 is the third one's name
    assert generate(client, JSON, n=24, seed=3).json()["images"] == listed
    for image in listed[:4]:
        place = {name: image[name] for name in ("seed", "index", "class_label")}
        assert generate(client, JSON, **place).json()["images"] == [image]  # with its class
        mixed = generate(client, JSON, seed=3, index=image["index"]).json()["images"]
        assert mixed == [image]  # and as part of the mix


@pytest.mark.parametrize(("one", "same"), [(1, "1"), (1, BEETLE), (1, 1.0), ("plain", "PLAIN"), (2, "0"), (2, 0)])
def test_a_class_can_be_named_or_numbered(client: TestClient, one: int | str, same: int | float | str) -> None:
    images = [generate(client, JSON, seed=1, class_label=label).json()["images"][0] for label in (one, same)]
    assert images[0] == images[1]
    assert images[0]["class_label"] == one


def test_headers_and_text_say_what_to_send_again(client: TestClient) -> None:
    first = generate(client, n=2, seed=5, index=3, class_label=BEETLE, sampler="ddim", steps=4, eta=0.123456789)
    told = {name.removeprefix("x-ddpm-"): unquote(v) for name, v in first.headers.items() if name.startswith("x-ddpm")}
    assert told.pop("nfe") == "4"
    assert {name.replace("-", "_"): value for name, value in told.items()} == text_of(first.content)
    card = client.get("/models").json()["models"][0]
    assert (told["model"], told["checkpoint"]) == (card["name"], card["checkpoint"])
    again = generate(
        client,
        n=2,
        seed=int(told["seed"]),
        index=int(told["index"]),
        class_label=told["class-label"],
        sampler=told["sampler"],
        steps=int(told["steps"]),
        eta=float(told["eta"]),
        guidance_scale=float(told["guidance-scale"]),
    )
    assert again.content == first.content


def test_a_mix_names_no_class_and_comes_again_without_one(client: TestClient, colour_client: TestClient) -> None:
    for served in (client, colour_client):
        first = generate(served, n=5, seed=3)
        told = {name: unquote(v) for name, v in first.headers.items() if name.startswith("x-ddpm")}
        assert "x-ddpm-class-label" not in told
        assert "class_label" not in text_of(first.content)
        # The rule for clients: send what is there.
        numbers = {name: json.loads(told[f"x-ddpm-{name}"]) for name in ("seed", "index", "steps", "eta")}
        assert generate(served, n=5, sampler=told["x-ddpm-sampler"], **numbers).content == first.content


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_guidance_and_spacing_are_reported_and_can_be_sent_again(client: TestClient, sampler: str) -> None:
    how = {"guidance_scale": 3, "guidance_interval": [0.2, 0.8], "spacing": "logsnr", "limit": "dynamic"}
    first = generate(client, seed=5, sampler=sampler, steps=5, **how)
    assert first.content != generate(client, seed=5, sampler=sampler, steps=5, guidance_scale=3).content
    told = text_of(first.content)
    assert (told["guidance_interval"], told["spacing"], told["limit"]) == ("0.2,0.8", "logsnr", "dynamic")
    listed = generate(client, JSON, seed=5, sampler=sampler, steps=5, **how).json()
    assert listed.items() >= how.items()
    names = ("seed", "sampler", "steps", "guidance_scale", "guidance_interval", "spacing", "limit")
    query = {name: told[name] for name in names} | {"format": "gif", "frames": 1}
    assert client.get("/diffusion-sequence", params=query).headers["x-ddpm-guidance-interval"] == "0.2,0.8"
    twice = {**query, "guidance_interval": ["0.2", "0.8"]}
    assert client.get("/diffusion-sequence", params=twice).headers["x-ddpm-guidance-interval"] == "0.2,0.8"


@pytest.mark.parametrize(
    "interval", [[0.5], [0.1, 0.2, 0.3], "0.2,0.8", ["a", "b"], [0.9, 0.1], [None, 1], ["0.2,0.8"]]
)
def test_an_interval_that_is_none_is_refused(client: TestClient, interval: Any) -> None:
    answer = client.post("/generate", json={"guidance_scale": 2, "guidance_interval": interval})
    assert answer.status_code == 422
    assert "guidance_interval" in answer.json()["error"]["param"]
    query = {"guidance_scale": 2, "guidance_interval": interval if interval != "0.2,0.8" else "0.2;0.8"}
    if interval != ["0.2,0.8"]:
        answer = client.get("/diffusion-sequence", params=query)
        assert answer.status_code == 422


def test_headers_are_ascii_and_the_png_has_the_plain_name(client: TestClient) -> None:
    answer = generate(client, class_label=1)
    assert answer.headers["x-ddpm-class-label"] == "K%C3%A4fer %E2%86%92 %E8%99%AB"
    assert text_of(answer.content)["class_label"] == BEETLE
    assert answer.headers["vary"] == "Accept"


def test_every_file_of_a_zip_says_how_to_make_it_alone(client: TestClient) -> None:
    for name, data in unzipped(generate(client, ZIP, n=3, seed=8).content).items():
        text = text_of(data)
        shown = {"plain": "plain", BEETLE: "1", "0": "2"}  # what to send for it: 0 is the third one's name
        assert name == f"{shown[text['class_label']]}-{text['index']}.png"
        alone = generate(client, seed=8, index=int(text["index"]), class_label=text["class_label"])
        assert alone.content == data


def test_json_tells_the_schedule_and_the_checkpoint(client: TestClient) -> None:
    answer = generate(client, JSON, sampler="ddim", steps=3, eta=0.5, guidance_scale=2, class_label=1).json()
    card = client.get("/models").json()["models"][0]
    schedule = {"sampler": "ddim", "steps": 3, "eta": 0.5, "guidance_scale": 2.0}
    assert answer.items() >= (schedule | {"model": card["name"], "checkpoint": card["checkpoint"]}).items()
    assert answer["images"][0]["class_name"] == BEETLE


def test_an_unconditional_checkpoint_takes_only_a_null_class(colour_client: TestClient) -> None:
    (image,) = generate(colour_client, JSON, class_label=None, seed=1).json()["images"]
    assert (image["class_label"], image["class_name"]) == (None, None)
    assert list(unzipped(generate(colour_client, ZIP, n=2, seed=1).content)) == ["0.png", "1.png"]
    refused = colour_client.post("/generate", json={"class_label": 0})
    assert refused.status_code == 422
    assert refused.json()["error"]["code"] == "invalid_class_label"


@pytest.mark.parametrize("n", [1, 64])
@pytest.mark.parametrize("seed", [0, 2**53, 2**64 - 1])
def test_the_ends_of_the_ranges_are_served(client: TestClient, n: int, seed: int) -> None:
    body = {"n": n, "seed": seed, "index": 2**31 - 1, "steps": 1, "guidance_scale": 0, "eta": 1.0}
    last = generate(client, JSON, **body).json()["images"][-1]
    assert (last["seed"], last["index"]) == (seed, 2**31 - 1 + n - 1)


def test_metrics_count_what_a_request_really_did(client: TestClient) -> None:
    names = (
        "ddpm_image_steps_total",
        "ddpm_images_total",
        "ddpm_batch_size_sum",
        "ddpm_request_queue_time_seconds_count",
    )
    before = client.get("/metrics").text
    generate(client, n=5, steps=7, guidance_scale=2, class_label=1)
    after = client.get("/metrics").text
    assert [metric(after, name) - metric(before, name) for name in names] == [35, 5, 70, 1]
    assert metric(after, "ddpm_wasted_image_steps_total") == metric(before, "ddpm_wasted_image_steps_total")


@pytest.mark.parametrize("n", [1, 3])
def test_an_array_holds_the_pixels_of_the_pngs(client: TestClient, colour_client: TestClient, n: int) -> None:
    for served, mode in ((client, "L"), (colour_client, "RGB")):
        answer = generate(served, "application/x-npy", n=n, seed=5)
        array = np.load(io.BytesIO(answer.content), allow_pickle=False)
        files = generate(served, ZIP, n=n, seed=5)
        assert array.dtype == np.uint8
        np.testing.assert_array_equal(array, [picture(data) for data in unzipped(files.content).values()])
        assert Pillow.fromarray(array[0]).mode == mode
        assert answer.headers["x-ddpm-seed"] == "5"
        assert generate(served, "application/x-npy", n=n, seed=5).content == answer.content


def test_the_class_of_a_json_image_can_be_sent_again(tmp_path: Path) -> None:
    names = ("10", "2", "0")  # as folders sort: each is the number of another
    with serving(write_checkpoint(tmp_path / "numbers.safetensors", GREY, names)) as client:
        images = generate(client, JSON, n=24, seed=3).json()["images"]
        assert {(image["class_label"], image["class_name"]) for image in images} == {("10", "10"), (1, "2"), ("0", "0")}
        for image in {image["class_name"]: image for image in images}.values():
            place = {name: image[name] for name in ("seed", "index", "class_label")}
            assert generate(client, JSON, **place).json()["images"] == [image]


@pytest.mark.slow
@pytest.mark.parametrize("asked", [2, 2.0, "2", "2.0", "02"])
def test_a_number_means_one_class_in_json_and_query(tmp_path: Path, asked: int | float | str) -> None:
    with serving(write_checkpoint(tmp_path / "numbers.safetensors", GREY, ("10", "2", "0"))) as client:
        made = client.post("/generate", json={"class_label": asked, "steps": 1})
        shown = client.get("/diffusion-sequence", params={"class_label": asked, "steps": 1, "format": "gif"})
        assert [answer.headers["x-ddpm-class-label"] for answer in (made, shown)] == ["2", "2"]


def test_several_accept_lines_are_one_list(client: TestClient) -> None:
    lines = [("Content-Type", JSON), ("Accept", "text/plain"), ("Accept", JSON)]
    answer = client.post("/generate", content=b"{}", headers=lines)
    assert (answer.status_code, answer.headers["content-type"]) == (200, JSON)
    lines = [("Accept", "text/plain"), ("Accept", "image/gif")]
    shown = client.get("/diffusion-sequence?steps=1", headers=lines)
    assert shown.headers["content-type"] == "image/gif"


def test_each_class_in_turn_is_those_classes_alone(client: TestClient) -> None:
    several = json.loads(generate(client, JSON, each_class=True, n=4, seed=3, index=2).content)["images"]
    assert [image["class_name"] for image in several] == ["0", "plain", BEETLE, "0"]
    for image in several:
        alone = {key: image[key] for key in ("class_label", "seed", "index")}
        assert json.loads(generate(client, JSON, **alone).content)["images"][0]["png"] == image["png"]


def test_each_class_is_told_so_that_it_comes_again(client: TestClient) -> None:
    answer = generate(client, each_class=True, n=3, seed=3)
    assert answer.headers["x-ddpm-each-class"] == text_of(answer.content)["each_class"] == "true"
    query = "/diffusion-sequence?each_class=true&n=3&seed=3&format=sse&frames=1"
    assert base64.b64encode(answer.content).decode() in client.get(query).text
    assert "x-ddpm-each-class" not in generate(client, seed=3).headers


@pytest.mark.parametrize("label", [0, "plain"])
def test_each_class_beside_one_class_is_refused(
    client: TestClient, colour_client: TestClient, label: int | str
) -> None:
    answer = client.post("/generate", json={"each_class": True, "class_label": label})
    assert (answer.status_code, answer.json()["error"]["param"]) == (422, "each_class")
    answer = colour_client.post("/generate", json={"each_class": True})
    assert (answer.status_code, answer.json()["error"]["param"]) == (422, "each_class")
