"""The manifests as kubectl builds them, against Kubernetes' own schemas, and against each other."""

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from tests.deploy.tools import DEPLOY, accepts, documents

KUBERNETES = DEPLOY / "kubernetes"
OVERLAYS = ("cpu", "gpu")
VERSIONS = ("1.30", "1.37")
NOT_IN_KUBERNETES = {"ServiceMonitor", "PrometheusRule"}


@cache
def built(overlay: str) -> dict[str, dict[str, Any]]:
    """Kind -> manifest; there is one of each."""
    found = documents(accepts("kubectl", "kustomize", KUBERNETES / "overlays" / overlay))
    by_kind = {manifest["kind"]: manifest for manifest in found}
    assert len(by_kind) == len(found)
    return by_kind


def pod(overlay: str) -> dict[str, Any]:
    spec: dict[str, Any] = built(overlay)["Deployment"]["spec"]["template"]["spec"]
    return spec


def container(overlay: str) -> dict[str, Any]:
    (only,) = pod(overlay)["containers"]
    found: dict[str, Any] = only
    return found


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_manifest_follows_the_schema_of_its_kind(overlay: str, version: str) -> None:
    for kind, manifest in built(overlay).items():
        if kind in NOT_IN_KUBERNETES:
            with pytest.raises(kubernetes_validate.SchemaNotFoundError):
                kubernetes_validate.validate(manifest, version, strict=True)
        else:
            kubernetes_validate.validate(manifest, version, strict=True)


