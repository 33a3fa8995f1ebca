"""The alert rules against made-up histories, by `promtool test rules`: what fires, when, and that nothing else does."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

RULES = Path(__file__).parents[2] / "docker" / "prometheus" / "rules"
PROMTOOL = shutil.which("promtool")
MINUTES = 90
STEPS = MINUTES * 2  # samples 30 s apart
BUSY = 'endpoint="/generate", model="mnist"'


def on(name: str, instance: str = "a:8000", job: str = "ddpm", **labels: str) -> str:
    """A series' name with its labels."""
    inside = {"job": job, "instance": instance} | labels
    return name + "{" + ", ".join(f'{key}="{value}"' for key, value in inside.items()) + "}"


def steady(value: float = 0, growth: float = 0) -> str:
    return f"{value}{growth:+}x{STEPS}"


def until(minute: int, before: str, after: str) -> str:
    """`before` and `after` are values, _ for no sample; the change is at the minute."""
    return f"{before}x{minute * 2 - 1} {after}x{STEPS - minute * 2}"


def histogram(name: str, seconds: float, growth: float = 15, **labels: str) -> dict[str, str]:
    """A history in which every observation takes `seconds`."""
    series = {}
    for edge in (0.05, 0.5, 1, 2.5, 5, 10, 30, 60):
        series[on(f"{name}_bucket", le=str(float(edge)), **labels)] = steady(0, growth if seconds <= edge else 0)
    return series | {on(f"{name}_bucket", le="+Inf", **labels): steady(0, growth)}


REQUEST = {"endpoint": "/generate", "model": "mnist"}
REQUESTS = "ddpm_requests_total"


def healthy() -> dict[str, str]:
    """Two replicas with work, a balancer, an Alertmanager."""
    series = {
        on("up", "balancer:8404", "balancer"): steady(1),
        on("up", "alertmanager:9093", "alertmanager"): steady(1),
    }
    series[on("prometheus_notifications_dropped_total", "localhost:9090", "prometheus")] = steady(0)
    for instance in ("a:8000", "b:8000"):
        series |= {
            on("up", instance): steady(1),
            on("ddpm_ready", instance): steady(1),
            on("ddpm_engine_stalled", instance): steady(0),
            on("ddpm_engine_restarts_total", instance): steady(0),
            on("ddpm_failed_steps_total", instance, model="mnist"): steady(0),
            on("ddpm_model_loads_total", instance, model="mnist", outcome="loaded"): steady(0, 1),
            on("ddpm_model_loads_total", instance, model="mnist", outcome="invalid_checkpoint"): steady(0),
            on("process_start_time_seconds", instance): steady(1000),
            on("process_open_fds", instance): steady(50),
            on("process_max_fds", instance): steady(1024),
            on("ddpm_pending_nfe", instance): steady(1000),
            on("ddpm_estimated_nfe_per_second", instance): steady(200),
            on("ddpm_device_memory_bytes", instance, device="cuda", kind="used"): steady(60e9),
            on("ddpm_device_memory_bytes", instance, device="cuda", kind="total"): steady(80e9),
            on("ddpm_image_steps_total", instance, model="mnist"): steady(0, 3000),
            on("ddpm_wasted_image_steps_total", instance, model="mnist", outcome="cancelled"): steady(0, 30),
            on("ddpm_frames_sent_total", instance, model="mnist"): steady(0, 30),
            on("ddpm_frames_dropped_total", instance, model="mnist"): steady(0, 3),
            on("ddpm_model_info", instance, model="mnist", sha256="1", device="cuda"): steady(1),
            on(REQUESTS, instance, **REQUEST, outcome="ok"): steady(0, 150),
            on(REQUESTS, instance, **REQUEST, outcome="cancelled"): steady(0, 15),
            on(REQUESTS, instance, **REQUEST, outcome="invalid_request"): steady(0, 60),
        }
    series |= histogram("ddpm_e2e_request_latency_seconds", 0.3, **REQUEST, outcome="ok")
    series |= histogram("ddpm_e2e_request_latency_seconds", 60, **REQUEST, outcome="cancelled")
    return series | histogram("ddpm_cancellation_latency_seconds", 0.05, model="mnist")


@dataclass
class History:
    """What differs from the healthy one, from `minute` on where it changes. A series that is None is not there."""

    changes: dict[str, str | None] = field(default_factory=dict)
    fires: frozenset[str] = frozenset()
    at: str = "40m"


def one(alert: str, changes: dict[str, str | None], *others: str, at: str = "40m") -> History:
    return History(changes, frozenset({alert, *others}), at)


