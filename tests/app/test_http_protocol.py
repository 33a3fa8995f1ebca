"""What a client may do to a real server before and beside HTTP: smuggling, dawdling, crowding."""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

from app.client_transport import ClientTransport
from app.settings import Settings
from tests.app.processes import PATIENCE, ServerProcess, metric, wait_for

ALICE, CAROL = "alice-0123456789abcdef", "carol-0123456789abcdef"
AUTH = f"Authorization: Bearer {ALICE}"


@pytest.fixture(scope="module")
def keys_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("keys") / "keys.toml"
    path.write_text(f'[carol]\nsha256 = "{hashlib.sha256(CAROL.encode()).hexdigest()}"\n')
    return path


@pytest.fixture(scope="module")
def guarded(grey_checkpoint: Path, keys_file: Path) -> Iterator[ServerProcess]:
    """A server with keys, short time-outs, few connections, and metrics on a port of their own."""
    argv = [
        "--checkpoint", str(grey_checkpoint), "--api-keys-file", str(keys_file), "--metrics-port", "0",
        "--read-timeout-s", "1", "--write-timeout-s", "1", "--max-connections", "40",
        "--max-header-bytes", "4096", "--cors-origins", "https://a.example", "--keep-alive-s", "2",
    ]  # fmt: skip
    with ServerProcess("app", *argv, DDPM_API_KEYS=f"alice:{ALICE}") as server:
        yield server


def operations(server: ServerProcess) -> str:
    """The address of its --metrics-port."""
    urls = [line["message"].split()[3] for line in server.logs() if "running on http" in line["message"]]
    assert len(urls) == 2
    return urls[1]


def connect(server: ServerProcess, holding: int = 0) -> socket.socket:
    """`holding` is the size of the client's buffer, in bytes."""
    host, _, port = server.url.removeprefix("http://").partition(":")
    connection = socket.socket()
    if holding:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, holding)
    connection.settimeout(PATIENCE)
    connection.connect((host, int(port)))
    return connection


def ended(connection: socket.socket) -> bytes:
    """What still comes until the server ends the connection."""
    data = b""
    try:
        while chunk := connection.recv(65536):
            data += chunk
    except ConnectionResetError:
        pass
    return data


def raw(server: ServerProcess, *lines: str, body: bytes = b"", path: str = "/models", method: str = "GET") -> bytes:
    """The answer to a request made of exactly these header lines."""
    head = "\r\n".join([f"{method} {path} HTTP/1.1", "Host: x", "Connection: close", *lines, "", ""])
    with connect(server) as connection:
        connection.sendall(head.encode("latin-1") + body)
        return ended(connection)


def status(answer: bytes) -> int:
    assert answer.startswith(b"HTTP/1.1 "), answer
    return int(answer[9:12])


def test_a_key_opens(guarded: ServerProcess) -> None:
    assert status(raw(guarded, AUTH)) == 200
    assert status(raw(guarded, AUTH.lower())) == 200
    assert status(raw(guarded)) == 401


@pytest.mark.parametrize(
    ("lines", "refused"),
    [
        ([AUTH, AUTH], {401}),
        ([AUTH, "Authorization: Bearer x"], {401}),
        (["Authorization: Bearer x", AUTH], {401}),
        (["Authorization: Bearer", f" {ALICE}"], {400, 401}),  # folded
        (["X-A: b", f" {AUTH}"], {400, 401}),
        ([f"Authorization : Bearer {ALICE}"], {400}),
        ([f"X-A: b\n{AUTH}"], {400, 401}),
        ([f"X-A: b\r{AUTH}"], {400, 401}),
        ([f"{AUTH}\x00"], {400, 401}),
        ([f"Authorization: Bearer\x0b{ALICE}"], {400, 401}),
        ([f"Authorization: Bearer {ALICE},Bearer x"], {401}),
        ([f"Proxy-Authorization: Bearer {ALICE}"], {401}),
        ([f"X-Authorization: Bearer {ALICE}"], {401}),
        ([f"Authorization_: Bearer {ALICE}"], {401}),
        ([f"Cookie: Authorization=Bearer {ALICE}"], {401}),
        (["X-Original-URL: /livez", "X-Rewrite-URL: /livez", "X-HTTP-Method-Override: GET"], {401}),
        ([AUTH, "Content-Length: 0", "Transfer-Encoding: chunked"], {400}),
        ([AUTH, "Transfer-Encoding: chunked", "Content-Length: 0"], {400}),
        ([AUTH, "Content-Length: 1", "Content-Length: 2"], {400}),
        ([AUTH, "Content-Length: +1"], {400}),
        ([AUTH, "Content-Length: -1"], {400}),
        ([AUTH, "Transfer-Encoding: xchunked"], {400}),
        ([AUTH, "Transfer-Encoding : chunked"], {400}),
    ],
)
def test_what_could_be_read_in_two_ways_is_refused(guarded: ServerProcess, lines: list[str], refused: set[int]) -> None:
    answer = raw(guarded, *lines)
    assert status(answer) in refused
    assert answer.count(b"HTTP/1.1 ") == 1
    assert b'"error"' in answer