def test_the_schema_finds_a_misspelt_field() -> None:
    broken = yaml.safe_load(yaml.safe_dump(built("cpu")["Deployment"]))
    broken["spec"]["template"]["spec"]["containers"][0]["readynessProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError, match="readynessProbe"):
        kubernetes_validate.validate(broken, VERSIONS[0], strict=True)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_everything_but_the_namespace_lies_in_it(overlay: str) -> None:
    name = built(overlay)["Namespace"]["metadata"]["name"]
    spaces = {kind: m["metadata"].get("namespace") for kind, m in built(overlay).items() if kind != "Namespace"}
    assert set(spaces.values()) == {name}, spaces


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_whatever_selects_pods_selects_these(overlay: str) -> None:
    manifests = built(overlay)
    labels = manifests["Deployment"]["spec"]["template"]["metadata"]["labels"]
    selectors = [
        manifests["Deployment"]["spec"]["selector"]["matchLabels"],
        manifests["Service"]["spec"]["selector"],
        manifests["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
        manifests["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"],
    ]
    assert all(selector.items() <= labels.items() for selector in selectors)
    monitor = manifests["ServiceMonitor"]["spec"]
    assert monitor["selector"]["matchLabels"].items() <= manifests["Service"]["metadata"]["labels"].items()
    ports = {port["name"]: port["targetPort"] for port in manifests["Service"]["spec"]["ports"]}
    assert all(ports[endpoint["port"]] == "http" for endpoint in monitor["endpoints"])
    assert manifests["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"] == {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "name": manifests["Deployment"]["metadata"]["name"],
    }


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_life_and_readiness_are_asked_apart_and_a_stop_leaves_time_to_drain(overlay: str) -> None:
    asked = container(overlay)
    assert asked["livenessProbe"]["httpGet"]["path"] == asked["startupProbe"]["httpGet"]["path"] == "/health"
    assert asked["readinessProbe"]["httpGet"]["path"] == "/ready"
    drain = next(int(flag.split("=")[1]) for flag in asked["args"] if flag.startswith("--shutdown-timeout="))
    pause = int(asked["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pause + drain < pod(overlay)["terminationGracePeriodSeconds"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_a_pod_is_what_the_restricted_profile_allows(overlay: str) -> None:
    assert built(overlay)["Namespace"]["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    assert pod(overlay)["securityContext"]["runAsNonRoot"] is True
    assert pod(overlay)["securityContext"]["runAsUser"] > 0
    assert pod(overlay)["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod(overlay)["automountServiceAccountToken"] is False
    own = container(overlay)["securityContext"]
    assert own["allowPrivilegeEscalation"] is False
    assert own["readOnlyRootFilesystem"] is True
    assert own["capabilities"] == {"drop": ["ALL"]}
    assert not any("hostPath" in volume for volume in pod(overlay)["volumes"])


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_mount_has_its_volume_and_the_key_comes_from_a_secret(overlay: str) -> None:
    volumes = {volume["name"] for volume in pod(overlay)["volumes"]}
    assert {mount["name"] for mount in container(overlay)["volumeMounts"]} == volumes
    refs = {e["name"]: e["valueFrom"]["secretKeyRef"] for e in container(overlay)["env"] if "KEY" in e["name"]}
    assert refs.keys() == {"VLLM_API_KEY", "HIDROP_METRICS_API_KEY"}
    assert not any("optional" in ref for ref in refs.values())
    (endpoint,) = built(overlay)["ServiceMonitor"]["spec"]["endpoints"]
    assert endpoint["authorization"]["credentials"] == refs["HIDROP_METRICS_API_KEY"]
    assert not any(kind == "Secret" for kind in built(overlay))


def test_the_gpu_overlay_asks_for_a_gpu_and_reads_models_from_the_claim() -> None:
    assert container("gpu")["resources"]["limits"]["nvidia.com/gpu"] == "1"
    claims = [v["persistentVolumeClaim"]["claimName"] for v in pod("gpu")["volumes"] if "persistentVolumeClaim" in v]
    assert claims == [built("gpu")["PersistentVolumeClaim"]["metadata"]["name"]]
    assert container("cpu")["image"] != container("gpu")["image"]


def test_the_autoscaler_reads_the_metric_that_the_adapter_makes_from_vllms_queue() -> None:
    (rule,) = yaml.safe_load((KUBERNETES / "prometheus-adapter-values.yaml").read_text())["rules"]["custom"]
    (metric,) = built("cpu")["HorizontalPodAutoscaler"]["spec"]["metrics"]
    assert metric["pods"]["metric"]["name"] == rule["name"]["as"]
    assert '"vllm:num_requests_waiting"' in rule["seriesQuery"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_rules_are_those_of_the_rule_file_and_prometheus_takes_them(overlay: str, tmp_path: Path) -> None:
    groups = built(overlay)["PrometheusRule"]["spec"]
    assert groups == yaml.safe_load((DEPLOY / "prometheus" / "hidrop.rules.yml").read_text())
    (tmp_path / "rules.yml").write_text(yaml.safe_dump(groups))
    assert "SUCCESS" in accepts("promtool", "check", "rules", tmp_path / "rules.yml")


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_job_that_rules_name_is_the_service_that_is_scraped(overlay: str) -> None:
    """The operator names a job by the Service, unless the ServiceMonitor names a label for it."""
    assert "jobLabel" not in built(overlay)["ServiceMonitor"]["spec"]
    jobs = set(re.findall(r'job="(\w+)"', str(built(overlay)["PrometheusRule"])))
    assert jobs == {built(overlay)["Service"]["metadata"]["name"]}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_dashboard_is_in_the_map_that_grafanas_sidecar_finds(overlay: str) -> None:
    dashboards = built(overlay)["ConfigMap"]
    assert dashboards["metadata"]["labels"] == {"grafana_dashboard": "1"}
    assert dashboards["data"] == {file.name: file.read_text() for file in (DEPLOY / "grafana").glob("*.json")}
    assert len(yaml.safe_dump(dashboards)) < 2**20, "what etcd takes"


def _strings(found: Any) -> Iterator[str]:
    if isinstance(found, dict):
        for value in found.values():
            yield from _strings(value)
    elif isinstance(found, list):
        for value in found:
            yield from _strings(value)
    elif isinstance(found, str):
        yield found


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_no_image_is_latest(overlay: str) -> None:
    assert ":" in container(overlay)["image"]
    assert not any(text.endswith(":latest") for text in _strings(built(overlay)))
