"""The end of one turn, for somebody who waits for it over HTTP; leaving, or being sent away, ends the waiting alone."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import aclosing
from typing import Any

from chatserve.errors import NotFound, Unavailable
from chatserve.protocol.codec import from_wire
from chatserve.server.event_stream import ends_response
from chatserve.server.services import Services
from chatserve.sessions.accept import Accepted
from chatserve.sessions.registry import draining


class TurnEnd:
    """Waits for the end of an accepted turn; a member of the hub meanwhile, so that a server that ends says so."""

    def __init__(self, services: Services, tenant: str, session_id: str, accepted: Accepted, epoch: int) -> None:
        self.tenant: str | None = tenant
        self._services = services
        self._owner = tenant
        self._session_id = session_id
        self._accepted = accepted
        self._epoch = epoch
        self._closing: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def notify(self, event: Mapping[str, Any]) -> None:
        """Notices have no place in an answer that is one object."""

    def close_soon(self, code: int, reason: str) -> None:
        """The server ends: whoever has the session next goes on with the turn."""
        if not self._closing.done():
            self._closing.set_result(None)

    async def response(self) -> dict[str, Any]:
        """The final response. Raises Unavailable where the server ends first, NotFound where it is deleted."""
        if self._accepted.duplicate and (stored := await self.stored()):
            return stored
        with self._services.hub.admitted(self._owner), self._services.hub.joined(self):
            try:
                return await self._unless_closed(asyncio.create_task(self._followed()))
            except Unavailable:  # also where the log was replaced or trimmed: the session itself may know the end
                if stored := await self.stored():
                    return stored
                raise

    async def stored(self) -> dict[str, Any] | None:
        """The response as the session keeps it, if it has come to its end."""
        view = await self._services.sessions.get_session(self._owner, self._session_id)
        for message in view["messages"]:
            response: dict[str, Any] = message.get("response") or {}
            if response.get("id") == self._accepted.response_id and message["state"] != "in_progress":
                return {**response, "text": "".join(part["text"] for part in message["content"])}
        return None

    async def _unless_closed(self, following: asyncio.Task[dict[str, Any]]) -> dict[str, Any]:
        try:
            ends: set[asyncio.Future[Any]] = {following, self._closing}
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            if not following.done():
                raise draining()
            return following.result()
        finally:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)

    async def _followed(self) -> dict[str, Any]:
        entries = self._services.sessions.follow(self._session_id, self._accepted.head_seq, epoch=self._epoch)
        async with aclosing(entries):
            async for entry in entries:
                event = from_wire(entry.wire)
                if ends_response(event, self._accepted.response_id):
                    response: dict[str, Any] = event["response"]
                    return response
        raise NotFound(f"session {self._session_id!r} was deleted while it answered", param="session_id")
