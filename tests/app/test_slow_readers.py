"""Clients that take a stream byte by byte, through small buffers on both sides."""

from __future__ import annotations

import base64
import http.client
import json
import socket
import time
from pathlib import Path

import pytest

from tests.app.faulty_server import SLOW
from tests.app.processes import PATIENCE, ServerProcess, wait_for

FAULTY = "tests.app.faulty_server"
BODY = {"n": 64, "steps": 100, "seed": 5}
STREAM = "/diffusion-sequence?n=64&steps=100&seed=5&frames=100"  # of 8 KB a frame and more


def open_stream(server: ServerProcess, path: str) -> http.client.HTTPResponse:
    """Its head is read; of what comes after, the client's side holds 2 KB."""
    host, port = server.url.removeprefix("http://").split(":")
    connection = http.client.HTTPConnection(host, int(port))
    connection.sock = socket.socket()
    connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    connection.sock.settimeout(PATIENCE)
    connection.sock.connect((host, int(port)))
    connection.request("GET", path, headers={"Connection": "close"})
    return connection.getresponse()


@pytest.mark.slow
def test_a_slow_reader_loses_frames_but_no_image(grey_checkpoint: Path) -> None:
    argv = ["--checkpoint", str(grey_checkpoint), "--drain-s", "0", "--write-timeout-s", "3600"]
    with ServerProcess(FAULTY, *argv, SEND_BUFFER="4096") as server:
        expected = server.client.post("/generate", json=BODY).content
        stream = open_stream(server, STREAM)
        taken = b""
        for _ in range(3):
            time.sleep(1)
            taken += stream.read(1)
        wait_for(lambda: server.samples_in_flight() == 0, "the end of its work, while it has read 3 bytes")
        assert server.metric("ddpm_images_total") == 2 * 64
        sent, dropped = (server.metric(f"ddpm_frames_{name}_total") for name in ("sent", "dropped"))
        assert sent < 30
        assert dropped > 60
        assert server.client.post("/generate", json=BODY).content == expected
        events = (taken + stream.read()).decode().split("\n\n")
        stream.close()
        *_, frame, last, end = events
        assert frame.startswith("event: frame\nid: 100\n"), "the newest frame waits for the client"
        assert last.startswith("event: completed\n")
        assert base64.b64decode(json.loads(last.partition("data: ")[2])["png"]) == expected
        assert end == ""

        patient = open_stream(server, STREAM + "&every_frame=true")
        wait_for(lambda: server.samples_in_flight() == 0, "the end of its work, while it has read nothing")
        assert patient.read().decode().count("event: frame\n") == 100
        patient.close()

        stuck = open_stream(server, STREAM.replace("seed=5", f"seed={SLOW}"))
        wait_for(lambda: server.metric("ddpm_frames_dropped_total") > dropped + 9, "a stream that backs up")
        server.terminate()
        assert server.exit_code() == 0
        stuck.close()
