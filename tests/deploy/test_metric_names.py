"""Autoscaler, rules and dashboards ask for metrics that a server has."""

import re
from pathlib import Path

import vllm
import yaml

from tests.deploy.tools import DEPLOY, ROOT, files

NAME = re.compile(r"(?<![-\w])(?:vllm:|vllm_(?!hidrop\b)|hidrop:)[a-z][a-z0-9_:]+")
HISTOGRAM = re.compile(r"_(bucket|count|sum)$")


def documented() -> set[str]:
    """Ours, as docs/metrics.md lists them, which scripts/readme.py keeps true."""
    return set(re.findall(r"^\| `(vllm_hidrop_\w+)`", (ROOT / "docs" / "metrics.md").read_text(), re.MULTILINE))


def of_vllm() -> set[str]:
    """What the installed vLLM registers; counters without their ending."""
    source = Path(vllm.__file__).parent / "v1" / "metrics" / "loggers.py"
    return set(re.findall(r'"(vllm:\w+)"', source.read_text()))


def recorded() -> set[str]:
    groups = yaml.safe_load((DEPLOY / "prometheus" / "hidrop.rules.yml").read_text())["groups"]
    return {rule["record"] for group in groups for rule in group["rules"] if "record" in rule}


def adapted() -> set[str]:
    """What prometheus-adapter makes for the autoscaler."""
    values = yaml.safe_load((DEPLOY / "kubernetes" / "prometheus-adapter-values.yaml").read_text())
    return {rule["name"]["as"] for rule in values["rules"]["custom"]}


def test_every_metric_named_in_deploy_is_one_that_a_server_has() -> None:
    known = documented() | of_vllm() | recorded() | adapted()
    named = {name for path in files(".yaml", ".yml", ".json") for name in NAME.findall(path.read_text())}
    assert {"vllm:num_requests_waiting", "vllm_num_requests_waiting", "vllm_hidrop_requests_total"} <= named
    assert len(named & documented()) > 10
    unknown = {name for name in named if not {name, HISTOGRAM.sub("", name), name.removesuffix("_total")} & known}
    assert not unknown