GONE = until(30, "1", "_")
HISTORIES = {
    "healthy": History(),
    "everything gone": one(
        "DDPMDown", {on("up"): GONE, on("up", "b:8000"): GONE, on("ddpm_ready"): GONE, on("ddpm_ready", "b:8000"): GONE}
    ),
    "one replica gone": one("DDPMReplicaLost", {on("up", "b:8000"): GONE, on("ddpm_ready", "b:8000"): GONE}),
    "gone for less than a minute": History({on("up", "b:8000"): GONE}, at="30m30s"),
    "a replica that was taken away long ago": History({on("up", "b:8000"): until(10, "1", "_")}, at="80m"),
    "a scrape fails": one("DDPMUnreachable", {on("up", "b:8000"): until(30, "1", "0")}, "DDPMReplicaLost"),
    "not ready": one("DDPMNotReady", {on("ddpm_ready"): until(30, "1", "0")}),
    "not ready for a minute": History({on("ddpm_ready"): until(30, "1", "0")}, at="31m"),
    "stalled": one("DDPMEngineStalled", {on("ddpm_engine_stalled"): until(30, "0", "1")}),
    "the engine failed once": one("DDPMEngineRestarts", {on("ddpm_engine_restarts_total"): until(35, "0", "1")}),
    "the engine failed an hour ago": History({on("ddpm_engine_restarts_total"): until(5, "0", "1")}, at="60m"),
    "the process starts anew, over and over": one(
        "DDPMRestarting", {on("process_start_time_seconds"): f"1000x60 2000x4 3000x4 4000x{STEPS}"}
    ),
    "the process was started anew": History({on("process_start_time_seconds"): f"1000x70 2000x{STEPS}"}),
    "steps fail": one("DDPMStepsFailing", {on("ddpm_failed_steps_total", model="mnist"): steady(0, 1)}),
    "requests fail": one("DDPMErrors", {on(REQUESTS, **REQUEST, outcome="step_failed"): steady(0, 5)}),
    "one request in a thousand fails": History({on(REQUESTS, **REQUEST, outcome="step_failed"): steady(0, 0.3)}),
    "clients send nonsense": History({on(REQUESTS, **REQUEST, outcome="invalid_request"): steady(0, 1500)}),
    "requests are slow": one(
        "DDPMSlow", {**histogram("ddpm_e2e_request_latency_seconds", 30, **REQUEST, outcome="ok")}
    ),
    "the queue is long and grows": one("DDPMQueueGrowing", {on("ddpm_pending_nfe"): steady(1000, 500)}),
    "the queue is long and shrinks": History({on("ddpm_pending_nfe"): steady(200_000, -400)}),
    "requests are refused": one(
        "DDPMHighRejectionRate", {on(REQUESTS, **REQUEST, outcome="overloaded"): steady(0, 60)}
    ),
    "time-outs pass": one(
        "DDPMHighRejectionRate", {on(REQUESTS, **REQUEST, outcome="deadline_exceeded"): steady(0, 60)}
    ),
    "the device is full": one(
        "DDPMDeviceMemory", {on("ddpm_device_memory_bytes", device="cuda", kind="used"): steady(78e9)}
    ),
    "cancels take long": one("DDPMCancelsSlow", histogram("ddpm_cancellation_latency_seconds", 5, model="mnist")),
    "work for nobody": one(
        "DDPMWastedCompute", {on("ddpm_wasted_image_steps_total", model="mnist", outcome="cancelled"): steady(0, 1500)}
    ),
    "frames are dropped": one("DDPMFramesDropped", {on("ddpm_frames_dropped_total", model="mnist"): steady(0, 90)}),
    "descriptors": one("DDPMFileDescriptorsHigh", {on("process_open_fds"): steady(1000)}),
    "two checkpoints of one name": one(
        "DDPMMixedCheckpoints",
        {
            on("ddpm_model_info", "b:8000", model="mnist", sha256="1", device="cuda"): None,
            on("ddpm_model_info", "b:8000", model="mnist", sha256="2", device="cuda"): steady(1),
        },
    ),
    "new weights are broken": one(
        "DDPMLoadFailed",
        {on("ddpm_model_loads_total", model="mnist", outcome="invalid_checkpoint"): until(35, "0", "1")},
    ),
    "no balancer": one("DDPMBalancerDown", {on("up", "balancer:8404", "balancer"): until(30, "1", "0")}),
    "no Alertmanager": one("DDPMAlertsLost", {on("up", "alertmanager:9093", "alertmanager"): until(30, "1", "0")}),
    "alerts are dropped": one(
        "DDPMAlertsLost",
        {on("prometheus_notifications_dropped_total", "localhost:9090", "prometheus"): steady(0, 1)},
    ),
}


def alerts() -> set[str]:
    groups = yaml.safe_load((RULES / "alerts.yml").read_text())["groups"]
    return {rule["alert"] for group in groups for rule in group["rules"]}


def test_every_alert_has_a_history_in_which_it_fires() -> None:
    assert {alert for history in HISTORIES.values() for alert in history.fires} == alerts()


@pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed (Debian: apt-get install prometheus)")
def test_the_rules_are_valid() -> None:
    files = [str(path) for path in sorted(RULES.glob("*.yml"))]
    done = subprocess.run([str(PROMTOOL), "check", "rules", *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed (Debian: apt-get install prometheus)")
def test_each_history_makes_its_alerts_fire_and_no_other(tmp_path: Path) -> None:
    tests = []
    for name, history in HISTORIES.items():
        series = {key: values for key, values in (healthy() | history.changes).items() if values is not None}
        samples = [{"labels": f'{{alertname="{alert}"}}', "value": 1} for alert in sorted(history.fires)]
        expression = 'group by (alertname) (ALERTS{alertstate="firing"})'
        tests.append(
            {
                "name": name,
                "interval": "30s",
                "input_series": [{"series": key, "values": values} for key, values in series.items()],
                "promql_expr_test": [{"expr": expression, "eval_time": history.at, "exp_samples": samples}],
            }
        )
    file = tmp_path / "histories.yml"
    content = {"rule_files": [str(path) for path in sorted(RULES.glob("*.yml"), reverse=True)]}
    file.write_text(yaml.safe_dump(content | {"evaluation_interval": "30s", "tests": tests}))
    done = subprocess.run([str(PROMTOOL), "test", "rules", str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
