"""`make compose-test`: the whole of docker-compose.yml on a real Docker Engine, under load, with replicas that die.

    python -m tests.docker.compose [--no-build] [--stand-ins] [--keep]

Nothing is skipped silently: the last line says what was not tried. `--stand-ins` takes the images of the monitoring and
the balancer from the tag `latest` (see stand-ins.yml), where the pinned ones cannot be pulled. Ports: 18000, 19090,
19093, 13000 (PORT, PROMETHEUS_PORT, ALERTMANAGER_PORT, GRAFANA_PORT). No GPU is needed: this is the CPU's variant.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import httpx

from tests.docker.files import DOCKER, ROOT, panel_queries

PROJECT = "ddpm-compose-test"
PORTS = {"PORT": "18000", "PROMETHEUS_PORT": "19090", "ALERTMANAGER_PORT": "19093", "GRAFANA_PORT": "13000"}
ENVIRONMENT = {**PORTS, "SERVER_CPUS": "1", "SERVER_MEMORY": "2g", "TAG": "compose-test", **os.environ}
FILES = ["docker-compose.yml", "docker-compose.cpu.yml"]
API = f"http://127.0.0.1:{ENVIRONMENT['PORT']}"
PROMETHEUS = f"http://127.0.0.1:{ENVIRONMENT['PROMETHEUS_PORT']}"
ALERTMANAGER = f"http://127.0.0.1:{ENVIRONMENT['ALERTMANAGER_PORT']}"
GRAFANA = f"http://127.0.0.1:{ENVIRONMENT['GRAFANA_PORT']}"
PATIENCE = 180.0
BEGAN = time.monotonic()


def say(text: str) -> None:
    print(f"[{time.monotonic() - BEGAN:6.1f} s] {text}", flush=True)


def docker(*command: str, check: bool = True) -> str:
    done = subprocess.run(["docker", *command], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    if check and done.returncode:
        raise AssertionError(f"docker {' '.join(command)}: {done.stdout[-2000:]}{done.stderr[-4000:]}")
    return done.stdout.strip()


def compose(*command: str) -> str:
    files = [part for file in FILES for part in ("-f", file)]
    return docker("compose", "-p", PROJECT, *files, *command)


def wait_for(condition: Callable[[], Any], what: str, patience: float = PATIENCE) -> Any:
    until = time.monotonic() + patience
    while True:
        try:
            if found := condition():
                return found
        except (httpx.HTTPError, KeyError, IndexError, ValueError):
            pass
        assert time.monotonic() < until, f"{what} did not come true within {patience:.0f} s"
        time.sleep(0.3)


def replicas() -> list[str]:
    return compose("ps", "-q", "server").split()


def inside(container: str, *command: str, check: bool = True) -> str:
    return docker("exec", container, *command, check=check)


def metrics_of(container: str) -> str:
    return inside(
        container,
        "python",
        "-c",
        "import urllib.request as u; print(u.urlopen('http://127.0.0.1:8000/metrics').read().decode())",
    )


def metric(container: str, name: str) -> float:
    return sum(float(value) for value in re.findall(rf"^{name}(?:\{{.*\}})? (\S+)$", metrics_of(container), re.M))


def prometheus(query: str) -> list[dict[str, Any]]:
    answer = httpx.get(f"{PROMETHEUS}/api/v1/query", params={"query": query}, timeout=30).json()
    assert answer["status"] == "success", (query, answer)
    found: list[dict[str, Any]] = answer["data"]["result"]
    return found


def number(query: str) -> float:
    return float(prometheus(query)[0]["value"][1])


def generate(**body: Any) -> httpx.Response:
    return httpx.post(f"{API}/generate", json=body, timeout=PATIENCE)


step_seconds = 0.1  # of one replica with others at work; measured in `comes_up`


def steps(seconds: float) -> int:
    """How many steps take about so long on this machine."""
    return min(1000, max(10, round(seconds / step_seconds)))


class Stream:
    """One client of /diffusion-sequence; reads in a thread of its own until the end, whatever it is."""

    def __init__(self, **params: Any) -> None:
        self.events: list[str] = []
        self.times: list[float] = []
        self.end = ""  # completed, error, or how the connection broke
        self._params = params
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        try:
            with httpx.stream(
                "GET", f"{API}/diffusion-sequence", params={"format": "sse"} | self._params, timeout=60
            ) as r:
                self.events.append(str(r.status_code))
                for line in r.iter_lines():
                    if line.startswith("event: "):
                        self.events.append(line.removeprefix("event: "))
                        self.times.append(time.monotonic())
            self.end = self.events[-1]
        except httpx.RemoteProtocolError:
            self.end = "cut"
        except httpx.HTTPError as error:
            self.end = repr(error)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def join(self) -> str:
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive(), "a stream has no end"
        return self.end


class Load:
    """Clients that generate over and over, each with its own seed, and remember every answer."""

    def __init__(self, clients: int = 4, **body: Any) -> None:
        self.answers: list[int] = []
        self.errors: list[str] = []
        self._stop = threading.Event()
        self._body = {"n": 1, "steps": steps(1)} | body
        self._pool = [threading.Thread(target=self._run, args=(i,), daemon=True) for i in range(clients)]

    def _run(self, seed: int) -> None:
        while not self._stop.is_set():
            try:
                answer = generate(seed=seed, **self._body)
                self.answers.append(answer.status_code)
                if answer.status_code != 200:
                    self.errors.append(answer.text[:300])
            except httpx.HTTPError as error:
                self.errors.append(repr(error))

    def __enter__(self) -> Load:
        for thread in self._pool:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._pool:
            thread.join(PATIENCE)


def builds() -> None:
    say("building the image")
    compose("build", "server")


def comes_up() -> None:
    say("docker compose up --wait")
    compose("up", "-d", "--wait", "--wait-timeout", "300", "--scale", "server=1")
    size = int(docker("image", "inspect", "-f", "{{.Size}}", image())) / 1e6
    say(f"everything is healthy; the image has {size:.0f} MB")
    global step_seconds
    generate(n=1, steps=5)
    began = time.monotonic()
    generate(n=1, steps=20)
    step_seconds = (time.monotonic() - began) / 20
    say(f"{step_seconds * 1000:.0f} ms a step")


def image() -> str:
    return docker("inspect", "-f", "{{.Image}}", replicas()[0])


def is_locked_down() -> None:
    (server,) = replicas()
    assert inside(server, "id", "-u") == "10001"
    for place in ("/srv/ddpm/x", "/opt/venv/x", "/home/x", "/etc/x"):
        assert "Read-only" in inside(server, "sh", "-c", f"touch {place} 2>&1 || true"), place
    assert inside(server, "sh", "-c", "touch /tmp/x && echo fine") == "fine"
    status = inside(server, "cat", "/proc/1/status")
    assert re.search(r"CapEff:\s+0+$", status, re.M), "capabilities are left"
    assert re.search(r"NoNewPrivs:\s+1$", status, re.M)
    cmdlines = inside(server, "sh", "-c", "for p in /proc/[0-9]*; do tr '\\0' ' ' < $p/cmdline; echo; done")
    assert len(re.findall(r"^python -m app\s*$", cmdlines, re.M)) == 1, cmdlines
    for service, port in (("balancer", 8000), ("prometheus", 9090), ("alertmanager", 9093)):
        assert compose("port", service, str(port)).startswith("127.0.0.1:"), service
    assert docker("port", server) == "", "a replica is published"
    limits = docker(
        "inspect", "-f", "{{.HostConfig.Memory}} {{.HostConfig.NanoCpus}} {{.HostConfig.PidsLimit}}", server
    )
    assert limits == f"{2 * 2**30} {10**9} 512", limits
    code = "import importlib.metadata as m; print('\\n'.join(f'{d.name}=={d.version}' for d in m.distributions()))"
    installed = {re.sub(r"[-_.]+", "-", line).lower() for line in inside(server, "python", "-c", code).split()}
    text = (DOCKER / "requirements.txt").read_text() + (DOCKER / "torch-cpu.txt").read_text()
    locked = {re.sub(r"[-_.]+", "-", line).lower() for line in re.findall(r"^[A-Za-z0-9][^ \\]*==[^ \\;]+", text, re.M)}
    locked = {re.sub(r"\[.*\]", "", line) for line in locked}
    assert installed <= locked, f"not in the lock: {installed - locked}"
    say("user 10001, read-only, no capabilities, one process, limits, loopback only; installed is what is locked")


def serves() -> None:
    first = generate(class_label="7", n=4, seed=1, steps=10)
    assert (first.status_code, first.headers["content-type"]) == (200, "image/png"), first.text
    assert first.content == generate(class_label="7", n=4, seed=1, steps=10).content, "one seed, two pictures"
    refused = generate(n=0)
    assert (refused.status_code, refused.json()["error"]["code"]) == (422, "invalid_request")
    hidden = httpx.get(f"{API}/metrics")
    assert (hidden.status_code, hidden.json()["error"]["code"]) == (404, "not_found")
    stream = Stream(steps=steps(8), frames=20)
    assert stream.join() == "completed", stream.events
    spread = stream.times[-1] - stream.times[0]
    assert stream.events.count("frame") >= 5, stream.events
    halves = sum(at - stream.times[0] < spread / 2 for at in stream.times)
    assert 0.2 < halves / len(stream.times) < 0.8, "the events came in one lump: somebody buffers"
    say(f"generates through the balancer; a stream's {len(stream.events)} events came over {spread:.1f} s")


def passes_disconnects_on() -> None:
    (server,) = replicas()
    before = metric(server, "ddpm_cancellation_latency_seconds_count")
    for call in (
        lambda client: client.post(f"{API}/generate", json={"n": 8, "steps": steps(60)}),
        lambda client: client.get(
            f"{API}/diffusion-sequence", params={"format": "gif", "steps": steps(60), "frames": 2}
        ),
    ):
        with httpx.Client(timeout=1.5) as client:
            try:
                call(client)
                raise AssertionError("answered before the client could leave")
            except httpx.ReadTimeout:
                pass
    left = time.monotonic()
    wait_for(lambda: metric(server, "ddpm_cancellation_latency_seconds_count") == before + 2, "the cancels", 30)
    wait_for(lambda: metric(server, "ddpm_pending_nfe") == 0, "an empty queue", 30)
    say(f"clients that left: the replica dropped their work within {time.monotonic() - left:.1f} s")


def is_scraped_and_every_panel_has_data() -> None:
    wait_for(lambda: number('sum(up{job="ddpm"})') == 1, "the scrape")
    assert wait_for(lambda: not prometheus("up == 0"), "every target up")
    say("load for the dashboard")
    began = time.time()
    with Load():
        streams = []
        until = time.monotonic() + 60
        while time.monotonic() < until:
            streams = [s for s in streams if s.alive]
            if len(streams) < 3:  # more would still be at it long after
                streams.append(Stream(n=4, steps=steps(2), frames=20))
            generate(n=0)
            with suppress(httpx.ReadTimeout):
                httpx.post(f"{API}/generate", json={"n": 16, "steps": steps(20)}, timeout=1.0)
            time.sleep(1)
        empty = []
        for title, query in panel_queries():
            for variable, value in (("$__rate_interval", "30s"), ("$model", ".*"), ("$replica", ".*")):
                query = query.replace(variable, value)
            params = {"query": query, "start": began, "end": time.time(), "step": 5}
            answer = httpx.get(f"{PROMETHEUS}/api/v1/query_range", params=params, timeout=30).json()
            assert answer["status"] == "success", (title, answer)
            values = [float(v) for series in answer["data"]["result"] for _, v in series["values"]]
            if not any(value == value for value in values):  # NaN is no data
                empty.append((title, query))
        assert not empty, f"no data for {empty}"
    for stream in streams:
        stream.join()
    say(f"all {len(panel_queries())} queries of the dashboard have data under load")
    if "tests/docker/stand-ins.yml" not in FILES:
        board = httpx.get(f"{GRAFANA}/api/dashboards/uid/ddpm", timeout=30)
        assert board.status_code == 200, board.text
        source = httpx.get(f"{GRAFANA}/api/datasources/uid/prometheus/health", timeout=30)
        say(f"Grafana has the dashboard; its data source answers {source.status_code}")


def scales() -> None:
    compose("up", "-d", "--wait", "--no-recreate", "--scale", "server=3")
    wait_for(lambda: number('sum(up{job="ddpm"})') == 3, "three targets")
    wait_for(lambda: number('haproxy_backend_active_servers{proxy="replicas"}') == 3, "three at the balancer")
    with ThreadPoolExecutor(6) as pool:
        pictures = {r.content for r in pool.map(lambda _: generate(seed=5, n=2, steps=20), range(12))}
    assert len(pictures) == 1, "one seed has different pictures on different replicas"
    assert all(metric(replica, "ddpm_images_total") > 0 for replica in replicas()), "a replica got nothing"
    say("three replicas, all used; one seed is one picture on each")


def kill(container: str) -> None:
    """The death of the process, as out of memory would kill it: docker's own kill is taken for the operator's will."""
    script = 'for p in /proc/[0-9]*; do if [ "$(cat $p/comm)" = python ]; then kill -9 ${p#/proc/}; fi; done'
    docker("exec", "-u", "10001", container, "sh", "-c", script, check=False)


def survives_the_death_of_a_replica() -> None:
    victim = replicas()[0]
    streams = [Stream(steps=steps(20), frames=20, seed=i) for i in range(6)]
    with ThreadPoolExecutor(6) as pool:
        answers = [pool.submit(generate, seed=i, n=1, steps=steps(20)) for i in range(6)]
        wait_for(lambda: all("frame" in s.events for s in streams), "all streams to flow")
        on_victim = metric(victim, "ddpm_num_samples_running") + metric(victim, "ddpm_num_samples_waiting")
        assert on_victim >= 2, "the victim has too little to lose"
        kill(victim)
        killed = time.monotonic()
        ends = [stream.join() for stream in streams]
        cut = ends.count("cut")
        assert set(ends) <= {"completed", "cut"}, ends
        assert 1 <= cut <= 4, ends
        statuses = [answer.result().status_code for answer in answers]
    assert statuses == [200] * 6, f"{statuses}: requests without an answer yet go to another replica"
    say(
        f"a replica was killed with {on_victim:.0f} images: {cut} streams were cut off, {6 - cut} went on to their end,"
    )
    say("and all 6 plain requests were answered, by another replica where need be")
    wait_for(lambda: docker("inspect", "-f", "{{.State.Health.Status}}", victim) == "healthy", "its restart")
    wait_for(lambda: number('haproxy_backend_active_servers{proxy="replicas"}') == 3, "three at the balancer again")
    say(f"restarted and in use after {time.monotonic() - killed:.0f} s")


def restarts_under_load() -> None:
    with Load(clients=6) as load:
        wait_for(lambda: len(load.answers) >= 6, "load")
        for replica in replicas():
            docker("restart", "-t", "40", replica)
            assert docker("inspect", "-f", "{{.State.OOMKilled}}", replica) == "false"
            wait_for(lambda r=replica: docker("inspect", "-f", "{{.State.Health.Status}}", r) == "healthy", "health")
            wait_for(lambda: number('haproxy_backend_active_servers{proxy="replicas"}') == 3, "three at the balancer")
    assert not load.errors, load.errors
    say(f"each replica restarted in turn under load: {len(load.answers)} requests, none failed")


def drains_on_sigterm_and_the_alert_fires_and_resolves() -> None:
    victim = replicas()[0]
    with ThreadPoolExecutor(6) as pool:
        answers = [pool.submit(generate, seed=i, n=1, steps=steps(6)) for i in range(6)]
        wait_for(lambda: metric(victim, "ddpm_num_samples_running") > 0, "work on it")
        stopped = time.monotonic()
        docker("stop", "-t", "40", victim)
        seconds = time.monotonic() - stopped
        code = docker("inspect", "-f", "{{.State.ExitCode}}", victim)
        assert [answer.result().status_code for answer in answers] == [200] * 6
    assert code == "0"
    assert seconds < 40
    say(f"SIGTERM with work at hand: drained, exit code 0 after {seconds:.1f} s, every request answered")

    def firing() -> set[str]:
        alerts = httpx.get(f"{ALERTMANAGER}/api/v2/alerts", params={"active": "true"}, timeout=30).json()
        return {alert["labels"]["alertname"] for alert in alerts}

    wait_for(lambda: "DDPMReplicaLost" in firing(), "the alert at Alertmanager", 240)
    say(f"DDPMReplicaLost reached Alertmanager {time.monotonic() - stopped:.0f} s after the stop")
    say(f"all that fire: {sorted(firing())}")
    started = time.monotonic()
    docker("start", victim)
    wait_for(lambda: "DDPMReplicaLost" not in firing(), "its end", 240)
    say(f"and was resolved {time.monotonic() - started:.0f} s after the start")


def goes_without_a_trace() -> None:
    compose("down", "-v", "--remove-orphans")
    label = f"label=com.docker.compose.project={PROJECT}"
    for kind in (["ps", "-aq"], ["network", "ls", "-q"], ["volume", "ls", "-q"]):
        assert docker(*kind, "--filter", label) == "", f"{kind} are left"
    say("docker compose down -v left no container, network or volume")


STEPS = (
    comes_up,
    is_locked_down,
    serves,
    passes_disconnects_on,
    is_scraped_and_every_panel_has_data,
    scales,
    survives_the_death_of_a_replica,
    restarts_under_load,
    drains_on_sigterm_and_the_alert_fires_and_resolves,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-build", action="store_true", help=f"take ddpm-serve:{ENVIRONMENT['TAG']}-cpu as it is")
    parser.add_argument("--stand-ins", action="store_true", help="images of Debian's packages; no Grafana")
    parser.add_argument("--keep", action="store_true", help="leave everything running at the end")
    parser.add_argument("--only", nargs="*", choices=[step.__name__ for step in STEPS], help="and nothing else")
    asked = parser.parse_args()
    untried = ["the GPU (docker compose config checks its part)"]
    if asked.stand_ins:
        FILES.append("tests/docker/stand-ins.yml")
        for name in ("PROMETHEUS_TAG", "ALERTMANAGER_TAG", "HAPROXY_TAG"):
            ENVIRONMENT.setdefault(name, "latest")
        untried += ["Grafana itself", "the pinned images of Prometheus, Alertmanager and HAProxy"]
    if asked.no_build:
        untried.append("the build")
    else:
        builds()
    compose("down", "-v", "--remove-orphans")
    try:
        for step in STEPS:
            if not asked.only or step.__name__ in asked.only:
                step()
    except BaseException:
        print(compose("ps", "-a"), compose("logs", "--tail", "15"), sep="\n", file=sys.stderr)
        if asked.keep:
            sys.exit("failed; left running")
        raise
    finally:
        if not asked.keep:
            goes_without_a_trace()
    untried += [step.__name__ for step in STEPS if asked.only and step.__name__ not in asked.only]
    say("passed. Not tried: " + "; ".join(untried))


if __name__ == "__main__":
    main()
