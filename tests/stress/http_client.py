"""HTTP by hand: what a well-behaved library would not send, and hundreds of clients in one thread."""

from __future__ import annotations

import asyncio
import json
import socket
from dataclasses import dataclass
from typing import Any

PATIENCE = 120.0  # seconds after which an answer is taken to be missing


@dataclass(frozen=True)
class Answer:
    """What came back; status 0 where the connection ended without an answer."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def code(self) -> str:
        """As metrics and log call it: ok, or the error's code, also of a stream that ended with an error event."""
        if self.status == 200:
            last = self.body.rstrip().rpartition(b"\n\n")[2]
            if not last.startswith(b"event: error"):
                return "ok"
            return str(json.loads(last.partition(b"data: ")[2])["error"]["code"])
        return str(json.loads(self.body)["error"]["code"]) if self.status else "unanswered"


def message(method: str, path: str, body: dict[str, Any] | None = None, **headers: str) -> bytes:
    """A request as bytes; an underscore in a header's name is a hyphen."""
    content = b"" if body is None else json.dumps(body).encode()
    fields = {"Host": "stress", "Connection": "close"} | ({"Content-Type": "application/json"} if content else {})
    fields |= {"Content-Length": str(len(content))} if content else {}
    fields |= {name.replace("_", "-"): value for name, value in headers.items()}
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items()), "", ""]
    return "\r\n".join(lines).encode() + content


async def connect(port: int, holding: int = 0) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection whose client has room for `holding` bytes; 0 is as much as the system gives."""
    client = socket.socket()
    client.setblocking(False)
    if holding:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, holding)
    try:
        await asyncio.get_running_loop().sock_connect(client, ("127.0.0.1", port))
        return await asyncio.open_connection(sock=client, limit=max(holding, 4096) if holding else 2**20)
    except BaseException:  # also a cancel: nobody else would close it
        client.close()
        raise


async def ask(port: int, request: bytes) -> Answer:
    """Sends a request (with Connection: close) and takes all of its answer."""
    try:
        reader, writer = await connect(port)
    except OSError:
        return Answer(0, {}, b"refused")
    try:
        async with asyncio.timeout(PATIENCE):
            writer.write(request)
            return parse(await reader.read())
    except (OSError, TimeoutError):
        return Answer(0, {}, b"")
    finally:
        writer.close()


def parse(data: bytes) -> Answer:
    """A whole answer. A body that broke off counts as none at all."""
    head, found, body = data.partition(b"\r\n\r\n")
    if not found:
        return Answer(0, {}, data)
    first, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
    if headers.get("transfer-encoding") == "chunked":
        parts, whole = [], False
        while body and not whole:
            size, _, body = body.partition(b"\r\n")
            length = int(size, 16)
            whole = length == 0
            parts.append(body[:length])
            body = body[length + 2 :]
        body = b"".join(parts)
    else:
        whole = len(body) == int(headers.get("content-length", "0"))
    return Answer(int(first.split()[1]) if whole else 0, headers, body)
