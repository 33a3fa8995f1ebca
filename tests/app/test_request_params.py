import asyncio
import unicodedata
from dataclasses import fields, replace
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
import torch

from app.engine.instance import ModelInstance
from app.engine.request import Frame
from app.engine.runner import ModelRunner
from app.errors import InvalidClassLabel, InvalidRequest
from app.request_params import LARGEST_JSON_INTEGER, GenerationJob, build_request, class_index, frame_steps, headers
from app.schemas import Format, GenerateBody, GenerateResponse, SequenceQuery
from app.settings import Settings
from model import checkpoint
from model.checkpoint import Checkpoint
from model.diffusion import DiffusionConfig
from model.sampling.schedule import DEFAULT_STEPS, SamplingParams, make_schedule
from tests.app.conftest import BEETLE, CLASSES

GREY_BYTES = 8 * 12


@pytest.fixture(scope="module")
def grey(grey_checkpoint: Path) -> Checkpoint:
    return checkpoint.load(grey_checkpoint)


def served(checkpoint: Checkpoint) -> ModelInstance:
    return ModelInstance(checkpoint, ModelRunner(checkpoint, torch.device("cpu"), micro_batch_size=4), max_batch_size=8)


def job(checkpoint: Checkpoint, asked: GenerateBody | SequenceQuery, **settings: object) -> GenerationJob:
    async def make() -> GenerationJob:
        return build_request(asked, served(checkpoint), Settings(**settings))

    return asyncio.run(make())


@pytest.mark.parametrize(
    ("label", "index"),
    [
        (None, None),
        (2, 2),
        ("1", 1),
        ("01", 1),
        ("plain", 0),
        (BEETLE, 1),
        ("0", 2),  # a class that is named so comes before the one that has the number
        (0, 2),
        ("00", 2),
        ("1.0", 1),
        ("Plain", 0),
        (unicodedata.normalize("NFD", BEETLE), 1),
        (BEETLE.upper(), 1),
    ],
)
def test_a_class_is_meant_by_index_name_or_numeric_string(label: int | str | None, index: int | None) -> None:
    assert class_index(label, CLASSES) == index


@pytest.mark.parametrize(
    ("names", "label", "index"),
    [
        (("0", "1", "10", "11", "2"), 2, 4),
        (("0", "1", "10", "11", "2"), "2", 4),
        (("0", "1", "10", "11", "2"), 11, 3),
        (("0", "1", "10", "11", "2"), 3, 3),  # no class has that name
        (("001", "002", "003"), 2, 1),
        (("001", "002", "003"), "2.0", 1),
        (("1.0", "2.0", "3.0"), "2.0", 1),
        (("1.0", "2.0", "3.0"), 2, 1),
        (("cat", "Cat"), "cat", 0),
        (("cat", "Cat"), "Cat", 1),
    ],
)
def test_a_number_is_the_class_of_that_name_first(names: tuple[str, ...], label: int | str, index: int) -> None:
    assert class_index(label, names) == index


@pytest.mark.parametrize(("names", "label"), [(("cat", "Cat"), "CAT"), (("1", "01"), "001")])
def test_an_ambiguous_class_is_refused(names: tuple[str, ...], label: str) -> None:
    with pytest.raises(InvalidClassLabel, match="did you mean"):
        class_index(label, names)


def test_a_near_miss_is_told_the_nearest_class() -> None:
    with pytest.raises(InvalidClassLabel, match=r"no class 'hrose'; did you mean 'horse'\?"):
        class_index("hrose", (*(f"c{i}" for i in range(1000)), "horse"))


@pytest.mark.parametrize("label", [3, -1, "3", "-1", "", " 1", "random", "²", "１", 10**400, "9" * 5000])
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


def test_header_values_are_ascii_and_unquote_to_the_original() -> None:
    hostile = {"class_label": "Käfer → 虫\r\nX-Evil: 1", "model": 'a%41 "b"', "guidance_scale": "1.0"}
    made = headers(hostile)
    assert list(made) == ["X-DDPM-Class-Label", "X-DDPM-Model", "X-DDPM-Guidance-Scale"]
    for value, original in zip(made.values(), hostile.values(), strict=True):
        assert value.isascii()
        assert value.isprintable()
        assert unquote(value) == original


