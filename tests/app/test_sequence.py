import base64
import email
import io
import json
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from PIL import Image as Pillow
from torch import Tensor

from app.routes.sequence import BOUNDARY
from model import checkpoint
from model.images import Image, to_uint8
from model.sampling.noise import normal
from model.sampling.schedule import make_schedule
from model.sampling.step import sample
from tests.app.conftest import BEETLE, SlowRunner, serving
from tests.app.processes import metric

SEQUENCE = "/diffusion-sequence"


class Event(NamedTuple):
    name: str
    id: str | None
    data: dict[str, Any]


def events(text: str) -> list[Event]:
    """A small reader of text/event-stream (WHATWG HTML, 9.2.6)."""
    assert text.endswith("\n\n")
    found = []
    for block in text[:-2].split("\n\n"):
        if block.startswith(":"):  # a comment
            continue
        fields = dict(line.split(": ", 1) for line in block.split("\n"))
        found.append(Event(fields["event"], fields.get("id"), json.loads(fields["data"])))
    return found


def picture(data: bytes | str) -> Image:
    return np.array(Pillow.open(io.BytesIO(base64.b64decode(data) if isinstance(data, str) else data)))


def watch(client: TestClient, accept: str | None = None, /, **query: Any) -> httpx.Response:
    answer = client.get(SEQUENCE, params=query, headers={"Accept": accept} if accept else {})
    assert answer.status_code == 200, answer.text
    return answer


def finished(client: TestClient, **body: Any) -> Image:
    """The same images by /generate."""
    return picture(client.post("/generate", json=body).content)


def all_frames(client: TestClient, **query: Any) -> list[Image]:
    """Every frame, from a lossless file."""
    opened = Pillow.open(io.BytesIO(watch(client, format="webp", **query).content))
    frames = []
    for i in range(opened.n_frames):
        opened.seek(i)
        frames.append(np.array(opened.convert("L")))
    return frames


def test_events_come_in_order_and_end_with_the_image_of_generate(client: TestClient) -> None:
    answer = watch(client, n=3, seed=5, class_label=1, steps=9, frames=4)
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    start, *frames, completed = events(answer.text)
    assert (start.name, completed.name) == ("start", "completed")
    assert frames
    assert {frame.name for frame in frames} == {"frame"}
    steps = [frame.data["step"] for frame in frames]
    assert steps == sorted(set(steps))
    assert set(steps) <= {0, 3, 6, 9}
    assert [frame.id for frame in frames] == [str(step) for step in steps]
    for frame in frames:
        assert picture(frame.data["png"]).shape == (16, 24)
    wanted = client.post("/generate", json={"n": 3, "seed": 5, "class_label": 1, "steps": 9}).content
    assert base64.b64decode(completed.data["png"]) == wanted


def test_start_says_what_is_coming(client: TestClient) -> None:
    answer = watch(client, n=2, class_label=BEETLE, steps=4, frames=3, view="x0")
    start = events(answer.text)[0].data
    assert start.items() >= {"n": 2, "steps": 4, "frames": 3, "view": "x0", "class_label": BEETLE}.items()
    assert str(start["seed"]) == answer.headers["x-ddpm-seed"]
    again = watch(client, n=2, class_label=BEETLE, steps=4, seed=start["seed"])
    assert events(again.text)[-1].data["png"] == events(answer.text)[-1].data["png"]
    assert events(watch(client, steps=2).text)[0].data["class_label"] is None  # a mix


