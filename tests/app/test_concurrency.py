"""Many requests at once: each gets what it would have got alone, and a burst is admitted."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.engine.request import Sample
from app.settings import Settings
from tests.app.conftest import SlowRunner, serving
from tests.app.processes import PATIENCE, ServerProcess, metric, wait_for


def mixed_requests(count: int) -> list[dict[str, Any]]:
    """Requests of both endpoints that differ in everything that they can differ in."""
    draw = random.Random(0)
    made: list[dict[str, Any]] = []
    for seed in range(count):
        asked: dict[str, Any] = {"seed": seed, "n": draw.randint(1, 5), "steps": draw.randint(1, 14)}
        asked["sampler"] = draw.choice(["ddpm", "ddim", "dpmpp_2m"])
        asked |= {"eta": 0.7} if asked["sampler"] == "ddim" else {}
        asked |= draw.choice([{}, {"class_label": draw.randrange(3)}, {"guidance_scale": 2.5}, {"index": 1000}])
        if draw.random() < 0.25:
            query = asked | {"frames": draw.randint(1, 5), "format": draw.choice(["gif", "webp"])}
            made.append({"method": "GET", "url": "/diffusion-sequence", "params": query})
        else:
            accept = draw.choice(["image/png", "application/json", "application/zip"])
            made.append({"method": "POST", "url": "/generate", "json": asked, "headers": {"Accept": accept}})
    return made


@pytest.mark.slow
def test_fifty_at_once_get_what_each_gets_alone(server: ServerProcess) -> None:
    requests = mixed_requests(50)
    alone = [server.client.request(**request) for request in requests]
    steps = server.metric("ddpm_image_steps_total")
    batches = server.metric("ddpm_batch_size_count")
    limits = httpx.Limits(max_connections=None)
    with httpx.Client(base_url=server.url, timeout=PATIENCE, limits=limits) as client, ThreadPoolExecutor(50) as pool:
        together = list(pool.map(lambda request: client.request(**request), requests))
    assert [answer.status_code for answer in together] == [200] * 50
    assert [answer.content for answer in together] == [answer.content for answer in alone]
    assert len({answer.content for answer in together}) == 50
    wanted = sum(body["n"] * body["steps"] for body in (r.get("json") or r["params"] for r in requests))
    assert server.metric("ddpm_image_steps_total") == steps + wanted
    assert server.metric("ddpm_batch_size_count") - batches < wanted / 2  # they did share batches
    assert server.samples_in_flight() == 0


class InstantRunner(SlowRunner):
    """Skips the network, which leaves the noise as it is: only the way through the service is tried."""

    def step(self, samples: list[Sample]) -> list[Sample]:
        self.released.wait(0.02)
        for sample in samples:
            sample.step += 1
        return []


@pytest.mark.slow
def test_forty_requests_of_fifty_images_are_admitted_by_default(grey_checkpoint: Path) -> None:
    runner = InstantRunner(grey_checkpoint)
    # As the bundled checkpoint is sampled.
    body = {"n": 50, "sampler": "dpmpp_2m", "steps": 15, "guidance_scale": 1.5, "class_label": 1}
    with serving(grey_checkpoint, runner) as client, ThreadPoolExecutor(41) as pool:
        assert client.app.state.service.settings.max_pending_nfe == Settings.model_fields["max_pending_nfe"].default
        burst = [pool.submit(client.post, "/generate", json=body) for _ in range(40)]

        def in_flight() -> float:
            text = client.get("/metrics").text
            return metric(text, "ddpm_num_samples_running") + metric(text, "ddpm_num_samples_waiting")

        wait_for(lambda: in_flight() == 2000, "all images of the burst in the queue")
        runner.released.set()
        assert [answer.result().status_code for answer in burst] == [200] * 40
        assert metric(client.get("/metrics").text, "ddpm_images_total") == 2000
