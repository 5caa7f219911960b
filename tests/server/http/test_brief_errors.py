"""Errors are one short line, whoever wrote them; no engine."""

import asyncio
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, TypeAdapter, ValidationError
from vllm.exceptions import VLLMValidationError

from hidrop_server.http.brief_errors import BriefErrors, brief, validation_refusal

SECRET = "aGlkcm9w" * 40


class Body(BaseModel):
    """What the small application takes."""

    n: list[int]


def raised() -> str:
    try:
        TypeAdapter(dict[str, int]).validate_python({"a": SECRET, "b": [SECRET]})
    except ValidationError as error:
        return str(error)
    raise AssertionError


@pytest.mark.parametrize(
    "message",
    [
        raised(),
        str(VLLMValidationError("bad", parameter="p", value=SECRET)),
        f"Invalid value for `tool_choice`: {SECRET}!",
        f"bad\nline\n{SECRET}",
        "word " * 1000,
        "x" * 1_000_000,
    ],
)
def test_a_message_is_one_short_line(message: str) -> None:
    said = brief(message)
    assert 0 < len(said) <= 500
    assert "\n" not in said
    assert SECRET[:32] not in said
    assert "errors.pydantic.dev" not in said


def test_a_short_message_stays() -> None:
    says = "temperature must be non-negative, got -1.0. (parameter=temperature)"
    assert brief(says) == says


def application() -> FastAPI:
    app = FastAPI()
    app.add_exception_handler(RequestValidationError, validation_refusal)  # type: ignore[arg-type]
    app.add_middleware(BriefErrors)

    @app.post("/body")
    def body(body: Body) -> int:
        return len(body.n)

    @app.get("/openai")
    def openai() -> JSONResponse:
        return JSONResponse({"error": {"message": f"a\n{SECRET}", "param": SECRET, "code": 400}}, 400)

    @app.get("/anthropic")
    def anthropic() -> JSONResponse:
        return JSONResponse({"type": "error", "error": {"type": "x", "message": f"a\n{SECRET}"}}, 400)

    @app.get("/other")
    def other() -> JSONResponse:
        return JSONResponse({"detail": "a\nb"}, 404)

    @app.get("/whole")
    def whole() -> JSONResponse:
        return JSONResponse({"error": {"message": f"a\n{SECRET}"}})

    @app.get("/stream")
    def stream() -> StreamingResponse:
        return StreamingResponse(iter(["a\n", SECRET]), 500, media_type="text/plain")

    return app


def ask(method: str, path: str, **more: Any) -> httpx.Response:
    async def asking() -> httpx.Response:
        transport = httpx.ASGITransport(application())
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as http:
            return await http.request(method, path, **more)

    return asyncio.run(asking())


@pytest.mark.parametrize("path", ["/openai", "/anthropic"])
def test_errors_of_both_shapes_are_shortened(path: str) -> None:
    response = ask("GET", path)
    error = response.json()["error"]
    assert error["message"] == f"a {SECRET[:24]}..."
    assert len(error.get("param", "")) <= 100
    assert response.status_code == 400
    assert int(response.headers["content-length"]) == len(response.content)


def test_other_answers_stay_as_they_are() -> None:
    assert ask("GET", "/other").json() == {"detail": "a\nb"}
    assert ask("GET", "/whole").json()["error"]["message"] == f"a\n{SECRET}"
    assert ask("GET", "/stream").text == f"a\n{SECRET}"


def test_a_model_that_refuses_says_where_and_not_what() -> None:
    error = ask("POST", "/body", json={"n": [SECRET, SECRET, 1]}).json()["error"]
    assert error["message"].startswith("body.n.0: Input should be a valid integer")
    assert error["message"].endswith("(and 1 more)")
    assert error["param"] == "body.n.0"
    assert SECRET[:9] not in str(error)
