"""`python -m app` as a process: how it starts, logs, keeps connections, and ends."""

from __future__ import annotations

import http.client
import json
import re
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.app.faulty_server import SLOW
from tests.app.processes import PATIENCE, ROOT, ServerProcess, run_to_its_end, wait_for


@pytest.fixture(scope="module")
def failed_starts(
    server: ServerProcess, grey_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, subprocess.CompletedProcess[str]]:
    """Starts that must fail, side by side: each takes the time of importing torch."""
    there = tmp_path_factory.mktemp("broken")
    whole = grey_checkpoint.read_bytes()
    (there / "short.safetensors").write_bytes(whole[: len(whole) // 2])
    port = server.url.rpartition(":")[2]
    starts: dict[str, tuple[list[str], dict[str, str]]] = {
        "misspelt": ([], {"DDPM_CHEKPOINT": "mnist"}),
        "missing": (["--checkpoint", "nowhere.safetensors"], {}),
        "short": (["--checkpoint", str(there / "short.safetensors")], {}),
        "port": (["--checkpoint", str(grey_checkpoint), "--port", port], {}),
        "metrics": (["--checkpoint", str(grey_checkpoint), "--port", "0", "--metrics-port", port], {}),
    }
    with ThreadPoolExecutor(5) as pool:
        runs = {name: pool.submit(run_to_its_end, *argv, **extra) for name, (argv, extra) in starts.items()}
        return {name: run.result() for name, run in runs.items()}


@pytest.mark.parametrize(
    ("start", "said"),
    [
        ("misspelt", "python -m app: unknown variable DDPM_CHEKPOINT; did you mean DDPM_CHECKPOINT?"),
        ("missing", "python -m app: no checkpoint 'nowhere.safetensors': neither a file nor bundled"),
        ("short", "is not a readable safetensors file"),
        ("port", "of 127.0.0.1 is in use: stop what uses it, or choose another one with --port"),
        ("metrics", "of 127.0.0.1 is in use: stop what uses it, or choose another one with --metrics-port"),
    ],
)
def test_a_wrong_setting_stops_the_start_with_one_sentence(
    failed_starts: dict[str, subprocess.CompletedProcess[str]], start: str, said: str
) -> None:
    ended = failed_starts[start]
    assert ended.returncode == 1
    assert ended.stderr.startswith("python -m app: ")
    assert said in ended.stderr
    assert ended.stderr.count("\n") == 1
    assert ended.stdout == ""


@pytest.mark.slow
def test_ctrl_c_at_the_start_is_one_line(grey_checkpoint: Path) -> None:
    """While it imports, and while it loads. The signal may be ignored in the process that runs the tests."""
    script = (
        "import runpy, signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        f"sys.argv = ['app', '--port', '0', '--checkpoint', {str(grey_checkpoint)!r}]; "
        "import threading; threading.Timer(DELAY, signal.raise_signal, [signal.SIGINT]).start(); "
        "runpy.run_module('app', run_name='__main__')"
    )

    def run(delay: str) -> subprocess.CompletedProcess[str]:
        argv = [sys.executable, "-c", script.replace("DELAY", delay)]
        return subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)

    with ThreadPoolExecutor(2) as pool:
        for ended in pool.map(run, ["0.3", "1"]):
            assert ended.stderr.strip().splitlines() == ["python -m app: interrupted"]
            assert ended.returncode == 130


def test_the_log_says_what_happens_until_it_is_ready(server: ServerProcess, grey_checkpoint: Path) -> None:
    messages = [line["message"] for line in server.logs()]
    running = next(message for message in messages if "running on" in message)
    assert running == f"ddpm-serve running on {server.url} (Ctrl-C ends it)"
    assert any(message.startswith(f"loaded {grey_checkpoint} in ") for message in messages)
    wait_for(lambda: any(line["message"].startswith("ready for requests after ") for line in server.logs()))
    assert any(message.startswith("warming up grey: ") for message in messages)


def test_probes_are_not_logged_at_info(server: ServerProcess) -> None:
    for path in ("/livez", "/readyz", "/health", "/metrics"):
        assert server.client.get(path, headers={"X-Request-Id": "probe"}).status_code == 200
    server.client.get("/models", headers={"X-Request-Id": "after"})
    wait_for(lambda: any(line.get("request_id") == "after" for line in server.logs()), "the line")
    assert not [line for line in server.logs() if line.get("request_id") == "probe"]


def test_a_slash_at_the_end_changes_nothing_behind_a_proxy(server: ServerProcess) -> None:
    behind = {"Host": "images.example", "X-Forwarded-Proto": "https"}
    made = server.client.post("/generate/", json={"steps": 1}, headers=behind)
    assert (made.status_code, made.headers["content-type"]) == (200, "image/png")
    assert "location" not in made.headers
    page = server.client.get("/docs/").text
    assert server.client.get("/docs/" + re.findall('href="([^"]*openapi.json)"', page)[0]).status_code == 200
    assert server.client.get("/nothing/").status_code == 404


COUNTS_OBJECTS = """
import gc, os, sys
from app import __main__ as main

def count(*_):
    print(len(gc.get_objects()), flush=True)
    os._exit(0)

main.Server.run = count
main.serve(main.read_settings(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_full_collection_of_garbage_has_little_to_look_through(grey_checkpoint: Path) -> None:
    """Nobody is served meanwhile; through all that is imported it took 0.2 s."""
    argv = [sys.executable, "-c", COUNTS_OBJECTS, "--checkpoint", str(grey_checkpoint)]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 20_000


def test_log_lines_are_json_and_every_request_has_one(server: ServerProcess) -> None:
    answers = [server.client.get("/models"), server.client.post("/generate", json={}), server.client.get("/nothing")]
    ids = [answer.headers["x-request-id"] for answer in answers]

    def logged() -> list[dict[str, object]]:
        return [line for line in server.logs() if line.get("request_id") in ids]

    wait_for(lambda: len(logged()) >= 3, "the lines")
    lines = sorted(logged(), key=lambda line: ids.index(str(line["request_id"])))
    assert [(line["path"], line["status"]) for line in lines] == [
        ("/models", 200),
        ("/generate", 200),
        ("/nothing", 404),
    ]
    assert lines[1]["bytes"] == len(answers[1].content)
    assert {"time", "level", "logger", "message", "seconds", "outcome", "client"} <= set(lines[0])


def test_a_connection_can_be_used_again_after_every_error(server: ServerProcess) -> None:
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=PATIENCE)
    declared = {"Content-Type": "application/json"}
    large = b" " * 300_000
    connection.connect()
    socket = connection.sock
    for method, path, body, headers, status in [
        ("POST", "/generate", b"{", declared, 422),
        ("POST", "/generate", large, declared, 413),
        ("POST", "/generate", b'{"n": 2}', declared, 200),
        ("POST", "/generate", iter([large]), declared, 413),  # chunked
        ("POST", "/nothing", large, declared, 404),
        ("GET", "/diffusion-sequence?steps=2&frames=2", large, declared, 200),
        ("POST", "/generate", b"{}", declared | {"Accept": "text/html"}, 406),
        ("HEAD", "/livez", None, {}, 200),
        ("GET", "/diffusion-sequence?steps=2&frames=2", None, {}, 200),
        ("GET", "/diffusion-sequence", None, {"Last-Event-ID": "1"}, 204),
        ("GET", "/livez", None, {}, 200),
    ]:
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        answer.read()
        assert answer.status == status
        assert connection.sock is socket, f"closed by {method} {path}"
    connection.close()


def test_what_is_not_http_is_refused_without_a_traceback(server: ServerProcess) -> None:
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=PATIENCE)
    connection.connect()
    connection.sock.sendall(b"\x16\x03\x01 this is not HTTP\r\n\r\n")
    assert connection.sock.recv(100).startswith(b"HTTP/1.1 400")
    connection.close()
    assert server.client.get("/livez").status_code == 200
    assert not [line for line in server.logs() if "exception" in line]


def slow_work(server: ServerProcess, steps: int) -> tuple[list[httpx.Response], list[threading.Thread]]:
    """A /generate of two images and a stream of one, both under way; their answers, and the threads that wait."""
    answers: list[httpx.Response] = []

    def send(method: str, path: str, **options: object) -> None:
        answers.append(httpx.request(method, server.url + path, timeout=PATIENCE, **options))

    body = {"n": 2, "steps": steps, "seed": SLOW}
    stream = f"/diffusion-sequence?steps={steps}&seed={SLOW}"
    threads = [
        threading.Thread(target=send, args=("POST", "/generate"), kwargs={"json": body}),
        threading.Thread(target=send, args=("GET", stream)),
    ]
    for thread in threads:
        thread.start()
    wait_for(lambda: server.samples_in_flight() == 3, "work")
    return answers, threads


def refused(server: ServerProcess) -> bool:
    """Whether a new client gets no work done."""
    try:
        return httpx.get(server.url + "/readyz", timeout=PATIENCE).status_code == 503
    except httpx.TransportError:
        return True


@pytest.mark.slow
def test_sigterm_under_load_finishes_what_was_admitted(grey_checkpoint: Path) -> None:
    with ServerProcess("tests.app.faulty_server", "--checkpoint", str(grey_checkpoint)) as server:
        answers, threads = slow_work(server, steps=40)
        server.terminate()
        wait_for(lambda: refused(server), "the refusal of new work")
        assert all(thread.is_alive() for thread in threads)
        for thread in threads:
            thread.join()
        assert server.exit_code() == 0
    generated, streamed = sorted(answers, key=lambda answer: answer.request.method, reverse=True)
    assert generated.status_code == 200
    assert generated.headers["content-type"] == "image/png"
    assert "event: completed" in streamed.text
    assert not [line for line in server.logs() if line["level"] == "error"]


def test_what_is_not_done_when_the_drain_ends_is_told_so(grey_checkpoint: Path) -> None:
    argv = ["--checkpoint", str(grey_checkpoint), "--drain-s", "0.2"]
    with ServerProcess("tests.app.faulty_server", *argv) as server:
        answers, threads = slow_work(server, steps=1000)
        server.terminate()
        for thread in threads:
            thread.join()
        assert server.exit_code() == 0
    generated, streamed = sorted(answers, key=lambda answer: answer.request.method, reverse=True)
    assert (generated.status_code, generated.json()["error"]["code"]) == (503, "not_ready")
    assert int(generated.headers["retry-after"]) >= 1
    assert streamed.status_code == 200
    *_, last, end = streamed.text.split("\n\n")
    assert last.startswith("event: error\ndata: ")
    assert json.loads(last.partition("data: ")[2])["error"]["code"] == "not_ready"
    assert end == ""


def test_an_idle_server_ends_at_once_whatever_connections_it_has(grey_checkpoint: Path) -> None:
    with ServerProcess("app", "--checkpoint", str(grey_checkpoint)) as server:
        idle = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=PATIENCE)
        idle.connect()  # and says nothing
        server.process.send_signal(signal.SIGINT)
        assert server.exit_code() == 0
        idle.close()
    assert all(line["level"] == "info" for line in server.logs())
