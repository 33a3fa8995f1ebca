"""Ray Serve's `@serve.batch`: up to `batch` requests, `wait_ms` after the first; one replica with all cores.

The batch blocks the replica's event loop, as in Ray's own examples. In a thread it would be slower: Ray forms the next
batch when `wait_ms` are over and not when the one before is done, so under load nearly every request would run alone.
"""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

import ray
from ray import serve
from starlette.requests import Request
from starlette.responses import Response

from tests.bench.serving.backend import Backend
from tests.bench.serving.settings import VARIABLE, settings

told = settings()


@serve.deployment(
    max_ongoing_requests=max(2 * told.batch, told.queue // 2),
    max_queued_requests=max(1, told.queue // 2),
    ray_actor_options={"num_cpus": 1},
)
class Peer:
    """Ray runs its own loop, of health checks, in another thread."""

    def __init__(self) -> None:
        self.backend = Backend(settings())

    @serve.batch(max_batch_size=told.batch, batch_wait_timeout_s=told.wait_ms / 1e3)
    async def generate(self, requests: list[dict[str, Any]]) -> list[bytes]:
        """A picture for each."""
        return self.backend.generate(requests)

    async def __call__(self, request: Request) -> Response:
        """POST of a request."""
        return Response(await self.generate(await request.json()), media_type="image/png")


if __name__ == "__main__":
    stop = threading.Event()
    variables = {VARIABLE: os.environ[VARIABLE], "OMP_NUM_THREADS": str(told.threads)}
    ray.init("local", num_cpus=2, include_dashboard=False, runtime_env={"env_vars": variables}, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": told.port, "request_timeout_s": told.deadline_s})
    serve.run(Peer.bind(), route_prefix="/", logging_config={"enable_access_log": False})
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    stop.wait()
    serve.shutdown()
    ray.shutdown()
