"""What vLLM's own routes read, for tests without a server."""

from functools import cache

from fastapi import FastAPI
from vllm.entrypoints.generate.api_router import register_generate_api_routers
from vllm.entrypoints.serve.tokenize.api_router import router as tokenize

from hidrop_server.http.typed_fields import TypedFields, request_models


@cache
def typed_fields() -> TypedFields:
    """Fields of the routes of a server that generates."""
    app = FastAPI()
    register_generate_api_routers(app)
    app.include_router(tokenize)
    return TypedFields(request_models(app))
