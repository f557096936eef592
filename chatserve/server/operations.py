"""What operators and load balancers ask: is the process alive, can it serve, which version is it."""

from __future__ import annotations

import asyncio

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from chatserve.errors import ServiceError
from chatserve.server.http import services_of, tenant_of
from chatserve.server.services import Services
from chatserve.version import __version__

PING_TIMEOUT_S = 2.0


async def healthz(request: Request) -> JSONResponse:
    """`GET /healthz`: the process answers."""
    return JSONResponse({"status": "ok"})


async def readyz(request: Request) -> JSONResponse:
    """`GET /readyz`: 200 if a turn could start now, else 503 with what is missing."""
    services = services_of(request)
    checks = {
        "engine": services.engine.ready,
        "storage": await _storage_answers(services),
        "not_draining": not services.hub.draining,
    }
    ready = all(checks.values())
    return JSONResponse({"ready": ready, "checks": checks}, status_code=200 if ready else 503)


async def version(request: Request) -> JSONResponse:
    """`GET /version`: what runs here, and what it found."""
    tenant_of(request)
    info = services_of(request).engine.info
    return JSONResponse(
        {
            "version": __version__,
            "model": info.model,
            "device": info.device,
            "dtype": info.dtype,
            "attention": info.attention,
            "max_context": info.max_context,
            "capacity_tokens": info.capacity_tokens,
            "page_bytes": info.page_bytes,
            "token_bytes": info.token_bytes,
        }
    )


async def _storage_answers(services: Services) -> bool:
    try:
        await asyncio.wait_for(services.ping_store(), PING_TIMEOUT_S)
    except (ServiceError, TimeoutError):
        return False
    return True


ROUTES = [
    Route("/healthz", healthz, methods=["GET"]),
    Route("/readyz", readyz, methods=["GET"]),
    Route("/version", version, methods=["GET"]),
]
