"""One client's connection, with what uvicorn leaves open: limits on headers, on time, and on how many there are."""

from __future__ import annotations

import asyncio
import json
import socket
from dataclasses import dataclass, field
from typing import Any

import httptools
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from app.client_transport import ClientTransport
from app.errors import BadRequest, HeadersTooLarge, NotReady, RequestTimeout, ServiceError

PARSE_CHUNK = 1024  # bytes that are parsed at once
READ_AHEAD = 65_536  # bytes that are read while earlier requests are answered: enough to see the client leave
NOTSENT_LOWAT = 16_384  # bytes that the kernel may hold for a client before it sends them; its default is megabytes
WRITE_CHECKS = 4  # at a client that takes nothing, before it is cut off
UPGRADE_HEADERS = {
    b"upgrade",
    b"http2-settings",
}  # and options of the header Connection


@dataclass
class ConnectionLimits:
    """Of one listening server; see the settings of the same names. `idle` is shared by its connections."""

    connections: int
    header_bytes: int
    read_s: float
    write_s: float
    idle: dict[HardenedHttpProtocol, None] = field(default_factory=dict)  # those without a request; longest first


class HardenedHttpProtocol(HttpToolsProtocol):
    """uvicorn's protocol. A message is read within `read_s` for its head and again for its body, or the connection
    ends; so it does if the client takes nothing of an answer for `write_s`. Where there are too many, the longest
    idle one makes room, which is what a client that sends its head drop by drop is, too. Requests that come before
    the answer to an earlier one wait as bytes, few of them, in which uvicorn would queue as many as are sent."""

    transport: ClientTransport  # type: ignore[assignment]

    def __init__(self, limits: ConnectionLimits, **uvicorn_arguments: Any) -> None:
        super().__init__(**uvicorn_arguments)
        self._limits = limits
        self._held = bytearray()  # read, and not parsed yet
        self._answered: RequestResponseCycle | None = None  # the request that is, or was last
        self._part = "none"  # of a message that is being read: none, head or body
        self._unparsed = 0  # bytes since the last complete head or body
        self._refusal: ServiceError = BadRequest("this is not well-formed HTTP")
        self._read_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client is there: makes room for it, or refuses it where all are busy."""
        super().connection_made(ClientTransport(transport))  # type: ignore[arg-type]
        if limited := getattr(socket, "TCP_NOTSENT_LOWAT", None):  # Linux and macOS
            transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, limited, NOTSENT_LOWAT)
        idle = self._limits.idle
        if len(self.connections) > self._limits.connections:
            if not idle:
                self._refuse(NotReady("too many connections", retry_after=1))
                return
            longest = next(iter(idle))
            del idle[longest]
            longest.transport.abort()
        idle[self] = None
        self._arm_read_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client left, or was cut off."""
        self._limits.idle.pop(self, None)
        for timer in (self._read_timer, self._write_timer):
            if timer is not None:
                timer.cancel()
        if self._answered is not None:  # uvicorn tells the newest, which may be another that waits behind it
            self._answered.disconnected = True
            self._answered.message_event.set()
        super().connection_lost(exc)

    # Reading

    def data_received(self, data: bytes) -> None:
        """Some bytes of a message, or of several."""
        self._held += data
        self._parse()

    def _parse(self) -> None:
        while self._held and not self.pipeline and not self.transport.is_closing():
            piece = bytes(self._held[:PARSE_CHUNK])
            del self._held[:PARSE_CHUNK]
            if self._read_timer is None:
                self._arm_read_timer()
            if self._part != "body":
                self._unparsed += len(piece)
            self._feed(piece)
            if self._part != "body" and self._unparsed > self._limits.header_bytes:
                self._refuse(self._too_large())
        if self.transport.is_closing():
            self._held.clear()
        elif not self.transport.read_paused and len(self._held) > READ_AHEAD:
            self.transport.read_paused = True
            self.transport.pause_reading()
        elif self.transport.read_paused and len(self._held) <= READ_AHEAD:
            self.transport.read_paused = False
            if not self.flow.read_paused:
                self.transport.resume_reading()

    def _feed(self, piece: bytes) -> None:
        self._unset_keepalive_if_required()
        try:
            self.parser.feed_data(piece)
        except httptools.HttpParserError:
            self.logger.warning("Invalid HTTP request received.")
            self._refuse(self._refusal)
        except httptools.HttpParserUpgrade as offer:
            # The parser takes what follows for another protocol: another one reads the head again, without the offer.
            self.parser = httptools.HttpRequestParser(self)
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's own
            self._held[:0] = self._head_without_offer() + piece[offer.args[0] :]

    def _head_without_offer(self) -> bytes:
        """Of the message that was read last. Who offers an upgrade gets an answer in HTTP/1.1 (RFC 9110, 7.8)."""
        lines = [b"%s %s HTTP/%s" % (self.scope["method"].encode(), self.url, self.scope["http_version"].encode())]
        for name, value in self.headers:
            if name == b"connection":
                value = b",".join(
                    option for option in value.split(b",") if option.strip().lower() not in UPGRADE_HEADERS
                )
            if name not in UPGRADE_HEADERS:
                lines.append(name + b": " + value)
        return b"\r\n".join([*lines, b"", b""])

    def on_message_begin(self) -> None:
        """The first byte of a request line."""
        self._part, self._unparsed = "head", 0
        self._arm_read_timer()
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header, or a trailer."""
        # Trailers come here too, and would pass for headers that no proxy saw.
        if self._part == "head":
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The request can begin, if its headers are within the limit and it offers no upgrade: see `_feed`."""
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if size > self._limits.header_bytes:
            self._refusal = self._too_large()
            raise self._refusal  # which the parser turns into its own error
        method, version = self.parser.get_method(), self.parser.get_http_version()
        if method == b"CONNECT":
            self._refusal = BadRequest("this server is not a proxy: it knows no CONNECT")
            raise self._refusal
        if self.parser.should_upgrade():
            self.scope["method"], self.scope["http_version"] = method.decode(), version
            return
        self._part, self._unparsed = "body", 0
        self._limits.idle.pop(self, None)
        self._arm_read_timer()
        super().on_headers_complete()
        if version == "1.0":  # uvicorn would end the connection, though the client asks to keep it
            self.cycle.keep_alive = self._asks_to_keep()
        if self.pipeline:  # uvicorn reads no more then, and would not see that the client leaves
            self.flow.resume_reading()

    def _asks_to_keep(self) -> bool:
        """Whether a client of HTTP/1.0 does. It is doubtful where a message with Transfer-Encoding ends (RFC 9112)."""
        options = {
            option.strip().lower()
            for name, value in self.headers
            if name == b"connection"
            for option in value.split(b",")
        }
        framed = any(name == b"transfer-encoding" for name, _ in self.headers)
        return b"keep-alive" in options and b"close" not in options and not framed

    def on_message_complete(self) -> None:
        """Head and body are here."""
        if self.parser.should_upgrade():
            return
        super().on_message_complete()
        self._part, self._unparsed = "none", 0
        if self._read_timer is not None:
            self._read_timer.cancel()
            self._read_timer = None

    def on_response_complete(self) -> None:
        """The answer was handed over for writing."""
        super().on_response_complete()
        if self._held and not self.transport.is_closing():
            self.loop.call_soon(self._parse)
        elif self.cycle.response_complete and not self.transport.is_closing():  # and no pipelined one goes on
            self._limits.idle[self] = None
        self._watch_writing()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._answered = cycle
        super()._start_asgi_task(cycle, _kept_alive(cycle, app) if cycle.scope["http_version"] == "1.0" else app)

    def _arm_read_timer(self) -> None:
        if self._read_timer is not None:
            self._read_timer.cancel()
        self._read_timer = self.loop.call_later(self._limits.read_s, self._read_timed_out)

    def _read_timed_out(self) -> None:
        self._read_timer = None
        if self._answering():  # the time of a body that is wanted is BodyLimitMiddleware's to keep
            self._arm_read_timer()
        elif self._part == "head":
            self._refuse(RequestTimeout(f"the headers did not arrive within {self._limits.read_s:g} s"))
        else:
            self.transport.close()

    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _too_large(self) -> ServiceError:
        return HeadersTooLarge(f"request line and headers are larger than {self._limits.header_bytes} bytes")

    def _refuse(self, error: ServiceError) -> None:
        """Answers outside of any request, and ends the connection."""
        if self.transport.is_closing():
            return
        if self._answering():
            if self.cycle.response_started or self.pipeline:  # an answer on its way must not be mixed with this one
                self.transport.abort()
                return
            self.cycle.disconnected = True  # its headers were good, what follows is not
            self.cycle.message_event.set()
        body = json.dumps(error.body()).encode()
        fields = {"Content-Type": "application/json", "Content-Length": str(len(body)), "Connection": "close"}
        lines = [f"{name}: {value}\r\n".encode() for name, value in (fields | error.headers()).items()]
        self.transport.write(b"".join([STATUS_LINE[error.status], *lines, b"\r\n", body]))
        self.transport.close()
        self._watch_writing()

    # Writing

    def pause_writing(self) -> None:
        """The client takes less than there is for it."""
        super().pause_writing()
        self._watch_writing()

    def _watch_writing(self) -> None:
        if self._write_timer is None and self.transport.get_write_buffer_size():
            self._recheck_write(self.transport.bytes_flushed, WRITE_CHECKS)

    def _recheck_write(self, flushed: int, checks: int) -> None:
        self._write_timer = self.loop.call_later(
            self._limits.write_s / WRITE_CHECKS, self._check_writing, flushed, checks
        )

    def _check_writing(self, flushed: int, checks: int) -> None:
        self._write_timer = None
        if self.transport.bytes_flushed > flushed:
            self._watch_writing()
        elif checks > 1:  # several, for a process that stood still may look before the client was asked
            self._recheck_write(flushed, checks - 1)
        else:
            self.transport.abort()


def _kept_alive(cycle: RequestResponseCycle, app: ASGIApp) -> Any:
    """Says that a connection is kept which a client of HTTP/1.0 asks to keep, if the answer says how long it is."""

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_connection(message: Message) -> None:
            if message["type"] == "http.response.start" and cycle.keep_alive:
                headers = list(message.get("headers", ()))
                cycle.keep_alive = any(name == b"content-length" for name, _ in headers)
                if cycle.keep_alive:
                    message = {**message, "headers": [*headers, (b"connection", b"keep-alive")]}
            await send(message)

        await app(scope, receive, send_with_connection)

    return answer
