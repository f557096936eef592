"""The newest events of one session in memory, and those who wait for the next."""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import Sequence

from chatserve.errors import ServiceError
from chatserve.storage.session_store import LogEntry


class LogTail:
    """Events up to `head_seq`, as many as the bounds allow.

    Notices are seen by whoever waits while they are given; they stand in no log and have seq 0.
    """

    def __init__(self, head_seq: int, *, max_entries: int, max_bytes: int) -> None:
        self.head_seq = head_seq
        self.ended = False
        self.failure: ServiceError | None = None
        self.num_notices = 0
        self._max_entries = max_entries
        self._max_bytes = max_bytes
        self._entries: deque[LogEntry] = deque()
        self._num_bytes = 0
        self._notices: deque[LogEntry] = deque(maxlen=8)
        self._waiting: set[asyncio.Future[None]] = set()

    def publish(self, entries: Sequence[LogEntry]) -> None:
        """Events that are in the log now; they must follow the head without a gap."""
        for entry in entries:
            assert entry.seq == self.head_seq + 1
            self.head_seq = entry.seq
            self._entries.append(entry)
            self._num_bytes += len(entry.wire)
        while len(self._entries) > self._max_entries or (self._num_bytes > self._max_bytes and len(self._entries) > 1):
            self._num_bytes -= len(self._entries.popleft().wire)
        self._wake()

    def notify(self, wire: bytes) -> None:
        """Tell everybody who follows now."""
        self._notices.append(LogEntry(0, wire))
        self.num_notices += 1
        self._wake()

    def notices_after(self, num_seen: int) -> list[LogEntry]:
        """The notices given since `num_seen` of them, the newest ones if there were many."""
        num_new = min(self.num_notices - num_seen, len(self._notices))
        return list(self._notices)[len(self._notices) - num_new :]

    def after(self, seq: int) -> list[LogEntry] | None:
        """The events after `seq`, or None where some of them are in the store only."""
        first = self.head_seq + 1 - len(self._entries)
        if seq >= self.head_seq:
            return []
        if seq + 1 < first:
            return None
        newest = list(itertools.islice(reversed(self._entries), self.head_seq - seq))
        return newest[::-1]

    def end(self, failure: ServiceError | None = None) -> None:
        """Nothing will follow here: the session was deleted or, with a failure, must be attached to again."""
        self.ended = True
        self.failure = failure
        self._wake()

    async def wait_beyond(self, seq: int, num_notices: int) -> None:
        """Return once there is an event after `seq`, a notice after the first `num_notices`, or the end."""
        while self.head_seq <= seq and self.num_notices <= num_notices and not self.ended:
            waiting = asyncio.get_running_loop().create_future()
            self._waiting.add(waiting)
            try:
                await waiting
            finally:
                self._waiting.discard(waiting)

    def _wake(self) -> None:
        for waiting in self._waiting:
            if not waiting.done():
                waiting.set_result(None)
