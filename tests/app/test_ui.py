"""The page at GET /: one file that a browser shows without asking any other host for anything."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

import app
from app.routes.sequence import HEARTBEATS

needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="the page's script is run by node")


def test_the_page_runs_its_own_script_and_style_and_needs_no_other_host(client: TestClient) -> None:
    response = client.get("/")
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert response.headers["x-content-type-options"] == "nosniff"
    policy = dict(part.strip().split(" ", 1) for part in response.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert policy["connect-src"] == "'self'"
    for tag in ("script", "style"):
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", response.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert policy[f"{tag}-src"] == f"'sha256-{digest}'"
    assert not re.findall(r"https?:|[\"'(]//", response.text), "an address of another host"
    # The policy would stop these, and the page would break without a word:
    assert not re.findall(r"<[^>]*\s(?:on\w+|style)=|javascript:|innerHTML|insertAdjacent|eval\(", response.text)


def test_the_page_is_not_part_of_the_api_description(client: TestClient) -> None:
    assert "/" not in client.get("/openapi.json").json()["paths"]


def behaviour(answers: list[dict[str, Any]], *deeds: tuple[str, str, dict[str, str]]) -> list[dict[str, Any]]:
    """What the page shows at first and after each deed (element, event, values), where a server answers so."""
    index = Path(app.__file__).parent / "web/index.html"
    scenario = json.dumps({"answers": answers, "deeds": deeds})
    argv = ["node", str(Path(__file__).with_name("page.mjs")), str(index)]
    done = subprocess.run(argv, input=scenario, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    shown: list[dict[str, Any]] = json.loads(done.stdout)
    return shown


def served(client: TestClient) -> dict[str, Any]:
    return {"body": client.get("/models").json()}


def run_of(steps: int) -> dict[str, Any]:
    """The events of a run, with a heartbeat among them, as the server sends them."""
    frames = [
        f"id: {i}\nevent: frame\ndata: {json.dumps({'step': i, 'steps': steps, 'png': ''})}\n\n" for i in range(steps)
    ]
    done = {"png": "", "n": 1, "steps": steps, "sampler": "ddim", "guidance_scale": 1, "model": "m", "checkpoint": "c"}
    completed = f"event: completed\ndata: {json.dumps(done | {'class_label': None})}\n\n"
    return {"stream": HEARTBEATS["sse"].decode().join(["event: start\ndata: {}\n\n", *frames, completed])}


@needs_node
def test_the_slider_is_at_the_last_step_of_every_run(client: TestClient) -> None:
    make = ("form", "submit", {"steps": "3"})
    _, first, second = behaviour([served(client), run_of(3), run_of(9)], make, make)
    assert first["slider"] == ["3", "3"]
    assert second["slider"] == ["9", "9"]
    assert not second["alert"]


@needs_node
def test_a_key_is_asked_for_without_scolding(client: TestClient) -> None:
    refused = {"status": 401, "body": {"error": {"code": "unauthorized", "message": "a key is needed"}}}
    key = {"key": "alice-0123456789abcdef"}
    first, short, wrong, right = behaviour(
        [refused, refused, served(client)],
        ("entrance", "submit", {"key": "short"}),
        ("entrance", "submit", key),
        ("entrance", "submit", key),
    )
    assert first["entrance"]
    assert (first["alert"], first["model"], first["focus"]) == ("", "This server needs an API key.", "key")
    assert "at least 16" in short["alert"]
    assert (short["asked"], short["focus"]) == (1, "key")
    assert "does not know this key" in wrong["alert"]
    assert (wrong["entrance"], wrong["focus"]) == (True, "key")
    assert (right["entrance"], right["alert"], right["focus"]) == (False, "", "class_label")
