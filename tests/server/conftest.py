"""A real uvicorn with the real application in this process, over doubles of sessions and engine."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import httpx
import pytest
import pytest_asyncio
from websockets.asyncio.client import ClientConnection, connect

from chatserve.protocol.codec import Encoding, encode, from_wire
from chatserve.server.access import Access
from chatserve.server.app import create_app
from chatserve.server.hub import Hub
from chatserve.server.listener import ChatServer, bind, server_config
from chatserve.server.metrics import Metrics
from chatserve.server.openai.completing import Completions
from chatserve.server.services import Services, Timeouts
from chatserve.settings import ServeSettings, load_settings
from chatserve.storage.embedded import EmbeddedRedis
from tests.server.fakes import FakeEngine, FakeSessions
from tests.server.real import TEXT, RealServer, end, real_server

HELLO = {"type": "hello", "client": {"name": "test", "version": "1"}}


@dataclass
class Peer:
    """A client that does nothing by itself."""

    socket: ClientConnection
    encoding: Encoding = "msgpack"

    async def tell(self, **command: Any) -> None:
        await self.socket.send(encode(command, self.encoding))

    async def hear_any(self) -> dict[str, Any]:
        data = await asyncio.wait_for(self.socket.recv(), 5)
        assert isinstance(data, bytes if self.encoding == "msgpack" else str)
        return json.loads(data) if isinstance(data, str) else from_wire(data)

    async def hear(self) -> dict[str, Any]:
        """The next event but for the notices that a list changed, which may come at any time."""
        while (event := await self.hear_any())["type"] == "sessions.changed":
            pass
        return event

    async def ask(self, **command: Any) -> dict[str, Any]:
        await self.tell(**command)
        return await self.hear()

    async def closed_with(self) -> int:
        """The server's close code, whatever it says before."""
        await asyncio.wait_for(self.socket.wait_closed(), 10)
        assert self.socket.close_code is not None
        return self.socket.close_code


@dataclass
class Served:
    """A running server and its insides."""

    url: str
    services: Services
    sessions: FakeSessions
    engine: Any
    server: ChatServer
    stack: AsyncExitStack

    async def connect(self, *, subprotocol: str | None = "chatserve.v1.msgpack", **options: Any) -> ClientConnection:
        subprotocols = [subprotocol] if subprotocol else None
        address = self.url.replace("http", "ws", 1) + "/v1/ws"
        connecting = connect(address, subprotocols=subprotocols, proxy=None, close_timeout=1, **options)
        return await self.stack.enter_async_context(connecting)

    async def peer(self, **hello: Any) -> Peer:
        """A connection that has been welcomed."""
        peer = Peer(await self.connect())
        assert (await peer.ask(**HELLO, **hello))["type"] == "welcome"
        return peer

    def http(self, **options: Any) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=self.url, trust_env=False, **options)


@asynccontextmanager
async def serving(settings: ServeSettings, timeouts: Timeouts, engine: Any) -> AsyncIterator[Served]:
    """Serve until the block ends."""
    sessions = FakeSessions()
    services = Services(
        settings=settings,
        sessions=sessions,
        completions=Completions(engine, TEXT),
        engine=engine,
        hub=Hub(max_connections=settings.max_connections, max_key_connections=settings.max_key_connections),
        access=Access(keys=settings.keys, allowed_origins=settings.allowed_origins, bound_host=settings.host),
        ping_store=sessions.ping,
        metrics=Metrics(),
        timeouts=timeouts,
    )
    started = asyncio.Event()
    with bind(settings.host, 0) as listener:
        server = ChatServer(server_config(create_app(services), settings), started.set)
        task = asyncio.create_task(server.serve(sockets=[listener]))
        await started.wait()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        async with AsyncExitStack() as stack:
            yield Served(url, services, sessions, engine, server, stack)
        await end(server, task)


Serve = Callable[..., Any]
StartReal = Callable[..., AbstractAsyncContextManager[RealServer]]


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    """Start servers with the settings given: `served = await serve(api_keys=("alice=secret-a",))`."""
    async with AsyncExitStack() as stack:

        async def start(timeouts: Timeouts | None = None, engine: Any = None, **settings: Any) -> Served:
            running = serving(load_settings(settings), timeouts or Timeouts(), engine or FakeEngine())
            return await stack.enter_async_context(running)

        yield start


@pytest.fixture
async def served(serve: Serve) -> Served:
    """A server with default settings and no keys."""
    started: Served = await serve()
    return started


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def embedded_redis(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[EmbeddedRedis]:
    """A running Redis, shared."""
    server = EmbeddedRedis(tmp_path_factory.mktemp("redis") / "data")
    await server.start()
    yield server
    await server.stop()


@pytest.fixture
def real(embedded_redis: EmbeddedRedis) -> StartReal:
    """Servers over real sessions: `async with real(api_keys=KEYS) as server:`."""
    return partial(real_server, embedded_redis.socket_path)
