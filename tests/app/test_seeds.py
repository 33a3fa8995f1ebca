"""An image depends on its seed, index, class and settings alone: not on who shares its batches, when it came, what
became of the engine meanwhile, or which process made it. Equal bytes, for random mixes of all of these.

    SEED_MIXES=1000 python -m pytest tests/app/test_seeds.py
    SEED_MIXES=300 SEED_CHECKPOINT=mnist python -m pytest tests/app/test_seeds.py
"""

from __future__ import annotations

import base64
import os
import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from model.sampling.solvers import SAMPLERS
from tests.app.faulty_server import CRASHES, RAISES
from tests.app.processes import ServerProcess, wait_for

MIXES = int(os.environ.get("SEED_MIXES", "20"))
CROWD = 16  # requests at once
CRASH_EVERY = 20  # requests


@pytest.fixture
def servers(request: pytest.FixtureRequest) -> Iterator[tuple[ServerProcess, ServerProcess]]:
    """One that fails where a seed says so, and one that does not, by the settings that a server has by itself."""
    if name := os.environ.get("SEED_CHECKPOINT"):
        argv = ["--checkpoint", name, "--max-pending-nfe", "1000000"]
        with ServerProcess("tests.app.faulty_server", *argv) as one, ServerProcess("app", *argv) as other:
            yield one, other
    else:
        yield request.getfixturevalue("faulty"), request.getfixturevalue("server")


def mix(rng: random.Random) -> dict[str, Any]:
    """A request of one to six images, by some schedule."""
    asked: dict[str, Any] = {"seed": rng.randrange(10**5, 2**64), "index": rng.choice([0, 3, 2**31 - 10])}
    asked |= {"n": rng.randint(1, 6), "steps": rng.randint(1, 25), "sampler": rng.choice(list(SAMPLERS))}
    asked |= {"class_label": rng.choice([None, 0, 2]), "guidance_scale": rng.choice([1, 1, 0.5, 3])}
    return asked | ({"eta": rng.random()} if asked["sampler"] == "ddim" else {})


def images(server: ServerProcess, asked: dict[str, Any]) -> list[bytes]:
    """The file of each image."""
    answer = server.client.post("/generate", json=asked, headers={"Accept": "application/json"})
    assert answer.status_code == 200, answer.text
    return [base64.b64decode(image["png"]) for image in answer.json()["images"]]


@pytest.mark.slow
def test_an_image_is_the_same_in_any_batch_and_process(
    servers: tuple[ServerProcess, ServerProcess],
) -> None:
    crashing, other = servers
    rng = random.Random(0)
    mixes = [mix(rng) for _ in range(MIXES)]
    elsewhere = [images(other, asked) for asked in mixes]
    restarts, batches = (crashing.metric(f"ddpm_{name}") for name in ("engine_restarts_total", "batch_size_count"))

    def in_a_crowd(place: int) -> list[bytes]:
        time.sleep(random.Random(place).uniform(0, 0.2))  # so that it joins what is under way
        if place % CRASH_EVERY == CRASH_EVERY // 2:
            for seed in (CRASHES, RAISES):
                failed = crashing.client.post("/generate", json={"n": 2, "steps": 8, "seed": seed})
                assert (failed.status_code, failed.json()["error"]["code"]) == (500, "step_failed")
        return images(crashing, mixes[place])

    with ThreadPoolExecutor(CROWD) as pool:
        together = list(pool.map(in_a_crowd, range(MIXES)))
    assert [asked for asked, a, b in zip(mixes, together, elsewhere, strict=True) if a != b] == []
    steps = sum(asked["n"] * asked["steps"] for asked in mixes)
    assert crashing.metric("ddpm_batch_size_count") - batches < steps / 2, "there were crowds"
    assert crashing.metric("ddpm_engine_restarts_total") - restarts >= 2 * (MIXES // CRASH_EVERY)
    for asked, made in zip(mixes, elsewhere, strict=True):
        i = rng.randrange(asked["n"])
        assert images(crashing, asked | {"n": 1, "index": asked["index"] + i}) == [made[i]]
    wait_for(lambda: crashing.samples_in_flight() == 0, "an idle server")
