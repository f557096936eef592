"""Follows one stored response to its end. As a connection it is told of a drain; its own end cancels nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any, TypeVar

from chatserve.errors import Unavailable
from chatserve.protocol.codec import from_wire
from chatserve.protocol.events import TERMINAL_EVENTS
from chatserve.server.hub import RECONNECT_AFTER_MS, Hub
from chatserve.server.openai.response_accept import find_response
from chatserve.server.openai.response_object import no_response, public_id
from chatserve.sessions.conversations import StoredResponse
from chatserve.sessions.manager import SessionManager
from chatserve.storage.session_store import LogEntry

T = TypeVar("T")


class ResponseReader:
    """A reader of the response `found`, which is kept as it stands; a member of the hub while it reads."""

    def __init__(self, sessions: SessionManager, hub: Hub, tenant: str, found: StoredResponse) -> None:
        self.tenant: str | None = tenant
        self.found = found
        self._sessions = sessions
        self._hub = hub
        self._owner = tenant
        self._closing: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def notify(self, event: Mapping[str, Any]) -> None:
        """OpenAI's streams have no event for notices."""

    def close_soon(self, code: int, reason: str) -> None:
        """End the reading: the server leaves the response to its successor."""
        if not self._closing.done():
            self._closing.set_result(None)

    async def wait(self) -> StoredResponse:
        """The response when it is over; raises what `deltas` raises."""
        async with aclosing(self.deltas()) as deltas:
            async for _ in deltas:
                pass
        return self.found

    async def deltas(self) -> AsyncGenerator[str, None]:
        """The text behind what `found` has at first, until the response is over; then `found` is its end.

        Raises NotFound where it is deleted, Unavailable where the server ends or the log was lost on the way.
        """
        if self.found.is_running:
            with self._hub.joined(self):
                async with aclosing(self._read()) as texts:
                    async for text in texts:
                        yield text

    async def _read(self) -> AsyncGenerator[str, None]:
        num_told = len(self.found.reply.text)
        try:
            async with aclosing(self._events()) as events:
                async for event in events:
                    if event["type"] == "response.output_text.delta":
                        yield event["delta"][max(0, num_told - event["offset"]) :]
                        num_told = max(num_told, event["offset"] + len(event["delta"]))
        except Unavailable:  # the log was replaced or trimmed meanwhile: the session itself may know the end
            await self._look_again()
            if self.found.is_running:
                raise
            yield self.found.reply.text[num_told:]
        await self._look_again()

    async def _events(self) -> AsyncGenerator[dict[str, Any], None]:
        """The response's events up to its terminal one."""
        found = self.found
        following = self._sessions.follow_batches(found.session_id, found.head_seq, epoch=found.epoch)
        async with aclosing(following), aclosing(self._until_closed(following)) as batches:
            async for batch in batches:
                for event in map(_event, batch):
                    if _response_id(event) == found.inner_id:
                        yield event
                        if event["type"] in TERMINAL_EVENTS:
                            return
        raise no_response(public_id(found.session_id, found.inner_id), "response_id")

    async def _until_closed(self, source: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
        """What the source gives; raises Unavailable when the server ends."""
        while True:
            step = asyncio.ensure_future(anext(source, None))
            ends: set[asyncio.Future[Any]] = {step, self._closing}
            try:
                await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            finally:
                if not step.done():
                    step.cancel()
                    await asyncio.gather(step, return_exceptions=True)
            if step.cancelled():
                raise _shutting_down()
            item = step.result()
            if item is None:
                return
            yield item

    async def _look_again(self) -> None:
        response_id = public_id(self.found.session_id, self.found.inner_id)
        self.found = await find_response(self._sessions, self._owner, response_id)


def _event(entry: LogEntry) -> dict[str, Any]:
    return from_wire(entry.wire)


def _response_id(event: Mapping[str, Any]) -> str | None:
    """The response that an event of a session is about."""
    about = event.get("response_id") or event.get("response", {}).get("id")
    return about if isinstance(about, str) else None


def _shutting_down() -> Unavailable:
    return Unavailable(
        "the server is shutting down; the response goes on after its restart: get it by its id in a moment",
        code="server_draining",
        retry_after_ms=RECONNECT_AFTER_MS,
    )
