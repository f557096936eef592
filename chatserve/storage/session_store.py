"""The session store on Redis: what sessions are, their messages and their event logs, for one fenced writer each.

Every change is one Lua call that checks the fence and the head before it writes anything. Does not know what events
mean, nor how Redis was started.

Epochs. A reader's cursor counts only within the epoch it was made in. Where Redis may lose what it acknowledged (not
`durable`: a Redis of somebody else's, perhaps syncing once a second, perhaps failed over), `take_fence` begins a new
epoch when Redis is another process than the one that the session was last taken over on; if the taker knows the head
that was acknowledged, only when the log is behind it. So no reader mistakes rewritten events for those it has seen.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, cast

import msgpack
from redis.asyncio import Redis
from redis.exceptions import NoScriptError, RedisError

from chatserve.errors import BadRequest, Conflict, NotFound, QuotaReached, Unavailable
from chatserve.storage.health import Health, StorageUnavailable, is_away
from chatserve.storage.scripts import (
    ACTIVE_SESSIONS,
    COMMIT,
    DELETE,
    KEY_LIFETIME_S,
    RECORD_CHANGES,
    TAKE_FENCE,
    Script,
    scope_keys,
    session_key,
    tenant_key,
    tenant_of_key,
)
from chatserve.storage.session_data import (
    IdempotencyKey,
    LogEntry,
    MessageRecord,
    SessionMeta,
    StoredKey,
    pack_changes,
    pack_key,
    pack_message,
    pack_meta,
    pack_token_ids,
    text_of_message,
    unpack_key,
    unpack_message,
    unpack_meta,
    unpack_token_ids,
)
from chatserve.storage.writer import CommitWriter

MAX_SEARCHED_SESSIONS = 2000
SEARCHED_AT_ONCE = 20

__all__ = [
    "FenceLost",
    "IdempotencyConflict",
    "IdempotencyKey",
    "LogEntry",
    "MessageRecord",
    "SessionMeta",
    "SessionStore",
    "StorageUnavailable",
    "StoreWatch",
    "StoredKey",
]

_SCANNED_KEYS = 1000
MAX_LOG_READS = 2  # at a time: many readers who come back at once must not hold up those who are there
_NO_CHANGES: Final[Mapping[str, Any]] = {}


class FenceLost(Unavailable):
    """This instance may not write the session as it tried to: another took it over, or the log's head is elsewhere.

    Take the fence again to learn the present state.
    """

    default_code = "server_interrupted"


class IdempotencyConflict(Conflict):
    """The key was used before, for another body."""

    default_code = "idempotency_conflict"


def _unwatched(*_: float) -> None:
    """Nobody counts."""


@dataclass(frozen=True, slots=True)
class StoreWatch:
    """Who counts what a store does: each append with its seconds, each command whose key had been used before."""

    on_append: Callable[[float], None] = _unwatched
    on_duplicate: Callable[[], None] = _unwatched


class SessionStore:
    """Sessions in Redis, for the instance `instance_id`. `durable`: Redis keeps all that it acknowledged.

    `max_sessions` gives how many sessions a tenant may have; None is no limit. `watch` is told of every write.
    Any method raises `StorageUnavailable` when Redis is away. Close it when done; it does not close the client.
    """

    def __init__(
        self,
        redis: Redis,
        instance_id: str,
        *,
        durable: bool = False,
        max_sessions: Callable[[str], int | None] = lambda _: None,
        watch: StoreWatch = StoreWatch(),
    ) -> None:
        self._redis = redis
        self._instance_id = instance_id
        self._durable = durable
        self._max_sessions = max_sessions
        self._watch = watch
        self._reading = asyncio.Semaphore(MAX_LOG_READS)
        self._health = Health(redis.ping)
        self._writer = CommitWriter(redis, COMMIT, self._health)

    @property
    def available(self) -> bool:
        """Whether Redis answered when it was last asked."""
        return self._health.available

    async def wait_available(self) -> None:
        """Return once Redis answers; at once if nothing else is known."""
        await self._health.wait_available()

    async def ping(self) -> None:
        """Ask Redis for a sign of life."""
        await self._execute("PING")

    async def close(self) -> None:
        """Wait for writes that were handed in, then stop."""
        await self._writer.close()
        await self._health.close()

    async def create(
        self,
        meta: SessionMeta,
        entries: Sequence[LogEntry],
        key: IdempotencyKey | None = None,
        *,
        messages: Iterable[MessageRecord] = (),
    ) -> StoredKey | None:
        """Write a new session, held by this instance, with its first events (seq from 1) and, for a fork, its messages.

        Gives what was stored under `key` if it was used before, and then writes nothing. Raises `IdempotencyConflict`
        if that was for another body, `Conflict` if there is a session of this id, `QuotaReached` if the tenant has as
        many as it may have.
        """
        _check_contiguous(entries, first_seq=1)
        row = pack_meta(meta) | {"fence": self._instance_id.encode(), "head_seq": b"%d" % len(entries)}
        new = _commit(meta.id, entries, messages, row)
        new |= {"create": True, "updated_at": str(meta.updated_at)}
        max_sessions = self._max_sessions(meta.tenant)
        if max_sessions is not None:
            new |= {"max_sessions": str(max_sessions), "list": tenant_key(meta.tenant).decode()}
        if meta.active is not None:
            new["active"] = "begin"
        return await self._commit(new, key)

    async def append(
        self,
        session_id: str,
        entries: Sequence[LogEntry],
        *,
        expected_head: int,
        messages: Iterable[MessageRecord] = (),
        meta: Mapping[str, Any] = _NO_CHANGES,
        key: IdempotencyKey | None = None,
    ) -> StoredKey | None:
        """Append events (seq from `expected_head + 1`), store messages whole, change fields of the session: one step.

        The session moves up its tenant's list when `meta` holds `updated_at`, and is among `active_sessions` as long
        as its `active` is not None. Gives what was stored under `key` if it was used before, and then writes nothing.
        After `StorageUnavailable` send the same appends again, in order: what is there already is not written twice.
        Raises `FenceLost`, `IdempotencyConflict`, or `NotFound` for a session that was deleted.
        """
        _check_contiguous(entries, first_seq=expected_head + 1)
        row, removed = pack_changes(meta)
        row["head_seq"] = b"%d" % (expected_head + len(entries))
        new = _commit(session_id, entries, messages, row)
        new |= {"remove": removed, "fence": self._instance_id, "expected_head": str(expected_head)}
        if "updated_at" in meta:
            new["updated_at"] = str(meta["updated_at"])
        if "active" in meta:
            new["active"] = "end" if meta["active"] is None else "begin"
        return await self._commit(new, key)

    async def take_fence(self, session_id: str, acknowledged_head: int | None = None) -> SessionMeta:
        """Make this instance the session's only writer and give its present state, in a new epoch where that is due.

        `acknowledged_head` is the head that this instance saw acknowledged, where it held the session before; None
        where it did not. Raises `NotFound` for no such session.
        """
        known = "" if acknowledged_head is None else str(acknowledged_head)
        arguments = (self._instance_id, int(self._durable), known)
        row = await self._run_script(TAKE_FENCE, [session_key(session_id, "meta")], *arguments)
        if row is None:
            raise _no_session(session_id)
        return unpack_meta(dict(zip(row[::2], row[1::2], strict=True)))

    async def find_key(self, scope: str, key: str) -> StoredKey | None:
        """What was stored under an idempotency key, for 24 hours at least."""
        packed = await self._execute("HGET", scope_keys(scope)[0], key)
        if packed is None:
            return None
        self._watch.on_duplicate()
        return unpack_key(packed)

    async def load_meta(self, session_id: str) -> SessionMeta | None:
        """The session without its messages; None for no such session."""
        row = await self._execute("HGETALL", session_key(session_id, "meta"))
        return unpack_meta(row) if row else None

    async def load_messages(self, session_id: str) -> dict[str, MessageRecord]:
        """All messages of the session by id, oldest first; empty for no such session."""
        packed = await self._execute("HVALS", session_key(session_id, "msgs"))
        messages = sorted((unpack_message(row) for row in packed), key=lambda message: message.created_at)
        return {message.id: message for message in messages}

    async def read_log(self, session_id: str, after_seq: int, limit: int) -> list[LogEntry]:
        """At most `limit` events after `after_seq`, in order; trimmed ones are missing at the front."""
        log = session_key(session_id, "log")
        async with self._reading:
            rows = await self._execute("XRANGE", log, f"{after_seq + 1}-0", "+", "COUNT", limit)
        return [_log_entry(entry_id, entry_fields) for entry_id, entry_fields in rows]

    async def first_seq(self, session_id: str) -> int | None:
        """The oldest event still in the log; None when there is none."""
        entries = await self.read_log(session_id, 0, 1)
        return entries[0].seq if entries else None

    async def trim_log(self, session_id: str, min_seq: int) -> None:
        """Drop the events before `min_seq`."""
        await self._execute("XTRIM", session_key(session_id, "log"), "MINID", "=", f"{min_seq}-0")

    async def list_sessions(
        self, tenant: str, limit: int = 50, before: str | None = None, words: Sequence[str] = ()
    ) -> list[SessionMeta]:
        """The tenant's sessions, last updated first; `before` is the id of the last session of the page before.

        With `words`: those that have each of them in their title or messages, whatever their case, among the latest
        `MAX_SEARCHED_SESSIONS`. Raises `BadRequest` where `before` is not in the tenant's list.
        """
        first = 0 if before is None else await self._rank(tenant, before) + 1
        if words:
            return await self._search(tenant, [word.casefold() for word in words], limit, first)
        ids = await self._execute("ZREVRANGE", tenant_key(tenant), first, first + limit - 1)
        rows = await self._pipeline([("HGETALL", session_key(session_id.decode(), "meta")) for session_id in ids])
        return [unpack_meta(row) for row in rows if row]

    async def sessions_before(self, time_ms: int, limit: int) -> list[tuple[str, str]]:
        """At most `limit` sessions of any tenant that were last updated before the time, as (tenant, session id)."""
        found: list[tuple[str, str]] = []
        cursor: int | None = None
        while cursor != 0 and len(found) < limit:
            match = ("MATCH", tenant_key("*"), "COUNT", _SCANNED_KEYS, "TYPE", "zset")
            next_cursor, lists = await self._execute("SCAN", cursor or 0, *match)
            cursor = int(next_cursor)
            for name in lists:
                old = await self._execute("ZRANGEBYSCORE", name, "-inf", f"({time_ms}", "LIMIT", 0, limit - len(found))
                found += [(tenant_of_key(name), session_id.decode()) for session_id in old]
        return found

    async def active_sessions(self) -> list[str]:
        """The ids of all sessions with a running response, of every tenant."""
        return sorted(session_id.decode() for session_id in await self._execute("SMEMBERS", ACTIVE_SESSIONS))

    async def delete(self, session_id: str, tenant: str) -> bool:
        """Delete the session with everything it holds; False if the tenant has no such session."""
        shared = [session_key(session_id, "meta"), tenant_key(tenant), ACTIVE_SESSIONS, RECORD_CHANGES]
        own = [session_key(session_id, part) for part in ("msgs", "log", "record")]
        return bool(await self._run_script(DELETE, [*shared, *own, *scope_keys(session_id)], session_id, tenant))

    async def _commit(self, new: dict[str, Any], key: IdempotencyKey | None) -> StoredKey | None:
        session_id = new["session_id"]
        keys = [*(session_key(session_id, part) for part in ("meta", "msgs", "log")), ACTIVE_SESSIONS]
        if key is not None:
            keys += scope_keys(key.scope)
            new |= {"key": key.key, "key_value": pack_key(key), "key_lifetime_s": KEY_LIFETIME_S}
        # Plain strings, not msgpack's binary type: the Lua side knows one kind of string only.
        began_s = time.perf_counter()
        answer = await self._writer.run(keys, cast(bytes, msgpack.packb(new, use_bin_type=False)))
        self._watch.on_append(time.perf_counter() - began_s)
        earlier = _outcome(answer, session_id, key)
        if earlier is not None:
            self._watch.on_duplicate()
        return earlier

    async def _search(self, tenant: str, words: Sequence[str], limit: int, first: int) -> list[SessionMeta]:
        """Looks through some sessions at a time, so that others are served meanwhile."""
        found: list[SessionMeta] = []
        while len(found) < limit and first < MAX_SEARCHED_SESSIONS:
            ids = await self._execute("ZREVRANGE", tenant_key(tenant), first, first + SEARCHED_AT_ONCE - 1)
            if not ids:
                break
            names = [session_id.decode() for session_id in ids]
            metas = await self._pipeline([("HGETALL", session_key(name, "meta")) for name in names])
            messages = await self._pipeline([("HVALS", session_key(name, "msgs")) for name in names])
            found += await asyncio.to_thread(_with_words, words, metas, messages)
            first += len(ids)
        return found[:limit]

    async def _rank(self, tenant: str, session_id: str) -> int:
        rank = await self._execute("ZREVRANK", tenant_key(tenant), session_id)
        if rank is None:
            raise BadRequest(f"no session {session_id!r} to go on after; list from the start", param="before")
        return cast(int, rank)

    async def _run_script(self, script: Script, keys: Sequence[bytes], *arguments: str | int) -> Any:
        try:
            return await self._execute("EVALSHA", script.sha, len(keys), *keys, *arguments)
        except NoScriptError:
            return await self._execute("EVAL", script.source, len(keys), *keys, *arguments)

    async def _execute(self, *command: Any) -> Any:
        return (await self._pipeline([command]))[0]

    async def _pipeline(self, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
        self._health.check()
        pipeline = self._redis.pipeline(transaction=False)
        for command in commands:
            pipeline.execute_command(*command)
        try:
            return list(await pipeline.execute())
        except (RedisError, OSError) as error:
            if is_away(error):
                raise self._health.lost(error) from error
            raise


def _check_contiguous(entries: Sequence[LogEntry], first_seq: int) -> None:
    for seq, entry in enumerate(entries, first_seq):
        if entry.seq != seq:
            raise ValueError(f"event {entry.seq} stands where {seq} is expected; a log has no gaps")


def _commit(
    session_id: str, entries: Sequence[LogEntry], messages: Iterable[MessageRecord], row: Mapping[str, bytes]
) -> dict[str, Any]:
    return {
        "session_id": session_id,
        "entries": [(f"{entry.seq}-0", entry.wire, pack_token_ids(entry.token_ids)) for entry in entries],
        "messages": [(message.id, pack_message(message)) for message in messages],
        "set": [item for pair in row.items() for item in pair],
        "remove": [],
    }


def _outcome(answer: list[bytes], session_id: str, key: IdempotencyKey | None) -> StoredKey | None:
    """What a commit's answer means to its caller; see `scripts.COMMIT`."""
    status, detail = answer[0], b"".join(answer[1:])
    if status == b"duplicate" and key is not None:
        return _same_body(unpack_key(detail), key)
    if status not in (b"written", b"done"):
        raise _refused(status.decode(), detail.decode(), session_id)
    return None


