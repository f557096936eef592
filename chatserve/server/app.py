"""The ASGI application: routes, and the checks that every request passes. `compose` makes the parts behind it."""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Route, WebSocketRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocket

from chatserve.errors import Forbidden, ServiceError
from chatserve.server import completions, http, metrics, operations
from chatserve.server.access import Access
from chatserve.server.pages import page_routes
from chatserve.server.replies import error_response, on_fault, on_http_error, on_service_error
from chatserve.server.services import Services
from chatserve.server.ws import plain_request, websocket_endpoint

SECURITY_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
}


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
        await self._app(scope, receive, _with_headers(send))

    async def _refuse(self, refusal: Forbidden, scope: Scope, receive: Receive, send: Send) -> None:
        response = error_response(refusal)
        if scope["type"] == "http":
            await response(scope, receive, send)
        else:
            await WebSocket(scope, receive, send).send_denial_response(response)


def _with_headers(send: Send) -> Send:
    async def send_with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message).update(SECURITY_HEADERS)
        await send(message)

    return send_with_headers


def create_app(services: Services) -> Starlette:
    """The application around its parts."""
    routes = [
        WebSocketRoute("/v1/ws", websocket_endpoint),
        Route("/v1/ws", plain_request),
        *http.ROUTES,
        *completions.ROUTES,
        *operations.ROUTES,
        *metrics.ROUTES,
        *page_routes(),
    ]
    cors = Middleware(
        CORSMiddleware,
        allow_origins=list(services.settings.allowed_origins),
        allow_methods=["GET", "POST", "PATCH", "DELETE"],
        allow_headers=["Authorization", "Content-Type", "Idempotency-Key"],
    )
    app = Starlette(
        routes=routes,
        middleware=[Middleware(Guard, access=services.access), cors],
        exception_handlers={ServiceError: on_service_error, HTTPException: on_http_error, Exception: on_fault},
    )
    app.state.services = services
    return app
