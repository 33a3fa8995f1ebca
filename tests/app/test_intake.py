import asyncio
from dataclasses import replace
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest

from app.engine.request import Frame
from app.errors import InvalidClassLabel, InvalidRequest
from app.intake import LARGEST_JSON_INTEGER, Job, class_index, frame_steps, headers, make_job
from app.schemas import Format, GenerateBody, SequenceQuery
from app.settings import Settings
from model import checkpoint
from model.checkpoint import Checkpoint
from tests.app.conftest import BEETLE, CLASSES

GREY_BYTES = 8 * 12


@pytest.fixture(scope="module")
def grey(grey_checkpoint: Path) -> Checkpoint:
    return checkpoint.load(grey_checkpoint)


def job(checkpoint: Checkpoint, asked: GenerateBody | SequenceQuery, **settings: object) -> Job:
    async def make() -> Job:
        return make_job(asked, checkpoint, Settings(**settings))

    return asyncio.run(make())


@pytest.mark.parametrize(
    ("label", "index"),
    [
        (None, None),
        (0, 0),
        (2, 2),
        ("1", 1),
        ("01", 1),
        ("plain", 0),
        (BEETLE, 1),
        ("0", 2),  # a class that is named so comes before the one that has the number
    ],
)
def test_a_class_is_meant_by_index_name_or_numeric_string(label: int | str | None, index: int | None) -> None:
    assert class_index(label, CLASSES) == index


@pytest.mark.parametrize(
    "label", [3, -1, "3", "-1", "", " 1", "Plain", "random", "1.0", "²", "１", 10**400, "9" * 5000]
)
def test_an_unknown_class_is_refused_with_the_list(label: int | str) -> None:
    with pytest.raises(InvalidClassLabel, match=f"plain, {BEETLE}, 0 .or their numbers, 0 to 2") as caught:
        class_index(label, CLASSES)
    assert len(caught.value.message) < 250
    assert caught.value.param == "class_label"


def test_of_many_classes_twenty_are_listed() -> None:
    with pytest.raises(InvalidClassLabel, match=r"c18, c19, … \(or their numbers, 0 to 999\)"):
        class_index("dog", tuple(f"c{i}" for i in range(1000)))


def test_an_unconditional_checkpoint_takes_null_only() -> None:
    assert class_index(None, ()) is None
    with pytest.raises(InvalidClassLabel, match="unconditional"):
        class_index(0, ())


@pytest.mark.parametrize(
    ("frames", "steps", "view", "shown"),
    [
        (5, 8, "xt", [0, 2, 4, 6, 8]),
        (8, 8, "x0", [1, 2, 3, 4, 5, 6, 7, 8]),
        (1, 8, "xt", [8]),
        (1, 8, "x0", [8]),
        (2, 8, "xt", [0, 8]),
        (100, 3, "xt", [0, 1, 2, 3]),  # more frames than steps: every step once
        (100, 3, "x0", [1, 2, 3]),
        (7, 1, "x0", [1]),
    ],
)
def test_frames_are_spread_evenly_and_end_with_the_last_step(
    frames: int, steps: int, view: str, shown: list[int]
) -> None:
    assert sorted(frame_steps(frames, steps, view)) == shown


def test_header_values_are_plain_ascii_and_come_back_by_unquoting() -> None:
    hostile = {"class_label": "Käfer → 虫\r\nX-Evil: 1", "model": 'a%41 "b"', "guidance_scale": "1.0"}
    made = headers(hostile)
    assert list(made) == ["X-DDPM-Class-Label", "X-DDPM-Model", "X-DDPM-Guidance-Scale"]
    for value, original in zip(made.values(), hostile.values(), strict=True):
        assert value.isascii()
        assert value.isprintable()
        assert unquote(value) == original


def test_a_seed_that_nobody_gave_is_drawn_and_fits_into_a_json_number(grey: Checkpoint) -> None:
    seeds = {job(grey, GenerateBody()).request.seed for _ in range(12)}
    assert len(seeds) == 12
    assert max(seeds) < LARGEST_JSON_INTEGER
    assert max(seeds) > 2**48


