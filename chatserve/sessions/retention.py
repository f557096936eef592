"""Deletes sessions that nobody has used for a time that the operator sets, with everything they hold.

Runs in the background, a bounded number of sessions at a time, so that people who are here do not feel it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Protocol

from chatserve.errors import NotFound, Unavailable

MAX_SWEPT = 1000
PAUSE_S = 0.01  # between two sessions
MIN_INTERVAL_S = 1.0
MAX_INTERVAL_S = 3600.0
logger = logging.getLogger(__name__)


class OldSessions(Protocol):
    """Where old sessions are found: `SessionStore`."""

    async def sessions_before(self, time_ms: int, limit: int) -> list[tuple[str, str]]: ...


class ExpiringSessions(Protocol):
    """Who deletes them, unless they are in use: `SessionManager`."""

    async def expire_session(self, tenant: str, session_id: str, before_ms: int) -> bool: ...


class Retention:
    """Keeps sessions for `ttl_s` after their last use. `clock` gives seconds since 1970."""

    def __init__(
        self,
        store: OldSessions,
        sessions: ExpiringSessions,
        ttl_s: float,
        *,
        on_deleted: Callable[[str], None] = lambda _: None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._sessions = sessions
        self._ttl_s = ttl_s
        self._on_deleted = on_deleted
        self._clock = clock

    async def run(self) -> None:
        """Sweep now and then, for ever."""
        interval_s = min(max(self._ttl_s / 10, MIN_INTERVAL_S), MAX_INTERVAL_S)
        while True:
            try:
                deleted = await self.sweep()
            except Unavailable as error:
                logger.info("old sessions are not deleted now: %s", error)
            else:
                if deleted:
                    logger.info("deleted sessions that were not used for long", extra={"sessions": deleted})
            await asyncio.sleep(interval_s)

    async def sweep(self) -> int:
        """Delete what is too old, at most `MAX_SWEPT` sessions; gives how many there were."""
        before_ms = int((self._clock() - self._ttl_s) * 1000)
        deleted = 0
        for tenant, session_id in await self._store.sessions_before(before_ms, MAX_SWEPT):
            deleted += await self._expire(tenant, session_id, before_ms)
            await asyncio.sleep(PAUSE_S)
        return deleted

    async def _expire(self, tenant: str, session_id: str, before_ms: int) -> bool:
        try:
            is_deleted = await self._sessions.expire_session(tenant, session_id, before_ms)
        except NotFound:
            return False  # somebody else was faster
        if is_deleted:
            self._on_deleted(tenant)
        return is_deleted
