"""BentoML: adaptive batching of up to `batch` requests. How long to wait is its own decision, within `wait_ms`
(`max_latency_ms`), beyond which it answers 503. A batchable API speaks JSON lists, so a picture is base64 in a list."""

from __future__ import annotations

import base64
from typing import Any

import bentoml

from tests.bench.serving.backend import Backend
from tests.bench.serving.settings import settings

told = settings()
most_ms = round(min(told.wait_ms, 1e3 * told.deadline_s))


@bentoml.service(traffic={"timeout": told.deadline_s, "max_concurrency": told.queue}, workers=1)
class Peer:
    """One worker."""

    def __init__(self) -> None:
        self.backend = Backend(told)

    @bentoml.api(route="/generate", batchable=True, max_batch_size=told.batch, max_latency_ms=most_ms)
    def generate(self, requests: list[dict[str, Any]]) -> list[str]:
        """A picture for each."""
        return [base64.b64encode(picture).decode() for picture in self.backend.generate(requests)]
