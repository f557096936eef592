"""The connections of this process: how many there may be, and what all of a tenant's are told at once.

It knows neither sessions nor the wire; a connection is whatever can be given a notice and be closed.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

from chatserve.errors import Overloaded, Unavailable
from chatserve.protocol import events

RECONNECT_AFTER_MS = 1000
CHANGES_INTERVAL_S = 0.25


class Member(Protocol):
    """A connection as the hub sees it. `tenant` is None until the connection has said hello."""

    @property
    def tenant(self) -> str | None: ...

    def notify(self, event: Mapping[str, Any]) -> None:
        """Queue an event at once, whatever else is waiting."""

    def close_soon(self, code: int, reason: str) -> None:
        """Begin to close."""


class Hub:
    """All connections, counted in all and by key."""

    def __init__(self, *, max_connections: int, max_key_connections: int) -> None:
        self._max_connections = max_connections
        self._max_key_connections = max_key_connections
        self._members: set[Member] = set()
        self._by_tenant: Counter[str] = Counter()
        self._told: dict[str, bool] = {}  # tenants told a moment ago, and whether there is news since
        self._empty = asyncio.Event()
        self._farewell: events.Event | None = None

    @property
    def draining(self) -> bool:
        """Whether the server is on its way out and takes no new connection."""
        return self._farewell is not None

    @property
    def farewell(self) -> events.Event | None:
        """What connections were told when draining began, for those that say hello only then."""
        return self._farewell

    @property
    def num_connections(self) -> int:
        """Connections held now."""
        return len(self._members)

    def check_room(self, tenant: str | None = None) -> None:
        """Raise Unavailable while draining and Overloaded when no further connection can be held, or by this tenant."""
        if self.draining:
            raise Unavailable(
                "the server is shutting down; connect again in a moment",
                code="server_draining",
                retry_after_ms=RECONNECT_AFTER_MS,
            )
        if len(self._members) >= self._max_connections:
            raise Overloaded(
                f"the server holds {self._max_connections} connections, the most it may; try again later",
                code="rate_limited",
                retry_after_ms=RECONNECT_AFTER_MS,
            )
        if tenant is not None:
            self._check_key(tenant)

    def _check_key(self, tenant: str) -> None:
        if self._by_tenant[tenant] >= self._max_key_connections:
            raise Overloaded(
                f"this key holds {self._max_key_connections} connections, the most it may; close one first",
                code="rate_limited",
                retry_after_ms=RECONNECT_AFTER_MS,
            )

    @contextmanager
    def joined(self, member: Member) -> Iterator[None]:
        """Count a connection for as long as it lives."""
        self._members.add(member)
        try:
            yield
        finally:
            self._members.discard(member)
            if not self._members:
                self._empty.set()

    @contextmanager
    def admitted(self, tenant: str) -> Iterator[None]:
        """Count a connection under its tenant; raises Overloaded when the tenant has too many."""
        self._check_key(tenant)
        self._by_tenant[tenant] += 1
        try:
            yield
        finally:
            self._by_tenant[tenant] -= 1
            if not self._by_tenant[tenant]:
                del self._by_tenant[tenant]

    def sessions_changed(self, tenant: str) -> None:
        """Tell every connection of the tenant that its list of sessions is not what it was.

        At once, and then at most every `CHANGES_INTERVAL_S`: with many of both, each telling all would be felt.
        """
        if tenant in self._told:
            self._told[tenant] = True
            return
        self._told[tenant] = False
        asyncio.get_running_loop().call_later(CHANGES_INTERVAL_S, self._tell_again, tenant)
        notice = events.sessions_changed()
        for member in self._members:
            if member.tenant == tenant:
                member.notify(notice)

    def _tell_again(self, tenant: str) -> None:
        """It is a while since the tenant was told; there may be news since."""
        if self._told.pop(tenant):
            self.sessions_changed(tenant)

    def begin_drain(self, time_left_s: float) -> None:
        """Take no new connection, and ask those that are here to leave."""
        self._farewell = events.goaway(
            reason="shutdown", time_left_ms=int(time_left_s * 1000), reconnect_after_ms=RECONNECT_AFTER_MS
        )
        for member in self._members:
            member.notify(self._farewell)

    async def close_all(self, code: int, reason: str, timeout_s: float) -> None:
        """Close every connection and wait for their ends, at most `timeout_s`."""
        for member in list(self._members):
            member.close_soon(code, reason)
        self._empty.clear()
        if not self._members:
            return
        try:
            await asyncio.wait_for(self._empty.wait(), timeout_s)
        except TimeoutError:
            return  # whoever is left is cut off with the process
