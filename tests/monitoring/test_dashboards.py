"""Dashboards, rules and runbook fit each other and the metrics there are; checked without any server."""

import json
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from hidrop_server.metrics import METRICS
from vllm_hidrop.monitoring import grafana, rules
from vllm_hidrop.monitoring.dashboards import DASHBOARDS
from vllm_hidrop.monitoring.panels import Dashboard, fill
from vllm_hidrop.monitoring.prometheus import Tools, find_tools

ROOT = Path(__file__).parents[2]
OURS = re.compile(r"\bvllm_hidrop_\w+")


@pytest.fixture(scope="session")
def tools() -> Tools:
    """Fetched where they are not installed; a machine that can do neither fails here and says why."""
    return find_tools()


def queries() -> str:
    return "\n".join(query.expr for each in DASHBOARDS for panel in each.panels for query in panel.queries)


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda dashboard: str(dashboard.uid))
def test_grafanas_files_are_up_to_date(dashboard: Dashboard) -> None:
    file = grafana.FOLDER / f"{dashboard.uid}.json"
    assert file.read_text() == grafana.to_json(dashboard), "run python -m vllm_hidrop.monitoring.grafana"


def test_grafana_gets_every_query_and_no_other_file_lies_there() -> None:
    files = sorted(grafana.FOLDER.glob("*.json"))
    assert [file.stem for file in files] == sorted(dashboard.uid for dashboard in DASHBOARDS)
    panels = [panel for file in files for panel in json.loads(file.read_text())["panels"] if panel["type"] != "row"]
    shown = {target["expr"] for panel in panels for target in panel["targets"]}
    assert shown == set(queries().splitlines())


def test_the_rule_file_is_up_to_date() -> None:
    for file, text in rules.files().items():
        assert file.read_text() == text, "run python -m vllm_hidrop.monitoring.rules"


def test_every_metric_is_plotted_and_no_other_is() -> None:
    suffixes = ("_bucket", "_sum", "_count")
    plotted = {re.sub(rf"({'|'.join(suffixes)})$", "", name) for name in OURS.findall(queries())}
    assert plotted == {spec.shown for spec in METRICS}


def test_rules_name_metrics_there_are() -> None:
    shown = {spec.shown for spec in METRICS}
    names = {re.sub(r"_(bucket|sum|count)$", "", name) for name in OURS.findall(rules.FILE.read_text())}
    assert names <= shown


def test_every_alert_has_its_place_in_the_runbook_and_its_test() -> None:
    headings = re.findall(r"^## (\w+)$", (ROOT / rules.RUNBOOK).read_text(), re.MULTILINE)
    assert headings == [alert.name for alert in rules.ALERTS]
    tests = yaml.safe_load((rules.FILE.parent / "hidrop.rules.test.yml").read_text())
    bad = next(test for test in tests["tests"] if test["name"] == "everything is bad")
    firing = [sample["labels"] for sample in bad["promql_expr_test"][0]["exp_samples"]]
    assert firing == [f'{{alertname="{alert.name}"}}' for alert in rules.ALERTS]


def test_no_variable_of_grafanas_is_left_after_filling() -> None:
    assert "$" not in fill(queries(), "1m")


@pytest.mark.parametrize(
    "arguments",
    [
        ("check", "config", "prometheus.yml"),
        ("check", "rules", rules.FILE.name),
        ("test", "rules", "hidrop.rules.test.yml"),
    ],
    ids=" ".join,
)
def test_promtool_accepts(tools: Tools, arguments: tuple[str, ...]) -> None:
    folder = rules.FILE.parent
    done = subprocess.run([tools.promtool, *arguments], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_promtool_fails_where_a_rule_is_another_than_its_test_expects(tools: Tools, tmp_path: Path) -> None:
    (tmp_path / rules.FILE.name).write_text(rules.FILE.read_text().replace("> 16", "> 100"))
    tests = (rules.FILE.parent / "hidrop.rules.test.yml").read_text()
    (tmp_path / "tests.yml").write_text(tests)
    command = [str(tools.promtool), "test", "rules", "tests.yml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "HidropQueueGrows" in done.stdout + done.stderr


def test_a_machine_without_the_package_is_told_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match=r"package prometheus.*apt-get: No such file"):
        find_tools(tmp_path / "cache")
    assert list(tmp_path.iterdir()) == []


def test_a_fetch_that_fails_leaves_nothing_and_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs, cache = tmp_path / "bin", tmp_path / "cache"
    programs.mkdir()
    (programs / "apt-get").write_text("#!/bin/sh\necho 'E: no such package' >&2\nexit 100\n")
    (programs / "apt-get").chmod(0o755)
    monkeypatch.setenv("PATH", str(programs))
    with pytest.raises(ValueError, match=r"E: no such package.*apt-get update may be needed"):
        find_tools(cache / "prometheus")
    assert list(cache.iterdir()) == []
