"""A session's events as server-sent events: `id: <epoch>:<seq>`, so that a client that reconnects goes on where it was.

A stream counts as a connection: it is told of a drain, and bounded by key. It is a cursor into the log, its end cancels
nothing, and a reader that takes nothing is cut off by the transport.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Any

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from chatserve.errors import BadRequest, ServiceError
from chatserve.protocol import events
from chatserve.protocol.codec import encode, from_wire
from chatserve.protocol.merging import merge_deltas
from chatserve.server.dispatch import internal_error
from chatserve.server.outbox import Outbox
from chatserve.server.services import Services

MAX_UNSENT_BYTES = 256 << 10
HEARTBEAT_S = 15.0
STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
_HEARTBEAT = b": still here\n\n"
_EVENT_ID = re.compile(r"(\d{1,16}):(\d{1,16})")
logger = logging.getLogger(__name__)


def read_event_id(text: str) -> tuple[int, int]:
    """Epoch and seq of a `Last-Event-ID`; raises BadRequest."""
    match = _EVENT_ID.fullmatch(text)
    if match is None:
        raise BadRequest(
            f"Last-Event-ID {text[:64]!r} is none of ours; send the last 'id' as it came, or leave the header out",
            param="last-event-id",
        )
    return int(match[1]), int(match[2])


def frame(event: Mapping[str, Any], event_id: str | None = None) -> bytes:
    """One server-sent event; without an id a reconnecting client's cursor stays where it was."""
    head = f"id: {event_id}\n" if event_id else ""
    return f"{head}event: {event['type']}\ndata: {encode(event, 'json')!s}\n\n".encode()


def ends_response(event: Mapping[str, Any], response_id: str) -> bool:
    """Whether this is the response's terminal event."""
    return event["type"] in events.TERMINAL_EVENTS and event["response"]["id"] == response_id


class SessionStream:
    """One reader of one session, from `after_seq` on; a member of the hub.

    `opening` frames go first; without `after_seq` they are all. With `response_id` the stream ends behind that
    response's terminal event.
    """

    def __init__(
        self,
        services: Services,
        tenant: str,
        session_id: str,
        *,
        epoch: int,
        after_seq: int | None,
        opening: Sequence[bytes] = (),
        response_id: str | None = None,
    ) -> None:
        self.tenant: str | None = tenant
        self._services = services
        self._session_id = session_id
        self._epoch = epoch
        self._after_seq = after_seq
        self._opening = opening
        self._response_id = response_id
        self._outbox = Outbox(MAX_UNSENT_BYTES)
        self._closing: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def notify(self, event: Mapping[str, Any]) -> None:
        """Queue a connection event at once."""
        self._outbox.put_notice(frame(event))

    def close_soon(self, code: int, reason: str) -> None:
        """End the stream behind what is queued."""
        if not self._closing.done():
            self._closing.set_result(None)

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        """What is to be sent, as it comes, with a sign of life where nothing does."""
        pump = asyncio.create_task(self._pump(), name=f"stream-{self._session_id}")
        try:
            while (chunk := await self._next(pump)) is not None:
                yield chunk
        finally:
            self._closing.cancel()
            pump.cancel()
            await asyncio.gather(pump, return_exceptions=True)

    async def _next(self, pump: asyncio.Task[None]) -> bytes | None:
        """All that waits, or a sign of life; None at the end."""
        if not self._outbox.unsent_bytes:
            filled = asyncio.create_task(self._outbox.peek())
            ends: set[asyncio.Future[Any]] = {filled, pump, self._closing}
            await asyncio.wait(ends, timeout=HEARTBEAT_S, return_when=asyncio.FIRST_COMPLETED)
            filled.cancel()
            await asyncio.gather(filled, return_exceptions=True)
        if self._outbox.unsent_bytes:
            messages = await self._outbox.peek()
            self._outbox.sent(len(messages))
            return b"".join(message for message in messages if isinstance(message, bytes))
        return None if pump.done() or self._closing.done() else _HEARTBEAT

    async def _pump(self) -> None:
        for message in self._opening:
            await self._outbox.put(message)
        if self._after_seq is None:
            return
        try:
            await self._follow(self._after_seq)
        except ServiceError as refusal:
            await self._report(refusal)
        except Exception:  # a client must learn that its session stands still, whatever the fault was
            logger.exception("following session %s failed", self._session_id)
            await self._report(internal_error())

    async def _follow(self, after_seq: int) -> None:
        is_behind = False
        following = self._services.sessions.follow_batches(self._session_id, after_seq, epoch=self._epoch)
        async with aclosing(following) as batches:
            async for batch in batches:
                wires = [entry.wire for entry in batch]
                for event in map(from_wire, merge_deltas(wires) if is_behind else wires):
                    was_behind, is_behind = is_behind, await self._put(event)
                    if is_behind and not was_behind:
                        self._services.metrics.note_slow_reader()
                    if self._response_id is not None and ends_response(event, self._response_id):
                        return

    async def _put(self, event: Mapping[str, Any]) -> bool:
        event_id = f"{self._epoch}:{event['seq']}" if "seq" in event else None
        return await self._outbox.put(frame(event, event_id))

    async def _report(self, error: ServiceError) -> None:
        await self._outbox.put(frame(events.error(error.as_object(), session_id=self._session_id)))


class EventStreamResponse(StreamingResponse):
    """Serves a stream, counted among the connections. Raises Overloaded where its key has too many."""

    def __init__(self, stream: SessionStream, services: Services) -> None:
        self._chunks = stream.chunks()
        super().__init__(self._chunks, media_type="text/event-stream", headers=STREAM_HEADERS)
        self._stream = stream
        self._services = services

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI entry."""
        hub, tenant = self._services.hub, self._stream.tenant or ""
        with hub.admitted(tenant), hub.joined(self._stream):
            async with aclosing(self._chunks):
                await super().__call__(scope, receive, send)
