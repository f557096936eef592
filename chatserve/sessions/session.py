"""One session in memory: its state, the tail of its log, and the one way to change it.

A change is written to the store first and shows here and to followers after. A write whose outcome is unknown is looked
up before the next one. It knows neither the model nor what events mean.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from chatserve.errors import ServiceError, Unavailable
from chatserve.protocol import events
from chatserve.protocol.codec import to_wire
from chatserve.sessions.limits import SessionLimits
from chatserve.sessions.ports import Store
from chatserve.sessions.recovery import load_messages
from chatserve.sessions.tail import LogTail
from chatserve.storage.session_store import (
    FenceLost,
    IdempotencyKey,
    LogEntry,
    MessageRecord,
    SessionMeta,
    StoredKey,
)


class RunningTurn(Protocol):
    """A response that is being made. `stop` ends it as cancelled; `abandon` leaves it for whoever continues it."""

    @property
    def response_id(self) -> str: ...

    def stop(self) -> None: ...

    def abandon(self) -> None: ...

    async def wait_done(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Draft:
    """An event without its place in the log, and the token ids it stands for."""

    event: Mapping[str, Any]
    token_ids: tuple[int, ...] = ()


@dataclass(slots=True)
class Change:
    """One step of a session: events, whole messages, changed fields. It takes effect altogether or not at all.

    `said` is text that the events add to the message `speaker`, for those who ask for the state meanwhile. `era` is the
    one of the session that the change was made for; None until it is first committed.
    """

    drafts: Sequence[Draft]
    messages: Sequence[MessageRecord] = ()
    meta: Mapping[str, Any] = field(default_factory=dict)
    key: IdempotencyKey | None = None
    speaker: str | None = None
    said: str = ""
    era: int | None = None
    entries: list[LogEntry] = field(default_factory=list)
    applied: bool = False


class LiveSession:
    """A session that this process holds the fence of. `lock` serialises commands; a running turn writes beside them.

    `era` counts how often the store turned out to have another log than was known: what was made for an earlier one is
    not written. `clock` gives seconds since 1970.
    """

    def __init__(
        self,
        store: Store,
        meta: SessionMeta,
        messages: dict[str, MessageRecord],
        limits: SessionLimits,
        clock: Callable[[], float],
    ) -> None:
        self.meta = meta
        self.messages = messages
        self.lock = asyncio.Lock()
        self.num_users = 0
        self.turn: RunningTurn | None = None
        self.num_followers = 0
        self.cancel_at_start: str | None = None
        self.engine_knows = False
        self.last_reply_s: float | None = None
        self.think_time_s = 0.0
        self.warmed_s = 0.0
        self.era = 0
        self.tail = LogTail(meta.head_seq, max_entries=limits.tail_entries, max_bytes=limits.tail_bytes)
        self._store = store
        self._limits = limits
        self._clock = clock
        self._write_lock = asyncio.Lock()
        self._doubt: Change | None = None
        self._retired: ServiceError | None = None

    @property
    def id(self) -> str:
        """The session's id."""
        return self.meta.id

    @property
    def in_doubt(self) -> bool:
        """Whether the outcome of the last write is unknown."""
        return self._doubt is not None

    def now_ms(self) -> int:
        """The time for stamps."""
        return int(self._clock() * 1000)

    async def commit(self, change: Change) -> StoredKey | None:
        """Write a change, then show it; repeating one that was written does nothing.

        Gives what the change's key stands for if it was used before. Raises what `SessionStore.append` raises; after
        StorageUnavailable or FenceLost the outcome is open until `settle`.
        """
        change.era = self.era if change.era is None else change.era
        async with self._write_lock:
            if self._retired is not None:
                raise self._retired
            await self._settle()
            if change.applied:
                return None
            if change.era != self.era:
                raise FenceLost(f"the log of session {self.id!r} was replaced; send this again")
            change.entries = self._stamp(change.drafts)
            self._doubt = change
            duplicate = await self._append(change)
            self._doubt = None
            if duplicate is None:
                self._apply(change)
            return duplicate

    async def _append(self, change: Change) -> StoredKey | None:
        try:
            return await self._store.append(
                self.id,
                change.entries,
                expected_head=self.tail.head_seq,
                messages=change.messages,
                meta=change.meta,
                key=change.key,
            )
        except ServiceError as refusal:
            if not isinstance(refusal, Unavailable):
                self._doubt = None  # refused for good: nothing was written
            raise

    async def settle(self) -> None:
        """Find out about a write of unknown outcome. Raises StorageUnavailable, FenceLost or NotFound."""
        async with self._write_lock:
            await self._settle()

    def retire(self, reason: ServiceError) -> None:
        """Write nothing more through this object: two of one session would write over one another."""
        self._retired = reason

    async def _settle(self) -> None:
        change = self._doubt
        if change is None:
            return
        stored = await self._store.load_meta(self.id)
        if stored is not None and stored.fence != self.meta.fence:
            raise FenceLost(f"session {self.id!r} is held by another server; connect again")
        present = await self._store.take_fence(self.id, self.tail.head_seq)
        written = await self._store.read_log(self.id, self.tail.head_seq, self._limits.read_entries)
        if present.epoch == self.meta.epoch and written == change.entries:
            self._apply(change)
        elif present.epoch != self.meta.epoch or written:
            await self._start_over(present)
        self._doubt = None

    async def _start_over(self, present: SessionMeta) -> None:
        """The store is not what it was known to be: it has the truth, and whoever followed must attach again."""
        self.messages = await load_messages(self._store, present, self._limits)
        self.meta = present
        self.era += 1
        self.tail.end(Unavailable("the session's log was replaced; attach again", code="server_interrupted"))
        self.tail = LogTail(present.head_seq, max_entries=self._limits.tail_entries, max_bytes=self._limits.tail_bytes)
        if self.turn is not None:
            self.turn.abandon()

    def _stamp(self, drafts: Sequence[Draft]) -> list[LogEntry]:
        now_ms = self.now_ms()
        return [
            LogEntry(seq, to_wire(events.stamp(draft.event, self.id, seq, now_ms)), draft.token_ids)
            for seq, draft in enumerate(drafts, self.tail.head_seq + 1)
        ]

    def _apply(self, change: Change) -> None:
        change.applied = True
        for message in change.messages:
            self.messages[message.id] = dataclasses.replace(message)
        if change.speaker in self.messages and not change.messages:
            self.messages[change.speaker].text += change.said
        head_seq = change.entries[-1].seq if change.entries else self.tail.head_seq
        if change.meta:
            self.meta = dataclasses.replace(self.meta, **change.meta, head_seq=head_seq)
        else:
            self.meta.head_seq = head_seq  # for every delta: a copy of the whole would be felt
        self.tail.publish(change.entries)
