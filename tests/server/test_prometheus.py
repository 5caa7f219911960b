"""A real Prometheus scrapes the real server under traffic: every query of dashboards and rules answers."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from tests.server.harness import Server, image_url
from vllm_hidrop.cli.monitor import wait_for_scrape
from vllm_hidrop.monitoring import rules
from vllm_hidrop.monitoring.dashboards import DASHBOARDS
from vllm_hidrop.monitoring.panels import Query, fill
from vllm_hidrop.monitoring.prometheus import Prometheus, Series, running

pytestmark = pytest.mark.server

INTERVAL = "10m"
"""Longer than the test: a rate over all of it, with the zeros before the traffic."""
QUERIES = [query for dashboard in DASHBOARDS for panel in dashboard.panels for query in panel.queries]
NEEDS_OTHER_TRAFFIC = {
    "vllm:num_preemptions_total": "a pool that is too small",
    "vllm:num_requests": "a request at the very moment of a scrape",
    "vllm:kv_cache_usage_perc": "the same",
    "vllm_hidrop_grammars_waiting": "a grammar that is being tried at the moment of a scrape",
    "vllm_hidrop_kv_blocks_returned_total": "a method that decides the counts itself",
    "vllm_hidrop_prefix_reuse_off_total": "a method, a cache or a setting under which images are not reused",
    "vllm_hidrop_fallback_requests_total": "a prompt that ends with an image, which this model's template never makes",
}
"""What this traffic does not move: these answer 0, not nothing."""


@dataclass(frozen=True)
class Scraped:
    """A Prometheus that has seen these reports come and go."""

    prometheus: Prometheus
    reports: list[dict[str, Any]]
    refused: int


@pytest.fixture(scope="module")
def scraped(server: Server) -> Iterator[Scraped]:
    with running([server.url], rules.FILE, scrape_seconds=0.5) as prometheus:
        wait_for_scrape(prometheus)
        reports = [server.chat([image_url(seed)], max_tokens=8, ignore_eos=True)["hidrop"] for seed in range(20, 26)]
        reports.append(server.chat([image_url(20), image_url(21)])["hidrop"])
        off = {"hidrop": "off"}
        reports += [server.chat([image_url(seed)], vllm_xargs=off, max_tokens=8)["hidrop"] for seed in (31, 32)]
        reports.append(server.chat([])["hidrop"])
        bad = server.http.post("/v1/chat/completions", json=server.body([], vllm_xargs={"hidrop_no": 1}))
        assert bad.status_code == 400
        refused = server.metric("vllm_hidrop_refused_requests_total")
        wait_for(prometheus, f"sum(vllm_hidrop_refused_requests_total) == {refused}")
        for recorded in ('hidrop:requests:rate5m{mode="text"}', rules.RECORDINGS[-1].name):
            wait_for(prometheus, f"{recorded} > 0")
        yield Scraped(prometheus, reports, 1)


def wait_for(prometheus: Prometheus, condition: str) -> None:
    deadline = time.monotonic() + 60
    while not prometheus.query(condition):
        assert time.monotonic() < deadline, f"never: {condition}"
        time.sleep(0.2)


def numbers(found: list[Series]) -> list[float]:
    return [value for series in found for _, value in series.points if not math.isnan(value)]


@pytest.mark.parametrize("query", QUERIES, ids=lambda query: str(query.expr)[:80])
def test_every_panels_query_shows_the_traffic(scraped: Scraped, query: Query) -> None:
    found = numbers(scraped.prometheus.query(fill(query.expr, INTERVAL)))
    assert found, f"no data: {query.expr}"
    if not any(name in query.expr for name in NEEDS_OTHER_TRAFFIC):
        assert any(found), f"nothing moved: {query.expr}"


def test_a_panel_filtered_by_another_model_is_empty(scraped: Scraped) -> None:
    for query in QUERIES:
        if "$model_name" in query.expr:
            assert not numbers(scraped.prometheus.query(fill(query.expr, INTERVAL, "no-such-model"))), query.expr


def test_the_savings_shown_are_those_of_the_responses(scraped: Scraped) -> None:
    for what, run, dense in (
        ("kv_bytes_held", "kv_bytes", "kv_bytes_dense"),
        ("prefill_flops_run", "prefill_flops", "prefill_flops_dense"),
    ):
        part = f"vllm_hidrop_{what}_total"
        whole = part.replace("held", "dense").replace("run", "dense")
        expr = f"sum(increase({part}[{INTERVAL}])) / sum(increase({whole}[{INTERVAL}]))"
        expected = sum(report[run] for report in scraped.reports) / sum(report[dense] for report in scraped.reports)
        # Both are extrapolated alike, so their ratio is exact.
        assert numbers(scraped.prometheus.query(expr)) == [pytest.approx(expected)]


def test_every_rule_is_healthy_and_none_fires(scraped: Scraped) -> None:
    found = {rule["name"]: rule for rule in scraped.prometheus.rules()}
    names = [recording.name for recording in rules.RECORDINGS] + [alert.name for alert in rules.ALERTS]
    assert sorted(found) == sorted(names)
    assert {name: rule["health"] for name, rule in found.items()} == dict.fromkeys(names, "ok")
    assert [name for name, rule in found.items() if rule.get("state") == "firing"] == []


@pytest.mark.parametrize("recording", rules.RECORDINGS, ids=lambda recording: str(recording.name))
def test_every_recording_rule_records(scraped: Scraped, recording: rules.Recording) -> None:
    found = numbers(scraped.prometheus.query(recording.name))
    assert any(found), recording


@pytest.mark.parametrize("alert", rules.ALERTS, ids=lambda alert: str(alert.name))
def test_every_alert_watches_a_value_that_there_is(scraped: Scraped, alert: rules.Alert) -> None:
    assert numbers(scraped.prometheus.query(alert.value)), alert
