"""Who is compared, and how each is started and asked."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.bench.serving.settings import SAMPLER, Settings
from tests.bench.serving.workloads import Arrival

FRAMES = 5
PEERS = "tests.bench.serving.peers"


def _own_flags(told: Settings) -> list[str]:
    return ["--port", str(told.port), "--threads", str(told.threads), "--checkpoint", told.checkpoint]


@dataclass(frozen=True)
class ServerSpec:
    """`package` is what it needs beside this project's own. `argv` follows the Python that has it. A batching one has
    settings to sweep. `one_by_one`: no two requests run together. `in_list` is one whose API takes and gives lists.
    `stream` is the path of its streams, if any."""

    name: str
    title: str
    argv: Callable[[Settings], list[str]]
    package: str = ""
    batching: bool = False
    one_by_one: bool = False
    waits_ms: tuple[float, ...] = (50, 5)
    in_list: bool = False
    stream: str = ""
    ours: bool = False

    def request(self, arrival: Arrival, streamed: bool = False, timeout_s: float | None = None) -> str:
        """The text of an HTTP request. `timeout_s` is for ours, the only one that takes a client's deadline."""
        asked = {"class_label": arrival.class_label, "n": arrival.n, "seed": arrival.seed, "steps": arrival.steps}
        if streamed and self.ours:
            query = "&".join(f"{key}={value}" for key, value in {**asked, **SAMPLER}.items())
            return _http("GET", f"{self.stream}?format=sse&view=x0&frames={FRAMES}&{query}", "")
        body: dict[str, Any] = asked
        if self.ours:
            body = {**asked, **SAMPLER} | ({} if timeout_s is None else {"timeout_s": timeout_s})
        elif streamed:
            body = {**asked, "frames": FRAMES}
        text = json.dumps({"requests": [body]} if self.in_list else body)
        return _http("POST", self.stream if streamed else "/generate", text)

    def picture(self, body: bytes) -> bytes:
        """The PNG in an answer."""
        return base64.b64decode(json.loads(body)[0]) if self.in_list else body


def _http(method: str, path: str, body: str) -> str:
    fields = ["Host: localhost", "Connection: close", "Content-Type: application/json", f"Content-Length: {len(body)}"]
    return "\r\n".join([f"{method} {path} HTTP/1.1", *fields, "", body])


def _module(name: str) -> Callable[[Settings], list[str]]:
    return lambda told: ["-m", f"{PEERS}.{name}"]


def _bentoml(told: Settings) -> list[str]:
    return ["-m", "bentoml", "serve", f"{PEERS}.bentoml:Peer", "--host", "127.0.0.1", "--port", str(told.port)]


SERVERS = {
    c.name: c
    for c in (
        ServerSpec(
            "ours",
            "python -m app",
            lambda told: ["-m", f"{PEERS}.ours" if told.step_ms else "app", *_own_flags(told)],
            stream="/diffusion-sequence",
            ours=True,
        ),
        ServerSpec(
            "request_level",
            "ours, batching requests",
            lambda told: ["-m", f"{PEERS}.request_level", *_own_flags(told)],
            stream="/diffusion-sequence",
            ours=True,
        ),
        ServerSpec("fastapi_lock", "FastAPI + lock", _module("fastapi_lock"), one_by_one=True, stream="/stream"),
        ServerSpec("litserve", "LitServe", _module("litserve"), "litserve", batching=True),
        ServerSpec("rayserve", "Ray Serve", _module("rayserve"), "ray", batching=True),
        ServerSpec(
            "bentoml",
            "BentoML",
            _bentoml,
            "bentoml",
            batching=True,
            waits_ms=(5_000, 60_000),
            in_list=True,
        ),
        ServerSpec("mosec", "mosec", _module("mosec"), "mosec", batching=True),
    )
}


def python_of(spec: ServerSpec, own: str, venvs: Path | None) -> str:
    """VENVS/NAME/bin/python where there is one, else the Python that runs this."""
    found = venvs / spec.name / "bin" / "python" if venvs else None
    return str(found) if found and found.exists() else own
