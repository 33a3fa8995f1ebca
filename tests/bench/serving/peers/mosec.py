"""mosec: a Rust front, one worker process, batches of up to `batch` requests that waited `wait_ms`."""

from __future__ import annotations

import json
import sys
from typing import Any

from mosec import Server, Worker

from tests.bench.serving.backend import Backend
from tests.bench.serving.settings import settings


class Peer(Worker):
    """JSON in, PNG out."""

    resp_mime_type = "image/png"

    def __init__(self) -> None:
        super().__init__()
        self.backend = Backend(settings())

    def deserialize(self, data: bytes) -> Any:
        return json.loads(data)

    def serialize(self, data: bytes) -> bytes:
        return data

    def forward(self, data: list[dict[str, Any]]) -> list[bytes]:
        return self.backend.generate(data)


if __name__ == "__main__":
    told = settings()
    sys.argv += ["--address", "127.0.0.1", "--port", str(told.port), "--log-level", "warning"]
    sys.argv += ["--capacity", str(told.queue), "--timeout", str(round(1e3 * told.deadline_s))]
    server = Server()
    # The timeout of a worker is that of a whole batch: it kills the worker, so it must never come.
    server.append_worker(
        Peer, max_batch_size=told.batch, max_wait_time=max(1, round(told.wait_ms)), timeout=600, route="/generate"
    )
    server.run()
