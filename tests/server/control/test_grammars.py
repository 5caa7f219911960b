"""Structured outputs: what cannot be compiled, or spelt, is a 400 before anything is sent, and holds up nobody."""

import json
import threading
import time
from typing import Any

import httpx
import pytest

from tests.server.conftest import serving
from tests.server.harness import Server
from tests.server.processes import api_process

pytestmark = pytest.mark.server

BEGIN_ALIKE = {"choice": ["ab" * 3900 + str(index) for index in range(8)]}
"""Within the size limit; XGrammar takes 20 s for it."""
TWICE_A_RULE = "".join(f"\nr{i} ::= r{i + 1} r{i + 1}" for i in range(40))
SLOW_MASKS = {"grammar": f'root ::= r0{TWICE_A_RULE}\nr40 ::= "c" | ""'}
"""Compiled in a millisecond; then one token's mask takes seconds."""
PATTERN = {"regex": "[a-z]{3}"}
SCHEMA = {"type": "object", "properties": {"colour": {"enum": ["red", "blue"]}}, "required": ["colour"]}


def json_schema(schema: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}


def strict_tool(schema: Any) -> dict[str, Any]:
    function = {"name": "paint", "description": "Paint.", "parameters": schema, "strict": True}
    return {"tools": [{"type": "function", "function": function}], "tool_choice": "required"}


def structured(**constraint: Any) -> dict[str, Any]:
    return {"structured_outputs": constraint}


LARGE = "ab" * 150_000
LARGE_SCHEMA = {"enum": [LARGE]}
TOO_LARGE: dict[str, dict[str, Any]] = {
    "choice": structured(choice=[LARGE]),
    "choices": structured(choice=[f"choice {index} {'x' * 100}" for index in range(1000)]),
    "regex": structured(regex=LARGE),
    "grammar": structured(grammar=f'root ::= "{LARGE}"'),
    "json": structured(json=LARGE_SCHEMA),
    "json as text": structured(json=json.dumps(LARGE_SCHEMA)),
    "structural tag": structured(
        structural_tag=json.dumps({"type": "structural_tag", "format": {"type": "const_string", "value": LARGE}})
    ),
    "schema": json_schema(LARGE_SCHEMA),
}
SAYS_SIZE = "over 64 KiB (--max-grammar-kb)"
NOT_SPELT: dict[str, dict[str, Any]] = {
    "json object": {"response_format": {"type": "json_object"}},
    "enum schema": json_schema({"enum": ["red", "blue"]}),
    "unknown word": structured(choice=["xyzzy"]),
    "one word of two": structured(grammar='root ::= "red" "xyzzy"'),
}
NO_GRAMMAR: dict[str, dict[str, Any]] = {
    "nothing": structured(grammar="root ::= "),
    "open bracket": structured(regex="("),
    "no root": structured(grammar="a ::= b"),
    "no schema": structured(json="{"),
}


def routes(server: Server) -> dict[str, dict[str, Any]]:
    messages = [{"role": "user", "content": "what ?"}]
    chat = {"model": server.model, "messages": messages, "max_tokens": 8}
    return {
        "/v1/chat/completions": chat,
        "/v1/chat/completions/batch": chat | {"messages": [messages]},
        "/v1/completions": {"model": server.model, "prompt": "what ?", "max_tokens": 8},
        "/v1/responses": {"model": server.model, "input": "what ?", "max_output_tokens": 8},
    }


def ask(server: Server, constraint: dict[str, Any], path: str = "/v1/chat/completions", **more: Any) -> httpx.Response:
    return server.http.post(path, json=routes(server)[path] | constraint | more)


def verdict(server: Server, constraint: dict[str, Any]) -> httpx.Response:
    """The answer of a server that had the time; a 503 says that it had none and asks to come again."""
    for _ in range(10):
        response = ask(server, constraint)
        if response.status_code != 503:
            break
        time.sleep(int(response.headers["retry-after"]))
    return response


def reason(response: httpx.Response) -> str:
    """The message of a 400 that is whole: type and code agree, and there is nothing to wait for."""
    assert response.status_code == 400, response.text[:500]
    assert response.headers["content-type"] == "application/json"
    assert "retry-after" not in response.headers
    error = response.json()["error"]
    assert (error["type"], error["code"]) == ("BadRequestError", 400)
    assert "\n" not in error["message"]
    assert len(error["message"]) <= 500
    return str(error["message"])


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", TOO_LARGE)
def test_what_is_too_large_is_refused_by_a_named_limit(guarded: Server, name: str, stream: bool) -> None:
    assert SAYS_SIZE in reason(ask(guarded, TOO_LARGE[name], stream=stream))


@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_too_large_is_refused_by_what_the_prompt_may_hold(guarded: Server, stream: bool) -> None:
    """Templates write it into the prompt."""
    tool = strict_tool({"type": "object", "properties": {"a": LARGE_SCHEMA}})
    assert "characters (32 x --max-model-len)" in reason(ask(guarded, tool, stream=stream))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/responses", "/v1/chat/completions/batch"])
def test_the_limit_is_on_every_route(guarded: Server, path: str, stream: bool) -> None:
    if stream and path.endswith("batch"):
        pytest.skip("it does not stream")
    assert SAYS_SIZE in reason(ask(guarded, TOO_LARGE["choice"], path, stream=stream))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/responses"])
