"""What nobody should send: broken HTTP, broken JSON, and requests that are neither."""

from __future__ import annotations

import io
import json
import random
import struct
import zlib
from collections.abc import Callable

from PIL import Image as Pillow

from tests.stress.http_client import message

SEQUENCE = "/diffusion-sequence"
FIELDS = (
    "class_label", "n", "seed", "index", "sampler", "steps", "eta", "guidance_scale", "guidance_interval", "spacing",
    "limit", "timeout_s", "columns", "frames", "view", "format", "unheard",
)  # fmt: skip
OPENAI = "/v1/images/generations"
OPENAI_FIELDS = (
    "prompt", "model", "n", "size", "quality", "response_format", "output_format", "output_compression", "background",
    "moderation", "stream", "partial_images", "user", "seed", "index", "steps", "sampler", "guidance_scale", "style",
)  # fmt: skip
PROMPTS = ["plain", "", "plain and 0", "no class", "plain " * 600, "\0", "\ud800", "٣", "🐛" * 900, 7, None, ["plain"]]
SIZES = ["1x1", "99999x66666", "0x0", "-12x-8", "1e9x1e9", "12x8" * 999, "12X8", "１２x８", "1200x800", 12, None]
SEGMENTS = [
    "grey", "grey@", "grey@deadbeef", "grey@" + "0" * 64, "@", "..", ".", "%2e%2e", "%2F", "%00", "%ff", "a" * 3000, "",
    "plain", "random", "none", "0", "1", "-1", "007", "1e3", "9" * 400, "6.png", "6.gif", "6.webp", "6.jpg", "6.",
    ".png", "6.png.gif", "6.svg", "٣.png", "{index}.png",
]  # fmt: skip
VALUES: list[object] = [
    None, True, -1, 0, 2**31, 2**63, 2**64, 10**30, 1.5, -0.0, 1e308, float("nan"), float("inf"), "", "1", "0x10", "\0",
    "\ud800", "🐛" * 50, "a" * 5000, "../../etc/passwd", "'; DROP TABLE", "{{7*7}}", "%s%n", [], [[]], [1, 2, 3], {},
    {"$ref": "#"}, {"__class__": "x"},
]  # fmt: skip
JSONS = [
    b"", b"null", b"[]", b'"x"', b"{", b'{"n": 1', b'{"n": 1e999}', b'{"n": 1, "n": 2}', b'{"n": 01}',
    b"\xff\xfe{\x00}\x00",
    b"\xef\xbb\xbf{}",
    b'{"seed": ' + b"9" * 5000 + b"}", b"[" * 20_000, b'{"a":' * 10_000, b"\x00" * 100, b"\x80\x04\x95",
    b'{"class_label": "\xff"}', b'{"class_label": "\\ud800"}', b"{}" + b" " * 70_000,
]  # fmt: skip
TARGETS = [
    "/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/%00", "/generate%0d%0aX: y", "//generate", "/generate/", "*",
    "http://other/generate", "/\xff", "/" + "a" * 5000, "/" + "a" * 100_000, "/models?" + "a=b&" * 2000, "/metrics/..",
    "/generate#x", "/.git/config", "/docs/../models", "other:443", "", "?",
]  # fmt: skip
HEADERS = [
    "Content-Length: -1", "Content-Length: 99999999999999999999", "Content-Length: 5\r\nContent-Length: 6",
    "Transfer-Encoding: chunked\r\nContent-Length: 3", "Transfer-Encoding: gzip, chunked", "Expect: 100-continue",
    "Expect: the worst", "X: " + "a" * 20_000, "\r\n".join(f"X-{i}: y" for i in range(2000)), "X\0: y", "X : y",
    ": y",
    "X: \x01\x02", " folded: x", "Upgrade: websocket\r\nConnection: Upgrade", "Upgrade: h2c", "Accept: ;;;,,q=",
    "Accept: */*;q=nan", "Content-Type: text/plain", "Content-Type: application/json; charset=utf-7",
    "Host:\r\nHost: x",
    "Content-Encoding: gzip", "Last-Event-ID: \xff", "X-Request-Id: \xff{}%0a", "Range: bytes=0-0,-1",
    "Authorization: \xff",
]  # fmt: skip
FOREIGN = [
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(506),  # the beginning of TLS
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9),
    b"SSH-2.0-OpenSSH_9.2\r\n",
    b"PROXY TCP4 10.0.0.1 10.0.0.2 1 2\r\nGET / HTTP/1.1\r\nHost: x\r\n\r\n",
    b"*1\r\n$8\r\nFLUSHALL\r\n",
    b"EHLO x\r\nQUIT\r\n",
    b"GET /\r\n",
    b"GET /models HTTP/1.1\nHost: x\n\n",
    b"\r\n" * 1000,
]


