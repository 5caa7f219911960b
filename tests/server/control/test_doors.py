"""What reaches the engine's inside is shut, and no number sent to what stays open ends the engine."""

from argparse import Namespace
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute

from hidrop_server.control.arguments import parse
from hidrop_server.control.settings import REFUSED, Refused
from hidrop_server.errors import StartError
from hidrop_server.http.access import ADMIN_ROUTES, hide_routes
from tests.server.conftest import serving
from tests.server.harness import Server, content, image_url

OPENED_BY: dict[str, list[str]] = {
    "--data-parallel-multi-port-external-lb": ["--data-parallel-multi-port-external-lb", "--data-parallel-size", "2"],
    "--profiler-config": ["--profiler-config", '{"profiler": "torch", "torch_profiler_dir": "/nowhere"}'],
}
"""Of the flags that want a value."""
ROUTES = {
    "/",
    "/detokenize",
    "/docs",
    "/docs/oauth2-redirect",
    "/generative_scoring",
    "/health",
    "/hidrop",
    "/kv_event_sources",
    "/load",
    "/metrics",
    "/openapi.json",
    "/playground",
    "/ready",
    "/redoc",
    "/tokenize",
    "/v1/chat/completions",
    "/v1/chat/completions/batch",
    "/v1/completions",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/v1/models",
    "/v1/responses",
    "/v1/responses/{response_id}",
    "/v1/responses/{response_id}/cancel",
    "/v1/systemone",
    "/version",
}
"""All there are: one that a later vLLM adds has to be looked at first."""
ACCEPTED = (
    *("--enable-tokenizer-info-endpoint", "--return-tokens-as-token-ids", "--enable-server-load-tracking"),
    *("--enable-prompt-tokens-details", "--enable-force-include-usage", "--enable-per-request-metrics"),
    *("--enable-log-requests", "--enable-log-outputs", "--max-logprobs", "-1"),
    *("--trust-request-chat-template", "--max-num-queued-reqs", "64", "--enforce-eager"),
)
"""Flags that let requests ask for more, and stay."""
NUMBERS: tuple[Any, ...] = (-1, 0, 1, 3, 577, 2**31, 2**63, 2**70, -(2**63), 0.5, 1e308, -1e308, True)
SERVER_BUSY = {501, 503}
"""Not implemented for this model, or more sequences than the queue has places."""


def parsed(*flags: str) -> Namespace:
    return parse("any/model", list(flags))


