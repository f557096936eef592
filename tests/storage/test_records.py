"""The records that eviction reads: written without waiting, read as changes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from redis.asyncio import Redis

from chatserve.storage import records as records_module
from chatserve.storage.connection import open_redis
from chatserve.storage.record_reader import RedisRecordReader
from chatserve.storage.records import RedisSessionRecords
from chatserve.storage.session_store import SessionStore
from kvstore.records import SessionRecord
from tests.storage.fakes import session_meta


class Clock:
    """Seconds since 1970, set by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def records(redis: Redis, store: SessionStore, clock: Clock) -> AsyncIterator[RedisSessionRecords]:
    """The records of instance one, which serves the sessions s1 to s3."""
    for session_id in ("s1", "s2", "s3"):
        await store.create(session_meta(session_id), [])
    records = RedisSessionRecords(redis, "one", clock=clock)
    yield records
    await records.close()


@pytest.fixture
def reader(url: str) -> Iterator[RedisRecordReader]:
    """The planner's side."""
    reader = RedisRecordReader(url)
    yield reader
    reader.close()


async def test_a_record_is_read_as_it_was_touched(records: RedisSessionRecords, reader: RedisRecordReader) -> None:
    """Touches of one session add up; what was never said is at rest."""
    records.touch("s1", last_activity_s=999.25, turns=2, connected=True)
    records.touch("s1", turns=3, typing=True, tokens=1234, priority=-1)
    records.touch("s2")
    await records.close()
    assert reader.changed_since(0) == [
        SessionRecord(
            session_id="s1",
            last_activity_s=999.25,
            turns=3,
            tokens=1234,
            think_time_s=0.0,
            connected=True,
            typing=True,
            priority=-1,
            pinned=False,
            owner="one",
        ),
        SessionRecord(
            session_id="s2",
            last_activity_s=0.0,
            turns=0,
            tokens=0,
            think_time_s=0.0,
            connected=False,
            typing=False,
            priority=0,
            pinned=False,
            owner="one",
        ),
    ]


async def test_only_changes_since_then_are_read(
    records: RedisSessionRecords, reader: RedisRecordReader, clock: Clock
) -> None:
    """A pass of the planner sees what changed at or after the time it asks for, oldest change first."""
    for session_id in ("s3", "s1", "s2"):
        records.touch(session_id, connected=True)
        await settled(records)
        clock.now += 1
    records.touch("s1", connected=False)
    await settled(records)
    assert [record.session_id for record in reader.changed_since(1001)] == ["s2", "s1"]
    assert reader.changed_since(1004) == []


async def settled(records: RedisSessionRecords) -> None:
    """Wait until nothing is on its way to Redis."""
    await records.close()


async def test_a_deleted_session_gets_no_record_back(
    records: RedisSessionRecords, reader: RedisRecordReader, store: SessionStore, redis: Redis
) -> None:
    """A touch that comes after the deletion leaves nothing in Redis."""
    await store.delete("s1", "acme")
    records.touch("s1", connected=False)
    await records.close()
    assert reader.changed_since(0) == []
    assert await redis.keys("*s1*") == []


@pytest.mark.parametrize("num_steps", range(8))
async def test_closing_in_mid_send_loses_nothing(
    num_steps: int, records: RedisSessionRecords, reader: RedisRecordReader
) -> None:
    """Whenever the end comes, what was touched before is written."""
    records.touch("s1", turns=5)
    for _ in range(num_steps):
        await asyncio.sleep(0)
    await records.close()
    assert [record.turns for record in reader.changed_since(0)] == [5]


async def test_touches_wait_for_redis_and_keep_the_latest(
    url: str, store: SessionStore, reader: RedisRecordReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With Redis away a touch neither waits nor fails; once it is back, what was said last is written."""
    monkeypatch.setattr(records_module, "RETRY_DELAY_S", 0.01)
    await store.create(session_meta("s1"), [])
    link = tmp_path / "redis.sock"
    link.symlink_to(url.removeprefix("unix://"))
    async with open_redis(f"unix://{link}", tmp_path) as redis:
        records = RedisSessionRecords(redis, "one")
        link.unlink()
        await redis.connection_pool.disconnect()
        records.touch("s1", turns=1, connected=True)
        await asyncio.sleep(0.03)
        records.touch("s1", turns=2)
        await asyncio.sleep(0.03)
        link.symlink_to(url.removeprefix("unix://"))
        async with asyncio.timeout(5):
            while not (written := reader.changed_since(0)):
                await asyncio.sleep(0.01)
        assert [(record.turns, record.connected) for record in written] == [(2, True)]
        await records.close()


async def test_what_waits_is_bounded(
    records: RedisSessionRecords, reader: RedisRecordReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond the bound the session that was touched longest ago is forgotten: records are hints."""
    monkeypatch.setattr(records_module, "MAX_WAITING_SESSIONS", 2)
    records.touch("s1", turns=1)
    records.touch("s2", turns=1)
    records.touch("s1", turns=2)
    records.touch("s3", turns=1)
    await records.close()
    assert {record.session_id: record.turns for record in reader.changed_since(0)} == {"s1": 2, "s3": 1}


async def test_nothing_is_written_after_the_end(records: RedisSessionRecords, reader: RedisRecordReader) -> None:
    """A touch behind `close` starts nothing that would outlive its Redis."""
    await records.close()
    records.touch("s1", turns=1)
    await asyncio.sleep(2 * records_module.GATHER_S)
    assert reader.changed_since(0) == []


def test_a_reader_without_redis_says_so(tmp_path: Path) -> None:
    """The planner goes on with what it knew, but must know that it missed something."""
    reader = RedisRecordReader(f"unix://{tmp_path}/nothing.sock")
    with pytest.raises(OSError, match="Redis does not answer"):
        reader.changed_since(0)
    reader.close()