@pytest.mark.parametrize(
    "path", ["//models", "/livez/../models", "/livez%2f..%2fmodels", "/./models", "/livez;/models"]
)
def test_no_spelling_of_a_path_gets_around_the_key(guarded: ServerProcess, path: str) -> None:
    assert status(raw(guarded, path=path)) == 401


def test_a_trailer_is_no_header(guarded: ServerProcess) -> None:
    body = b"2\r\n{}\r\n0\r\n" + AUTH.encode() + b"\r\nX-Request-Id: smuggled\r\n\r\n"
    declared = ["Transfer-Encoding: chunked", "Trailer: Authorization", "Content-Type: application/json"]
    answer = raw(guarded, *declared, body=body, path="/generate", method="POST")
    assert status(answer) == 401
    assert b"smuggled" not in answer


def test_the_next_request_of_a_connection_needs_a_key_again(guarded: ServerProcess) -> None:
    with connect(guarded) as connection:
        first = f"GET /models HTTP/1.1\r\nHost: x\r\n{AUTH}\r\n\r\n"
        connection.sendall((first + "GET /models HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").encode())
        answers = ended(connection)
    assert [part[:3] for part in answers.split(b"HTTP/1.1 ")[1:]] == [b"200", b"401"]


def test_who_says_to_be_forwarded_is_not_believed(guarded: ServerProcess) -> None:
    raw(guarded, "X-Forwarded-For: 6.6.6.6", "X-Forwarded-Proto: https", "X-Request-Id: forwarded")
    wait_for(lambda: [line for line in guarded.logs() if line.get("request_id") == "forwarded"])
    (line,) = [line for line in guarded.logs() if line.get("request_id") == "forwarded"]
    assert line["client"] == "127.0.0.1"


@pytest.mark.parametrize(
    "lines", [["X-A: " + "a" * 5000], [f"X-{i}: a" for i in range(900)], ["X-A: " + "a" * 900_000]]
)
def test_headers_beyond_the_limit_are_431(guarded: ServerProcess, lines: list[str]) -> None:
    with connect(guarded) as connection:
        try:
            connection.sendall("\r\n".join(["GET /livez HTTP/1.1", "Host: x", *lines, "", ""]).encode())
            answer = ended(connection)
        except (BrokenPipeError, ConnectionResetError):  # it did not even listen to the end
            answer = b""
    assert not answer or status(answer) == 431
    if len(lines[0]) < 6000:
        assert b'"headers_too_large"' in answer


def test_every_answer_has_security_headers_and_no_server_name(guarded: ServerProcess) -> None:
    for path in ("/", "/docs", "/livez", "/models", "/nothing"):
        headers = httpx.get(guarded.url + path).headers
        assert "server" not in headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert headers["cross-origin-resource-policy"] == "cross-origin"  # there are origins that may
        assert "camera=()" in headers["permissions-policy"]


