"""`chatserve serve`: bind, load, announce, serve, and end in order when asked to.

The first signal drains: connections are told to leave, replies in progress may end. The second does not wait.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from typing import TextIO

import uvicorn
from starlette.types import ASGIApp

from chatserve.errors import StartupError
from chatserve.server.app import create_app
from chatserve.server.closing import CloseCode
from chatserve.server.compose import compose
from chatserve.server.console import loading_progress, print_summary, stderr_console
from chatserve.server.logs import configure_logging
from chatserve.server.services import Services
from chatserve.server.signals import StopSignals
from chatserve.server.transport import Transport
from chatserve.settings import ServeSettings
from chatserve.version import __version__

BACKLOG = 512
CLOSE_TIMEOUT_S = 1.5
HTTP_GRACE_S = 2
_ANY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "::1"}
logger = logging.getLogger(__name__)


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
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind)
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
        ws=Transport,
        ws_max_size=settings.max_message_bytes,
        ws_per_message_deflate=False,  # deltas are small: compressing each costs more than it saves
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=HTTP_GRACE_S,
    )


async def drain(services: Services, stop: StopSignals) -> None:
    """Let replies in progress end, as long as the settings allow, then close every connection."""
    timeout_s = services.settings.drain_timeout_s
    logger.info("shutting down", extra={"connections": services.hub.num_connections})
    services.hub.begin_drain(timeout_s)
    await stop.unless_forced(services.sessions.drain(timeout_s))
    await services.hub.close_all(CloseCode.RESTART, "the server is shutting down", CLOSE_TIMEOUT_S)


async def serve(settings: ServeSettings, ready_output: TextIO) -> None:
    """Run one server until a signal ends it. Raises StartupError if it cannot start."""
    stop, console = StopSignals(), stderr_console()
    with ExitStack() as loading, bind(settings.host, settings.port) as listener:
        report = loading.enter_context(loading_progress(console))
        async with compose(settings, report) as services:
            url = url_of(settings.host, listener.getsockname()[1])

            def announce() -> None:
                loading.close()
                print_summary(console, url, settings, services.engine.info)
                print_ready_line(ready_output, url, services)

            server = ChatServer(server_config(create_app(services), settings), announce)
            stop.loaded()
            await serve_until_stopped(server, listener, services, stop)


async def serve_until_stopped(
    server: ChatServer, listener: socket.socket, services: Services, stop: StopSignals
) -> None:
    """Serve, drain at the first signal, and return when the last connection is gone or cut off."""
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    stopping = asyncio.create_task(stop.requested())
    await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if not serving.done():
        await drain(services, stop)
    server.should_exit = True
    await serving


def print_ready_line(output: TextIO, url: str, services: Services) -> None:
    """The one line of standard output, for the program that started this one."""
    ready = {
        "event": "ready",
        "url": url,
        "pid": os.getpid(),
        "model": services.engine.info.model,
        "version": __version__,
    }
    print(json.dumps(ready), file=output, flush=True)


@contextmanager
def reserved_stdout() -> Iterator[TextIO]:
    """Keep standard output for the caller; what any library or child prints there goes to stderr."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with open(kept, "w", encoding="utf-8", closefd=False) as output:
            yield output
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def run(settings: ServeSettings) -> int:
    """Serve with these settings; returns the process's exit status. Raises StartupError."""
    configure_logging(settings.log_level, settings.log_format)
    with reserved_stdout() as ready_output:
        try:
            asyncio.run(serve(settings, ready_output))
        except asyncio.CancelledError:
            logger.info("stopped while loading")
    return 0
