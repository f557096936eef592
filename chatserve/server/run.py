"""`chatserve serve`: bind, load, announce, serve, and end in order when asked to.

The first signal drains: connections are told to leave, replies in progress may end. The second does not wait.
"""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TextIO

from chatserve.logs import configure_logging
from chatserve.server.app import create_app
from chatserve.server.closing import CloseCode
from chatserve.server.compose import compose
from chatserve.server.console import loading_progress, say_ready, stderr_console
from chatserve.server.listener import ChatServer, bind, server_config, url_of
from chatserve.server.services import Services
from chatserve.server.signals import StopSignals
from chatserve.settings import ServeSettings
from chatserve.version import __version__

CLOSE_TIMEOUT_S = 1.5
COLLECTOR_THRESHOLDS = (10_000, 20, 50)
logger = logging.getLogger(__name__)


async def drain(services: Services, stop: StopSignals) -> None:
    """Let replies in progress end, as long as the settings allow, then close every connection."""
    timeout_s = services.settings.drain_timeout_s
    logger.info("shutting down", extra={"connections": services.hub.num_connections})
    services.hub.begin_drain(timeout_s)
    await stop.unless_forced(_drain_replies(services, timeout_s))
    await services.hub.close_all(CloseCode.RESTART, "the server is shutting down", CLOSE_TIMEOUT_S)


async def _drain_replies(services: Services, timeout_s: float) -> None:
    await asyncio.gather(services.sessions.drain(timeout_s), services.completions.drain(timeout_s))


async def serve(settings: ServeSettings, ready_output: TextIO) -> None:
    """Run one server until a signal ends it. Raises StartupError if it cannot start."""
    stop, console = StopSignals(), stderr_console()
    with ExitStack() as loading, bind(settings.host, settings.port) as listener:
        report = loading.enter_context(loading_progress(console))
        async with compose(settings, report) as services:
            url = url_of(settings.host, listener.getsockname()[1])

            def announce() -> None:
                loading.close()
                keep_loaded_objects()
                say_ready(console, url, settings, services.engine.info)
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


def keep_loaded_objects() -> None:
    """Spare the collector what was loaded and stays, and have it come by less often.

    Each time it holds up every connection. Nearly all garbage goes without it.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*COLLECTOR_THRESHOLDS)


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
