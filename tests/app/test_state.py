"""The place in the engine that a handler holds: given up however the handler ends."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fastapi import Request

from app import encoders
from app.errors import Cancelled
from app.request_context import context_of
from app.request_params import build_request
from app.routes import state
from app.routes.state import AppState, in_flight
from app.schemas import GenerateBody
from tests.app.conftest import SlowRunner, serving
from tests.app.processes import metric, wait_for


def test_steps_and_answers_go_on_while_a_picture_is_encoded(
    grey_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, leave = threading.Event(), threading.Event()
    png = encoders.png

    def slow(*args: Any) -> bytes:
        entered.set()
        assert leave.wait(30)
        return png(*args)

    monkeypatch.setattr(encoders, "png", slow)
    monkeypatch.setattr(state, "INLINE_PIXELS", 0)  # or the event loop would encode so small a picture itself
    with serving(grey_checkpoint) as client, ThreadPoolExecutor(2) as pool:
        first = pool.submit(client.post, "/generate", json={"steps": 1})
        assert entered.wait(30)
        second = pool.submit(client.post, "/generate", json={"n": 2, "steps": 5})
        wait_for(lambda: metric(client.get("/metrics").text, "ddpm_images_total") == 3, "the second's steps")
        assert not first.done()
        leave.set()
        assert [first.result().status_code, second.result().status_code] == [200, 200]


async def silence() -> Any:
    """A client that stays and says nothing."""
    await asyncio.Event().wait()


async def disconnect() -> Any:
    return {"type": "http.disconnect"}


def request(receive: Any) -> Request:
    return Request({"type": "http", "method": "POST", "headers": []}, receive)


def test_a_handler_that_breaks_frees_its_place(held: SlowRunner, grey_checkpoint: Path) -> None:
    async def handle(service: AppState) -> None:
        job = build_request(GenerateBody(steps=1000), service.models.default, service.settings)
        async with in_flight(service, request(silence), job):
            raise RuntimeError("a bug")

    with serving(grey_checkpoint, held) as client:
        with pytest.raises(RuntimeError, match="a bug"):
            asyncio.run(handle(client.app.state.service))
        wait_for(
            lambda: metric(client.get("/metrics").text, "ddpm_cancellation_latency_seconds_count") == 1, "the cancel"
        )


def test_a_leaving_client_marks_the_outcome_at_once(held: SlowRunner, grey_checkpoint: Path) -> None:
    async def handle(service: AppState) -> str:
        http = request(disconnect)
        job = build_request(GenerateBody(steps=1000), service.models.default, service.settings)
        async with in_flight(service, http, job):
            with pytest.raises(Cancelled):
                await job.request.output.images()
            return context_of(http.scope).outcome

    with serving(grey_checkpoint, held) as client:
        assert asyncio.run(handle(client.app.state.service)) == "cancelled"
