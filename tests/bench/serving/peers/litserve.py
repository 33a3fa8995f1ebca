"""LitServe: up to `batch` requests are taken together, `wait_ms` after the first; one worker, one API process."""

from __future__ import annotations

from typing import Any

import litserve
from fastapi import Response

from tests.bench.serving.backend import Backend
from tests.bench.serving.settings import settings


class Api(litserve.LitAPI):
    """The batch is a list of requests, and of pictures."""

    def setup(self, device: str) -> None:
        self.backend = Backend(settings())

    def decode_request(self, request):  # type: ignore[no-untyped-def]  # LitServe takes an annotation for a schema
        return request

    def batch(self, inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return inputs

    def predict(self, inputs: list[dict[str, Any]]) -> list[bytes]:
        return self.backend.generate(inputs)

    def unbatch(self, output: list[bytes]) -> list[bytes]:
        return output

    def encode_response(self, output: bytes) -> Response:
        return Response(output, media_type="image/png")


if __name__ == "__main__":
    told = settings()
    api = Api(max_batch_size=told.batch, batch_timeout=told.wait_ms / 1e3, api_path="/generate")
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1, timeout=told.deadline_s)
    server.run("127.0.0.1", told.port, num_api_servers=1, log_level="warning", generate_client_file=False)
