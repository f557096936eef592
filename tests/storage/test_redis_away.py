"""The store while Redis dies, restarts, hangs or loses data: nothing acknowledged is lost, nothing is written twice."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from redis.asyncio import Redis
from redis.asyncio.client import Pipeline
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import BusyLoadingError, NoScriptError, ReadOnlyError, ResponseError
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from chatserve.storage.connection import open_redis
from chatserve.storage.embedded import EmbeddedRedis
from chatserve.storage.health import Health, is_away
from chatserve.storage.scripts import COMMIT
from chatserve.storage.session_store import FenceLost, IdempotencyKey, SessionStore, StorageUnavailable
from chatserve.storage.writer import CommitWriter
from tests.storage.fakes import log_entries, log_entry, session_meta

NUM_SESSIONS = 8
NO_RETRY = Retry(NoBackoff(), 0)


class Stand:
    """A Redis of its own that may be killed, with a store on it."""

    def __init__(self, server: EmbeddedRedis, redis: Redis) -> None:
        self.server = server
        self.store = SessionStore(redis, "one", durable=True)

    def signal(self, number: signal.Signals) -> None:
        assert self.server.pid is not None
        os.kill(self.server.pid, number)


@pytest.fixture
async def stand(tmp_path: Path) -> AsyncIterator[Stand]:
    """A stand that ends with the test."""
    server = EmbeddedRedis(tmp_path / "data")
    await server.start()
    async with open_redis(f"unix://{server.socket_path}", tmp_path) as redis:
        stand = Stand(server, redis)
        yield stand
        await stand.store.close()
    await server.stop()


async def until_back(store: SessionStore) -> None:
    """Wait until Redis answers, whether its loss was noticed already or not."""
    while True:
        try:
            return await store.ping()
        except StorageUnavailable:
            await store.wait_available()


async def append_with_retry(store: SessionStore, session_id: str, seq: int) -> None:
    """Append one event as a session manager does: the same one again once Redis is back."""
    while True:
        try:
            await store.append(session_id, log_entries(session_id, seq, 1), expected_head=seq - 1)
        except StorageUnavailable:
            await store.wait_available()
        else:
            return


async def append_until(store: SessionStore, session_id: str, acknowledged: dict[str, int], end: asyncio.Event) -> None:
    while not end.is_set():
        await append_with_retry(store, session_id, acknowledged[session_id] + 1)
        acknowledged[session_id] += 1


async def kill_while_appending(stand: Stand, num_kills: int, seed: int) -> None:
    """Kill Redis at random instants under appending sessions, then compare the logs with what was acknowledged."""
    generator = random.Random(seed)
    acknowledged = {f"s{number}": 0 for number in range(NUM_SESSIONS)}
    for session_id in acknowledged:
        await stand.store.create(session_meta(session_id), [])
    end = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        for session_id in acknowledged:
            group.create_task(append_until(stand.store, session_id, acknowledged, end))
        for _ in range(num_kills):
            await asyncio.sleep(generator.uniform(0.02, 0.12))
            await until_back(stand.store)
            stand.signal(signal.SIGKILL)
        end.set()
    await until_back(stand.store)
    for session_id, head in acknowledged.items():
        log = await stand.store.read_log(session_id, 0, head + 10)
        assert head > 0
        assert log == log_entries(session_id, 1, head)


@pytest.mark.parametrize("seed", [1, 2])
async def test_a_kill_in_mid_append_loses_nothing_and_repeats_nothing(stand: Stand, seed: int) -> None:
    """Five kills -9 of Redis: every log holds exactly what was acknowledged, without a gap."""
    await kill_while_appending(stand, num_kills=5, seed=seed)


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", range(100, 104))
async def test_hundreds_of_kills_lose_nothing(stand: Stand, seed: int) -> None:
    """The same, a hundred kills a seed."""
    await kill_while_appending(stand, num_kills=100, seed=seed)


async def test_a_lost_redis_is_said_at_once_and_noticed_when_it_is_back(url: str, tmp_path: Path) -> None:
    """While it is away everything fails with `storage_unavailable`; then service resumes by itself."""
    socket, link = Path(url.removeprefix("unix://")), tmp_path / "redis.sock"
    link.symlink_to(socket)
    async with open_redis(f"unix://{link}", tmp_path) as redis:
        await redis.flushall()
        store = SessionStore(redis, "one")
        await store.create(session_meta("s1"), [])
        assert store.available
        link.unlink()
        await redis.connection_pool.disconnect()
        for _ in range(2):
            with pytest.raises(StorageUnavailable):
                await store.append("s1", log_entries("s1", 1, 1), expected_head=0)
            with pytest.raises(StorageUnavailable) as caught:
                await store.load_meta("s1")
        assert not store.available
        assert (caught.value.code, caught.value.retryable) == ("storage_unavailable", True)
        link.symlink_to(socket)
        async with asyncio.timeout(5):
            await store.wait_available()
        await store.append("s1", log_entries("s1", 1, 1), expected_head=0)
        await store.close()


async def test_an_append_that_timed_out_but_arrived_is_done_when_repeated(stand: Stand) -> None:
    """Redis hangs past the timeout and carries the append out later: repeating it finds it there, with its key."""
    impatient = Redis(unix_socket_path=str(stand.server.socket_path), socket_timeout=0.2, protocol=2, retry=NO_RETRY)
    store = SessionStore(impatient, "one")
    await store.create(session_meta("s1"), [])
    stand.signal(signal.SIGSTOP)
    key = IdempotencyKey("s1", "k1", "hash", {})
    appends = [
        store.append("s1", [log_entry("s1", 1, "a")], expected_head=0, key=key),
        store.append("s1", [log_entry("s1", 2, "b")], expected_head=1),
    ]
    failures = await asyncio.gather(*appends, return_exceptions=True)
    assert [type(failure) for failure in failures] == [StorageUnavailable, StorageUnavailable]
    stand.signal(signal.SIGCONT)
    async with asyncio.timeout(5):
        await store.wait_available()
    assert await store.append("s1", [log_entry("s1", 1, "a")], expected_head=0, key=key) is None
    assert await store.append("s1", [log_entry("s1", 2, "b")], expected_head=1) is None
    assert await store.read_log("s1", 0, 10) == [log_entry("s1", 1, "a"), log_entry("s1", 2, "b")]
    await store.close()
    await impatient.aclose()


async def test_what_waits_behind_a_lost_batch_fails_with_it(redis: Redis) -> None:
    """A second append of a session never reports a lost fence only because the first one did not get through."""
    store = SessionStore(redis, "one")
    await store.create(session_meta("s1"), [])
    health = Health(redis.ping, first_delay_s=0.001)
    writer = CommitWriter(FailingOnce(redis), COMMIT, health, max_batch=1)
    results = await asyncio.gather(*(writer.run([b"k"] * 4, b"\x80") for _ in range(3)), return_exceptions=True)
    assert [type(result) for result in results] == [StorageUnavailable] * 3
    await health.close()  # a probe behind the client's end would open a connection that nobody closes


class FailingOnce(Redis):
    """A client of the same Redis whose first pipeline finds the connection lost."""

    def __init__(self, redis: Redis) -> None:
        super().__init__(connection_pool=redis.connection_pool)
        self.failed = False

    def pipeline(self, transaction: bool = True, shard_hint: str | None = None) -> Pipeline:
        if not self.failed:
            self.failed = True
            raise RedisConnectionError("lost")
        return super().pipeline(transaction, shard_hint)


async def test_cancelled_readers_never_get_each_others_answers(store: SessionStore) -> None:
    """Readers cancelled at any instant leave no answer behind in a connection that the next reader would take."""
    generator = random.Random(1)
    ids = [f"s{number}" for number in range(10)]
    for session_id in ids:
        await store.create(session_meta(session_id), [log_entry(session_id, 1, session_id * 100)])

    async def read(session_id: str) -> bool:
        return await store.read_log(session_id, 0, 10) == [log_entry(session_id, 1, session_id * 100)]

    for _ in range(30):
        readers = [asyncio.create_task(read(session_id)) for session_id in ids]
        await asyncio.sleep(generator.uniform(0, 0.004))
        for reader in generator.sample(readers, 5):
            reader.cancel()
        results = await asyncio.gather(*readers, return_exceptions=True)
        assert all(result is True or isinstance(result, asyncio.CancelledError) for result in results)


async def test_probing_goes_on_until_redis_answers() -> None:
    """After a loss every check fails with the reason, until a probe gets through."""
    probes = []

    async def probe() -> None:
        probes.append(len(probes))
        if len(probes) < 3:
            raise RedisConnectionError("not yet")

    health = Health(probe, first_delay_s=0.001)
    error = health.lost(ConnectionRefusedError("refused"))
    assert isinstance(error, StorageUnavailable)
    with pytest.raises(StorageUnavailable, match="refused"):
        health.check()
    async with asyncio.timeout(5):
        await health.wait_available()
    assert probes == [0, 1, 2]
    health.check()


@pytest.mark.parametrize(
    ("error", "away"),
    [
        (ConnectionRefusedError("refused"), True),
        (RedisTimeoutError("slow"), True),
        (BusyLoadingError("loading"), True),
        (ReadOnlyError("a replica"), True),
        (ResponseError("MISCONF Errors writing to the AOF file: No space left on device"), True),
        (ResponseError("OOM command not allowed"), True),
        (ResponseError("WRONGTYPE Operation against a key holding the wrong kind of value"), False),
        (NoScriptError("no script"), False),
        (ValueError("ours"), False),
    ],
)
def test_what_counts_as_away(error: Exception, away: bool) -> None:
    """Lost, loading, hanging, full or read only is away; a command that is wrong is a mistake of ours."""
    assert is_away(error) is away


async def test_too_many_waiting_writes_are_refused(redis: Redis) -> None:
    """The queue is bounded in writes and in bytes; what was taken in is written all the same."""
    health = Health(redis.ping)
    store = SessionStore(redis, "one")
    await store.create(session_meta("s1"), [])
    writer = CommitWriter(redis, COMMIT, health, max_waiting=2, max_waiting_bytes=100)
    waiting = [asyncio.create_task(writer.run([b"a", b"b", b"c", b"d"], b"\x80")) for _ in range(3)]
    results = await asyncio.gather(*waiting, return_exceptions=True)
    assert [isinstance(result, StorageUnavailable) for result in results] == [False, False, True]
    with pytest.raises(StorageUnavailable, match="are waiting"):
        await writer.run([b"a"], b"x" * 101)


async def test_a_caller_who_gave_up_does_not_hold_up_the_others(store: SessionStore) -> None:
    """A cancelled append that was not sent yet is not sent; the one after it fares as if it had not been there."""
    await store.create(session_meta("s1"), [])
    given_up = asyncio.create_task(store.append("s1", [log_entry("s1", 1, "a")], expected_head=0))
    other = asyncio.create_task(store.append("s1", [log_entry("s1", 1, "b")], expected_head=0))
    await asyncio.sleep(0)
    given_up.cancel()
    await other
    assert await store.read_log("s1", 0, 10) == [log_entry("s1", 1, "b")]


async def restart(server: EmbeddedRedis, redis: Redis) -> None:
    """End Redis and start it again: another process with another run id."""
    run_id = (await redis.info("server"))["run_id"]
    assert server.pid is not None
    os.kill(server.pid, signal.SIGTERM)
    while not await has_other_run_id(redis, run_id):
        await asyncio.sleep(0.01)


async def has_other_run_id(redis: Redis, run_id: str) -> bool:
    try:
        return bool((await redis.info("server"))["run_id"] != run_id)
    except RedisConnectionError:
        return False


async def test_a_restart_of_somebody_elses_redis_begins_a_new_epoch(tmp_path: Path) -> None:
    """Whoever does not know what was acknowledged begins a new epoch, once; with a durable Redis nobody does."""
    server = EmbeddedRedis(tmp_path / "data")
    await server.start()
    async with open_redis(f"unix://{server.socket_path}", tmp_path) as redis:
        store = SessionStore(redis, "one")
        await store.create(session_meta("s1"), log_entries("s1", 1, 3))
        assert (await store.take_fence("s1")).epoch == 1
        await restart(server, redis)
        assert (await SessionStore(redis, "two", durable=True).take_fence("s1", None)).epoch == 1
        await restart(server, redis)
        assert (await SessionStore(redis, "three").take_fence("s1")).epoch == 2
        assert (await SessionStore(redis, "four").take_fence("s1")).epoch == 2
        await restart(server, redis)
        assert (await SessionStore(redis, "four").take_fence("s1", acknowledged_head=3)).epoch == 2
    await server.stop()


async def test_a_log_behind_what_was_acknowledged_begins_a_new_epoch(store: SessionStore, redis: Redis) -> None:
    """An instance that saw event 3 acknowledged and finds event 2 at the head: appends fail, taking the fence helps."""
    await store.create(session_meta("s1"), log_entries("s1", 1, 2))
    with pytest.raises(FenceLost, match="event 2"):
        await store.append("s1", log_entries("s1", 4, 1), expected_head=3)
    meta = await store.take_fence("s1", acknowledged_head=3)
    assert (meta.epoch, meta.head_seq) == (2, 2)
    await store.append("s1", log_entries("s1", 3, 1), expected_head=2)
