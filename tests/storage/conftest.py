"""One real Redis of our own for all storage tests, emptied before each."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from redis.asyncio import Redis

from chatserve.storage.connection import open_redis
from chatserve.storage.embedded import EmbeddedRedis
from chatserve.storage.session_store import SessionStore


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[EmbeddedRedis]:
    """A running Redis, shared."""
    server = EmbeddedRedis(tmp_path_factory.mktemp("redis") / "data")
    await server.start()
    yield server
    await server.stop()


@pytest.fixture
def url(server: EmbeddedRedis) -> str:
    """The shared server's URL."""
    return f"unix://{server.socket_path}"


@pytest.fixture
async def redis(url: str, tmp_path: Path) -> AsyncIterator[Redis]:
    """A client of the shared server, which is empty."""
    async with open_redis(url, tmp_path) as client:
        await client.flushall()
        yield client


@pytest.fixture
async def store(redis: Redis) -> AsyncIterator[SessionStore]:
    """The store of instance one."""
    store = SessionStore(redis, "one")
    yield store
    await store.close()
