"""The clients, in a process of their own: an open loop, so a slow server does not slow the arrivals down.

    python -m tests.bench.serving.generator JOB RESULT

JOB is JSON: host, port, and requests {at, raw, patience, leaves, keep}; RESULT gets a list of records in their order.
Times are seconds since the *intended* arrival. Every request is a connection of its own: independent clients. Little
is imported, and the loop is uvloop's, so the process starts at once and leaves the processor to the server.
"""

from __future__ import annotations

import asyncio
import base64
import json
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import uvloop

LEAD_S = 0.3  # from the start of the clock to the first arrival
FRAME = b"event: frame"


async def ask(host: str, port: int, request: dict[str, Any], start: float) -> dict[str, Any]:
    """One request. status 0: no whole answer, `error` says why."""
    due = start + request["at"]
    await asyncio.sleep(max(0.0, due - time.monotonic()))
    record: dict[str, Any] = {"late": time.monotonic() - due, "status": 0, "first": None, "done": None, "error": None}
    leaves = request["leaves"]
    patience = request["patience"] if leaves is None else leaves
    answer = bytearray()
    try:
        async with asyncio.timeout_at(asyncio.get_running_loop().time() + due + patience - time.monotonic()):
            await _exchange(host, port, request["raw"].encode(), answer, record, due)
        record["done"] = time.monotonic() - due
        status, body = parse(bytes(answer))
        record["status"] = status
        if request["keep"] or status != 200:
            record["body"] = base64.b64encode(body[: None if status == 200 else 300]).decode()
    except TimeoutError:
        record["error"] = "timeout" if leaves is None else "left"
    except (OSError, ValueError, IndexError) as error:
        record["error"] = f"{type(error).__name__}: {error}"
    return record


async def _exchange(host: str, port: int, raw: bytes, answer: bytearray, record: dict[str, Any], due: float) -> None:
    reader, writer = await asyncio.open_connection(host, port)
    try:
        writer.write(raw)
        streaming = None
        while not complete(answer) and (data := await reader.read(65536)):
            answer += data
            if record["first"] is None and (head := answer.find(b"\r\n\r\n")) >= 0:
                streaming = b"text/event-stream" in answer[:head].lower()
                seen = FRAME in answer if streaming else len(answer) > head + 4
                record["first"] = time.monotonic() - due if seen else None
    finally:
        writer.close()
        with suppress(OSError, asyncio.CancelledError):
            await writer.wait_closed()


def complete(answer: bytearray) -> bool:
    """Whether the answer says that it is whole. Where it does not say, the server's close does."""
    head = answer.find(b"\r\n\r\n")
    if head < 0:
        return False
    fields = answer[:head].lower()
    if b"transfer-encoding: chunked" in fields:
        return answer.endswith(b"\r\n0\r\n\r\n")
    place = fields.find(b"\r\ncontent-length:")
    if place < 0:
        return False
    length = int(fields[place + 17 :].split(b"\r\n", 1)[0])
    return len(answer) >= head + 4 + length


def parse(answer: bytes) -> tuple[int, bytes]:
    """Status and body. Raises ValueError where the answer is cut off."""
    head, separator, body = answer.partition(b"\r\n\r\n")
    if not separator:
        raise ValueError("the connection was closed without an answer")
    if not complete(bytearray(answer)) and b"content-length:" in head.lower():
        raise ValueError("the answer was cut off")
    if b"transfer-encoding: chunked" in head.lower():
        body = _unchunked(body)
    return int(head.split(b" ", 2)[1]), body


def _unchunked(body: bytes) -> bytes:
    parts = []
    while True:
        size, _, body = body.partition(b"\r\n")
        length = int(size.split(b";")[0], 16)
        if length == 0:
            return b"".join(parts)
        parts.append(body[:length])
        body = body[length + 2 :]


async def _all(job: dict[str, Any]) -> list[dict[str, Any]]:
    start = time.monotonic() + LEAD_S
    return await asyncio.gather(*(ask(job["host"], job["port"], r, start) for r in job["requests"]))


def main(job: Path, result: Path) -> None:
    """Runs the job and writes its records, and the processor seconds that it took itself."""
    records = uvloop.run(_all(json.loads(job.read_text())))
    result.write_text(json.dumps({"records": records, "cpu_s": time.process_time()}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
