"""What is written to a client, as few sends."""

from __future__ import annotations

import asyncio
from typing import Any

JOINED_BODY = 65_536  # bytes of a body that are worth a copy, so that its head goes out with them


class ClientTransport:
    """A transport that counts `bytes_flushed` to its client, and reads none while it is `read_paused`.

    An answer's head goes out with what follows it: for each send the event loop gives up Python's lock.
    """

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._written = 0
        self._head = b""  # written, and held until the loop's next turn at most
        self.read_paused = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        """As the transport's own."""
        self._written += len(data)
        if data.startswith(b"HTTP/1.1 ") and not self._head:
            self._head = data
            asyncio.get_running_loop().call_soon(self._flush_head)
        elif self._head and len(data) <= JOINED_BODY:
            data, self._head = self._head + data, b""
            self._transport.write(data)
        else:
            self._flush_head()
            self._transport.write(data)

    def close(self) -> None:
        """As the transport's own."""
        self._flush_head()
        self._transport.close()

    def _flush_head(self) -> None:
        data, self._head = self._head, b""
        if data and not self._transport.is_closing():
            self._transport.write(data)

    def resume_reading(self) -> None:
        """As the transport's own, which uvicorn calls at every request and every answer."""
        if not self.read_paused:
            self._transport.resume_reading()

    @property
    def bytes_flushed(self) -> int:
        """Bytes that were written and do not wait here any more."""
        return self._written - len(self._head) - self._transport.get_write_buffer_size()