def test_what_is_left_out_is_the_checkpoints_own_default(grey: Checkpoint) -> None:
    made = job(grey, GenerateBody())
    assert (made.request.plan.sampler, len(made.request.plan), made.eta, made.guidance_scale) == ("ddim", 6, 0, 1)
    assert job(grey, GenerateBody(), max_steps=4).request.plan.timesteps.size == 4  # but within this server's limits


def test_a_default_eta_is_for_ddim_alone(grey: Checkpoint) -> None:
    noisy = replace(grey, config=replace(grey.config, sampling=replace(grey.config.sampling, eta=0.5)))
    assert job(noisy, GenerateBody()).eta == 0.5
    assert job(noisy, GenerateBody(sampler="dpmpp_2m")).eta == 0


def test_provenance_is_exact(grey: Checkpoint) -> None:
    eta, scale = 0.1234567890123456, 1 / 3
    made = job(grey, GenerateBody(eta=eta, guidance_scale=scale, class_label=1, index=4, n=2, seed=9))
    provenance = made.provenance()
    assert (float(provenance["eta"]), float(provenance["guidance_scale"])) == (eta, scale)
    assert (provenance["class_label"], provenance["index"], provenance["seed"]) == (BEETLE, "4", "9")
    assert made.provenance_of(1)["index"] == "5"


def test_a_random_mix_is_a_function_of_seed_and_index(grey: Checkpoint) -> None:
    mix = job(grey, GenerateBody(seed=5, n=40)).request.classes
    assert mix is not None
    assert set(mix) == {0, 1, 2}
    for i in (0, 7, 39):
        assert job(grey, GenerateBody(seed=5, index=i)).request.classes == (mix[i],)


def test_the_bytes_of_a_sequence_are_limited_not_only_its_parts(grey: Checkpoint) -> None:
    limit = 10 * 4 * GREY_BYTES
    query = SequenceQuery(n=4, frames=10, steps=50)
    assert len(job(grey, query, max_sequence_bytes=limit).request.frame_steps) == 10
    with pytest.raises(InvalidRequest, match=f"10 frames of 4 images are {limit} bytes") as caught:
        job(grey, query, max_sequence_bytes=limit - 1)
    assert caught.value.param == "frames"


@pytest.mark.parametrize(("format", "dropped"), [("sse", 4), ("multipart", 4), ("gif", 0), ("webp", 0)])
def test_a_stream_keeps_the_newest_frame_for_a_slow_client_and_a_file_keeps_all(
    grey: Checkpoint, format: Format, dropped: int
) -> None:
    drops = []

    async def deliver() -> None:
        query = SequenceQuery(frames=5, steps=10, format=format)
        mailbox = make_job(query, grey, Settings(), lambda: drops.append(1)).request.mailbox
        for step in range(5):
            mailbox.deliver(Frame(step, np.zeros((1, 1, 8, 12), np.uint8)))

    asyncio.run(deliver())
    assert len(drops) == dropped


def test_more_frames_than_steps_cost_only_the_steps(grey: Checkpoint) -> None:
    limit = 4 * GREY_BYTES  # of steps 0 to 3
    assert job(grey, SequenceQuery(frames=100, steps=3), max_sequence_bytes=limit).request.frame_steps == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        (GenerateBody(eta=0.5, sampler="ddpm"), "eta"),
        (GenerateBody(steps=1001), "steps"),
        (GenerateBody(sampler="euler"), "sampler"),
        (GenerateBody(n=65), "n"),
        (GenerateBody(n=10**400), "n"),
        (GenerateBody(timeout_s=301), "timeout_s"),
        (SequenceQuery(frames=101), "frames"),
        (SequenceQuery(frames=10**400), "frames"),
    ],
)
def test_what_is_out_of_limits_is_refused_by_name(grey: Checkpoint, asked: GenerateBody, param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        job(grey, asked, max_steps=100_000)
    assert caught.value.param == param


def test_guidance_needs_a_null_class(colour_checkpoint: Path) -> None:
    colour = checkpoint.load(colour_checkpoint)
    assert job(colour, GenerateBody(guidance_scale=1)).guidance_scale == 1
    with pytest.raises(InvalidRequest, match="null class"):
        job(colour, GenerateBody(guidance_scale=2))
