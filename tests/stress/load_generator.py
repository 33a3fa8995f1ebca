"""The clients of the stress test: each sends one thing, and writes down how that went."""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import random
import re
import socket
import struct
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from tests.app.faulty_server import (
    CRASHES,
    CRASHES_TWICE,
    LONG,
    NOT_FINITE,
    RAISES,
    RAISES_ONCE,
    SLOW,
    TOO_LARGE,
    TOO_MANY,
)
from tests.stress import malformed_requests
from tests.stress.http_client import PATIENCE, Answer, ask, connect, message, parse

SEQUENCE = "/diffusion-sequence"
FAULTS = {
    RAISES: {"step_failed"},
    RAISES_ONCE: {"ok", "step_failed"},  # once by every runner: with new weights it may be in a replay, which is alone
    NOT_FINITE: {"step_failed"},
    CRASHES_TWICE: {"ok", "step_failed"},  # just after another fault it is read alone at once, and failed
    CRASHES: {"step_failed"},
    TOO_MANY: {"ok"},
    TOO_LARGE: {"out_of_memory"},
    LONG: {"ok"},
}
"""Seeds that make the server fail, and how it must answer. What follows must be as if nothing had been."""
REFUSALS = {"overloaded", "not_ready", "deadline_exceeded"}  # honest wherever there is too much work, or a long step
MOMENTS = ("head", "body", "queued", "step", "stream", "image")  # in which clients disconnect
CANARY = {"n": 3, "steps": 8, "seed": 77, "class_label": 1}


def query(body: dict[str, Any]) -> str:
    """A request's body as a query."""
    return "&".join(f"{name}={value}" for name, value in body.items() if value is not None)


