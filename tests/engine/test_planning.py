"""The engine evicts by session records once it is told where they are."""

from __future__ import annotations

import asyncio
import time

from chatserve.engine.build import build
from chatserve.engine.config import EngineConfig
from chatserve.storage.connection import open_redis, socket_url
from chatserve.storage.records import RedisSessionRecords
from chatserve.storage.session_store import SessionMeta, SessionStore
from tests.engine.fakes import run_until_idle, submit

MIB = 1 << 20


def engine():
    """The bundled model with memory for about three of the sessions below."""
    core, _ = build(EngineConfig(model="bundled", device="cpu", num_threads=1, kv_device_bytes=4 * MIB))
    return core


def talk(core, session_id, first):
    """A turn of 150 tokens."""
    submit(core, f"{session_id}-{first}", session_id, [first, *range(300, 449)], max_output_tokens=2)
    run_until_idle(core, check=False)


async def test_a_pinned_session_outlives_later_ones(tmp_path):
    """Its record in Redis keeps the oldest session on the device while younger ones are evicted."""
    core = engine()
    async with open_redis(None, tmp_path) as redis:
        store = SessionStore(redis, "me", durable=True)
        for name in ("kept", "a", "b", "c", "d"):
            await store.create(SessionMeta(id=name, tenant="t", created_at=1, updated_at=1), [])
        records = RedisSessionRecords(redis, "me")
        records.touch("kept", last_activity_s=time.time(), turns=1, tokens=150, pinned=True)
        await asyncio.sleep(0.4)
        talk(core, "kept", 10)
        core.handle({"verb": "read_records", "url": socket_url(redis)})
        core.handle({"verb": "read_records", "url": socket_url(redis)})
        await asyncio.sleep(2.5)
        for first, name in enumerate("abcd"):
            await asyncio.to_thread(talk, core, name, 20 + first)
        assert core.store.stats().evicted_pages > 0
        assert core.store.resident_tokens("kept") > 140
        await records.close()
        await store.close()
        core.close(1.0)


def test_without_redis_the_engine_goes_on(caplog):
    """Records that cannot be read are said once; evictions go by age."""
    core = engine()
    core.handle({"verb": "read_records", "url": "redis://127.0.0.1:1/0"})
    for first in range(6):
        talk(core, f"s{first}", 30 + first)
    time.sleep(1.5)
    assert core.store.stats().evicted_pages > 0
    assert caplog.text.count("session records cannot be read") == 1
    core.close(1.0)