def _refused(status: str, detail: str, session_id: str) -> Exception:
    refusals: dict[str, Exception] = {
        "missing": _no_session(session_id),
        "exists": Conflict(f"there is a session {session_id!r} already; use another id", code="invalid_value"),
        "full": QuotaReached(f"this key has {detail} sessions, the most it may; delete one first"),
        "fence": FenceLost(f"session {session_id!r} is held by another server ({detail}); connect again"),
        "head": FenceLost(f"session {session_id!r} stands at event {detail}, not where this append expects it"),
    }
    return refusals[status]


def _same_body(stored: StoredKey, key: IdempotencyKey) -> StoredKey:
    if stored.body_hash != key.body_hash:
        raise IdempotencyConflict(f"key {key.key!r} was used for another body; make a new key", param="key")
    return stored


def _no_session(session_id: str) -> NotFound:
    return NotFound(f"there is no session {session_id!r}", param="session_id")


def _log_entry(entry_id: bytes, entry_fields: Mapping[bytes, bytes]) -> LogEntry:
    token_ids = tuple(unpack_token_ids(entry_fields[b"t"]))
    return LogEntry(int(entry_id.partition(b"-")[0]), entry_fields[b"w"], token_ids)


def _with_words(
    words: Sequence[str], metas: Sequence[Mapping[bytes, bytes]], messages: Sequence[Sequence[bytes]]
) -> list[SessionMeta]:
    """The sessions whose title or messages have all the words, which are folded."""
    found = []
    for row, packed in zip(metas, messages, strict=True):
        if row:
            meta = unpack_meta(row)
            said = "\n".join([meta.title, *map(text_of_message, packed)]).casefold()
            if all(word in said for word in words):
                found.append(meta)
    return found