def test_cors_is_for_the_origins_named_and_without_credentials(guarded: ServerProcess, server: ServerProcess) -> None:
    def preflight(where: ServerProcess, origin: str) -> httpx.Response:
        asked = {
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization, content-type, x-stainless-lang",
        }
        return httpx.options(where.url + "/generate", headers={"Origin": origin, **asked})

    allowed = preflight(guarded, "https://a.example")
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == "https://a.example"
    assert allowed.headers["access-control-allow-headers"] == "authorization, content-type, x-stainless-lang"
    for origin in ("https://b.example", "https://a.example.evil", "null", "http://a.example"):
        assert "access-control-allow-origin" not in preflight(guarded, origin).headers
    refusal = httpx.get(guarded.url + "/models", headers={"Origin": "https://a.example"})
    assert refusal.status_code == 401  # and its page may read why
    assert refusal.headers["access-control-allow-origin"] == "https://a.example"
    for answer in (allowed, refusal, preflight(server, "https://a.example")):
        assert "access-control-allow-credentials" not in answer.headers
    assert "access-control-allow-origin" not in preflight(server, "https://a.example").headers


def test_metrics_have_a_port_of_their_own(guarded: ServerProcess) -> None:
    url = operations(guarded)
    own = httpx.get(url + "/metrics")
    assert own.status_code == 200
    assert "ddpm_ready 1.0" in own.text
    assert httpx.get(url + "/readyz").status_code == 200
    assert httpx.get(url + "/models").status_code == 404
    assert httpx.get(guarded.url + "/metrics", headers={"Authorization": f"Bearer {ALICE}"}).status_code == 404


def test_a_key_added_to_the_file_opens_after_a_while(guarded: ServerProcess, keys_file: Path) -> None:
    dave = "dave-0123456789abcdef"
    asked = {"Authorization": f"Bearer {dave}"}
    assert httpx.get(guarded.url + "/models", headers=asked).status_code == 401
    added = keys_file.with_suffix(".new")
    added.write_text(keys_file.read_text() + f'[dave]\nsha256 = "{hashlib.sha256(dave.encode()).hexdigest()}"\n')
    os.replace(added, keys_file)
    guarded.process.send_signal(signal.SIGHUP)
    wait_for(lambda: httpx.get(guarded.url + "/models", headers=asked).status_code == 200)
    assert not [line for line in guarded.lines if dave in line or ALICE in line or CAROL in line]


@pytest.mark.slow
def test_slow_senders_are_cut_off_and_delay_nobody(guarded: ServerProcess) -> None:
    slow = [connect(guarded) for _ in range(60)]  # more than there are connections
    for number, connection in enumerate(slow):
        connection.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\n" if number % 2 else b"\r\n")
    for _ in range(5):
        assert status(raw(guarded, AUTH)) == 200
    ends = [ended(connection) for connection in slow]  # by the server, or this would last for ever
    assert {status(answer) for answer in ends if answer} <= {408}
    assert any(b"request_timeout" in answer for answer in ends)
    assert b"" in ends[1::2]  # those who had begun made room, when others came, before their time was up
    for connection in slow:
        connection.close()


@pytest.mark.slow
def test_a_body_that_does_not_come_is_408(guarded: ServerProcess) -> None:
    lines = [AUTH, "Content-Type: application/json", "Content-Length: 10"]
    answer = raw(guarded, *lines, body=b"{", path="/generate", method="POST")
    assert status(answer) == 408
    assert b'"request_timeout"' in answer
    # Where nobody wants the body, its connection ends all the same.
    with connect(guarded) as connection:
        connection.sendall(b"POST /nothing HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n{")
        assert status(ended(connection)) == 401


@pytest.mark.slow
def test_who_takes_nothing_of_an_answer_is_cut_off(guarded: ServerProcess) -> None:
    many = f"GET /openapi.json HTTP/1.1\r\nHost: x\r\n{AUTH}\r\n\r\n".encode() * 5000

    def reset() -> bool:
        try:
            connection.sendall(many)  # and read nothing
        except TimeoutError:  # the buffers are full, as they should be
            return False
        except OSError:
            return True
        return False

    with connect(guarded, holding=4096) as connection:
        connection.settimeout(0.5)
        wait_for(reset, "the end")
    assert status(raw(guarded, AUTH)) == 200


@pytest.mark.slow
def test_who_takes_an_answer_little_by_little_is_not_cut_off(guarded: ServerProcess) -> None:
    """For some times of --write-timeout-s, in which there is always more for it than it takes."""
    many = f"GET /openapi.json HTTP/1.1\r\nHost: x\r\n{AUTH}\r\n\r\n".encode() * 1000
    with connect(guarded, holding=4096) as connection:
        connection.sendall(many)
        started = last = time.monotonic()
        while last < started + 5:
            time.sleep(0.02)
            assert connection.recv(8192), "cut off"
            if time.monotonic() > last + 0.5:  # it stood still itself: what was before does not count
                started = time.monotonic()
            last = time.monotonic()


