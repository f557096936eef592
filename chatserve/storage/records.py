"""Session records in Redis, written by whoever serves the session: what eviction reads about it.

Changes are taken without waiting and sent in batches. They are hints: with Redis away the last values known stay good
enough. `record_reader` is the other side, in the engine's process.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from contextvars import Context
from typing import TypedDict, Unpack

from redis.asyncio import Redis
from redis.exceptions import NoScriptError, RedisError

from chatserve.storage.health import is_away
from chatserve.storage.scripts import RECORD_CHANGES, TOUCH, session_key

logger = logging.getLogger(__name__)

MAX_WAITING_SESSIONS = 10_000
RETRY_DELAY_S = 1.0
GATHER_S = 0.1  # nobody decides by a record that quickly, and each write costs


class RecordChanges(TypedDict, total=False):
    """Fields of a session's record; times in seconds since 1970."""

    last_activity_s: float
    turns: int
    tokens: int
    think_time_s: float
    connected: bool
    typing: bool
    priority: int
    pinned: bool


class RedisSessionRecords:
    """Writes the records of the sessions that the instance `owner` serves."""

    def __init__(self, redis: Redis, owner: str, *, clock: Callable[[], float] = time.time) -> None:
        self._redis = redis
        self._owner = owner
        self._clock = clock
        self._waiting: dict[str, RecordChanges] = {}
        self._flushing: asyncio.Task[None] | None = None
        self._closed = False

    def touch(self, session_id: str, **changes: Unpack[RecordChanges]) -> None:
        """Note changes of a session's record; they are written soon, together with others. Never waits, never raises.

        A session that was deleted in the meantime gets no record.
        """
        self._merge(session_id, changes)
        if self._flushing is None and not self._closed:
            self._flushing = asyncio.get_running_loop().create_task(self._flush(), context=Context())

    async def close(self) -> None:
        """Send what is waiting if Redis is there, then stop: what is touched later is not written."""
        self._closed = True
        if self._flushing is not None:
            self._flushing.cancel()
            await asyncio.gather(self._flushing, return_exceptions=True)
        await self._send_waiting()

    def _merge(self, session_id: str, changes: RecordChanges) -> None:
        merged = self._waiting.pop(session_id, RecordChanges())
        merged.update(changes)
        self._waiting[session_id] = merged
        if len(self._waiting) > MAX_WAITING_SESSIONS:
            oldest = next(iter(self._waiting))
            del self._waiting[oldest]

    async def _flush(self) -> None:
        try:
            while self._waiting:
                await asyncio.sleep(GATHER_S)
                if not await self._send_waiting():
                    await asyncio.sleep(RETRY_DELAY_S)
        finally:
            self._flushing = None

    async def _send_waiting(self) -> bool:
        """Send all that waits; whether Redis took it. What it did not take waits on, under what came since."""
        batch, self._waiting = self._waiting, {}
        try:
            await self._send(batch)
        except asyncio.CancelledError:
            self._take_back(batch)
            raise
        except (RedisError, OSError) as error:
            if not is_away(error):
                logger.error("Redis refused %d session records, they are dropped: %s", len(batch), error)
                return True
            logger.info("session records wait for Redis: %s", error)
            self._take_back(batch)
            return False
        return True

    def _take_back(self, batch: Mapping[str, RecordChanges]) -> None:
        newer, self._waiting = self._waiting, {}
        for session_id, changes in (*batch.items(), *newer.items()):
            self._merge(session_id, changes)

    async def _send(self, batch: Mapping[str, RecordChanges]) -> None:
        try:
            await self._pipeline(batch)
        except NoScriptError:
            await self._redis.script_load(TOUCH.source)
            await self._pipeline(batch)

    async def _pipeline(self, batch: Mapping[str, RecordChanges]) -> None:
        pipeline = self._redis.pipeline(transaction=False)
        for session_id, changes in batch.items():
            keys = [session_key(session_id, "meta"), session_key(session_id, "record"), RECORD_CHANGES]
            row = [item for name, value in changes.items() for item in (name, _packed(value))]
            arguments = [session_id, int(self._clock() * 1000), "owner", self._owner, *row]
            pipeline.execute_command("EVALSHA", TOUCH.sha, len(keys), *keys, *arguments)
        await pipeline.execute()


def _packed(value: object) -> str:
    return str(int(value)) if isinstance(value, bool) else repr(value)
