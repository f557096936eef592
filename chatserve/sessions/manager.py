"""Everything that can be done with sessions, for the surfaces: one method a command, plus following and resuming.

It checks whose session it is, keeps commands on one session in order and repeats harmless, and hands turns to their
keeper. It knows neither connections nor encodings.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from typing import Any

from chatserve.engine.api import Engine
from chatserve.errors import Conflict, NotFound, Unavailable
from chatserve.protocol import events
from chatserve.protocol.codec import from_wire, to_wire
from chatserve.protocol.commands import ResponseCreate, SessionCreate, SessionFork, SessionUpdate
from chatserve.sessions import views
from chatserve.sessions.accept import Accepted, PreparedTurn, body_hash, history_ids, prepare_turn
from chatserve.sessions.conversations import Conversations
from chatserve.sessions.following import follow_session
from chatserve.sessions.forgetting import histories_to_forget
from chatserve.sessions.keeper import TurnKeeper
from chatserve.sessions.limits import SessionLimits
from chatserve.sessions.making import forked_session, given_changes, new_session
from chatserve.sessions.portable import Document, SessionImport, export_document, imported_session
from chatserve.sessions.ports import Records, Store
from chatserve.sessions.registry import SessionRegistry, draining
from chatserve.sessions.session import Change, Draft, LiveSession
from chatserve.sessions.tasks import TaskGroup
from chatserve.sessions.trimming import LogTrimmer
from chatserve.sessions.turn import Turn, TurnTools
from chatserve.storage.session_store import (
    IdempotencyConflict,
    IdempotencyKey,
    LogEntry,
    MessageRecord,
    SessionMeta,
    StoredKey,
)
from chatserve.text.pipeline import TextPipeline

View = dict[str, Any]
WARM_INTERVAL_S = 5.0  # a person who types says so again and again


@dataclass(frozen=True, slots=True)
class Attached:
    """Where a reader stands: `follow` goes on after `after_seq`. A snapshot is the state at that event."""

    session_id: str
    epoch: int
    head_seq: int
    mode: events.Mode
    snapshot: View | None
    after_seq: int


class SessionManager:
    """The sessions of one process. Every method that takes a tenant raises NotFound for a session of another.

    All errors are `ServiceError`s. `clock` gives seconds since 1970; `on_response` is told of each response's end.
    `priority_of` a tenant's sessions: where memory is short, what has more is kept longer.
    """

    def __init__(
        self,
        store: Store,
        engine: Engine,
        text: TextPipeline,
        records: Records,
        limits: SessionLimits = SessionLimits(),  # noqa: B008 - frozen
        *,
        clock: Callable[[], float] = time.time,
        on_response: Callable[[dict[str, Any]], None] = lambda _: None,
        priority_of: Callable[[str], int] = lambda _: 0,
    ) -> None:
        self._store = store
        self._engine = engine
        self._records = records
        self._limits = limits
        self._clock = clock
        self._priority_of = priority_of
        self._tasks = TaskGroup()
        self._trimmer = LogTrimmer(store, limits)
        self._tools = TurnTools(engine, text, store, limits, on_response)
        self._registry = SessionRegistry(store, limits, clock, self._loaded)
        self._keeper = TurnKeeper(self._tools, self._registry, self._tasks, self._finished)
        self.conversations = Conversations(self._registry, self._tools, self._tasks, clock, self._write_new)

    @property
    def num_running(self) -> int:
        """Responses being made now."""
        return self._keeper.num_running

    @property
    def num_live(self) -> int:
        """Sessions in memory now."""
        return len(self._registry)

    async def start(self) -> None:
        """Go on with the responses that were running when the server last ended, then serve."""
        self._tasks.spawn(self._trimmer.run(), name="trim-logs")
        slots = asyncio.Semaphore(self._limits.max_recoveries)
        await asyncio.gather(*(self._recover(sid, slots) for sid in await self._store.active_sessions()))

    async def drain(self, timeout_s: float) -> None:
        """Refuse new turns, let running ones end for `timeout_s`, leave the rest to be continued after a restart."""
        self._registry.close()
        await self._keeper.drain(timeout_s)

    async def close(self) -> None:
        """End at once; what runs is continued after a restart."""
        await self._keeper.drain(0.0)
        await self._tasks.close()

    async def create_session(self, tenant: str, command: SessionCreate) -> tuple[View, bool]:
        """A new session, and whether this very command made it before."""
        meta = new_session(tenant, command, self._now_ms())
        return await self._tasks.carry_out(self._write_new(meta, command, []), "create-session")

    async def fork_session(self, tenant: str, command: SessionFork) -> tuple[View, bool]:
        """A session that begins like another up to a message, and whether this very command made it before."""
        async with self._registry.view(command.session_id, tenant) as live, live.lock:
            meta, messages = forked_session(live, command, self._now_ms())
        return await self._tasks.carry_out(self._write_new(meta, command, messages), "fork-session")

    async def export_session(self, tenant: str, session_id: str) -> View:
        """The session as a document that `import_session` takes, here or elsewhere."""
        async with self._registry.view(session_id, tenant) as live:
            return export_document(live, self._engine.info)

    async def import_session(self, tenant: str, command: SessionImport, document: Document) -> tuple[View, bool]:
        """A new session with what a document says, and whether this very command made it before."""
        info, decode = self._engine.info, self._tools.text.decode
        meta, messages = await asyncio.to_thread(imported_session, tenant, document, info, decode, self._now_ms())
        return await self._tasks.carry_out(self._write_new(meta, command, messages), "import-session")

    async def list_sessions(
        self, tenant: str, limit: int = 50, before: str | None = None, words: Sequence[str] = ()
    ) -> list[View]:
        """The tenant's sessions without messages, last updated first; `before` is the last id of the page before.

        With `words`: those that have each of them in their title or messages.
        """
        return [views.session_view(meta) for meta in await self._store.list_sessions(tenant, limit, before, words)]

    async def get_session(self, tenant: str, session_id: str) -> View:
        """A session with its messages, its running response and the context left."""
        async with self._registry.view(session_id, tenant) as live:
            return views.snapshot(live, self._engine.info.max_context)

    async def update_session(self, tenant: str, command: SessionUpdate) -> View:
        """Change what is given. Raises NotFound for a `head_id` that there is not."""
        return await self._tasks.carry_out(self._update(tenant, command), "update-session")

    async def delete_session(self, tenant: str, session_id: str) -> None:
        """Delete a session with all it holds; a running response is cancelled first."""
        await self._tasks.carry_out(self._delete(tenant, session_id), "delete-session")

    async def expire_session(self, tenant: str, session_id: str, before_ms: int) -> bool:
        """Delete a session, unless it is in use or was since the time given; whether it was deleted."""
        return await self._tasks.carry_out(self._delete(tenant, session_id, before_ms), "expire-session")

    async def create_response(
        self, tenant: str, command: ResponseCreate, request: dict[str, Any] | None = None
    ) -> Accepted:
        """Accept a turn: it is in the log before this returns, and runs whether or not anybody follows.

        `request` is kept with the reply, for the surface that asked.
        """
        return await self._tasks.carry_out(self._create_response(tenant, command, request), "create-response")

    async def cancel_response(self, tenant: str, session_id: str, response_id: str) -> str:
        """End a response early; gives `cancelling`, or the status it has already. Harmless to repeat."""
        async with self._registry.use(session_id, tenant) as live:
            if live.meta.active is not None and live.meta.active["response_id"] == response_id:
                live.cancel_at_start = response_id  # also where it is only about to be taken up again
                if live.turn is not None:
                    live.turn.stop()
                return "cancelling"
            return _final_status(live, response_id)

    async def typing(self, tenant: str, session_id: str) -> None:
        """The tenant is about to say something here."""
        async with self._registry.use(session_id, tenant) as live:
            self._records.touch(live.id, typing=True, last_activity_s=self._clock())
            await self._warm(live)

    async def attach(self, tenant: str, session_id: str, epoch: int | None, after_seq: int | None) -> Attached:
        """Where to begin to follow: after the cursor if the log still has all behind it, else from a snapshot."""
        async with self._registry.use(session_id, tenant) as live:
            await self._warm(live)
            if after_seq is not None and await self._can_replay(live, epoch, after_seq):
                return Attached(live.id, live.meta.epoch, live.tail.head_seq, "replay", None, after_seq)
            state = views.snapshot(live, self._engine.info.max_context)
            return Attached(live.id, live.meta.epoch, live.tail.head_seq, "snapshot", state, live.tail.head_seq)

    async def follow(
        self, session_id: str, after_seq: int, *, epoch: int | None = None
    ) -> AsyncGenerator[LogEntry, None]:
        """As `follow_batches`, one event at a time."""
        async with aclosing(self.follow_batches(session_id, after_seq, epoch=epoch)) as batches:
            async for batch in batches:
                for entry in batch:
                    yield entry

    async def follow_batches(
        self, session_id: str, after_seq: int, *, epoch: int | None = None
    ) -> AsyncGenerator[list[LogEntry], None]:
        """Every event after `after_seq`, then those to come; see `follow_session`. Ends when the session is deleted.

        `epoch` is the one that the cursor belongs to: raises Unavailable, attach again, where it is over.
        """
        async with self._registry.use(session_id) as live:
            if epoch not in (None, live.meta.epoch):
                raise Unavailable("the session's log was replaced; attach again", code="server_interrupted")
            with self._followed(live):
                async for batch in follow_session(live, self._store, after_seq, self._limits):
                    yield batch

    async def resume(self, tenant: str, session_id: str, epoch: int | None, after_seq: int | None, warm: bool) -> View:
        """What happened since the cursor, as events or a snapshot, and how much of the history is held ready.

        `warm` says that a turn is about to come.
        """
        if warm:
            await self.typing(tenant, session_id)
        async with self._registry.view(session_id, tenant) as live:
            answer = await self._replayed(live, epoch, after_seq) or self._state(live)
            active = views.active_response(live)
            cache = await self._cache(live)
        if active is not None:
            answer["active_response"] = active
        return answer | {"cache": cache}

    async def session_cache(self, tenant: str, session_id: str) -> View:
        """How much of a session's history is held ready, and where."""
        async with self._registry.view(session_id, tenant) as live:
            return await self._cache(live)

    async def _cache(self, live: LiveSession) -> View:
        token_ids = await history_ids(live, self._tools)
        held = await self._engine.cached_tokens(live.id, live.meta.tenant, token_ids)
        return {"tokens": len(token_ids), **held.tokens, "restore_ms_estimate": round(held.restore_s * 1000, 3)}

    async def _warm(self, live: LiveSession) -> None:
        """A turn is likely: what left the device of the history may come back before it is asked for."""
        now_s = self._clock()
        if live.meta.active is None and now_s - live.warmed_s >= WARM_INTERVAL_S and live.messages:
            live.warmed_s = now_s
            self._engine.warm_session(live.id, live.meta.tenant, await history_ids(live, self._tools))

    async def _recover(self, session_id: str, slots: asyncio.Semaphore) -> None:
        """Bring a session with a running response into memory, where its keeper takes it up."""
        async with slots:
            with contextlib.suppress(NotFound):  # deleted by whoever had it
                async with self._registry.use(session_id):
                    pass

    async def _write_new(
        self, meta: SessionMeta, command: SessionCreate | SessionFork | SessionImport, messages: Sequence[MessageRecord]
    ) -> tuple[View, bool]:
        key = IdempotencyKey(meta.tenant, command.key, body_hash(command), {"session_id": meta.id})
        created = events.stamp(events.session_created(views.session_fields(meta)), meta.id, 1, meta.created_at)
        duplicate = await self._store.create(meta, [LogEntry(1, to_wire(created))], key, messages=messages)
        if duplicate is None:
            return views.session_view(meta), False
        async with self._registry.view(duplicate.result["session_id"], meta.tenant) as live:
            return views.session_view(live.meta), True

    async def _update(self, tenant: str, command: SessionUpdate) -> View:
        async with self._registry.use(command.session_id, tenant) as live, live.lock:
            changes = given_changes(live, command)
            if changes:
                changes["updated_at"] = self._now_ms()
                fields = views.session_fields(dataclasses.replace(live.meta, **changes))
                await self._commit(live, Change([Draft(events.session_updated(fields))], meta=changes))
                self._records.touch(live.id, pinned=live.meta.pinned, last_activity_s=self._clock())
            return views.session_view(live.meta)

    async def _delete(self, tenant: str, session_id: str, unused_since_ms: int | None = None) -> bool:
        async with self._registry.use(session_id, tenant) as live, live.lock:
            is_used = live.num_followers or live.meta.active is not None
            if unused_since_ms is not None and (is_used or live.meta.updated_at >= unused_since_ms):
                return False
            await self._end_turn(live)
            histories = await histories_to_forget(live, self._store, self._limits)
            await self._engine.delete_session(session_id, tenant, histories)
            await self._store.delete(session_id, tenant)
            self._registry.drop(live, NotFound(f"there is no session {session_id!r}", param="session_id"))
            last = events.stamp(events.session_deleted(), live.id, live.tail.head_seq + 1, self._now_ms())
            live.tail.publish([LogEntry(live.tail.head_seq + 1, to_wire(last))])
            live.tail.end()
            return True

    async def _end_turn(self, live: LiveSession) -> None:
        """Cancel the running response and wait for its end; where that cannot be written now, leave it."""
        turn = live.turn
        if turn is None:
            return
        turn.stop()
        try:
            await asyncio.wait_for(turn.wait_done(), 2 * self._limits.cancel_grace_s)
        except TimeoutError:
            turn.abandon()
            await turn.wait_done()

    async def _create_response(self, tenant: str, command: ResponseCreate, request: dict[str, Any] | None) -> Accepted:
        async with self._registry.use(command.session_id, tenant) as live, live.lock:
            await live.settle()  # first: a turn that is answered as a duplicate must show in the session
            era = live.era
            # Without messages no command was accepted yet: a burst of new sessions need not ask.
            earlier = await self._store.find_key(live.id, command.key) if live.messages else None
            if earlier is not None:
                return _accepted_before(earlier, command, request)
            self._check_free(live)
            prepared = await prepare_turn(live, command, self._tools, request)
            self._check_open()
            prepared.change.era = era
            earlier = await self._accept(live, prepared)
            if earlier is not None:
                return _accepted_before(earlier, command, request)
            self._note_turn(live, prepared.plan.num_prompt)
            return prepared.accepted

    async def _accept(self, live: LiveSession, prepared: PreparedTurn) -> StoredKey | None:
        """Write the turn to the log and start it; the engine begins meanwhile, and stops where that fails."""
        turn = Turn(live, prepared.plan, prepared.prompt_ids, self._tools)
        try:
            turn.run_ahead()  # raises where the tenant or the engine has no room: nothing is written then
            earlier = await self._commit(live, prepared.change)
            if earlier is None:
                self._keeper.start(live, turn)
            return earlier
        finally:
            if live.turn is not turn:
                await turn.discard()

    def _check_free(self, live: LiveSession) -> None:
        """Raise where no turn can begin now."""
        self._check_open()
        if live.meta.active is not None:
            raise Conflict("the session has a running response: wait for its end, or cancel it first")

    def _check_open(self) -> None:
        if not self._keeper.is_open:
            raise draining()

    async def _commit(self, live: LiveSession, change: Change) -> StoredKey | None:
        try:
            return await live.commit(change)
        except Unavailable:
            self._keeper.mend(live)
            raise

    async def _can_replay(self, live: LiveSession, epoch: int | None, after_seq: int) -> bool:
        """Whether the log has everything after the cursor. One of unknown epoch counts only at the very beginning."""
        is_known = epoch == live.meta.epoch or (epoch is None and after_seq == 0)
        if not is_known or after_seq > live.tail.head_seq:
            return False
        if live.tail.after(after_seq) is not None:
            return True
        first_seq = await self._store.first_seq(live.id)
        return first_seq is not None and first_seq <= after_seq + 1

    async def _replayed(self, live: LiveSession, epoch: int | None, after_seq: int | None) -> View | None:
        """The events after the cursor, unless they are gone or too many for one answer."""
        if after_seq is None or not await self._can_replay(live, epoch, after_seq):
            return None
        head_seq = live.tail.head_seq
        if head_seq - after_seq > self._limits.max_resume_events:
            return None
        replayed = await self._events_between(live, after_seq, head_seq)
        return {"epoch": live.meta.epoch, "head_seq": head_seq, "mode": "replay", "events": replayed}

    async def _events_between(self, live: LiveSession, after_seq: int, head_seq: int) -> list[View]:
        replayed: list[View] = []
        async with aclosing(follow_session(live, self._store, after_seq, self._limits)) as batches:
            while len(replayed) < head_seq - after_seq:
                replayed += [from_wire(entry.wire) for entry in await anext(batches) if entry.seq]
        return replayed[: head_seq - after_seq]

    def _state(self, live: LiveSession) -> View:
        state = views.snapshot(live, self._engine.info.max_context)
        return {"epoch": live.meta.epoch, "head_seq": live.tail.head_seq, "mode": "snapshot", "snapshot": state}

    def _loaded(self, live: LiveSession) -> None:
        if live.meta.active is not None:
            self._keeper.mend(live)
        else:
            self._trimmer.schedule(live.id, live.tail.head_seq)

    def _note_turn(self, live: LiveSession, num_tokens: int) -> None:
        """Tell eviction that the session is in use, and how long its person thinks between turns."""
        now_s = self._clock()
        if live.last_reply_s is not None:
            paused_s = now_s - live.last_reply_s
            live.think_time_s = paused_s if not live.think_time_s else 0.7 * live.think_time_s + 0.3 * paused_s
        self._records.touch(
            live.id,
            last_activity_s=now_s,
            turns=sum(message.role == "user" for message in live.messages.values()),
            tokens=num_tokens,
            think_time_s=live.think_time_s,
            priority=self._priority_of(live.meta.tenant),
            typing=False,
        )

    def _finished(self, live: LiveSession) -> None:
        self.conversations.histories.note(live)
        live.last_reply_s = self._clock()
        self._records.touch(live.id, last_activity_s=live.last_reply_s, tokens=views.num_branch_tokens(live))
        self._trimmer.schedule(live.id, live.tail.head_seq)

    @contextmanager
    def _followed(self, live: LiveSession) -> Iterator[None]:
        """Count a follower; the first and the last one change whether the session is connected."""
        live.num_followers += 1
        if live.num_followers == 1:
            self._records.touch(live.id, connected=True)
        try:
            yield
        finally:
            live.num_followers -= 1
            if not live.num_followers:
                self._records.touch(live.id, connected=False)

    def _now_ms(self) -> int:
        return int(self._clock() * 1000)


def _accepted_before(earlier: StoredKey, command: ResponseCreate, request: dict[str, Any] | None) -> Accepted:
    if earlier.body_hash != body_hash(command, request):
        raise IdempotencyConflict(f"key {command.key!r} was used for another body; make a new key", param="key")
    return Accepted(**earlier.result, duplicate=True)


def _final_status(live: LiveSession, response_id: str) -> str:
    for message in live.messages.values():
        if message.response is not None and message.response["id"] == response_id:
            status: str = message.response["status"]
            return status
    raise NotFound(f"the session has no response {response_id!r}", code="response_not_found", param="response_id")