@pytest.mark.slow
@pytest.mark.parametrize("takes", [False, True])
def test_requests_that_come_before_an_answer_do_not_pile_up(guarded: ServerProcess, takes: bool) -> None:
    request = f"GET /livez HTTP/1.1\r\nHost: x\r\n{AUTH}\r\n\r\n".encode()

    def resident() -> float:
        return metric(httpx.get(operations(guarded) + "/metrics").text, "process_resident_memory_bytes")

    def take(connection: socket.socket) -> None:
        with suppress(OSError):
            while connection.recv(2**20):
                pass

    before = resident()
    with connect(guarded) as flood, ThreadPoolExecutor(1) as pool:
        flood.settimeout(2)
        if takes:
            pool.submit(take, flood)
        with suppress(OSError):  # it reads no more, as it should
            flood.sendall(request * 10**6)
        assert resident() < before + 30 * 2**20
        with connect(guarded) as other:
            other.sendall(request * 299 + request.replace(b"Host: x", b"Connection: close"))
            assert ended(other).count(b"HTTP/1.1 200 OK") == 300
        with suppress(OSError):
            flood.shutdown(socket.SHUT_RDWR)  # for the one who takes


@pytest.mark.slow
def test_an_idle_connection_is_kept_for_the_time_of_the_setting(guarded: ServerProcess) -> None:
    with connect(guarded) as connection:
        connection.sendall(f"GET /livez HTTP/1.1\r\nHost: x\r\n{AUTH}\r\n\r\n".encode())
        assert status(connection.recv(65536)) == 200
        answered = time.monotonic()
        assert ended(connection) in (b"", b'{"status":"ok"}')  # the rest of the answer
    assert 1.9 < time.monotonic() - answered < 4.5  # uvicorn's own is 5
    assert Settings().keep_alive_s == 75  # balancers keep 60 s


H2C = ["Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAAQCAAAAAAIAAAAA"]
WEBSOCKET = ["Connection: keep-alive, Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13"]
BODY = b'{"n": 2, "steps": 2}'


@pytest.mark.parametrize(
    ("path", "headers", "kept"),
    [
        ("/livez", ["Connection: keep-alive"], True),
        ("/models", ["Connection: Keep-Alive", AUTH], True),
        ("/models", ["Connection: Keep-Alive"], True),  # a refusal
        ("/livez", [], False),
        ("/livez", ["Connection: close"], False),
        ("/livez", ["Connection: keep-alive, close"], False),
        ("/livez", ["Connection: close", "Connection: keep-alive"], False),
        ("/livez", ["Transfer-Encoding: chunked", "Connection: keep-alive"], False),  # who knows where it ends
        ("/diffusion-sequence?steps=2&format=sse", ["Connection: keep-alive", AUTH], False),  # of no known length
    ],
)
def test_a_client_of_http_1_0_may_keep_its_connection(
    guarded: ServerProcess, path: str, headers: list[str], kept: bool
) -> None:
    request = "\r\n".join([f"GET {path} HTTP/1.0", *headers, "", ""]).encode()
    with connect(guarded) as connection:
        connection.sendall(request)
        first = ended(connection) if not kept else b""
        while kept and (b"\r\n\r\n" not in first or len(first) < whole(first)):
            first += connection.recv(65536)
        head = first.partition(b"\r\n\r\n")[0].lower()
        assert (b"\r\nconnection: keep-alive" in head) == kept
        assert (b"\r\nconnection: close" in head) != kept
        if kept:
            connection.sendall(request.replace(b"Keep-Alive", b"close").replace(b"keep-alive", b"close"))
            assert ended(connection).startswith(first[:12])


def whole(answer: bytes) -> int:
    """How long it says that it is."""
    head, _, _ = answer.partition(b"\r\n\r\n")
    length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
    return len(head) + 4 + int(length.partition(b":")[2])


