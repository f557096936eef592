"""The sessions one connection follows: for each a pump that carries log entries into the connection's outbox."""

from __future__ import annotations

import asyncio
import logging
from contextlib import aclosing
from typing import Any

from chatserve.errors import Overloaded, ServiceError
from chatserve.protocol import events
from chatserve.protocol.codec import Encoding, encode, wire_to
from chatserve.server.outbox import Outbox
from chatserve.sessions.manager import SessionManager

logger = logging.getLogger(__name__)


class Following:
    """Follows at most `max_sessions`. Events go out unchanged on msgpack connections, transcoded on JSON ones."""

    def __init__(self, sessions: SessionManager, outbox: Outbox, encoding: Encoding, max_sessions: int) -> None:
        self._sessions = sessions
        self._outbox = outbox
        self._encoding: Encoding = encoding
        self._max_sessions = max_sessions
        self._pumps: dict[str, asyncio.Task[None]] = {}

    async def attach(
        self, tenant: str, session_id: str, *, epoch: int | None, after_seq: int | None, command_id: str | None = None
    ) -> None:
        """Announce the session, then begin to follow it from where the announcement says.

        Attaching again moves the cursor. Raises what `SessionManager.attach` raises, and Overloaded past the limit.
        """
        if session_id not in self._pumps and len(self._pumps) >= self._max_sessions:
            raise Overloaded(
                f"this connection follows {self._max_sessions} sessions, the most it may; detach one first",
                code="rate_limited",
                param="session_id",
            )
        attached = await self._sessions.attach(tenant, session_id, epoch, after_seq)
        await self.detach(session_id)
        announcement = events.session_attached(
            session_id=session_id,
            epoch=attached.epoch,
            head_seq=attached.head_seq,
            mode=attached.mode,
            snapshot=attached.snapshot,
            command_id=command_id,
        )
        await self._outbox.put(encode(announcement, self._encoding))
        pump = self._pump(session_id, attached.after_seq)
        self._pumps[session_id] = asyncio.create_task(pump, name=f"pump-{session_id}")

    async def detach(self, session_id: str) -> None:
        """Stop following; a session that is not followed is fine."""
        await self._stop(self._pumps.pop(session_id, None))

    async def close(self) -> None:
        """Stop following everything."""
        while self._pumps:
            await self._stop(self._pumps.popitem()[1])

    async def _stop(self, pump: asyncio.Task[None] | None) -> None:
        if pump is not None:
            pump.cancel()
            await asyncio.wait({pump})

    async def _pump(self, session_id: str, after_seq: int) -> None:
        try:
            # Closed at once, not when the collector comes by: until then the session counts as followed.
            async with aclosing(self._sessions.follow(session_id, after_seq)) as entries:
                async for entry in entries:
                    await self._outbox.put(wire_to(self._encoding, entry.wire))
        except ServiceError as refusal:
            await self._report(session_id, refusal.as_object())
        except Exception:  # a client must learn that its session stands still, whatever the fault was
            logger.exception("following session %s failed", session_id)
            await self._report(session_id, ServiceError("following this session failed; attach again").as_object())
        if self._pumps.get(session_id) is asyncio.current_task():
            del self._pumps[session_id]

    async def _report(self, session_id: str, error: dict[str, Any]) -> None:
        await self._outbox.put(encode(events.error(error, session_id=session_id), self._encoding))