def test_a_missing_seed_is_drawn_and_fits_a_json_number(grey: Checkpoint) -> None:
    seeds = {job(grey, GenerateBody()).request.seed for _ in range(12)}
    assert len(seeds) == 12
    assert max(seeds) < LARGEST_JSON_INTEGER
    assert max(seeds) > 2**48


def test_what_is_left_out_is_the_checkpoints_own_default(grey: Checkpoint) -> None:
    made = job(grey, GenerateBody())
    assert made.sampling == grey.config.sampling
    assert (made.request.schedule.sampler, len(made.request.schedule)) == ("ddim", 6)
    assert (
        job(grey, GenerateBody(), max_steps=4).request.schedule.timesteps.size == 4
    )  # but within this server's limits


def test_a_default_eta_is_for_ddim_alone(grey: Checkpoint) -> None:
    noisy = replace(grey, config=replace(grey.config, sampling=replace(grey.config.sampling, eta=0.5)))
    assert job(noisy, GenerateBody()).sampling.eta == 0.5
    assert job(noisy, GenerateBody(sampler="dpmpp_2m")).sampling.eta == 0


def with_sampling(checkpoint: Checkpoint, **values: object) -> Checkpoint:
    return replace(checkpoint, config=replace(checkpoint.config, sampling=SamplingParams(**values)))


@pytest.mark.slow
def test_another_sampler_takes_its_own_number_of_steps(grey: Checkpoint) -> None:
    for sampler, steps in DEFAULT_STEPS.items():
        expected = 6 if sampler == "ddim" else steps  # ddim is the checkpoint's
        assert len(job(grey, GenerateBody(sampler=sampler)).request.schedule) == expected
        assert len(job(grey, GenerateBody(sampler=sampler), max_steps=9).request.schedule) == min(expected, 9)
        assert len(job(grey, GenerateBody(sampler=sampler, steps=3)).request.schedule) == 3


def test_spacing_limit_and_interval_default_to_the_checkpoints(grey: Checkpoint) -> None:
    own = {"guidance_scale": 2.0, "guidance_interval": (0.1, 0.7), "spacing": "quadratic", "limit": "dynamic"}
    noted = with_sampling(grey, steps=10, **own)
    schedule = job(noted, GenerateBody()).request.schedule
    assert np.array_equal(schedule.table, make_schedule(grey.diffusion, "ddim", 10, **own).table)
    asked = {"guidance_scale": 3.0, "guidance_interval": [0.3, 0.9], "spacing": "linspace", "limit": "none"}
    schedule = job(noted, GenerateBody(**asked)).request.schedule
    assert np.array_equal(schedule.table, make_schedule(grey.diffusion, "ddim", 10, **asked).table)
    other = job(noted, GenerateBody(sampler="dpmpp_2m")).sampling  # the spacing was for another sampler
    assert (other.spacing, other.limit, other.guidance_interval) == ("trailing", "dynamic", (0.1, 0.7))
    assert job(noted, GenerateBody(guidance_scale=1)).sampling.guidance_interval == (0, 1)


def test_what_the_schedule_refuses_is_said_with_its_name(grey: Checkpoint) -> None:
    eps = replace(grey, config=replace(grey.config, diffusion=DiffusionConfig(schedule="cosine")))
    with pytest.raises(InvalidRequest, match=r"between 1 and 9\d\d \(of an eps network with limit none\)") as caught:
        job(eps, GenerateBody(steps=1000, limit="none"), max_steps=1000)
    assert caught.value.param == "steps"
    zero = replace(
        grey, config=replace(grey.config, diffusion=replace(DiffusionConfig(), prediction="v", zero_terminal_snr=True))
    )
    with pytest.raises(InvalidRequest, match="spacing leading starts at timestep 830: zero terminal SNR") as caught:
        job(zero, GenerateBody(spacing="leading"))
    assert caught.value.param == "spacing"


