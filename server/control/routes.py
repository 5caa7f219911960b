"""Our routes: ``/hidrop`` (what is pruned), ``/ready``, and vLLM's ``/v1/models`` with what is pruned."""

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from vllm_hidrop import __version__
from vllm_hidrop.plan.planner import REQUEST_KEYS, Planner

router = APIRouter()


@router.get("/hidrop")
async def show_hidrop(raw_request: Request) -> dict[str, Any]:
    """Method, preset, positions and stages of this server, its version, and the request options."""
    description: dict[str, Any] = raw_request.app.state.hidrop
    return {"version": __version__, **description, "request_options": REQUEST_KEYS}


@router.get("/ready")
async def show_ready(raw_request: Request) -> JSONResponse:
    """200 when the engine is up and its integrity checks found nothing, else 503 with the reason.

    Readiness, not liveness: that is vLLM's ``/health``.
    """
    engine = raw_request.app.state.engine_client
    reason = await engine.why_unready()
    if reason is None:
        return JSONResponse({"ready": True, "integrity": engine.integrity})
    return JSONResponse({"ready": False, "reason": reason, "integrity": engine.integrity}, status_code=503)


@router.get("/v1/models")
async def show_models(raw_request: Request) -> JSONResponse:
    """Stock list, and ``hidrop`` in every entry."""
    state = raw_request.app.state
    models = await state.openai_serving_models.show_available_models()
    for card in models.data:
        card.hidrop = state.hidrop
    return JSONResponse(models.model_dump())


def describe(planner: Planner, modalities: Sequence[str], takes_any_size: bool) -> dict[str, Any]:
    """What this server prunes and what its model takes, as JSON values.

    Where it does not take images of any size, it sees them as squares of one size.
    """
    schedule = planner.schedule
    return {
        "method": planner.method,
        "preset": planner.preset,
        "positions": str(planner.positions),
        "keeps_are_bounds": planner.methods[planner.method].adaptive,
        "request_methods": list(planner.methods),
        "modalities": list(modalities),
        "pictures": "any size" if takes_any_size else "squares",
        "prefix_state_bytes": planner.state_bytes,
        "schedule": schedule.dump(),
        "stages": [
            {
                "first_layer": stage.first_layer,
                "end_layer": end,
                "keep": stage.keep.dump(),
                "cached": str(stage.cached),
            }
            for stage, end in zip(schedule.stages, schedule.end_layers, strict=True)
        ],
    }
