"""Make every error one line that does not repeat what the client sent, whichever handler of vLLM's wrote it."""

import re
from http import HTTPStatus
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic_core import from_json, to_json
from starlette.datastructures import MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from vllm.entrypoints.serve.exception_handling.handlers.validation import clean_loc_for_param
from vllm.exceptions import VLLMValidationError

from hidrop_server.http.answers import error

MAX_CHARS = 500
_READ_CHARS = 20_000  # of a message; the rest is not looked at
_ECHOES = (
    (re.compile(r", value=.*\)$"), ")"),  # vLLM's
    (re.compile(r", input_value=.*?, input_type=\w+"), ""),  # pydantic's
    (re.compile(r"For further information visit \S+"), ""),
)
_LONG_WORD = re.compile(r"[^\s]{121,}")
_KEPT_CHARS = 24


def brief(message: str) -> str:
    """One line of at most :data:`MAX_CHARS` characters, without the values and the long words in it."""
    line = " ".join(message[:_READ_CHARS].split())
    for echo, without in _ECHOES:
        line = echo.sub(without, line)
    line = _LONG_WORD.sub(lambda word: f"{word[0][:_KEPT_CHARS]}...", line)
    return line if len(line) <= MAX_CHARS else f"{line[: MAX_CHARS - 3]}..."


async def validation_refusal(_: Request, fault: RequestValidationError) -> JSONResponse:
    """Answer a fault that vLLM's models found: the first one and how many there are, without the value."""
    faults = fault.errors()
    says, parameter = "the request is not valid", None
    if faults and isinstance(faults[0], dict):
        parameter = _parameter(faults)
        says = f"{clean_loc_for_param(faults[0].get('loc', ()))}: {faults[0].get('msg', '')}"
    elif faults:
        says = str(faults[0])
    others = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    response = error(HTTPStatus.BAD_REQUEST, brief(says) + others, parameter=parameter)
    return response


def _parameter(faults: list[dict[str, Any]] | Any) -> str | None:
    cause = faults[0].get("ctx", {}).get("error")
    if isinstance(cause, VLLMValidationError) and cause.parameter:
        return str(cause.parameter)
    return clean_loc_for_param(faults[0].get("loc", ()))


class BriefErrors:
    """Shortens the messages of JSON answers of status 4xx and 5xx."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application, holding back the answer if it is an error."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start: Message | None = None
        chunks: list[bytes] = []

        async def send_brief(message: Message) -> None:
            nonlocal start
            if message["type"] == "http.response.start" and _is_error(message):
                start = message
            elif start is None:
                await send(message)
            elif message["type"] == "http.response.body":
                chunks.append(message.get("body", b""))
                if not message.get("more_body", False):
                    body = _brief_body(b"".join(chunks))
                    MutableHeaders(scope=start)["content-length"] = str(len(body))
                    await send(start)
                    await send({"type": "http.response.body", "body": body})

        await self.app(scope, receive, send_brief)


def _is_error(start: Message) -> bool:
    is_json = MutableHeaders(scope=start).get("content-type", "").startswith("application/json")
    return start["status"] >= HTTPStatus.BAD_REQUEST and is_json


def _brief_body(body: bytes) -> bytes:
    try:
        answer = from_json(body)
    except ValueError:
        return body
    fault = answer.get("error") if isinstance(answer, dict) else None
    if not isinstance(fault, dict) or not isinstance(fault.get("message"), str):
        return body
    fault["message"] = brief(fault["message"])
    if isinstance(fault.get("param"), str):
        fault["param"] = brief(fault["param"])[:100]
    return bytes(to_json(answer))
