"""`/v1/models`: the one model that is served, alone and in a list of one."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from chatserve.engine.api import EngineInfo
from chatserve.errors import NotFound
from chatserve.server.http import services_of, tenant_of


async def list_models(request: Request) -> JSONResponse:
    """`GET /v1/models`."""
    tenant_of(request)
    return JSONResponse({"object": "list", "data": [_model_object(services_of(request).engine.info)]})


async def get_model(request: Request) -> JSONResponse:
    """`GET /v1/models/{id}`; ids may hold slashes."""
    tenant_of(request)
    info, name = services_of(request).engine.info, request.path_params["model_id"]
    if name != info.model:
        raise NotFound(f"there is no model {name!r} here; {info.model!r} is", code="model_not_found", param="model")
    return JSONResponse(_model_object(info))


def _model_object(info: EngineInfo) -> dict[str, Any]:
    return {
        "id": info.model,
        "object": "model",
        "created": 0,
        "owned_by": "chatserve",
        "max_context": info.max_context,
        "vocab_size": info.vocab_size,
    }


ROUTES = [
    Route("/v1/models", list_models, methods=["GET"]),
    Route("/v1/models/{model_id:path}", get_model, methods=["GET"]),
]
