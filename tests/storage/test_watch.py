"""Who watches a store is told of what it writes; reading goes a little at a time."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from redis.asyncio import Redis

from chatserve.storage.session_store import MAX_LOG_READS, IdempotencyKey, SessionStore, StoreWatch
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


async def test_few_logs_are_read_at_a_time(store: SessionStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many readers at once leave room between their reads for what else is to be done, and all get their log."""
    await store.create(session_meta("s1"), log_entries("s1", 1, 3))
    execute, running, most = store._execute, 0, 0

    async def counted(*command: Any) -> Any:
        nonlocal running, most
        running += 1
        most = max(most, running)
        try:
            return await execute(*command)
        finally:
            running -= 1

    monkeypatch.setattr(store, "_execute", counted)
    logs = await asyncio.gather(*(store.read_log("s1", 0, 10) for _ in range(20)))
    assert logs == [log_entries("s1", 1, 3)] * 20
    assert most == MAX_LOG_READS
