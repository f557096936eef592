"""Errors as HTTP responses: the same object that WebSocket `error` events carry."""

from __future__ import annotations

import logging
import math

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from chatserve.errors import ServiceError

CLIENT_CLOSED_REQUEST = 499  # nginx's word for it: nobody reads the answer, but logs of proxies know it
logger = logging.getLogger(__name__)


def error_response(error: ServiceError) -> Response:
    """The error object with its status, and the headers that go with it."""
    headers = {}
    if error.retry_after_ms is not None:
        headers["Retry-After"] = str(math.ceil(error.retry_after_ms / 1000))
    if error.http_status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse({"error": error.as_object()}, status_code=error.http_status, headers=headers)


async def on_service_error(request: Request, error: Exception) -> Response:
    """A refusal raised by an endpoint."""
    assert isinstance(error, ServiceError)
    return error_response(error)


async def on_http_error(request: Request, error: Exception) -> Response:
    """What the router refuses by itself: unknown paths and wrong methods."""
    assert isinstance(error, HTTPException)
    body = {
        "type": "invalid_request_error",
        "code": "not_supported",
        "message": f"{request.method} {request.url.path}: {error.detail}",
        "retryable": False,
    }
    return JSONResponse({"error": body}, status_code=error.status_code, headers=error.headers)


async def on_client_gone(request: Request, error: Exception) -> Response:
    """The client went away before its request was read whole; nobody reads this."""
    return Response(status_code=CLIENT_CLOSED_REQUEST)


async def on_fault(request: Request, error: Exception) -> Response:
    """A fault of ours; Starlette raises it again afterwards, so that the log has the trace."""
    return error_response(ServiceError("the server failed to carry this out; its log says why"))
