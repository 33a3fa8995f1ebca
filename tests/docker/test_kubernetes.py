"""The Kubernetes manifests: what Kustomize makes of them, and what must fit the server. `make check-manifests` has the
schemas."""

from __future__ import annotations

import shutil
import subprocess
from functools import cache
from typing import Any

import pytest
import yaml
from fastapi import APIRouter
from fastapi.routing import APIRoute

from app.__main__ import SHUTDOWN_GRACE_S
from app.routes import health
from app.settings import Settings
from tests.docker.files import DOCKER, metrics_in
from tests.docker.test_dashboard import series

FOLDER = DOCKER / "kubernetes"
OVERLAYS = ["cpu", "gpu"]
KUBECTL = shutil.which("kubectl")
needs_kubectl = pytest.mark.skipif(KUBECTL is None, reason="kubectl, which has Kustomize, is not installed")


@cache
def built(overlay: str) -> dict[str, Any]:
    """Kind → object. Every kind is there once."""
    done = subprocess.run([str(KUBECTL), "kustomize", str(FOLDER / overlay)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    objects = list(yaml.safe_load_all(done.stdout))
    found = {thing["kind"]: thing for thing in objects}
    assert len(found) == len(objects)
    return found


def base(name: str) -> Any:
    return yaml.safe_load((FOLDER / "base" / f"{name}.yaml").read_text())


def pod() -> Any:
    return base("deployment")["spec"]["template"]["spec"]


def server() -> Any:
    (found,) = pod()["containers"]
    return found


def settings() -> dict[str, str]:
    (generated,) = base("kustomization")["configMapGenerator"]
    return dict(literal.split("=", 1) for literal in generated["literals"])


def test_every_manifest_is_yaml_and_in_its_kustomization() -> None:
    files = sorted(FOLDER.rglob("*.yaml"))
    assert len(files) >= 9
    for path in files:
        assert isinstance(yaml.safe_load(path.read_text()), dict), path
    listed = base("kustomization")["resources"]
    assert sorted([*listed, "kustomization.yaml"]) == sorted(path.name for path in (FOLDER / "base").iterdir())
    for overlay in OVERLAYS:
        assert yaml.safe_load((FOLDER / overlay / "kustomization.yaml").read_text())["resources"] == ["../base"]


def test_the_server_is_unprivileged_and_writes_to_tmp_only() -> None:
    assert pod()["securityContext"]["runAsNonRoot"] is True
    user = f"{pod()['securityContext']['runAsUser']}:{pod()['securityContext']['runAsGroup']}"
    assert f"\nUSER {user}\n" in (DOCKER / "Dockerfile").read_text(), "the image has another one"
    assert pod()["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod()["enableServiceLinks"] is False
    assert pod()["automountServiceAccountToken"] is False
    rights = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
    assert server()["securityContext"] == rights
    assert [mount["mountPath"] for mount in server()["volumeMounts"]] == ["/tmp"]


def test_a_pod_has_time_for_its_drain() -> None:
    before = int(server()["lifecycle"]["preStop"]["exec"]["command"][-1])
    drain = Settings.model_fields["drain_s"].default
    assert pod()["terminationGracePeriodSeconds"] > before + drain + SHUTDOWN_GRACE_S


def test_probes_and_scrapes_use_existing_paths_and_ports() -> None:
    def paths(router: APIRouter) -> set[str]:
        return {route.path for route in router.routes if isinstance(route, APIRoute)}

    probes = {name: server()[f"{name}Probe"]["httpGet"] for name in ("startup", "readiness", "liveness")}
    assert [probe["path"] for probe in probes.values()] == ["/readyz", "/readyz", "/livez"]
    assert {probe["path"] for probe in probes.values()} <= paths(health.health)
    (endpoint,) = base("monitor")["spec"]["podMetricsEndpoints"]
    assert endpoint["path"] in paths(health.operations)
    ports = {port["name"]: port["containerPort"] for port in server()["ports"]}
    assert ports == {"http": Settings.model_fields["port"].default, "metrics": int(settings()["DDPM_METRICS_PORT"])}
    assert endpoint["port"] == "metrics"
    assert {probe["port"] for probe in probes.values()} == {"http"}
    assert [port["targetPort"] for port in base("service")["spec"]["ports"]] == ["http"], "metrics are not public"


def test_the_autoscaler_uses_a_metric_that_exists() -> None:
    (rule,) = yaml.safe_load((FOLDER / "prometheus-adapter.yaml").read_text())["rules"]["custom"]
    (metric,) = base("autoscaler")["spec"]["metrics"]
    assert metric["pods"]["metric"]["name"] == rule["name"]["as"]
    counted = rule["seriesQuery"].split("{")[0]
    query = rule["metricsQuery"].replace("<<.Series>>", counted).replace("<<.LabelMatchers>>", 'pod="a"')
    assert metrics_in(query.replace("<<.GroupBy>>", "pod")) == {
        "ddpm_pending_nfe",
        "ddpm_estimated_nfe_per_second",
    }
    assert metrics_in(query.replace("<<.GroupBy>>", "pod")) <= series()
    assert base("autoscaler")["spec"]["scaleTargetRef"]["name"] == base("deployment")["metadata"]["name"]
    assert "replicas" not in base("deployment")["spec"], "every apply would undo the autoscaler's work"


def test_settings_in_the_manifests_exist() -> None:
    known = {f"DDPM_{name.upper()}" for name in Settings.model_fields}
    assert set(settings()) <= known
    for overlay in OVERLAYS:
        (patch,) = yaml.safe_load((FOLDER / overlay / "kustomization.yaml").read_text())["patches"]
        (container,) = yaml.safe_load(patch["patch"])["spec"]["template"]["spec"]["containers"]
        assert {variable["name"] for variable in container["env"]} <= known


@needs_kubectl
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_is_whole(overlay: str) -> None:
    found = built(overlay)
    assert {"Deployment", "Service", "HorizontalPodAutoscaler", "PodMonitor", "PodDisruptionBudget"} < set(found)
    spec = found["Deployment"]["spec"]
    labels = spec["template"]["metadata"]["labels"].items()
    for selector in (
        spec["selector"]["matchLabels"],
        found["Service"]["spec"]["selector"],
        found["PodMonitor"]["spec"]["selector"]["matchLabels"],
        found["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
        spec["template"]["spec"]["topologySpreadConstraints"][0]["labelSelector"]["matchLabels"],
    ):
        assert selector
        assert selector.items() <= labels
    (container,) = spec["template"]["spec"]["containers"]
    limits = container["resources"]["limits"]
    assert ("nvidia.com/gpu" in limits) == (overlay == "gpu")
    assert container["image"].endswith({"cpu": "-cpu", "gpu": "-cuda"}[overlay])
    assert container["envFrom"][0] == {"configMapRef": {"name": found["ConfigMap"]["metadata"]["name"]}}
