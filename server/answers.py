"""Answers of the middlewares, in the shape of vLLM's own errors, and the routes they treat apart.

Knows ASGI and vLLM's error object; decides nothing.
"""

from collections.abc import Callable, Mapping
from http import HTTPStatus

from starlette.responses import JSONResponse
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response

PROBES = ("/health", "/ready")
"""Liveness and readiness: answered also while the server drains."""
METRICS = "/metrics"

OnRefused = Callable[[str], None]
"""Called with the reason of every refusal."""


def error(
    status: HTTPStatus, message: str, headers: Mapping[str, str] | None = None, parameter: str | None = None
) -> JSONResponse:
    """An error response; its type is the status's phrase, as for vLLM's own."""
    body = create_error_response(message, status.phrase, status, parameter)
    return JSONResponse(body.model_dump(), status_code=status, headers=headers)


def is_metrics(path: str) -> bool:
    """Whether vLLM's metrics application answers; it is mounted on a prefix."""
    return path.startswith(METRICS)
