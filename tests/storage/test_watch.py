"""Who watches a store is told of what it writes."""

from __future__ import annotations

from redis.asyncio import Redis

from chatserve.storage.session_store import IdempotencyKey, SessionStore, StoreWatch
from tests.storage.fakes import log_entries, session_meta


async def test_appends_are_timed_and_repeated_commands_are_told(redis: Redis) -> None:
    """Each append gives its seconds; a key that had been used before is told of, met in a commit or looked up."""
    seconds: list[float] = []
    repeated: list[None] = []
    store = SessionStore(redis, "one", watch=StoreWatch(seconds.append, lambda: repeated.append(None)))
    key = IdempotencyKey("alice", "k1", "hash", {"session_id": "s1"})
    for session_id in ("s1", "s2"):
        await store.create(session_meta(session_id), log_entries(session_id, 1, 1), key)
    await store.find_key("alice", "k1")
    await store.find_key("alice", "k2")
    await store.close()
    assert len(seconds) == 2
    assert all(0 < number < 5 for number in seconds)
    assert len(repeated) == 2
