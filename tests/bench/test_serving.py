"""The instruments of `tests.bench.serving` and `tests.bench.policies`; nothing here is timed."""

from __future__ import annotations

import asyncio
import io
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from app.engine.instance import BatchLimits
from app.engine.runner import ModelRunner
from app.engine.scheduler import Scheduler
from model import checkpoint
from model.images import to_uint8
from model.sampling.schedule import make_schedule
from model.sampling.step import sample
from tests.bench.policies import POLICIES, InOrder, replay
from tests.bench.serving import fixed_latency, generator, numbers, report, workloads
from tests.bench.serving.backend import Backend
from tests.bench.serving.peers import ours
from tests.bench.serving.phases import Course, Plan
from tests.bench.serving.server import MARK, kill
from tests.bench.serving.servers import SERVERS
from tests.bench.serving.settings import VARIABLE, Settings
from tests.bench.serving.workloads import Arrival

INF = math.inf


def test_a_trace_has_its_load_and_is_reproducible(tmp_path: Path) -> None:
    trace = workloads.poisson("mixed steps", rate=700, seconds=10, seed=1)
    assert sum(a.work for a in trace) == 7000
    assert {a.steps for a in trace} == set(workloads.STEPS)
    assert all(0 <= a.at < 10 for a in trace)
    assert trace == sorted(trace, key=lambda a: a.at)
    workloads.save({"it": trace}, tmp_path / "traces.json")
    assert workloads.load(tmp_path / "traces.json")["it"] == workloads.poisson("mixed steps", 700, 10, seed=1)
    assert trace != workloads.poisson("mixed steps", 700, 10, seed=2)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc", (200, b"abc")),
        (b"HTTP/1.1 503 No\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n1\r\nc\r\n0\r\n\r\n", (503, b"abc")),
        (b"HTTP/1.1 200 OK\r\n\r\nabc", (200, b"abc")),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nabc", None),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n", None),
        (b"", None),
    ],
)
def test_answers_are_read_and_those_cut_off_are_none(answer: bytes, expected: tuple[int, bytes] | None) -> None:
    if expected is None:
        with pytest.raises(ValueError, match=r"cut off|without an answer|invalid literal"):
            generator.parse(answer)
    else:
        assert generator.parse(answer) == expected


@pytest.mark.slow
def test_a_slow_server_delays_no_sending_and_clients_give_up() -> None:
    first, gone, second, overdue, begun = asyncio.run(four_clients())
    assert first["status"] == second["status"] == 200
    assert first["done"] >= 0.6
    assert (gone["status"], gone["error"], gone["done"]) == (0, "left", None)
    assert 0.1 <= begun <= second["done"] + 0.1
    assert second["late"] >= 0
    assert overdue["late"] >= 1.5
    assert overdue["done"] > overdue["late"], "latency counts from when it was meant to be sent"


async def four_clients() -> tuple[dict[str, Any], dict[str, Any], dict[str, Any], dict[str, Any], float]:
    """The records of a slow request, one given up, one 0.1 s after them, and one that was due long ago; and when
    the third was received."""
    posted: list[float] = []
    start = asyncio.get_running_loop().time() + 0.1

    async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if (await reader.readline()).startswith(b"GET"):
            await asyncio.sleep(0.6)
        else:
            posted.append(asyncio.get_running_loop().time() - start)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        writer.close()

    async with await asyncio.start_server(slow, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]

        def asked(at: float, method: str, leaves: float | None = None) -> dict[str, object]:
            raw = f"{method} / HTTP/1.1\r\n\r\n"
            return {"at": at, "raw": raw, "patience": 30.0, "leaves": leaves, "keep": False}

        requests = [asked(0.0, "GET"), asked(0.0, "GET", leaves=0.2), asked(0.1, "POST"), asked(-2.0, "POST")]
        first, gone, second, overdue = await asyncio.gather(
            *(generator.ask("127.0.0.1", port, request, start) for request in requests)
        )
    return first, gone, second, overdue, max(posted)


def test_an_answer_that_never_came_is_in_every_percentile() -> None:
    records = [[200, 1.0, 1.0, 0.0, None], [200, 3.0, 3.0, 0.0, None], [0, None, None, 0.0, "timeout"]]
    trace = [Arrival(0.0, 1, 20, 0, 0), Arrival(0.0, 1, 20, 0, 0), Arrival(1.0, 4, 20, 0, 0)]
    found = numbers.summary(trace, records, {"1x20": 0.5, "4x20": 2.0})
    assert (found["p50"], found["p95"], found["slow50"], found["failed"]) == (3.0, INF, 6.0, 1)
    assert found["images_s"] == pytest.approx(2 / 3)


