"""The session store on Redis: what sessions are, their messages and their event logs, for one fenced writer each.

Every change is one Lua call that checks the fence and the head before it writes anything. Does not know what events
mean, nor how Redis was started.

Epochs. A reader's cursor counts only within the epoch it was made in. Where Redis may lose what it acknowledged (not
`durable`: a Redis of somebody else's, perhaps syncing once a second, perhaps failed over), `take_fence` begins a new
epoch when Redis is another process than the one that the session was last taken over on; if the taker knows the head
that was acknowledged, only when the log is behind it. So no reader mistakes rewritten events for those it has seen.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, cast

import msgpack
from redis.asyncio import Redis
from redis.exceptions import NoScriptError, RedisError

from chatserve.errors import BadRequest, Conflict, NotFound, Unavailable
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
    unpack_key,
    unpack_message,
    unpack_meta,
    unpack_token_ids,
)
from chatserve.storage.writer import CommitWriter

__all__ = [
    "FenceLost",
    "IdempotencyConflict",
    "IdempotencyKey",
    "LogEntry",
    "MessageRecord",
    "SessionMeta",
    "SessionStore",
    "StorageUnavailable",
    "StoredKey",
]

_NO_CHANGES: Final[Mapping[str, Any]] = {}


class FenceLost(Unavailable):
    """This instance may not write the session as it tried to: another took it over, or the log's head is elsewhere.

    Take the fence again to learn the present state.
    """

    default_code = "server_interrupted"


class IdempotencyConflict(Conflict):
    """The key was used before, for another body."""

    default_code = "idempotency_conflict"


class SessionStore:
    """Sessions in Redis, for the instance `instance_id`. `durable`: Redis keeps all that it acknowledged.

    Any method raises `StorageUnavailable` when Redis is away. Close it when done; it does not close the client.
    """

    def __init__(self, redis: Redis, instance_id: str, *, durable: bool = False) -> None:
        self._redis = redis
        self._instance_id = instance_id
        self._durable = durable
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
        if that was for another body, `Conflict` if there is a session of this id.
        """
        _check_contiguous(entries, first_seq=1)
        row = pack_meta(meta) | {"fence": self._instance_id.encode(), "head_seq": b"%d" % len(entries)}
        new = _commit(meta.id, entries, messages, row, [], updated_at=meta.updated_at)
        new["create"] = True
        if meta.active is not None:
            new["active"] = "begin"
        return await self._commit(meta.id, meta.tenant, new, key)

    async def append(
        self,
        session_id: str,
        entries: Sequence[LogEntry],
        *,
        expected_head: int,
        messages: Iterable[MessageRecord] = (),
        meta: Mapping[str, Any] = _NO_CHANGES,
        key: IdempotencyKey | None = None,
        tenant: str = "",
    ) -> StoredKey | None:
        """Append events (seq from `expected_head + 1`), store messages whole and change fields of the session, in one step.

        The session moves up its tenant's list when `meta` holds `updated_at`, and is among `active_sessions` as long
        as `active` is not None. Gives what was stored under `key` if it was used before, and then writes nothing.
        After `StorageUnavailable` send the same append again: what is there already is not written twice. Raises
        `FenceLost`, `IdempotencyConflict`, or `NotFound` for a session that was deleted.
        """
        _check_contiguous(entries, first_seq=expected_head + 1)
        row, removed = pack_changes(meta)
        row["head_seq"] = b"%d" % (expected_head + len(entries))
        new = _commit(session_id, entries, messages, row, removed, updated_at=meta.get("updated_at"))
        new |= {"fence": self._instance_id, "expected_head": str(expected_head)}
        if "active" in meta:
            new["active"] = "end" if meta["active"] is None else "begin"
        return await self._commit(session_id, tenant, new, key)