@pytest.mark.parametrize("name", [*NOT_SPELT, *NO_GRAMMAR])
def test_a_failure_that_would_come_again_is_a_400(server: Server, name: str, path: str, stream: bool) -> None:
    constraint = (NOT_SPELT | NO_GRAMMAR)[name]
    if path == "/v1/responses" and "response_format" in constraint:
        form = constraint["response_format"]
        schema = form.get("json_schema")
        constraint = {"text": {"format": form if schema is None else {"type": "json_schema", **schema}}}
    says = reason(ask(server, constraint, path, stream=stream))
    assert ("no token of this model's vocabulary" in says) == (name in NOT_SPELT)


def test_a_dead_end_that_only_the_answer_meets_is_a_400_too(server: Server) -> None:
    """Whether the model goes there is not known before: the stream has begun, and its event says it."""
    constraint = structured(grammar='root ::= ("red" | "blue") "xyzzy"')
    assert "can go on" in reason(ask(server, constraint))
    assert "can go on" in reason(ask(server, constraint, "/v1/responses"))
    assert "can go on" in reason(ask(server, constraint, n=3, temperature=1))
    for path in ("/v1/chat/completions", "/v1/completions"):
        response = ask(server, constraint, path, stream=True)
        *_, event, done = [line.removeprefix("data: ") for line in response.text.split("\n") if line]
        error = json.loads(event)["error"]
        assert (error["type"], error["code"], done) == ("BadRequestError", 400, "[DONE]")
    response = ask(server, constraint, "/v1/responses", stream=True)
    last = json.loads(response.text.strip().rpartition("data: ")[2])
    assert (last["type"], last["code"]) == ("error", "400")
    assert server.http.get("/ready").status_code == 200


@pytest.mark.parametrize(
    ("constraint", "says"), [(BEGIN_ALIKE, "--max-grammar-seconds"), (SLOW_MASKS, "hold up every other request")]
)
def test_what_takes_too_long_is_refused_and_holds_up_nobody(
    guarded: Server, constraint: dict[str, Any], says: str
) -> None:
    answers: list[httpx.Response] = []
    hostile = threading.Thread(target=lambda: answers.append(verdict(guarded, structured(**constraint))))
    hostile.start()
    others = 0
    while hostile.is_alive():
        assert ask(guarded, structured(regex=f"[a-z]{{{others % 9 + 1}}}")).status_code == 200
        assert guarded.http.get("/health").status_code == 200
        others += 1
        time.sleep(0.05)
    hostile.join()
    assert says in reason(answers[0])
    assert others > 0
    began = time.monotonic()
    assert says in reason(ask(guarded, structured(**constraint), stream=True)), "remembered"
    assert time.monotonic() - began < 3


def test_a_client_that_leaves_leaves_nothing_behind(guarded: Server) -> None:
    """The case that occupied the one compiler for ever."""
    constraint = {"choice": [*BEGIN_ALIKE["choice"], "once"]}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(
            f"{guarded.url}/v1/chat/completions",
            json=routes(guarded)["/v1/chat/completions"] | structured(**constraint),
            headers={"Authorization": f"Bearer {guarded.key}"},
            timeout=0.5,
        )
    assert waiting(guarded) == 1
    assert ask(guarded, structured(**PATTERN)).status_code == 200
    deadline = time.monotonic() + 60
    while waiting(guarded):
        assert time.monotonic() < deadline, "it is tried for ever"
        time.sleep(0.1)
    assert guarded.http.get("/ready").status_code == 200


def waiting(server: Server) -> float:
    return server.metric("vllm_hidrop_grammars_waiting")


def test_good_grammars_are_followed(guarded: Server) -> None:
    found = ask(guarded, structured(choice=["red", "blue"])).json()["choices"][0]["message"]["content"]
    assert found in ("red", "blue")
    found = ask(guarded, json_schema(SCHEMA), max_tokens=40).json()["choices"][0]["message"]["content"]
    assert json.loads(found)["colour"] in ("red", "blue")
    called = ask(guarded, strict_tool(SCHEMA), max_tokens=200)
    assert called.status_code == 200, called.text[:300]


def test_refusals_are_counted(guarded: Server) -> None:
    before = guarded.metric("vllm_hidrop_refused_requests_total", reason="grammar")
    reason(ask(guarded, TOO_LARGE["choice"]))
    assert guarded.metric("vllm_hidrop_refused_requests_total", reason="grammar") == before + 1


def test_parameters_are_checked_before_a_stream_begins(server: Server) -> None:
    """Of any kind: vLLM looks at them when the stream has begun."""
    says = reason(ask(server, {"logit_bias": {"99999999": 1}}, stream=True))
    assert "logit_bias" in says or "vocab" in says


def test_a_server_without_its_judge_is_unready_and_refuses_for_now() -> None:
    with serving(["--enforce-eager"]) as server:
        own = api_process(server.url)
        (judge,) = [child for child in own.children() if child.cmdline() == own.cmdline()]
        judge.kill()
        deadline = time.monotonic() + 30
        while (response := server.http.get("/ready")).status_code == 200 and time.monotonic() < deadline:
            time.sleep(0.1)
        assert response.status_code == 503
        assert "grammars" in response.json()["reason"]
        answer = ask(server, structured(choice=["red"]))
        assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
        assert ask(server, {}).status_code == 200
