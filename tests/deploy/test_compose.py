"""The compose project, by docker-compose's own parser and the specification's schema."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.tools import DEPLOY, accepts, run

COMPOSE = DEPLOY / "compose"
KEYS = {"HIDROP_API_KEY": "key", "HIDROP_METRICS_KEY": "other", "GRAFANA_PASSWORD": "word"}
FORMS: list[tuple[str, ...]] = [("compose.yaml",), ("compose.yaml", "compose.gpu.yaml")]


def environment(**more: str) -> dict[str, str]:
    return {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/")} | more


def project(names: tuple[str, ...]) -> dict[str, Any]:
    """The project as docker-compose understands it."""
    chosen = [word for name in names for word in ("-f", name)]
    env = environment(**KEYS, MODEL="llava")
    found: dict[str, Any] = json.loads(
        accepts("docker-compose", *chosen, "config", "--format", "json", cwd=COMPOSE, env=env)
    )
    return found


@pytest.mark.parametrize("names", FORMS, ids="+".join)
def test_every_port_is_on_loopback_and_no_service_has_more_than_it_needs(names: tuple[str, ...]) -> None:
    services = project(names)["services"]
    assert set(services) == {"hidrop", "prometheus", "alertmanager", "grafana"}
    for name, service in services.items():
        assert {port["host_ip"] for port in service["ports"]} == {"127.0.0.1"}, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert not service.get("privileged"), name
        assert ":" in service["image"], name
        assert not service["image"].endswith(":latest"), name
    drained = [flag for flag in services["hidrop"]["command"] if flag.startswith("--shutdown-timeout=")]
    assert float(drained[0].split("=")[1]) < 90
    assert services["hidrop"]["stop_grace_period"] == "1m30s"


def test_without_a_key_nothing_starts() -> None:
    for missing in KEYS:
        given = {name: value for name, value in KEYS.items() if name != missing}
        found = run("docker-compose", "config", "-q", cwd=COMPOSE, env=environment(**given))
        assert found.returncode != 0
        assert missing in found.stderr


@pytest.mark.parametrize("name", ["compose.yaml", "compose.gpu.yaml"])
def test_a_file_follows_the_compose_specification(name: str) -> None:
    accepts("check-jsonschema", "--builtin-schema", "vendor.compose-spec", COMPOSE / name)


def test_the_example_of_settings_names_what_has_no_default() -> None:
    lines = (COMPOSE / "env.example").read_text().splitlines()
    settings = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    assert KEYS.keys() <= settings.keys()
    assert not any(settings[name] for name in KEYS)


def test_every_file_that_is_mounted_is_there() -> None:
    for service in project(FORMS[0])["services"].values():
        sources = [Path(mount["source"]) for mount in service["volumes"] if mount["type"] == "bind"]
        for source in sources:
            assert source.exists() or source == COMPOSE / "models", source


def test_grafana_reads_the_dashboards_and_the_data_source_they_name() -> None:
    mounts = {mount["target"]: Path(mount["source"]) for mount in project(FORMS[0])["services"]["grafana"]["volumes"]}
    (provider,) = yaml.safe_load((COMPOSE / "grafana/dashboards/hidrop.yaml").read_text())["providers"]
    dashboards = sorted(mounts[provider["options"]["path"]].glob("*.json"))
    assert dashboards
    (source,) = yaml.safe_load((COMPOSE / "grafana/datasources/prometheus.yaml").read_text())["datasources"]
    for dashboard in dashboards:
        for named in _data_sources(json.loads(dashboard.read_text())):
            assert named in {source["uid"], "-- Grafana --"} or named.startswith("$"), dashboard


def _data_sources(found: Any) -> set[str]:
    """Every uid of a data source in a dashboard."""
    if isinstance(found, list):
        return {uid for each in found for uid in _data_sources(each)}
    if not isinstance(found, dict):
        return set()
    here = found.get("datasource")
    own = {here["uid"]} if isinstance(here, dict) and here.get("uid") else set()
    return own | {uid for each in found.values() for uid in _data_sources(each)}


def test_alertmanager_accepts_its_file() -> None:
    accepts("amtool", "check-config", COMPOSE / "alertmanager" / "alertmanager.yml")


def test_prometheus_accepts_its_file() -> None:
    accepts("promtool", "check", "config", "--syntax-only", COMPOSE / "prometheus" / "prometheus.yml")


def test_prometheus_accepts_the_rules_it_loads(tmp_path: Path) -> None:
    config = yaml.safe_load((COMPOSE / "prometheus" / "prometheus.yml").read_text())
    (pattern,) = config["rule_files"]
    rules = list((DEPLOY / "prometheus").glob(Path(pattern).name))
    assert rules
    (scrape,) = [job for job in config["scrape_configs"] if job["job_name"] == "hidrop"]
    secret = project(FORMS[0])["services"]["prometheus"]["secrets"][0]["source"]
    assert scrape["authorization"].pop("credentials_file") == f"/run/secrets/{secret}"
    config["rule_files"] = [str(rule) for rule in rules]
    here = tmp_path / "prometheus.yml"
    here.write_text(yaml.safe_dump(config))
    accepts("promtool", "check", "config", here)