EDITS = "/v1/images/edits"
EDIT_FIELDS = (*OPENAI_FIELDS, "strength", "input_fidelity", "mask", "image[]", "unheard")


def picture(format: str, mode: str = "L", size: tuple[int, int] = (12, 8), **options: object) -> bytes:
    out = io.BytesIO()
    Pillow.new(mode, size).save(out, format, **options)
    return out.getvalue()


def bomb(width: int, height: int) -> bytes:
    """A PNG that says that it is that large."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(10**6))) + chunk(b"IEND", b"")


FILES = [
    b"", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%!PS\n", b"GIF89a" + bytes(50),
    b"\xff\xd8\xff\xe0" + bytes(99),
    picture("PNG"), picture("PNG", "RGBA"), picture("PNG", size=(9000, 1)), picture("PNG", size=(3000, 3000)),
    picture("JPEG", "CMYK"), picture("JPEG")[:-20], picture("WEBP", "RGB"), picture("TIFF"), picture("PNG", "I;16"),
    picture("PNG", save_all=True, append_images=[Pillow.new("L", (12, 8), 9)]),
    bomb(60_000, 60_000), bomb(4000, 4000), bomb(1, 2**31 - 1), bomb(0, 0),
]  # fmt: skip


def post(content: bytes, *lines: str, path: str = "/generate", kind: str = "application/json") -> bytes:
    """POST of exactly this body."""
    head = "\r\n".join([f"POST {path} HTTP/1.1", "Host: x", f"Content-Type: {kind}", *lines, "", ""])
    return head.encode("latin-1", "replace") + content


def wrong_values(rng: random.Random) -> bytes:
    fields = {field: rng.choice(VALUES) for field in rng.sample(FIELDS, rng.randint(1, 4))}
    content = json.dumps(fields).encode()
    return post(content, f"Content-Length: {len(content)}")


def wrong_prompt(rng: random.Random) -> bytes:
    """What an image of OpenAI's API cannot be of."""
    fields = {field: rng.choice(VALUES) for field in rng.sample(OPENAI_FIELDS, rng.randint(0, 3))}
    fields |= {"prompt": rng.choice(PROMPTS)} | ({"size": rng.choice(SIZES)} if rng.random() < 0.3 else {})
    content = json.dumps(fields).encode()
    return post(content, f"Content-Length: {len(content)}", path=OPENAI)


def wrong_form(rng: random.Random) -> bytes:
    """An edit of what is no image, or a form that is none."""
    edge = rng.choice(["b", "b" * 70, "b" * 3000, "--", "é"])
    sent = [("prompt", "", b"plain"), ("image", '; filename="a.png"', rng.choice(FILES))]
    if rng.random() < 0.5:
        sent.append(("mask", '; filename="m.png"', rng.choice(FILES)))
    for name in rng.sample(EDIT_FIELDS, rng.randint(0, 3)):
        sent.append((name, "", str(rng.choice(VALUES)).encode("utf-8", "replace")))
    sent *= rng.choice([1, 1, 1, 1, 30])
    form = b"".join(
        f'--{edge}\r\nContent-Disposition: form-data; name="{name}"{more}\r\n\r\n'.encode() + data + b"\r\n"
        for name, more, data in sent
    )
    form += rng.choice([b"", f"--{edge}--\r\n".encode(), f"--{edge}--".encode(), f"--{edge}".encode()])
    if rng.random() < 0.3:
        form = form[: rng.randrange(len(form))]
    kind = f"multipart/form-data; boundary={rng.choice([edge, edge, edge, 'other', ''])}"
    return post(form, f"Content-Length: {len(form)}", "Connection: close", path=EDITS, kind=kind)


