"""The messages waiting to be sent on one connection, bounded by bytes, so that a slow reader holds up only itself."""

from __future__ import annotations

import asyncio
from collections import deque

Message = bytes | str


class Outbox:
    """A queue of encoded messages for one writer.

    `put` waits while `max_bytes` are unsent; a message larger than that still passes, alone.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._messages: deque[Message] = deque()
        self._unsent_bytes = 0
        self._filled = asyncio.Event()
        self._drained = asyncio.Event()

    @property
    def unsent_bytes(self) -> int:
        """The size of what has not been sent."""
        return self._unsent_bytes

    async def put(self, message: Message) -> bool:
        """Queue a message once there is room for it; whether it had to wait for that."""
        is_late = not self._has_room(message)
        while not self._has_room(message):
            self._drained.clear()
            await self._drained.wait()
        self._append(message)
        return is_late

    def put_notice(self, message: Message) -> None:
        """Queue a small message at once, past the bound, unless the same one is waiting already."""
        if message not in self._messages:
            self._append(message)

    async def peek(self) -> list[Message]:
        """All messages, once there is one; they count as unsent until `sent` removes them."""
        while not self._messages:
            self._filled.clear()
            await self._filled.wait()
        return list(self._messages)

    def sent(self, num_messages: int) -> None:
        """The first messages that `peek` gave have left."""
        for _ in range(num_messages):
            self._unsent_bytes -= len(self._messages.popleft())
        self._drained.set()

    async def wait_empty(self) -> None:
        """Wait until everything has been sent."""
        while self._messages:
            self._drained.clear()
            await self._drained.wait()

    def _has_room(self, message: Message) -> bool:
        return not self._messages or self._unsent_bytes + len(message) <= self._max_bytes

    def _append(self, message: Message) -> None:
        self._messages.append(message)
        self._unsent_bytes += len(message)
        self._filled.set()