def test_a_fixed_large_variance_that_leaves_noise_is_replaced(grey: Checkpoint) -> None:
    large = replace(grey, config=replace(grey.config, diffusion=DiffusionConfig(variance="fixed_large")))
    few = job(large, GenerateBody(sampler="ddpm", steps=50))
    assert few.provenance["variance"] == "fixed_small"
    assert np.array_equal(
        few.request.schedule.table, make_schedule(large.diffusion, "ddpm", 50, variance="fixed_small").table
    )
    assert job(large, GenerateBody(sampler="ddpm", steps=1000)).provenance["variance"] == "fixed_large"
    assert "variance" not in job(large, GenerateBody(steps=50)).provenance


def test_provenance_is_exact(grey: Checkpoint) -> None:
    eta, scale = 0.1234567890123456, 1 / 3
    made = job(grey, GenerateBody(eta=eta, guidance_scale=scale, class_label=1, index=4, n=2, seed=9))
    provenance = made.provenance
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
def test_a_stream_keeps_the_newest_frame_and_a_file_all(grey: Checkpoint, format: Format, dropped: int) -> None:
    drops = []

    async def deliver() -> None:
        query = SequenceQuery(frames=5, steps=10, format=format)
        output = build_request(query, served(grey), Settings(), lambda: drops.append(1)).request.output
        for step in range(5):
            output.put(Frame(step, np.zeros((1, 1, 8, 12), np.uint8)))

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
        (GenerateBody(spacing="even"), "spacing"),
        (GenerateBody(limit="soft"), "limit"),
        (GenerateBody(guidance_interval=[0.2, 0.8]), "guidance_interval"),  # of no guidance
        (GenerateBody(guidance_interval=[0.8, 0.2], guidance_scale=2), "guidance_interval"),
        (GenerateBody(guidance_interval=[0.0, 1.1], guidance_scale=2), "guidance_interval"),
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
    assert job(colour, GenerateBody(guidance_scale=1)).sampling.guidance_scale == 1
    with pytest.raises(InvalidRequest, match="null class"):
        job(colour, GenerateBody(guidance_scale=2))


def test_a_schedule_is_made_once_for_equal_settings(grey: Checkpoint) -> None:
    one, other = served(grey), served(grey)
    asked = SamplingParams("ddim", 7)
    assert one.schedule(asked, None) is one.schedule(replace(asked), None)
    assert one.schedule(asked, None) is not one.schedule(replace(asked, steps=8), None)
    assert one.schedule(asked, None) is not other.schedule(asked, None)
    small, large = (one.schedule(SamplingParams("ddpm", 1000), v).table for v in ("fixed_small", "fixed_large"))
    assert not np.array_equal(small, large)


def test_every_sampling_setting_travels(grey: Checkpoint) -> None:
    names = [setting.name for setting in fields(SamplingParams)]
    assert list(GenerateResponse.model_fields) == ["model", "checkpoint", *names, "nfe", "images"]
    assert list(GenerateBody(n=1).overrides()) == names
    for body in (GenerateBody, SequenceQuery):
        assert list(body.model_fields)[6:13] == names, "where they were in the documentation"
    assert set(names) <= job(grey, GenerateBody()).provenance.keys()


def test_the_schema_has_the_settings_descriptions_and_bounds() -> None:
    properties = GenerateBody.model_json_schema()["properties"]
    for setting in fields(SamplingParams):
        told = setting.metadata
        assert properties[setting.name]["description"].startswith(told["description"])
        assert properties[setting.name].get("enum", []) == list(told["choices"] or [])
    assert properties["eta"]["anyOf"][0] == {"type": "number", "minimum": 0, "maximum": 1}
    assert properties["steps"]["anyOf"][0] == {"type": "integer", "minimum": 1}


def test_settings_are_read_as_json_and_queries_write_them() -> None:
    body = GenerateBody.model_validate_json('{"steps": 10.0, "eta": 1, "guidance_interval": [0, 1]}')
    assert (body.overrides()["steps"], body.overrides()["eta"]) == (10, 1)
    query = SequenceQuery.model_validate({"guidance_interval": ["0.2,0.8"], "steps": "7"})
    assert (query.overrides()["guidance_interval"], query.overrides()["steps"]) == ((0.2, 0.8), 7)
