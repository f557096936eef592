"""Drops the events of finished responses from the log when nobody may ask for them piece by piece any more."""

from __future__ import annotations

import asyncio
from collections import deque

from chatserve.sessions.limits import SessionLimits
from chatserve.sessions.ports import Store
from chatserve.storage.session_store import StorageUnavailable


class LogTrimmer:
    """Trims each log up to an event, `resume_ttl_s` after it was told of that event."""

    def __init__(self, store: Store, limits: SessionLimits) -> None:
        self._store = store
        self._limits = limits
        self._due: deque[tuple[float, str, int]] = deque()

    def schedule(self, session_id: str, last_seq: int) -> None:
        """Drop the events up to and including `last_seq` when their time has come."""
        self._due.append((asyncio.get_running_loop().time() + self._limits.resume_ttl_s, session_id, last_seq))

    async def run(self) -> None:
        """Trim what is due, for ever."""
        while True:
            await asyncio.sleep(self._limits.trim_interval_s)
            await self._trim_due()

    async def _trim_due(self) -> None:
        now_s = asyncio.get_running_loop().time()
        while self._due and self._due[0][0] <= now_s:
            _, session_id, last_seq = self._due[0]
            try:
                await self._store.trim_log(session_id, last_seq)
            except StorageUnavailable:
                return  # at the next pass, then
            self._due.popleft()