def test_the_frames_of_a_stream_are_those_of_the_file(held: SlowRunner, grey_checkpoint: Path) -> None:
    with serving(grey_checkpoint, held) as client:
        _, *shown, _ = events(watch(client, steps=6, frames=4, seed=1).text)
        frames = all_frames(client, steps=6, frames=4, seed=1)
    assert shown[-1].data["step"] == 6  # those before may be skipped where the client is slow
    for event in shown:
        np.testing.assert_array_equal(picture(event.data["png"]), frames[event.data["step"] // 2])


@pytest.mark.parametrize("view", ["xt", "x0"])
def test_frames_show_the_states_of_the_naive_loop(client: TestClient, grey_checkpoint: Path, view: str) -> None:
    loaded = checkpoint.load(grey_checkpoint)
    states = {0: normal(2, 0, 0, (1, 8, 12))}

    def keep(step: int, x: Tensor, x0: Tensor) -> None:
        states[step] = (x if view == "xt" else x0)[0]

    with torch.inference_mode():
        schedule = make_schedule(loaded.diffusion, "ddpm", 8)
        sample(loaded.network, schedule, (1, 8, 12), [2], [0], [1], on_step=keep)
    shown = all_frames(client, seed=2, class_label=1, sampler="ddpm", steps=8, frames=100, view=view)
    steps = range(9) if view == "xt" else range(1, 9)
    for step, frame in zip(steps, shown, strict=True):
        wanted = to_uint8(states[step])[0].numpy().astype(int)
        np.testing.assert_allclose(frame.astype(int), wanted, atol=1)  # rounded from sums in another order


def test_an_event_source_that_reconnects_is_told_not_to(client: TestClient) -> None:
    answer = client.get(SEQUENCE, headers={"Last-Event-ID": "5", "Accept": "text/event-stream"})
    assert (answer.status_code, answer.content) == (204, b"")


def test_multipart_is_framed_for_an_img_tag(client: TestClient) -> None:
    answer = watch(client, format="multipart", n=2, seed=5, class_label=1, steps=5, frames=3)
    assert answer.headers["content-type"] == f"multipart/x-mixed-replace; boundary={BOUNDARY}"
    assert answer.headers["x-accel-buffering"] == "no"
    assert answer.headers["cache-control"] == "no-store"
    rest, delimiter, parts = answer.content, f"--{BOUNDARY}\r\n".encode(), []
    while rest.startswith(delimiter):
        head, _, rest = rest.removeprefix(delimiter).partition(b"\r\n\r\n")
        fields = dict(line.split(": ") for line in head.decode().split("\r\n"))
        assert fields["Content-Type"] == "image/png"
        length = int(fields["Content-Length"])
        parts.append(picture(rest[:length]))
        assert rest[length : length + 2] == b"\r\n"
        rest = rest[length + 2 :]
    assert rest == f"--{BOUNDARY}--\r\n".encode()
    assert len(parts) >= 2
    np.testing.assert_array_equal(parts[-1], finished(client, n=2, seed=5, class_label=1, steps=5))


@pytest.mark.slow
def test_a_stream_without_news_sends_heartbeats(held: SlowRunner, grey_checkpoint: Path) -> None:
    with serving(grey_checkpoint, held, stream_heartbeat_s=0.1) as client:
        text = watch(client, steps=50, frames=2, seed=1).text  # a second between the two
        assert text.count("\n\n: waiting\n\n") >= 3
        assert next(event.name for event in events(text)) == "start"
        parts = watch(client, format="multipart", steps=50, frames=2, seed=1)
    assert parts.content.startswith(f"--{BOUNDARY}\r\n".encode())
    read = email.message_from_bytes(
        b"Content-Type: " + parts.headers["content-type"].encode() + b"\r\n\r\n" + parts.content
    )
    assert {part.get_content_type() for part in read.get_payload()} == {"image/png"}
    assert sum(len(part.get_all("X-Waiting", [])) for part in read.get_payload()) >= 3
    length = int(read.get_payload()[-1]["Content-Length"])
    _, _, last = parts.content.rpartition(b"\r\n\r\n\x89PNG")
    assert len(last) + 4 == length + len(f"\r\n--{BOUNDARY}--\r\n")


def test_a_stream_with_news_sends_no_heartbeat(client: TestClient) -> None:
    assert ": waiting" not in watch(client, steps=3).text
    assert b"X-Waiting" not in watch(client, steps=3, format="multipart").content


def test_the_first_event_has_an_id(client: TestClient) -> None:
    assert watch(client, steps=2).text.startswith("event: start\nid: 0\n")


@pytest.mark.parametrize("format", ["gif", "webp"])
def test_a_file_holds_all_frames_and_ends_with_the_image_exactly(client: TestClient, format: str) -> None:
    answer = watch(client, format=format, n=3, seed=5, class_label=1, steps=8, frames=5)
    assert answer.headers["content-type"] == f"image/{format}"
    opened = Pillow.open(io.BytesIO(answer.content))
    assert opened.n_frames == 5
    opened.seek(4)
    np.testing.assert_array_equal(np.array(opened.convert("L")), finished(client, n=3, seed=5, class_label=1, steps=8))
    again = watch(client, format=format, n=3, seed=5, class_label=1, steps=8, frames=5)
    assert again.content == answer.content


def test_a_webp_of_colours_ends_with_the_image_exactly(colour_client: TestClient) -> None:
    opened = Pillow.open(io.BytesIO(watch(colour_client, format="webp", n=2, seed=5, frames=3).content))
    opened.seek(2)
    np.testing.assert_array_equal(np.array(opened.convert("RGB")), finished(colour_client, n=2, seed=5))


@pytest.mark.parametrize("format", ["gif", "webp"])
def test_more_frames_than_steps_show_every_step_once(client: TestClient, format: str) -> None:
    opened = Pillow.open(io.BytesIO(watch(client, format=format, steps=3, frames=100, seed=1).content))
    assert opened.n_frames == 4


@pytest.mark.parametrize(
    ("accept", "media_type"),
    [
        (None, "text/event-stream"),
        ("*/*", "text/event-stream"),
        ("text/event-stream", "text/event-stream"),
        ("image/gif", "image/gif"),
        ("image/webp, */*;q=0.5", "image/webp"),
        ("multipart/x-mixed-replace", "multipart/x-mixed-replace"),
    ],
)
def test_without_format_accept_decides(client: TestClient, accept: str | None, media_type: str) -> None:
    answer = watch(client, accept, steps=2, frames=2)
    assert answer.headers["content-type"].startswith(media_type)
    assert answer.headers["vary"] == "Accept"


def test_format_outweighs_accept(client: TestClient) -> None:
    assert watch(client, "image/webp", format="gif", steps=2, frames=2).headers["content-type"] == "image/gif"


def test_nothing_acceptable_is_406_unless_a_format_is_named(client: TestClient) -> None:
    refused = client.get(SEQUENCE, headers={"Accept": "text/html"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (406, "not_acceptable")
    assert watch(client, "text/html", format="sse", steps=1).status_code == 200


@pytest.mark.slow
@pytest.mark.parametrize("format", ["sse", "multipart", "gif"])
def test_a_timeout_ends_a_stream_by_an_event_and_a_file_by_504(
    held: SlowRunner, grey_checkpoint: Path, format: str
) -> None:
    with serving(grey_checkpoint, held) as client:
        query = {"format": format, "steps": 100, "frames": 100, "timeout_s": 1}
        answer = client.get(SEQUENCE, params=query)
        text = client.get("/metrics").text
    if format == "gif":
        assert answer.status_code == 504
        error = answer.json()
    elif format == "sse":
        assert answer.status_code == 200
        assert [event.name for event in events(answer.text)][:2] == ["start", "frame"]
        assert [event.name for event in events(answer.text)].count("error") == 1
        error = events(answer.text)[-1].data
    else:
        *_, last, end = answer.content.split(f"--{BOUNDARY}".encode())
        assert end == b"--\r\n"
        assert b"Content-Type: application/json\r\n" in last
        error = json.loads(last.partition(b"\r\n\r\n")[2])
    assert error["error"]["code"] == "deadline_exceeded"
    assert metric(text, "ddpm_requests_total", endpoint=SEQUENCE, outcome="deadline_exceeded") == 1
    assert metric(text, "ddpm_wasted_image_steps_total") > 0


def test_frames_are_counted(client: TestClient) -> None:
    before = metric(client.get("/metrics").text, "ddpm_frames_sent_total")
    watch(client, format="gif", frames=5, steps=8)
    assert metric(client.get("/metrics").text, "ddpm_frames_sent_total") == before + 5
