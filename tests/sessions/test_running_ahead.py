"""The engine begins with a turn while the turn is still being written, and stops where that fails."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from chatserve.engine.api import GenerationRequest, Progress
from chatserve.errors import Unavailable
from chatserve.sessions.limits import SessionLimits
from chatserve.storage.session_store import StorageUnavailable
from tests.sessions.conftest import Stage, assert_coherent, pseudo_random_token
from tests.sessions.fakes import FakeEngine, UnreliableStore

LIMITS = SessionLimits(delta_interval_s=0.0, store_retry_s=0.002, requeue_delay_s=0.002)


class WatchedEngine(FakeEngine):
    """Tells when a request begins, and how many have been left or have ended."""

    def __init__(self, **options: Any) -> None:
        super().__init__(pseudo_random_token, **options)
        self.begun = asyncio.Event()
        self.num_over = 0

    async def generate(self, request: GenerationRequest) -> AsyncIterator[Progress]:
        self.begun.set()
        try:
            async for progress in super().generate(request):
                yield progress
        finally:
            self.num_over += 1


class WaitingStore(UnreliableStore):
    """Writes an event batch only once the engine has begun."""

    def __init__(self, line: UnreliableStore, engine: WatchedEngine) -> None:
        super().__init__(line._store)
        self._engine = engine
        self.refuses = False

    async def append(self, *arguments: Any, **options: Any) -> Any:
        """Without an engine that runs ahead this waits for ever."""
        async with asyncio.timeout(5):
            await self._engine.begun.wait()
        if self.refuses:
            raise StorageUnavailable("Redis is away")
        return await self._store.append(*arguments, **options)


async def test_the_engine_begins_before_the_turn_is_written(stage: Stage) -> None:
    """Writing takes a while on a disk; the first token's way does not wait for it, and the events are in order."""
    engine = WatchedEngine()
    chat = await stage.start(engine, WaitingStore(stage.line(), engine), LIMITS)
    session_id = await chat.create()
    await chat.send(session_id, "a", max_output_tokens=5, ignore_eos=True)
    events = await chat.events(session_id)
    assert_coherent(events)
    assert events[-1]["response"]["usage"]["output_tokens"] == 5
    assert len(engine.requests) == engine.num_over == 1


async def test_whoever_is_about_to_speak_has_the_history_warmed(stage: Stage) -> None:
    """Attaching or typing tells the engine of the history once, not at every key; a new session has none."""
    engine = WatchedEngine()
    chat = await stage.start(engine, None, LIMITS)
    session_id = await chat.create()
    await chat.manager.typing("t", session_id)
    assert engine.warmed == []
    await chat.send(session_id, "a", max_output_tokens=5, ignore_eos=True)
    events = await chat.events(session_id)
    for _ in range(3):
        await chat.manager.typing("t", session_id)
        await chat.manager.attach("t", session_id, None, None)
    (warmed,) = engine.warmed
    assert warmed[:2] == (session_id, "t")
    assert len(warmed[2]) == events[-1]["response"]["usage"]["total_tokens"]


async def test_a_turn_that_cannot_be_written_is_taken_back(stage: Stage) -> None:
    """Refused by the store, it leaves the engine and the log; the session goes on with the next one."""
    engine = WatchedEngine(gated=True)
    line = WaitingStore(stage.line(), engine)
    chat = await stage.start(engine, line, LIMITS)
    session_id = await chat.create()
    line.refuses = True
    with pytest.raises(Unavailable):
        await chat.send(session_id, "a", max_output_tokens=5)
    assert engine.num_over == len(engine.requests) == 1
    line.refuses = False
    engine.allow(100)
    await chat.send(session_id, "b", max_output_tokens=5, ignore_eos=True)
    events = await chat.events(session_id)
    assert_coherent(events)
    assert [event["message"]["content"][0]["text"] for event in events if event["type"] == "message.created"] == ["b"]
