"""A reader of one session's events: from memory where they are there, else from the store, none missed or repeated."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from chatserve.errors import Unavailable
from chatserve.sessions.limits import SessionLimits
from chatserve.sessions.ports import Store
from chatserve.sessions.session import LiveSession
from chatserve.sessions.tail import LogTail
from chatserve.storage.session_store import LogEntry, StorageUnavailable


async def follow_session(
    live: LiveSession, store: Store, after_seq: int, limits: SessionLimits
) -> AsyncGenerator[list[LogEntry], None]:
    """Every event after `after_seq` in order, then those to come, until the session is deleted: all there are at once.

    Notices come between them with seq 0. Raises Unavailable (`server_interrupted`) where the cursor has fallen out of
    the log: attach again.
    """
    tail = live.tail  # a session that starts over gets a new one, and this one ends with the reason
    seq, num_notices = after_seq, tail.num_notices
    while True:
        entries = tail.after(seq)
        if entries is None:
            entries = await _read(live.id, tail, store, seq, limits)
            if not entries and tail.ended:
                return
        if entries and (entries[0].seq, entries[-1].seq) != (seq + 1, seq + len(entries)):
            raise _fallen_out(live.id, seq)
        notices, num_notices = tail.notices_after(num_notices), tail.num_notices
        if entries or notices:
            seq += len(entries)
            yield [*entries, *notices]
        if tail.failure is not None:
            raise tail.failure
        if tail.ended and seq >= tail.head_seq:
            return
        await tail.wait_beyond(seq, num_notices)


async def _read(session_id: str, tail: LogTail, store: Store, seq: int, limits: SessionLimits) -> list[LogEntry]:
    """Events that are in the store only; waits while it is away."""
    while True:
        try:
            entries = await store.read_log(session_id, seq, limits.read_entries)
        except StorageUnavailable:
            await asyncio.sleep(limits.store_retry_s)
            continue
        if not entries and not tail.ended:
            raise _fallen_out(session_id, seq)
        return [entry for entry in entries if entry.seq <= tail.head_seq]  # what the session itself shows already


def _fallen_out(session_id: str, seq: int) -> Unavailable:
    return Unavailable(
        f"the events after {seq} of session {session_id!r} are no longer kept; attach again", code="server_interrupted"
    )