def test_goodput_and_recovery() -> None:
    """Deadline 2 s, overload until 6 s: what came early, late, or after it does not count."""
    ends = [(0.0, 1.0), (1.0, 1.5), (3.0, 1.0), (3.0, 2.5), (5.5, 1.0), (6.5, 3.0), (7.0, 1.0), (8.0, 1.0)]
    trace = [Arrival(at, 1, 20, 0, 0) for at, _ in ends]
    records = [[200, done, done, 0.0, None] for _, done in ends]
    assert numbers.goodput(trace, records, deadline_s=2, until=6) == pytest.approx(2 * 20 / 4)
    assert numbers.recovery(trace, records, deadline_s=2, until=6) == pytest.approx(0.5)
    assert numbers.recovery(trace[:6], records[:6], deadline_s=2, until=6) == INF


@pytest.mark.slow
def test_tables_give_medians_and_name_what_was_not_measured(tmp_path: Path) -> None:
    """Three rounds of ours at 1, 2 and 9 s, of a peer at 4 s; the loop that they are compared with ran as fast as it
    was told before, twice as fast, and half as fast."""
    alone = {"1x10": 0.5, "1x20": 1, "1x50": 1, "1x200": 1, "16x20": 1}
    plan = Plan({"capacity": 100.0, "alone_s": alone}, seconds=9, loads=(0.25,))
    baseline = plan.baseline | {"step_s": {"1": 0.01}, "knee": 1, "precision": "bf16", "checkpoint": "0" * 64}
    traces = {name: trace for name, trace in plan.traces.items() if name.startswith(("mixed", "overload"))}
    workloads.save(plan.traces, tmp_path / "traces.json")

    def turn(seconds: float, pace: float) -> dict[str, Any]:
        found = {name: [[200, None, seconds, 0.0, None] for _ in trace] for name, trace in traces.items()}
        return found | {"capacity": {"uniform": 90.0}, "pace": [pace, pace]}

    rounds = [
        {"ours": turn(seconds, pace), "mosec": turn(4.0, pace), "bentoml": {"unavailable": "a | reason"}}
        for seconds, pace in ((9.0, 100.0), (1.0, 200.0), (2.0, 50.0))
    ]
    results = {
        "baseline": baseline | {"processor": "any", "torch": "any"},
        "circumstances": {"date": "", "threads": 1, "cores": 1, "seconds": 9, "deadline_s": 10, "overload_s": 30},
        "settings": {"mosec": [8, 5.0]},
        "rounds": rounds,
    }
    report.write(results, {}, tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "| mixed steps: median latency | 0.5 (0.25–2.25) | ≤ 0.5 | met | mosec |" in text
    assert "| mixed steps: p95 latency | 0.5 (0.25–2.25) | ≤ 1 | met | mosec |" in text
    assert "| images/s through HTTP, saturated, of the baseline | 0.9 (0.45–1.8) | ≥ 0.95 | **not met** |  |" in text
    assert "from\n  50 to 200" in text
    count = 3 * len(traces["mixed steps"])
    assert f"| 2000 | 2000 | 2000 | 2 | 4 | 0 of {count} |" in text
    assert "| mosec (8, 5 ms) |" in text
    assert "| mixed n at 0.25, ms | p50 | p95 | 1 image: p50 | p95 | 16 images: p50 | p95 |" in text
    assert "| **python -m app** | 2000 | 2000 | 2000 | 2000 | 2000 | 2000 |" in text
    assert "| BentoML | a / reason |" in text
    assert "| LitServe" not in text, "it had no turn"
    assert "## Overload" in text
    assert "## Bursts" not in text, "nobody was asked for them"
    assert "Fixed latency" not in text
    results["circumstances"] |= {
        "step_ms": [[1, 20], [8, 47.5]],
        "command": "python -m it --simulated-step-ms 1:20,8:47.5",
    }
    for turns, calls in zip(rounds, ([100, 5, 0.5, 10.0], [200, 0, 0.0, 20.0], [100, 15, 1.0, 10.0]), strict=True):
        turns["ours"]["calls"] = calls
    report.write(results, {}, tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "`python -m it --simulated-step-ms 1:20,8:47.5` made this page" in text
    assert "1: 20, 8: 47.5.\n  Of 400 calls of servers 5.00% took longer" in text
    assert "which made them 3.75%\n  longer in all, and for the server that fared worst in a round 10.00%" in text
    assert (tmp_path / "latency.png").stat().st_size > 10_000


def test_only_the_workloads_that_were_asked_for_are_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures are always verified; where nothing is left for the server that sheds, it is not started."""
    went: list[tuple[int, int]] = []
    monkeypatch.setattr(Course, "go", lambda self, told, tasks: went.append((told.queue, len(tasks))))
    told = Settings(0, "mnist", 1, rows=2, batch=4, wait_ms=0, queue=1000, deadline_s=600, counter="")
    plan = Plan({"capacity": 100.0, "alone_s": {"1x20": 1.0}}, seconds=9, loads=(0.1, 1))
    course = Course(SERVERS["ours"], sys.executable, told, plan, print)
    course.run(False, ["mixed n", "backlog uniform"])
    course.run(False, ["mixed n", "overload 2", "cancels"])
    course.run(False)
    course.run(False, ["mixed n at 0.1"])
    light, full = (plan.traces[f"mixed n at {load}"] for load in ("0.1", "1"))
    assert 9 < max(a.at for a in light) < 36, "few come, so it is longer"
    assert max(a.at for a in full) < 9
    assert went == [(1000, 3), (1000, 2), (plan.queue, 3), (1000, 14), (plan.queue, 6), (1000, 2)]


class FakeTime:
    """Stands for the module `time`: nothing takes any but what sleeps."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_a_held_network_takes_its_time_and_counts_overruns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, takes_s = FakeTime(), 0.01
    monkeypatch.setattr(fixed_latency, "time", clock)

    def network(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor | None) -> torch.Tensor:
        clock.sleep(takes_s)
        return 2 * x

    settings = {"rows": 2, "batch": 4, "wait_ms": 0, "queue": 4, "deadline_s": 1, "counter": str(tmp_path / "counter")}
    told = Settings(0, "mnist", 1, **settings, step_ms=fixed_latency.read("1:20,3:40"))  # type: ignore[arg-type]
    held, x = fixed_latency.held(network, told), torch.ones(2, 1, 1, 1)
    assert torch.equal(held(x, x, None), 2 * x)
    assert clock.now == pytest.approx(0.03), "evenly between"
    takes_s = 0.05
    held(x, x, None)
    found = map(float, Path(fixed_latency.tally_of(told)).read_text().split())
    assert list(found) == pytest.approx([2, 1, 0.02, 0.06])  # calls, late ones, seconds too many, seconds told
    assert fixed_latency.held(network, Settings(0, "mnist", 1, **settings)) is network  # type: ignore[arg-type]
    assert "app" in SERVERS["ours"].argv(Settings(0, "mnist", 1, **settings))  # type: ignore[arg-type]
    assert "app" not in SERVERS["ours"].argv(told)


def test_a_step_of_ours_is_held_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its calls run side by side: each held by itself, the machine would be larger than the peers'."""
    calls: list[int] = []

    def forward(runner: ModelRunner, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor | None) -> torch.Tensor:
        calls.extend([len(x) // 2] * 2)
        return x

    monkeypatch.setattr(ModelRunner, "forward", forward)
    settings = {"rows": 2, "batch": 4, "wait_ms": 0, "queue": 4, "deadline_s": 1, "counter": str(tmp_path / "counter")}
    told = Settings(0, "mnist", 2, **settings, step_ms=((1, 1), (4, 30)))  # type: ignore[arg-type]
    monkeypatch.setenv(VARIABLE, told.variables()[VARIABLE])
    ours.hold()
    runner, x = object.__new__(ModelRunner), torch.ones(4, 1, 1, 1)
    for _ in range(2):
        assert runner.forward(x, x, None) is x
    assert calls == [2, 2, 2, 2]
    count, _, _, seconds = map(float, Path(fixed_latency.tally_of(told)).read_text().split())
    assert (count, seconds) == (2, pytest.approx(0.06))


@pytest.mark.parametrize("text", ["", "1", "1:2,1:2:3", "8:20,1:3", "1:0", "0:1", "1:x"])
def test_times_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"ROWS:MS|convert"):
        fixed_latency.read(text)


@pytest.mark.slow
def test_the_peers_make_the_pictures_of_the_naive_loop(tmp_path: Path) -> None:
    told = Settings(0, "mnist", 1, rows=2, batch=4, wait_ms=0, queue=4, deadline_s=1, counter=str(tmp_path / "counter"))
    backend = Backend(told)
    before = backend.steps_done
    asked = [
        {"class_label": 3, "n": 1, "seed": 5, "steps": 3},
        {"class_label": 7, "n": 3, "seed": 6, "steps": 2},
        {"class_label": 1, "n": 1, "seed": 7, "steps": 3},
    ]
    pictures = [np.asarray(Image.open(io.BytesIO(png))) for png in backend.generate(asked)]
    assert int((tmp_path / "counter").read_text()) - before == 3 + 3 * 2 + 3
    loaded = checkpoint.load("mnist")
    for request, picture in zip(asked, pictures, strict=True):
        schedule = make_schedule(loaded.diffusion, "ddim", request["steps"])
        n, seed, label = request["n"], request["seed"], request["class_label"]
        with torch.inference_mode():
            right = to_uint8(sample(loaded.network, schedule, (1, 28, 28), [seed] * n, range(n), [label] * n)).numpy()
        for i in range(n):
            column, row = (i % 2, i // 2) if n > 1 else (0, 0)
            tile = picture[28 * row : 28 * row + 28, 28 * column : 28 * column + 28]
            assert np.abs(tile.astype(int) - right[i, 0]).mean() < 1  # of 255; another class or seed is 20 off


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_serves_everybody(policy: str) -> None:
    """No image twice in a step, none beyond the cap (`replay` asserts it), and nothing is faster than alone."""
    schedules = {steps: make_schedule(checkpoint.load("mnist").diffusion, "ddim", steps) for steps in workloads.STEPS}
    trace = workloads.poisson("mixed steps", 1000, 4, seed=1)
    found = replay(POLICIES[policy](BatchLimits(4)), trace, schedules, [0.0, 1e-3, 2e-3, 3e-3, 4e-3])
    assert (found.latency > 0).all()
    assert found.slowdown.min() >= 1 - 1e-9
    assert found.starved.max() >= 0


def test_in_order_means_in_order() -> None:
    schedules = {20: make_schedule(checkpoint.load("mnist").diffusion, "ddim", 20)}
    trace = [Arrival(0.0, 16, 20, 0, 0), Arrival(0.01, 1, 20, 0, 0)]
    step_s = [0.0, 0.01, 0.01, 0.01, 0.01]
    crowd_first = replay(InOrder(BatchLimits(4)), trace, schedules, step_s).latency
    assert crowd_first.tolist() == pytest.approx([0.8, 0.99])
    passed = replay(Scheduler(BatchLimits(4)), trace, schedules, step_s).latency
    assert passed[1] < 0.5


def test_processes_are_found_by_their_mark_wherever_they_went() -> None:
    """One that left its session and its parent, as some servers' workers do."""
    stray_code = "import os, time; os.setsid(); print(os.getpid(), flush=True); time.sleep(60)"
    code = f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {stray_code!r}], stdout=-1)"
    code += "; sys.stdout.buffer.write(p.stdout.readline()); sys.stdout.flush(); import os; os._exit(0)"
    mark = f"test-{os.getpid()}"
    environment = os.environ | {MARK: mark}
    found = subprocess.run([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, check=True)
    stray = int(found.stdout)
    assert alive(stray)
    kill(mark)
    until = time.monotonic() + 10  # killed; the system may take a moment to bury it
    while alive(stray) and time.monotonic() < until:
        time.sleep(0.01)
    assert not alive(stray)


def alive(process: int) -> bool:
    """Whether it runs: neither gone nor a zombie."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2][0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_only_our_requests_carry_the_clients_deadline() -> None:
    arrival = Arrival(0, 2, 20, 7, 3)
    assert '"timeout_s": 2.5' in SERVERS["ours"].request(arrival, timeout_s=2.5)
    for candidate in SERVERS.values():
        text = candidate.request(arrival, timeout_s=2.5)
        head, _, body = text.partition("\r\n\r\n")
        assert f"Content-Length: {len(body)}" in head
        assert '"steps": 20' in body
        assert ("timeout_s" in body) == candidate.ours
