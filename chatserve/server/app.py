"""The ASGI application: routes, and the checks that every request passes. `compose` makes the parts behind it."""

from __future__ import annotations

import secrets
from collections.abc import Mapping

from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.routing import BaseRoute, Route, WebSocketRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocket

from chatserve.errors import Forbidden, ServiceError
from chatserve.logs import bind
from chatserve.server import documents, http, metrics, operations, turns
from chatserve.server.access import Access
from chatserve.server.openai import chat, completions, models, responses
from chatserve.server.openapi import openapi_route
from chatserve.server.pages import page_routes
from chatserve.server.replies import error_response, on_client_gone, on_fault, on_http_error, on_service_error
from chatserve.server.services import Services
from chatserve.server.ws import plain_request, websocket_endpoint

REQUEST_ID_HEADER = "X-Request-Id"
SECURITY_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
}


class RequestIds:
    """Gives every request an id, which stands in its answer's headers and in every line that is logged for it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI entry. Each request has a task of its own, so what is bound here ends with it."""
        if scope["type"] == "http":
            request_id = "req_" + secrets.token_hex(8)
            bind(request_id=request_id)
            send = _with_headers(send, {REQUEST_ID_HEADER: request_id})
        await self._app(scope, receive, send)


class Guard:
    """Refuses foreign web pages before anything else looks at a request, and adds the headers every answer carries."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app = app
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI entry."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        try:
            self._access.check_browser(host=headers.get("host"), origin=headers.get("origin"))
        except Forbidden as refusal:
            await self._refuse(refusal, scope, receive, send)
            return
        await self._app(scope, receive, _with_headers(send, SECURITY_HEADERS))

    async def _refuse(self, refusal: Forbidden, scope: Scope, receive: Receive, send: Send) -> None:
        response = error_response(refusal)
        if scope["type"] == "http":
            await response(scope, receive, send)
        else:
            await WebSocket(scope, receive, send).send_denial_response(response)


def _with_headers(send: Send, headers: Mapping[str, str]) -> Send:
    async def send_with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message).update(headers)
        await send(message)

    return send_with_headers


def create_app(services: Services) -> Starlette:
    """The application around its parts."""
    routes: list[BaseRoute] = [
        WebSocketRoute("/v1/ws", websocket_endpoint),
        Route("/v1/ws", plain_request),
        *http.ROUTES,
        *documents.ROUTES,
        *turns.ROUTES,
        *completions.ROUTES,
        *chat.ROUTES,
        *responses.ROUTES,
        *models.ROUTES,
        *operations.ROUTES,
        *metrics.ROUTES,
        *page_routes(),
    ]
    routes.append(openapi_route(routes))
    cors = Middleware(
        CORSMiddleware,
        allow_origins=list(services.settings.allowed_origins),
        allow_methods=["GET", "POST", "PATCH", "DELETE"],
        allow_headers=["Authorization", "Content-Type", "Idempotency-Key", "Last-Event-ID"],
    )
    app = Starlette(
        routes=routes,
        middleware=[Middleware(RequestIds), Middleware(Guard, access=services.access), cors],
        exception_handlers={
            ServiceError: on_service_error,
            HTTPException: on_http_error,
            ClientDisconnect: on_client_gone,
            Exception: on_fault,
        },
    )
    app.state.services = services
    return app
