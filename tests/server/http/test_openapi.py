"""Generated requests to every route of the server's own document: none is the server's fault.

Bounded and the same in every run; needs schemathesis.
"""

from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, settings

from tests.server.harness import Server, content, image_url

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed: no route is fuzzed")

pytestmark = pytest.mark.server

NUM_EXAMPLES = 8
"""For each route."""
NOT_IMPLEMENTED = 501
"""vLLM's answer for what this kind of model does not do."""


def test_no_generated_request_is_the_servers_fault(server: Server) -> None:
    before = content(server.chat([image_url()]))
    schema = schemathesis.openapi.from_dict(server.http.get("/openapi.json").json())
    failures: list[str] = []
    routes = []
    for result in schema.get_all_operations():
        operation = result.ok()
        routes.append(operation.label)
        failures += faults_of(server, operation)
    assert failures == []
    assert {"POST /v1/chat/completions", "POST /v1/completions", "GET /ready"} <= set(routes)
    assert content(server.chat([image_url()])) == before
    assert server.metric("vllm:kv_cache_usage_perc") == 0
    assert server.http.get("/ready").status_code == 200


def faults_of(server: Server, operation: Any) -> list[str]:
    """What of one route's examples was answered with a 5xx."""
    found: list[str] = []

    @given(case=operation.as_strategy())
    @settings(
        max_examples=NUM_EXAMPLES,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def ask(case: Any) -> None:
        try:
            response = case.call(base_url=server.url, timeout=60)
        except httpx.HTTPError as error:
            found.append(f"{operation.label}: {error!r}")
            return
        if response.status_code >= 500 and response.status_code != NOT_IMPLEMENTED:
            found.append(f"{operation.label}: {response.status_code} {response.text[:300]} for {case.body!r:.500}")

    ask()
    return found[:3]
