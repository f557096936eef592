"""Drops the events of finished responses from the log when nobody may ask for them piece by piece any more."""

from __future__ import annotations

import asyncio
from itertools import takewhile

from chatserve.sessions.limits import SessionLimits
from chatserve.sessions.ports import Store
from chatserve.storage.session_store import StorageUnavailable


class LogTrimmer:
    """Trims each log up to an event, `resume_ttl_s` after it was told of that event."""

    def __init__(self, store: Store, limits: SessionLimits) -> None:
        self._store = store
        self._limits = limits
        self._due: dict[tuple[str, int], float] = {}  # in the order of their times

    def schedule(self, session_id: str, last_seq: int) -> None:
        """Drop the events up to and including `last_seq` when their time has come."""
        due_s = asyncio.get_running_loop().time() + self._limits.resume_ttl_s
        self._due.setdefault((session_id, last_seq), due_s)

    async def run(self) -> None:
        """Trim what is due, for ever."""
        while True:
            await asyncio.sleep(self._limits.trim_interval_s)
            await self._trim_due()

    async def _trim_due(self) -> None:
        now_s = asyncio.get_running_loop().time()
        due = list(takewhile(lambda key: self._due[key] <= now_s, self._due))
        for session_id, last_seq in due:
            try:
                await self._store.trim_log(session_id, last_seq + 1)
            except StorageUnavailable:
                return  # at the next pass, then
            del self._due[session_id, last_seq]
