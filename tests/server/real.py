"""The real application over real sessions in a real Redis, in this process; only the engine's model is a double."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from redis.asyncio import Redis
from starlette.types import ASGIApp

from chatserve.server.access import Access
from chatserve.server.app import create_app
from chatserve.server.compose import limited_engine, session_quota
from chatserve.server.hub import Hub
from chatserve.server.listener import ChatServer, bind, server_config
from chatserve.server.metrics import Metrics
from chatserve.server.openai.completing import Completions
from chatserve.server.services import Services, Timeouts
from chatserve.sessions.manager import SessionManager
from chatserve.settings import ServeSettings, load_settings
from chatserve.storage.connection import open_redis
from chatserve.storage.session_store import SessionStore
from chatserve.text.pipeline import TextPipeline
from tests.sessions.conftest import EOS, LIMITS, TOKENIZER, saying
from tests.sessions.fakes import FakeEngine, FakeRecords

ALICE = {"Authorization": "Bearer alices-key"}
BOB = {"Authorization": "Bearer bobs-key-2"}
TEXT = TextPipeline(TOKENIZER, [EOS])
SAYS_WELL = saying(*["Well said."] * 8)
KEYS = ("alice=alices-key", "bob=bobs-key-2")


@dataclass
class RealServer:
    """A running server and its insides."""

    url: str
    services: Services
    engine: FakeEngine
    redis: Redis

    def http(self, headers: dict[str, str] | None = None) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=self.url, trust_env=False, headers=headers, timeout=10)


@asynccontextmanager
async def real_server(
    redis_socket: Path,
    *,
    choose: Callable[[Sequence[int]], int] = SAYS_WELL,
    timeouts: Timeouts | None = None,
    gated: bool = False,
    **chosen: Any,
) -> AsyncIterator[RealServer]:
    """Serve on an emptied Redis until the block ends; `chosen` are settings."""
    settings, engine = load_settings(chosen), FakeEngine(choose, gated=gated)
    async with AsyncExitStack() as stack:
        redis = await stack.enter_async_context(open_redis(f"unix://{redis_socket}", redis_socket.parent))
        await redis.flushall()
        store = SessionStore(redis, "instance", durable=True, max_sessions=session_quota(settings))
        stack.push_async_callback(store.close)
        limited = limited_engine(engine, settings)
        sessions = SessionManager(store, limited, TEXT, FakeRecords(), LIMITS)
        stack.push_async_callback(sessions.close)
        await sessions.start()
        services = Services(
            settings=settings,
            sessions=sessions,
            completions=Completions(limited, TEXT),
            engine=engine,
            hub=Hub(max_connections=settings.max_connections, max_key_connections=settings.max_key_connections),
            access=Access(keys=settings.keys, allowed_origins=settings.allowed_origins, bound_host=settings.host),
            ping_store=store.ping,
            metrics=Metrics(),
            timeouts=timeouts or Timeouts(),
        )
        url = await listening(stack, create_app(services), settings)
        yield RealServer(url, services, engine, redis)


async def listening(stack: AsyncExitStack, app: ASGIApp, settings: ServeSettings) -> str:
    """Serve an application until the stack unwinds; gives the URL."""
    listener = stack.enter_context(bind("127.0.0.1", 0))
    started = asyncio.Event()
    server = ChatServer(server_config(app, settings), started.set)
    task = asyncio.create_task(server.serve(sockets=[listener]))
    stack.push_async_callback(end, server, task)
    await started.wait()
    return f"http://127.0.0.1:{listener.getsockname()[1]}"


async def end(server: ChatServer, task: asyncio.Task[None]) -> None:
    """End a server at once: uvicorn's own way takes 0.2 s, which over a hundred tests is most of their time."""
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    for listening in server.servers:
        listening.close()
    for connection in list(server.server_state.connections):
        connection.transport.abort()
    await asyncio.wait_for(asyncio.gather(*server.server_state.tasks, return_exceptions=True), 10)


@dataclass
class SseEvent:
    """One server-sent event."""

    id: str | None
    name: str
    data: dict[str, Any]


async def sse_events(response: httpx.Response) -> AsyncIterator[SseEvent]:
    """The events of a stream, as they come; signs of life are left out."""
    fields: dict[str, str] = {}
    async for line in response.aiter_lines():
        if line.startswith(":"):
            continue
        if line:
            name, _, value = line.partition(": ")
            fields[name] = value
        elif fields:
            yield SseEvent(fields.get("id"), fields["event"], json.loads(fields["data"]))
            fields = {}