def wrong_address(rng: random.Random) -> bytes:
    """Of no image, or of one that nobody may see."""
    path = "/".join(rng.choice(SEGMENTS) for _ in range(rng.choice([4, 4, 4, 3, 5, 9])))
    names = ("size", "frames", "expires", "signature", "output_compression", *FIELDS)
    query = "&".join(f"{rng.choice(names)}={rng.choice(VALUES[:20])}" for _ in range(rng.randint(0, 3)))
    head = f"{rng.choice(['GET', 'GET', 'HEAD', 'POST'])} /images/{path}?{query} HTTP/1.1\r\nHost: x\r\n"
    return f"{head}If-None-Match: {rng.choice(['*', 'W/', ',,', chr(34) * 900])}\r\n\r\n".encode("utf-8", "replace")


def wrong_json(rng: random.Random) -> bytes:
    content = rng.choice(JSONS)
    return post(content, f"Content-Length: {len(content)}", path=rng.choice(["/generate", OPENAI]))


def wrong_length(rng: random.Random) -> bytes:
    return post(b'{"n": 1}', f"Content-Length: {rng.choice([1, 7, 9, 100, 10**6, 10**12])}")


def wrong_chunks(rng: random.Random) -> bytes:
    chunk = rng.choice(
        [b"2\r\n{}", b"ffffffffffffffffff\r\n{}", b"-2\r\n{}\r\n", b"2;" + b"a" * 9000 + b"\r\n{}", b"x"]
    )
    return post(chunk + b"\r\n0\r\n\r\n", "Transfer-Encoding: chunked")


def wrong_query(rng: random.Random) -> bytes:
    noise = "".join(rng.choice("&=%+[]{};,.\\'\"0123456789abcdefnx%00%ff") for _ in range(rng.randint(1, 60)))
    return message("GET", f"{SEQUENCE}?{rng.choice(FIELDS)}={noise}")


def wrong_target(rng: random.Random) -> bytes:
    method = rng.choice(
        ["GET", "POST", "PUT", "DELETE", "OPTIONS", "HEAD", "CONNECT", "TRACE", "PATCH", "get", "X" * 99]
    )
    version = rng.choice(["1.1", "1.0", "0.9", "2", "1.1.1"])
    return f"{method} {rng.choice(TARGETS)} HTTP/{version}\r\nHost: x\r\n\r\n".encode("latin-1")


def wrong_headers(rng: random.Random) -> bytes:
    lines = "\r\n".join(rng.sample(HEADERS, rng.randint(1, 3)))
    method, path = rng.choice([("GET", "/models"), ("POST", "/generate"), ("GET", "/metrics"), ("GET", "/")])
    return f"{method} {path} HTTP/1.1\r\nHost: x\r\n{lines}\r\n\r\n{{}}".encode("latin-1")


def flipped(rng: random.Random) -> bytes:
    data = bytearray(message("POST", "/generate", {"n": 1, "steps": 2, "seed": 10**6}))
    for _ in range(rng.randint(1, 8)):
        data[rng.randrange(len(data))] = rng.randrange(256)
    return bytes(data)


def noise(rng: random.Random) -> bytes:
    return rng.randbytes(rng.choice([1, 10, 1000, 100_000]))


def huge(rng: random.Random) -> bytes:
    """Far more than a body may have, as promised or in chunks that never end."""
    size = rng.choice([70_000, 10**6, 5 * 10**6])
    if rng.random() < 0.5:
        return post(b'{"n": 1, "x": "' + b"a" * size, f"Content-Length: {size + 17}")
    return post((b"2000\r\n" + b"[" * 0x2000 + b"\r\n") * (size // 0x2000), "Transfer-Encoding: chunked")


def foreign(rng: random.Random) -> bytes:
    """Other protocols."""
    return rng.choice(FOREIGN)


def pipelined(rng: random.Random) -> bytes:
    return b"".join(rng.choice(KINDS[:-1])(rng)[:3000] for _ in range(20)) + b"GET /livez HTTP/1.1\r\n\r\n" * 500


KINDS: list[Callable[[random.Random], bytes]] = [
    wrong_values, wrong_prompt, wrong_form, wrong_address, wrong_json, wrong_length, wrong_chunks, wrong_query,
    wrong_target, wrong_headers, flipped, noise, huge, foreign, pipelined,
]  # fmt: skip
