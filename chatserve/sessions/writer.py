"""Writes one response's events to the session in order, merging text into deltas.

The first text goes at once, later text at most every few milliseconds. While the store is away events wait here, up to
a bound; then whoever makes the response is told, and what waits is written when the store is back.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from chatserve.protocol import events
from chatserve.protocol.codec import to_wire
from chatserve.sessions.limits import SessionLimits
from chatserve.sessions.plan import TurnPlan
from chatserve.sessions.session import Change, Draft, LiveSession
from chatserve.storage.session_store import FenceLost, MessageRecord, StorageUnavailable


class TurnWriter:
    """One response's way into the log. `num_sent` code points of it are there or wait already.

    `task` ends early only by FenceLost (another server has the session) or NotFound (it was deleted). `on_lost` is
    called once, when more has waited for longer than the limits allow.
    """

    def __init__(
        self,
        live: LiveSession,
        plan: TurnPlan,
        limits: SessionLimits,
        on_lost: Callable[[StorageUnavailable], None],
    ) -> None:
        self.num_sent = 0
        self._live = live
        self._era = live.era
        self._response_id = plan.response_id
        self._message_id = plan.message_id
        self._limits = limits
        self._on_lost = on_lost
        self._drafts: list[Draft] = []
        self._said = ""
        self._text = ""
        self._token_ids: list[int] = []
        self._final: Change | None = None
        self._filled = asyncio.Event()
        self._urgent = asyncio.Event()
        self._has_spoken = False
        self._num_waiting_bytes = 0
        self._last_write_s = 0.0
        self._away_since_s: float | None = None
        self._told_lost = False
        self.task = asyncio.create_task(self._write_all(), name=f"write-{plan.response_id}")

    def put_event(self, event: Mapping[str, Any]) -> None:
        """An event, behind all text so far."""
        self._close_delta()
        self._drafts.append(Draft(event))
        self._filled.set()
        self._urgent.set()

    def put_text(self, text: str, token_ids: Iterable[int]) -> None:
        """More text and the ids taken since the last; ids without text wait for the next text."""
        self._token_ids += token_ids
        if not text:
            return
        self._text += text
        self._num_waiting_bytes += len(text.encode())
        self._filled.set()
        if not self._has_spoken or len(self._token_ids) >= self._limits.delta_tokens:
            self._urgent.set()
        self._has_spoken = True
        if self._num_waiting_bytes > self._limits.turn_buffer_bytes:
            self._lose("the reply is longer than what is kept in memory meanwhile")

    async def finish(
        self, drafts: Sequence[Mapping[str, Any]], message: MessageRecord, meta: Mapping[str, Any]
    ) -> None:
        """Write what waits and the response's last events with its message, in one step; return when it is done.

        Raises what ended `task` early.
        """
        self._final = Change([Draft(event) for event in drafts], messages=[message], meta=meta)
        self._filled.set()
        self._urgent.set()
        await self.task

    async def close(self) -> None:
        """Write nothing more."""
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)

    async def _write_all(self) -> None:
        is_last = False
        while not is_last:
            await self._wait_for_work()
            change, is_last = self._take()
            await self._write(change)
            self._last_write_s = _now_s()

    async def _wait_for_work(self) -> None:
        await self._filled.wait()
        pause_s = self._last_write_s + self._limits.delta_interval_s - _now_s()
        if pause_s > 0:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await self._urgent.wait()

    def _take(self) -> tuple[Change, bool]:
        """All that waits as one change, and whether it is the last."""
        self._close_delta()
        final = self._final
        change = final or Change([], speaker=self._message_id, said=self._said)
        change.drafts = [*self._drafts, *change.drafts]
        change.era = self._era
        self._drafts, self._said, self._num_waiting_bytes = [], "", 0
        self._filled.clear()
        self._urgent.clear()
        return change, final is not None

    def _close_delta(self) -> None:
        if not self._text:
            return
        delta = events.output_text_delta(response_id=self._response_id, offset=self.num_sent, delta=self._text)
        self._drafts.append(Draft(delta, tuple(self._token_ids)))
        self.num_sent += len(self._text)
        self._said += self._text
        self._text, self._token_ids = "", []

    async def _write(self, change: Change) -> None:
        """Write until it is written; only another owner or the session's end keep it from that."""
        num_refused = 0
        while True:
            try:
                await self._live.commit(change)
            except StorageUnavailable as error:
                self._note_away(error)
                await asyncio.sleep(self._limits.store_retry_s)
            except FenceLost:
                num_refused += 1
                if num_refused > 1:  # once may be a late write of ours; the commit looks it up before it tries again
                    raise
            else:
                self._away_since_s = None
                return

    def _note_away(self, error: StorageUnavailable) -> None:
        if self._away_since_s is None:
            self._away_since_s = _now_s()
        elif _now_s() - self._away_since_s > self._limits.turn_buffer_s:
            self._lose(error.message)

    def _lose(self, reason: str) -> None:
        if self._told_lost:
            return
        self._told_lost = True
        error = StorageUnavailable(f"this reply ends early, because it cannot be stored: {reason}")
        self._live.tail.notify(to_wire(events.error(error.as_object(), session_id=self._live.id)))
        self._on_lost(error)


def _now_s() -> float:
    return asyncio.get_running_loop().time()
