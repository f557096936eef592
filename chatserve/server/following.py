"""The sessions one connection follows: for each a pump that carries log entries into the connection's outbox."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from chatserve.errors import Overloaded, ServiceError
from chatserve.protocol import events
from chatserve.protocol.codec import Encoding, encode, from_wire, wire_to
from chatserve.protocol.merging import merge_deltas
from chatserve.server.outbox import Outbox
from chatserve.sessions.manager import Attached, SessionManager

if TYPE_CHECKING:
    from chatserve.server.metrics import Metrics

logger = logging.getLogger(__name__)


class Following:
    """Follows at most `max_sessions`. Events go out unchanged on msgpack connections, transcoded on JSON ones.

    To a reader that was behind, what has gathered meanwhile goes with its deltas merged.
    """

    def __init__(
        self, sessions: SessionManager, outbox: Outbox, encoding: Encoding, max_sessions: int, metrics: Metrics
    ) -> None:
        self._metrics = metrics
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
        if after_seq:  # else it has seen nothing yet
            self._metrics.note_resume(attached.mode)
        pump = self._pump(attached, has_missed=bool(after_seq) and attached.after_seq < attached.head_seq)
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

    async def _pump(self, attached: Attached, has_missed: bool) -> None:
        session_id = attached.session_id
        try:
            await self._follow(attached, has_missed)
        except ServiceError as refusal:
            await self._report(session_id, refusal.as_object())
        except Exception:  # a client must learn that its session stands still, whatever the fault was
            logger.exception("following session %s failed", session_id)
            await self._report(session_id, ServiceError("following this session failed; attach again").as_object())
        if self._pumps.get(session_id) is asyncio.current_task():
            del self._pumps[session_id]

    async def _follow(self, attached: Attached, has_missed: bool) -> None:
        is_behind = False
        following = self._sessions.follow_batches(attached.session_id, attached.after_seq, epoch=attached.epoch)
        # Closed at once, not when the collector comes by: until then the session counts as followed.
        async with aclosing(following) as batches:
            async for batch in batches:
                if has_missed:
                    self._metrics.note_missed(from_wire(batch[0].wire)["ts"])
                has_missed = False
                wires = [entry.wire for entry in batch]
                is_behind = await self._put_all(merge_deltas(wires) if is_behind else wires, is_behind)

    async def _put_all(self, wires: Sequence[bytes], was_behind: bool) -> bool:
        """Queue events; whether the reader was too slow for them."""
        late = [await self._outbox.put(wire_to(self._encoding, wire)) for wire in wires]
        if any(late) and not was_behind:
            self._metrics.note_slow_reader()
        return any(late)

    async def _report(self, session_id: str, error: dict[str, Any]) -> None:
        await self._outbox.put(encode(events.error(error, session_id=session_id), self._encoding))