@dataclass
class LoadGenerator:
    """Clients of the server at `port`, and what they saw."""

    port: int
    rng: random.Random
    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)  # by kind of client and outcome
    wrong: list[str] = field(default_factory=list)
    ledger: dict[str, tuple[int, str]] = field(default_factory=dict)  # status and outcome by request id
    kept: list[tuple[bytes, str, bytes]] = field(default_factory=list)  # request, checkpoint and answer
    canaries: dict[str, bytes] = field(default_factory=dict)  # by checkpoint
    disconnected: int = 0
    _ids: itertools.count[int] = field(default_factory=itertools.count)

    def note(self, kind: str, answer: Answer, id: str, expected: set[str]) -> None:
        """Counts an answer; one that must not be is written down as wrong."""
        self.outcomes[kind, answer.code] += 1
        self.ledger[id] = answer.status, answer.code
        if answer.code not in expected:
            self.wrong.append(f"{kind} ({id}): {answer.status} {answer.code}, {answer.body[:200]!r}")
        if answer.status in (429, 503) and int(answer.headers.get("retry-after", "0")) < 1:
            self.wrong.append(f"{kind} ({id}): {answer.status} without Retry-After")

    def id(self) -> str:
        """A new X-Request-Id, by which the server's log can be asked."""
        return f"stress-{next(self._ids)}"

    def body(self) -> dict[str, Any]:
        """A request that says all of what its images depend on."""
        rng = self.rng
        asked: dict[str, Any] = {"seed": rng.randrange(10**5, 2**53), "n": rng.choice([1, 1, 1, 2, 5, 16])}
        asked |= {"steps": rng.choice([1, 4, 10, 20, 50]), "sampler": rng.choice(["ddpm", "ddim", "dpmpp_2m"])}
        asked |= {"class_label": rng.choice([None, "plain", "0"]), "index": rng.choice([0, 0, 5, 10**6])}
        return asked | ({"guidance_scale": rng.choice([0.5, 2, 7])} if rng.random() < 0.3 else {})

    def keep(self, request: bytes, checkpoint: str, content: bytes) -> None:
        """Remembers some answers, all equally likely, to be compared with a quiet server's."""
        self.outcomes["images", "seen"] += 1
        place = len(self.kept) if len(self.kept) < 300 else self.rng.randrange(self.outcomes["images", "seen"])
        self.kept[place : place + 1] = [(request, checkpoint, content)] if place < 300 else []

    async def check_canary(self, when: str) -> None:
        """The same request gets the same image of the same checkpoint, always."""
        id = self.id()
        answer = await ask(self.port, message("POST", "/generate", CANARY, X_Request_Id=id))
        self.note("canary", answer, id, {"ok"} | REFUSALS)
        if answer.status == 200:
            checkpoint = answer.headers["x-ddpm-checkpoint"]
            if answer.body != self.canaries.setdefault(checkpoint, answer.body):
                self.wrong.append(f"{when} the canary is another image")

    async def generate(self) -> None:
        """Asks for images and waits for them."""
        body, id = self.body(), self.id()
        accept = self.rng.choice(["image/png", "application/json", "application/zip"])
        answer = await ask(self.port, message("POST", "/generate", body, Accept=accept, X_Request_Id=id))
        self.note("generate", answer, id, {"ok"} | REFUSALS)
        if answer.status == 200:
            request = message("POST", "/generate", body, Accept=accept)
            self.keep(request, answer.headers["x-ddpm-checkpoint"], answer.body)

    async def animation(self) -> None:
        """Asks for all frames as a file."""
        body, id = self.body(), self.id()
        path = f"{SEQUENCE}?{query(body)}&frames={self.rng.randint(1, 20)}&format={self.rng.choice(['gif', 'webp'])}"
        answer = await ask(self.port, message("GET", path, X_Request_Id=id))
        self.note("animation", answer, id, {"ok"} | REFUSALS)
        if answer.status == 200:
            self.keep(message("GET", path), answer.headers["x-ddpm-checkpoint"], answer.body)

    async def stream(self, slow: bool = False) -> None:
        """Watches images being denoised; a slow one takes a few bytes at a time at first."""
        body, id = self.body(), self.id()
        frames = self.rng.randint(1, 20)
        request = message("GET", f"{SEQUENCE}?{query(body)}&frames={frames}&format=sse", X_Request_Id=id)
        if slow:
            data = b""
            reader, writer = await connect(self.port, holding=2048)
            with suppress(OSError, TimeoutError):
                async with asyncio.timeout(PATIENCE):
                    writer.write(request)
                    for _ in range(50):
                        data += await reader.read(self.rng.choice([1, 100]))
                        await asyncio.sleep(0.05)
                    data += await reader.read()
            writer.close()
            answer = parse(data)
        else:
            answer = await ask(self.port, request)
        self.note("slow reader" if slow else "stream", answer, id, {"ok"} | REFUSALS)
        if answer.code == "ok":
            last = answer.body.rstrip().rpartition(b"\n\n")[2]
            if not last.startswith(b"event: completed"):
                self.wrong.append(f"stream ({id}) ended with {last[:100]!r}")
            else:
                completed = json.loads(last.partition(b"data: ")[2])
                request = message("POST", "/generate", body, Accept="image/png")
                self.keep(request, completed["checkpoint"], base64.b64decode(completed["png"]))

    async def slow_reader(self) -> None:
        """See `stream`."""
        await self.stream(slow=True)

    async def disconnect(self, moment: str = "") -> None:
        """Leaves at one of MOMENTS: in its head or body, queued, in a step, in a stream, when its image is made."""
        rng = self.rng
        moment = moment or rng.choice(MOMENTS)
        n, steps = {"queued": (4, 40), "step": (16, 100), "stream": (16, 100)}.get(moment, (64, 1))
        id = f"{moment}-{self.id()}"
        if moment == "stream" or (moment != "body" and rng.random() < 0.5):
            form = rng.choice(["sse", "multipart"] if moment == "stream" else ["sse", "multipart", "gif", "webp"])
            path = f"{SEQUENCE}?n={n}&steps={steps}&frames={min(9, steps)}&seed={SLOW}&format={form}"
            request = message("GET", path, X_Request_Id=id)
        else:
            request = message("POST", "/generate", {"n": n, "steps": steps, "seed": SLOW}, X_Request_Id=id)
        head = request.index(b"\r\n\r\n")
        request = {
            "head": request[: rng.randrange(head)],
            "body": request[: rng.randrange(head + 4, len(request)) if moment == "body" else 0],
        }.get(moment, request)
        self.disconnected += 1
        self.outcomes["disconnect", f"in its {moment}" if moment in ("head", "body", "step", "stream") else moment] += 1
        reader, writer = await connect(self.port)
        with suppress(OSError, TimeoutError):
            writer.write(request)
            await writer.drain()
            if moment == "stream":
                async with asyncio.timeout(5):
                    data = b"?"
                    while data and data.count(b"frame") < 3:
                        data += (part := await reader.read(1000))
                        data = data if part else b""
            longest = {"step": 1.0, "image": 0.3}.get(moment, 0.02)
            await asyncio.sleep(rng.random() * longest)
        if rng.random() < 0.5:  # a reset, and no orderly end
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort() if rng.random() < 0.5 else writer.close()

    async def malformed(self) -> None:
        """Sends what nobody should, at once or in small pieces. Most leave when they have an answer, some stay."""
        rng = self.rng
        kind = rng.choice(malformed_requests.KINDS)
        data = kind(rng)
        answers = b""
        reader, writer = await connect(self.port)
        stays = 2 if rng.random() < 0.05 else 0.02
        with suppress(OSError, TimeoutError):
            async with asyncio.timeout(2) as patience:
                if rng.random() < 0.1:
                    for i in range(40):
                        writer.write(data[i : i + 1])
                        await asyncio.sleep(0.02)
                    data = data[40:]
                writer.write(data)
                if writer.can_write_eof() and rng.random() < 0.3:
                    writer.write_eof()
                while part := await reader.read(2**16):
                    answers += part
                    patience.reschedule(asyncio.get_running_loop().time() + stays)
        writer.transport.abort()
        statuses = {int(found) for found in re.findall(rb"HTTP/1\.1 (\d{3}) ", answers)}
        for status in statuses or {"no answer"}:
            self.outcomes["malformed", str(status)] += 1
        if bad := {status for status in statuses if status >= 500} - {503, 504}:
            self.wrong.append(f"malformed {kind.__name__}: {bad}, {data[:300]!r}")

    async def fault(self) -> None:
        """Makes the server fail; then the canary must be as it was."""
        seed = (
            self.rng.choice(list(FAULTS)) if self.rng.random() < 0.5 else self.rng.choice([RAISES, CRASHES, NOT_FINITE])
        )
        id = self.id()
        answer = await ask(self.port, message("POST", "/generate", {"n": 3, "steps": 8, "seed": seed}, X_Request_Id=id))
        self.note(f"fault {seed}", answer, id, FAULTS[seed] | REFUSALS)
        await self.check_canary(f"after fault {seed}")

    async def burst(self) -> None:
        """More at once than the queue takes."""
        ids = [self.id() for _ in range(40)]
        body = {"n": 16, "steps": 50, "seed": 10**6}
        answers = [ask(self.port, message("POST", "/generate", body, X_Request_Id=id)) for id in ids]
        for id, answer in zip(ids, await asyncio.gather(*answers), strict=True):
            self.note("burst", answer, id, {"ok"} | REFUSALS)
