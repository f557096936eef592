"""The listening side: a bound socket, and uvicorn as this application needs it."""

from __future__ import annotations

import socket
from collections.abc import Callable, Generator
from contextlib import contextmanager

import uvicorn
from starlette.types import ASGIApp

from chatserve.errors import StartupError
from chatserve.server.http_transport import HttpTransport
from chatserve.server.transport import Transport
from chatserve.settings import ServeSettings

BACKLOG = 512
HTTP_GRACE_S = 2
MAX_HTTP_CONNECTIONS = 1024  # besides the WebSockets, and requests at work
_ANY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "::1"}


class ChatServer(uvicorn.Server):
    """uvicorn, telling when it listens, and without its signal handlers: `StopSignals` is there from loading on."""

    def __init__(self, config: uvicorn.Config, on_started: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_started = on_started

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Leave the signals alone."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, then say so."""
        await super().startup(sockets)
        self._on_started()


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; raises StartupError. Clients that come while the model loads wait in its backlog."""
    listener = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)  # asyncio turns Nagle's delay off only where it sees TCP
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        if listener:
            listener.close()
        remedy = "choose another --port (0 picks a free one), or set --host to an address of this machine"
        raise StartupError(f"cannot listen on {host} port {port}: {error.strerror}; {remedy}") from None
    return listener


def url_of(host: str, port: int) -> str:
    """An address that works from this machine, also where the server listens on all of them."""
    name = _ANY_ADDRESS.get(host, host)
    return f"http://[{name}]:{port}" if ":" in name else f"http://{name}:{port}"


def server_config(app: ASGIApp, settings: ServeSettings) -> uvicorn.Config:
    """uvicorn as this application needs it."""
    return uvicorn.Config(
        app,
        http=HttpTransport,
        ws=Transport,
        ws_max_size=settings.max_message_bytes,
        ws_per_message_deflate=False,  # deltas are small: compressing each costs more than it saves
        lifespan="off",
        log_config=None,
        access_log=False,
        limit_concurrency=settings.max_connections + MAX_HTTP_CONNECTIONS,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=HTTP_GRACE_S,
    )
