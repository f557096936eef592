"""Sessions that nobody used for long are deleted with everything; those in use stay."""

from __future__ import annotations

import asyncio

import pytest

from chatserve.errors import NotFound
from chatserve.sessions import retention
from chatserve.sessions.retention import Retention
from chatserve.storage.session_store import StorageUnavailable
from tests.sessions.conftest import Chat, pseudo_random_token
from tests.sessions.fakes import FakeEngine

TTL_S = 60.0


class Hours:
    """A clock that a test moves; sessions themselves go by the real one."""

    def __init__(self, time_s: float) -> None:
        self.time_s = time_s

    def __call__(self) -> float:
        return self.time_s


async def started(stage, **engine):
    """A manager, and a retention whose clock runs ahead of it by more than the time to live."""
    chat = await stage.start(FakeEngine(pseudo_random_token, **engine))
    changed = []
    ahead = Hours(chat.manager._clock() + TTL_S + 1)
    return chat, Retention(stage.stores[-1], chat.manager, TTL_S, on_deleted=changed.append, clock=ahead), changed


async def test_old_sessions_go_with_everything(stage, redis):
    """Sessions of every tenant go, with messages, log, keys and record; their tenants' lists are told."""
    chat, keeper, changed = await started(stage)
    other = Chat(chat.manager, "other")
    ids = [await chat.create(), await chat.create(), await other.create()]
    await chat.ask(ids[0], "Hello", max_output_tokens=4)
    assert await keeper.sweep() == 3
    assert sorted(changed) == ["other", "t", "t"]
    for owner, session_id in zip((chat, chat, other), ids, strict=True):
        with pytest.raises(NotFound):
            await owner.state(session_id)
    left = [key for key in await redis.keys("*") if not key.startswith((b"{t}:key", b"{other}:key"))]
    assert left == []
    assert await keeper.sweep() == 0


async def test_young_sessions_stay(stage):
    """What was used within the time stays, to the millisecond."""
    chat, keeper, _ = await started(stage)
    session_id = await chat.create()
    keeper._clock.time_s = (await chat.state(session_id))["updated_at"] / 1000 + TTL_S
    assert await keeper.sweep() == 0
    keeper._clock.time_s += 0.002
    assert await keeper.sweep() == 1


async def test_sessions_in_use_stay(stage):
    """A session that somebody follows, or that is being answered, is not touched however old it is."""
    chat, keeper, _ = await started(stage, gated=True)
    followed, answering = await chat.create(), await chat.create()
    following = asyncio.create_task(chat.events(followed, until=["session.deleted"]))
    await chat.send(answering, "Hello", max_output_tokens=2)
    await asyncio.sleep(0.05)
    assert await keeper.sweep() == 0
    following.cancel()
    await asyncio.gather(following, return_exceptions=True)
    assert await keeper.sweep() == 1
    assert (await chat.state(answering))["active_response_id"]


async def test_a_sweep_is_bounded(stage, monkeypatch):
    """One sweep deletes so many and no more; the next ones go on."""
    monkeypatch.setattr(retention, "MAX_SWEPT", 2)
    chat, keeper, _ = await started(stage)
    for _ in range(5):
        await chat.create()
    assert [await keeper.sweep() for _ in range(4)] == [2, 2, 1, 0]


async def test_it_goes_on_when_the_store_was_away(stage, monkeypatch):
    """A store that is away delays the sweep and does not end it."""
    monkeypatch.setattr(retention, "MIN_INTERVAL_S", 0.01)
    chat, keeper, _ = await started(stage)
    keeper._ttl_s = 0.01
    session_id = await chat.create()
    find = keeper._store.sessions_before
    failures = [StorageUnavailable("Redis is away")] * 2

    class Away:
        async def sessions_before(self, time_ms, limit):
            if failures:
                raise failures.pop()
            return await find(time_ms, limit)

    keeper._store = Away()
    running = asyncio.create_task(keeper.run())
    try:
        async with asyncio.timeout(5):
            while await chat.manager.list_sessions("t"):
                await asyncio.sleep(0.01)
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    with pytest.raises(NotFound):
        await chat.state(session_id)