@pytest.mark.parametrize("door", REFUSED, ids=lambda door: door.name)
def test_a_door_is_shut_with_its_reason(door: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = OPENED_BY.get(door.name, [door.name])
    if not door.name.startswith("--"):
        monkeypatch.setenv(door.name, "1")
        flags = []
    with pytest.raises(StartError) as refused:
        parsed(*flags)
    assert f"{door.name} is not supported by hidrop serve: {door.reason}" in str(refused.value)


@pytest.mark.parametrize("value", ["0", "", "false"])
def test_a_variable_that_says_no_opens_no_door(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", value)
    parsed()


def test_the_administrators_routes_bring_their_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
    parsed("--enable-admin-routes", *OPENED_BY["--profiler-config"])


@pytest.mark.parametrize(
    ("flags", "host"),
    [
        ([], "127.0.0.1"),
        (["--host", "0.0.0.0"], "0.0.0.0"),
        (["--api-key", "k"], None),
        (["--uds", "/nowhere/socket"], None),
    ],
)
def test_without_a_key_only_this_machine_is_listened_to(flags: list[str], host: str | None) -> None:
    assert parsed(*flags).host == host


def test_a_key_of_the_environment_is_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "k")
    assert parsed().host is None
    monkeypatch.setenv("VLLM_API_KEY", "")
    assert parsed().host == "127.0.0.1"


@pytest.fixture(scope="module")
def opened() -> Iterator[Server]:
    with serving(ACCEPTED) as started:
        yield started


@pytest.mark.server
def test_no_route_is_there_that_was_not_looked_at(server: Server) -> None:
    assert set(server.http.get("/openapi.json").json()["paths"]) <= ROUTES
    hidden = [*ADMIN_ROUTES, "/inference/v1/generate", "/v1/chat/completions/render", "/v1/completions/derender"]
    for path in hidden:
        assert server.http.post(path, json={}).status_code == 404, path
        assert server.http.get(path).status_code == 404, path


def bodies(model: str) -> dict[str, dict[str, Any]]:
    """For every route with a body, one that is answered."""
    chat = {"model": model, "messages": [{"role": "user", "content": "what ?"}], "max_tokens": 2}
    pictured = Server.body(Namespace(model=model), [image_url(3)], max_tokens=2)  # type: ignore[arg-type]
    return {
        "/v1/chat/completions": pictured,
        "/v1/chat/completions/batch": chat | {"messages": [chat["messages"]]},
        "/v1/completions": {"model": model, "prompt": "red", "max_tokens": 2},
        "/v1/responses": {"model": model, "input": "what ?", "max_output_tokens": 2},
        "/v1/messages": chat,
        "/v1/messages/count_tokens": chat,
        "/v1/systemone": {"model": model},
        "/tokenize": {"model": model, "prompt": "red"},
        "/detokenize": {"model": model, "tokens": [3]},
        "/generative_scoring": {"model": model, "query": "red", "items": ["blue"], "label_token_ids": [3, 4]},
    }


def altered(schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Fields of a body with one number changed or added, also where a list or a mapping holds numbers."""
    for name, field in schema["properties"].items():
        kinds = {each.get("type") for each in (field, *field.get("anyOf", []))}
        for number in NUMBERS:
            if kinds & {"integer", "number"}:
                yield {name: number}
            if "array" in kinds and name not in ("messages", "tools", "input"):
                yield {name: [number]}
            if "object" in kinds:
                yield {name: {"1": number}}
    for number in NUMBERS:
        for key in ("hidrop_keep", "hidrop_method", "session_id", "anything"):
            yield {"vllm_xargs": {key: number}}
            yield {"vllm_xargs": {key: [number] * 5}}
        transfer = {"do_remote_prefill": True, "remote_block_ids": [number], "num": number}
        yield {"kv_transfer_params": transfer}
        yield {"ec_transfer_params": transfer}


def faults_of(opened: Server, path: str, bodies: list[dict[str, Any]]) -> list[str]:
    """What is neither an answer nor the client's fault; a few requests at a time, fewer than the queue has places."""

    def fault(body: dict[str, Any]) -> str | None:
        response = opened.http.post(path, json=body)
        is_fault = response.status_code >= 500 and response.status_code not in SERVER_BUSY
        return f"{path} {body}: {response.status_code} {response.text[:200]}" if is_fault else None

    with ThreadPoolExecutor(4) as pool:
        return [found for found in pool.map(fault, bodies) if found]


@pytest.mark.server
def test_no_number_ends_the_engine(opened: Server) -> None:
    before = content(opened.chat([image_url()]))
    document = opened.http.get("/openapi.json").json()
    known = bodies(opened.model)
    faults: list[str] = []
    for path, operations in document["paths"].items():
        if "requestBody" not in operations.get("post", {}):
            continue
        schema = operations["post"]["requestBody"]["content"]["application/json"]["schema"]
        found = document["components"]["schemas"][schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema
        if "properties" in found:
            faults += faults_of(opened, path, [known[path] | changed for changed in altered(found)])
            assert opened.http.get("/health").status_code == 200, f"{path} ended the engine: {faults[-9:]}"
    assert not faults, "\n".join(faults)
    for rank in ("-1", "1", "577", str(2**70)):
        headers = {"X-data-parallel-rank": rank, "X-Request-Id": rank, "X-Priority": rank}
        response = opened.http.post("/v1/chat/completions", json=known["/v1/messages"], headers=headers)
        assert response.status_code < 500, response.text
    assert content(opened.chat([image_url()])) == before
    assert opened.http.get("/ready").status_code == 200


def test_a_route_that_our_checks_do_not_know_is_not_served() -> None:
    """None of vLLM 0.32's; 0.33 has one."""
    app = FastAPI(openapi_url=None)
    for path in ("/v1/decisions", "/v1/completions"):
        app.post(path)(lambda: None)
    hide_routes(app, admin_too=False)
    assert [route.path for route in app.routes if isinstance(route, APIRoute)] == ["/v1/completions"]


@pytest.mark.server
def test_head_is_get_without_a_body(server: Server) -> None:
    for path in ("/health", "/ready", "/metrics", "/v1/models", "/playground", "/hidrop"):
        head, get = httpx.head(f"{server.url}{path}"), httpx.get(f"{server.url}{path}")
        assert (head.status_code, head.content) == (200, b""), path
        assert head.headers.get("content-type") == get.headers.get("content-type"), path
    assert httpx.head(f"{server.url}/v1/chat/completions").status_code == 405
