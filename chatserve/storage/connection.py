"""Opens Redis: the one whose URL is given, or our own in the data directory, as a client that is ready to use."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError

from chatserve.errors import StartupError
from chatserve.storage.embedded import EmbeddedRedis
from chatserve.storage.redis_binary import OLDEST_VERSION

logger = logging.getLogger(__name__)

MAX_CONNECTIONS = 32
TIMEOUT_S = 5.0


@asynccontextmanager
async def open_redis(redis_url: str | None, data_dir: Path) -> AsyncIterator[Redis]:
    """A client of the Redis at `redis_url`, or of one that is started in `data_dir` and ended on leaving.

    Raises `StartupError` when it cannot be started or reached, or is too old.
    """
    if redis_url is None:
        async with _embedded(data_dir) as client:
            yield client
    else:
        async with _connected(redis_url, shown_url(redis_url)) as client:
            await _check_server(client, shown_url(redis_url))
            yield client


def shown_url(redis_url: str) -> str:
    """The URL as it may be logged: without user and password."""
    parts = urlsplit(redis_url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


@asynccontextmanager
async def _embedded(data_dir: Path) -> AsyncIterator[Redis]:
    server = EmbeddedRedis(data_dir)
    await server.start()
    try:
        async with _connected(f"unix://{server.socket_path}", "our own Redis") as client:
            yield client
    finally:
        await server.stop()


@asynccontextmanager
async def _connected(url: str, shown: str) -> AsyncIterator[Redis]:
    client = _client(url, shown)
    try:
        yield client
    finally:
        await client.aclose()


def socket_url(client: Redis) -> str:
    """The URL of the Redis that was started with the server, for its other processes."""
    return f"unix://{client.connection_pool.connection_kwargs['path']}"


def _client(url: str, shown: str) -> Redis:
    """A client that tries a lost connection once more: every command of ours may be repeated."""
    try:
        pool = BlockingConnectionPool.from_url(
            url,
            max_connections=MAX_CONNECTIONS,
            timeout=TIMEOUT_S,
            socket_timeout=TIMEOUT_S,
            socket_connect_timeout=TIMEOUT_S,
            retry=Retry(NoBackoff(), 1, supported_errors=(RedisConnectionError,)),
            protocol=2,
        )
    except ValueError as error:
        raise StartupError(f"cannot use the Redis URL {shown}: {error}") from error
    return Redis.from_pool(pool)


async def _check_server(client: Redis, shown: str) -> None:
    """Refuse a Redis that is too old; warn of one that may lose or evict what it was given."""
    try:
        info: dict[str, Any] = await client.info()
    except (RedisError, OSError) as error:
        raise StartupError(f"cannot reach Redis at {shown}: {error}; start it or correct --redis-url") from error
    version = str(info["redis_version"])
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_VERSION:
        raise StartupError(f"Redis at {shown} is {version}, but 6.2 or later is needed: update it")
    if not info.get("aof_enabled"):
        logger.warning("Redis at %s does not append to disk (appendonly no): a crash of it loses messages", shown)
    if info.get("maxmemory_policy") != "noeviction":
        logger.warning("Redis at %s may evict sessions: set its maxmemory-policy to noeviction", shown)
