"""uvicorn's HTTP transport with bounds on how long a request's head may take and a reader may take nothing.

uvicorn waits for ever for a connection's first request, for the rest of one that has begun, and for a client to read
its answer: sending a byte a second, or reading none, would keep a place for good. `http` bounds how long a body takes.
"""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_TIMEOUT_S = 15.0
STALL_TIMEOUT_S = 30.0


class HttpTransport(H11Protocol):
    """Cuts a connection off whose request head is not there in `head_timeout_s`.

    And one whose peer takes nothing for `stall_timeout_s` of an answer that it has not read.
    """

    head_timeout_s = HEAD_TIMEOUT_S
    stall_timeout_s = STALL_TIMEOUT_S

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._head_timer: asyncio.TimerHandle | None = None
        self._stall_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        """A client is there; its request must follow."""
        super().connection_made(transport)
        self._watch_head()

    def data_received(self, data: bytes) -> None:
        """More of the request, or of the next one."""
        super().data_received(data)
        self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client is gone."""
        self._stop_timers()
        super().connection_lost(exc)

    def handle_websocket_upgrade(self, event: h11.Request) -> None:
        """The connection goes on as a WebSocket, with timeouts of its own."""
        self._stop_timers()
        super().handle_websocket_upgrade(event)

    def pause_writing(self) -> None:
        """The client does not read as fast as we write."""
        super().pause_writing()
        self._await_progress()

    def resume_writing(self) -> None:
        """It has caught up."""
        if self._stall_timer is not None:
            self._stall_timer.cancel()
        super().resume_writing()

    def _watch_head(self) -> None:
        """Run the timer while a head is awaited: from the connection, or from the first byte of a later request."""
        if self.conn.their_state is not h11.IDLE:
            self._stop_head_timer()
        elif self._head_timer is None and not self.transport.is_closing():
            self._head_timer = self.loop.call_later(self.head_timeout_s, self.transport.abort)

    def _await_progress(self) -> None:
        """Look again later whether the client has read anything of what waits; nothing is added to that meanwhile."""
        num_unread = self.transport.get_write_buffer_size()
        self._stall_timer = self.loop.call_later(self.stall_timeout_s, self._check_progress, num_unread)

    def _check_progress(self, num_unread_before: int) -> None:
        if self.transport.get_write_buffer_size() < num_unread_before:
            self._await_progress()
        else:
            self.transport.abort()

    def _stop_timers(self) -> None:
        self._stop_head_timer()
        if self._stall_timer is not None:
            self._stall_timer.cancel()

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