def offering(server: ServerProcess, offer: list[str], *parts: bytes, declared: str) -> list[bytes]:
    """The answers to a POST that offers an upgrade, its body in parts, and to a GET after it on the same connection."""
    lines = ["POST /generate HTTP/1.1", "Host: x", AUTH, "Content-Type: application/json", declared, *offer, "", ""]
    last = f"GET /models HTTP/1.1\r\nHost: x\r\n{AUTH}\r\nConnection: close\r\n\r\n".encode()
    with connect(server) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for part in ("\r\n".join(lines).encode(), *parts, last):
            connection.sendall(part)
            time.sleep(0.05)
        return ended(connection).split(b"HTTP/1.1 ")[1:]


@pytest.mark.slow
@pytest.mark.parametrize("offer", [H2C, WEBSOCKET], ids=["h2c", "websocket"])
def test_an_offer_to_upgrade_is_ignored(guarded: ServerProcess, offer: list[str]) -> None:
    length, chunk = f"Content-Length: {len(BODY)}", b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)
    for declared, parts in [
        (length, [BODY]),
        (length, [BODY[:5], BODY[5:]]),
        ("Transfer-Encoding: chunked", [chunk]),
        (length + "\r\nX-Long: " + "a" * 3000, [BODY]),  # its head is parsed in several pieces
    ]:
        made, listed = offering(guarded, offer, *parts, declared=declared)
        assert made.startswith(b"200 OK")
        assert b"\x89PNG" in made
        assert listed.startswith(b"200 OK")
    assert not [line for line in guarded.logs() if "upgrade" in str(line["message"]).lower()]


def test_an_offer_to_upgrade_needs_a_key_as_well(guarded: ServerProcess) -> None:
    assert status(raw(guarded, *H2C)) == 401
    assert status(raw(guarded, *WEBSOCKET, AUTH)) == 200
    answer = raw(guarded, *H2C, AUTH, "Content-Length: 1", "Content-Length: 2")
    assert status(answer) == 400
    assert status(raw(guarded, *H2C, AUTH, "X-A: " + "a" * 5000)) == 431


def test_a_head_with_an_offer_in_pieces_is_read(guarded: ServerProcess) -> None:
    head = "\r\n".join(["GET /livez HTTP/1.1", "Host: x", *H2C, "Connection: close", "", ""]).encode()
    with connect(guarded) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for at in range(0, len(head), 40):
            connection.sendall(head[at : at + 40])
            time.sleep(0.01)
        assert status(ended(connection)) == 200


@pytest.mark.parametrize("target", ["x:443", "/livez"])
def test_connect_is_refused(guarded: ServerProcess, target: str) -> None:
    assert status(raw(guarded, path=target, method="CONNECT")) == 400


class RecordedTransport:
    """Keeps what is sent, by write."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self.closed = False

    def write(self, data: bytes) -> None:
        self.sent.append(data)

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    def get_write_buffer_size(self) -> int:
        return 0


HEAD = b"HTTP/1.1 200 OK\r\n\r\n"


@pytest.mark.parametrize(
    ("bodies", "expected"),
    [
        ([b"one"], [HEAD + b"one"]),
        ([b"one", b"two"], [HEAD + b"one", b"two"]),
        ([bytes(100_000)], [HEAD, bytes(100_000)]),  # too long to be copied
        ([], [HEAD]),  # before the connection closes
    ],
)
def test_a_head_is_sent_with_its_body(bodies: list[bytes], expected: list[bytes]) -> None:
    async def main() -> list[bytes]:
        recorded = RecordedTransport()
        transport = ClientTransport(recorded)  # type: ignore[arg-type]
        transport.write(HEAD)
        assert (recorded.sent, transport.bytes_flushed) == ([], 0)
        for body in bodies:
            transport.write(body)
        transport.close()
        await asyncio.sleep(0)
        assert transport.bytes_flushed == sum(map(len, recorded.sent))
        return recorded.sent

    assert asyncio.run(main()) == expected


def test_a_head_without_a_body_waits_one_turn_of_the_loop() -> None:
    async def main() -> list[bytes]:
        recorded = RecordedTransport()
        ClientTransport(recorded).write(HEAD)  # type: ignore[arg-type]
        await asyncio.sleep(0)
        return recorded.sent

    assert asyncio.run(main()) == [HEAD]
