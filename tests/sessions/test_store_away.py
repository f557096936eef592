"""The store goes away and comes back: nothing accepted is lost, nothing hangs, nothing is written twice."""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from chatserve.errors import ServiceError, Unavailable
from chatserve.protocol.codec import from_wire
from chatserve.sessions.limits import SessionLimits
from chatserve.storage.connection import open_redis
from chatserve.storage.embedded import EmbeddedRedis
from chatserve.storage.session_store import StorageUnavailable
from chatserve.text.pipeline import TextPipeline
from tests.sessions.conftest import (
    TERMINAL,
    TOKENIZER,
    Chat,
    Stage,
    assert_coherent,
    command,
    pseudo_random_token,
    saying,
)
from tests.sessions.fakes import FakeEngine

PATIENT = SessionLimits(delta_interval_s=0.0, store_retry_s=0.002, requeue_delay_s=0.002, cancel_grace_s=0.2)
IMPATIENT = SessionLimits(
    delta_interval_s=0.0, store_retry_s=0.002, requeue_delay_s=0.002, turn_buffer_s=0.03, cancel_grace_s=0.2
)


async def test_a_short_absence_is_not_noticed(stage: Stage) -> None:
    """Events wait while the store is away for a moment; the reply is whole and its events are in order."""
    engine = FakeEngine(pseudo_random_token, gated=True)
    line = stage.line()
    chat = await stage.start(engine, line, PATIENT)
    session_id = await chat.create()
    await chat.send(session_id, "a", max_output_tokens=30, ignore_eos=True)
    engine.allow(5)
    await chat.events(session_id, until=["response.output_text.delta"])
    for _ in range(3):
        line.away = True
        engine.allow(8)
        await asyncio.sleep(0.02)
        line.away = False
        await asyncio.sleep(0.01)
    engine.allow(100)
    events = await chat.events(session_id)
    assert_coherent(events)
    assert events[-1]["type"] == "response.incomplete"
    assert events[-1]["response"]["usage"]["output_tokens"] == 30


@pytest.mark.parametrize("num_lost", [1, 3])
async def test_a_lost_answer_is_not_written_twice(stage: Stage, num_lost: int) -> None:
    """Writes that were carried out though they failed are found, not repeated."""
    engine = FakeEngine(pseudo_random_token, gated=True)
    line = stage.line()
    chat = await stage.start(engine, line, PATIENT)
    session_id = await chat.create()
    await chat.send(session_id, "a", max_output_tokens=30, ignore_eos=True)
    for _ in range(4):
        engine.allow(7)
        line.lose_answers = num_lost
        await asyncio.sleep(0.01)
    engine.allow(100)
    events = await chat.events(session_id)
    assert_coherent(events)
    stored = await stage.stores[0].read_log(session_id, 0, 1000)
    assert [from_wire(entry.wire) for entry in stored] == events


async def test_a_long_absence_ends_the_turn_and_says_so(stage: Stage) -> None:
    """After the bound followers get an error without seq, generation ends, and the terminal event comes when it can."""
    engine = FakeEngine(saying("One two three four"), gated=True)
    line = stage.line()
    chat = await stage.start(engine, line, IMPATIENT)
    session_id = await chat.create()
    await chat.send(session_id, "a")
    engine.allow(2)
    await chat.events(session_id, until=["response.output_text.delta"])
    async with aclosing(chat.manager.follow(session_id, (await chat.state(session_id))["head_seq"])) as entries:
        line.away = True
        engine.allow(2)
        async with asyncio.timeout(5):
            notice = await anext(entries)
        error = from_wire(notice.wire)
        assert (notice.seq, error["type"], error["session_id"]) == (0, "error", session_id)
        assert error["error"]["code"] == "storage_unavailable"
        assert "seq" not in error
        await asyncio.sleep(0.05)
        line.away = False
        async with asyncio.timeout(5):
            later = [from_wire((await anext(entries)).wire)]
            while later[-1]["type"] not in TERMINAL:
                later.append(from_wire((await anext(entries)).wire))
    assert later[-1]["type"] == "response.failed"
    assert later[-1]["response"]["error"]["code"] == "storage_unavailable"
    said = TOKENIZER.decode(TOKENIZER.encode("One two three four", add_special_tokens=False)[:4])
    assert later[-1]["response"]["text"] == said
    assert_coherent(await chat.events(session_id))
    engine.allow(9)
    assert (await chat.ask(session_id, "b", max_output_tokens=1, parent_id="root"))["type"] == "response.incomplete"


async def test_too_much_text_ends_the_turn_as_well(stage: Stage) -> None:
    """Not only time is bounded: a turn whose text outgrows its buffer ends."""
    limits = SessionLimits(delta_interval_s=0.0, store_retry_s=0.002, turn_buffer_bytes=40, cancel_grace_s=0.2)
    engine = FakeEngine(lambda ids: 70, gated=True)
    line = stage.line()
    chat = await stage.start(engine, line, limits)
    session_id = await chat.create()
    await chat.send(session_id, "a")
    engine.allow(1)
    await chat.events(session_id, until=["response.output_text.delta"])
    line.away = True
    engine.allow(200)
    await asyncio.sleep(0.02)
    line.away = False
    events = await chat.events(session_id)
    assert_coherent(events)
    assert events[-1]["response"]["error"]["code"] == "storage_unavailable"
    assert len(events[-1]["response"]["text"]) < 100


async def test_a_reply_that_ends_while_the_store_is_away_is_complete(stage: Stage) -> None:
    """An absence within the bounds costs nothing, also if the engine was done meanwhile."""
    engine = FakeEngine(saying("One two three four"), gated=True)
    line = stage.line()
    chat = await stage.start(engine, line, PATIENT)
    session_id = await chat.create()
    await chat.send(session_id, "a")
    await asyncio.sleep(0.01)
    line.away = True
    engine.allow(100)
    await asyncio.sleep(0.05)
    line.away = False
    events = await chat.events(session_id)
    assert_coherent(events)
    assert (events[-1]["type"], events[-1]["response"]["text"]) == ("response.completed", "One two three four")


async def test_commands_fail_while_the_store_is_away_and_work_after(stage: Stage) -> None:
    """Nothing is accepted that is not stored; the same commands work when the store is back."""
    line = stage.line()
    chat = await stage.start(FakeEngine(saying("One")), line, PATIENT)
    session_id = await chat.create()
    line.away = True
    attempts: list[Any] = [
        lambda: chat.create(),
        lambda: chat.send(session_id, "a", key="same"),
        lambda: chat.manager.update_session("t", command("session.update", session_id=session_id, title="x")),
        lambda: chat.manager.delete_session("t", session_id),
    ]
    for attempt in attempts:
        with pytest.raises(StorageUnavailable) as refusal:
            await attempt()
        assert refusal.value.code == "storage_unavailable"
    line.away = False
    assert (await chat.ask(session_id, "a", key="same"))["response"]["text"] == "One"
    assert (await chat.state(session_id))["num_messages"] == 2


async def test_a_turn_accepted_without_an_answer_runs(stage: Stage) -> None:
    """The accept is stored but its answer is lost: the turn runs, and the client's repetition finds it."""
    line = stage.line()
    chat = await stage.start(FakeEngine(saying("One")), line, PATIENT)
    session_id = await chat.create()
    line.lose_answers = 1
    with pytest.raises(StorageUnavailable):
        await chat.send(session_id, "a", key="same")
    events = await chat.events(session_id)
    again = await chat.send(session_id, "a", key="same")
    assert_coherent(events)
    assert again.duplicate
    assert again.response_id == events[-1]["response"]["id"]
    assert events[-1]["response"]["text"] == "One"


async def test_two_lost_answers_in_a_row_lose_no_turn(stage: Stage) -> None:
    """A turn accepted without an answer, while an earlier lost answer is still being looked into, runs as well."""
    line = stage.line()
    chat = await stage.start(FakeEngine(saying("One")), line, PATIENT)
    session_id = await chat.create()
    line.lose_answers = 2
    with pytest.raises(StorageUnavailable):
        await chat.manager.update_session("t", command("session.update", session_id=session_id, title="new"))
    with pytest.raises(StorageUnavailable):
        await chat.send(session_id, "a")
    events = await chat.events(session_id)
    assert_coherent(events)
    assert events[-1]["response"]["text"] == "One"


async def test_an_update_without_an_answer_is_seen(stage: Stage) -> None:
    """A change that was stored though its answer was lost shows to followers and in the session."""
    line = stage.line()
    chat = await stage.start(FakeEngine(saying("One")), line, PATIENT)
    session_id = await chat.create()
    line.lose_answers = 1
    with pytest.raises(StorageUnavailable):
        await chat.manager.update_session("t", command("session.update", session_id=session_id, title="new"))
    events = await chat.events(session_id, until=["session.updated"])
    assert events[-1]["session"]["title"] == (await chat.state(session_id))["title"] == "new"


async def test_a_log_that_went_on_without_us_is_taken_as_it_is(stage: Stage) -> None:
    """A late write of our own that nobody waited for any more: the store has the truth, readers attach again."""
    chat = await stage.start(FakeEngine(saying("One")), limits=PATIENT)
    session_id = await chat.create()
    await chat.ask(session_id, "a")
    head_seq = (await chat.state(session_id))["head_seq"]
    follower = asyncio.create_task(chat.events(session_id, head_seq, until=["never"]))
    await asyncio.sleep(0.01)
    entry = (await stage.stores[0].read_log(session_id, 0, 1))[0]
    late = type(entry)(head_seq + 1, entry.wire)
    await stage.stores[0].append(session_id, [late], expected_head=head_seq, meta={"title": "late"})
    with pytest.raises(Unavailable):
        await chat.send(session_id, "b", parent_id="root")
    with pytest.raises(Unavailable, match="attach again"):
        await follower
    assert (await _eventually_sent(chat, session_id))["type"] == "response.completed"
    assert (await chat.state(session_id))["title"] == "late"


async def _eventually_sent(chat: Chat, session_id: str) -> Any:
    while True:
        try:
            return await chat.ask(session_id, "b", parent_id="root")
        except ServiceError:
            await asyncio.sleep(0.005)


async def test_a_session_taken_over_is_left_to_its_new_owner(stage: Stage) -> None:
    """When another server has the session, ours writes nothing more and its readers are told to come back."""
    first_engine = FakeEngine(saying("One two three"), gated=True)
    first = await stage.start(first_engine, limits=PATIENT)
    session_id = await first.create()
    await first.send(session_id, "a")
    first_engine.allow(1)
    await first.events(session_id, until=["response.output_text.delta"])
    head_seq = (await first.state(session_id))["head_seq"]
    follower = asyncio.create_task(first.events(session_id, head_seq))
    await asyncio.sleep(0)
    second = await stage.start(FakeEngine(saying("One two three")), limits=PATIENT)
    events = await second.events(session_id)
    first_engine.allow(100)
    with pytest.raises(Unavailable):
        await follower
    while first.manager.num_running:
        await asyncio.sleep(0.005)
    assert_coherent(events)
    assert events[-1]["response"]["text"] == "One two three"
    stored = await stage.stores[0].read_log(session_id, 0, 1000)
    assert [entry.seq for entry in stored] == list(range(1, len(events) + 1))


async def test_a_reader_of_old_events_waits_for_the_store(stage: Stage) -> None:
    """A follower whose next events are in the store only is not thrown out while the store is away."""
    line = stage.line()
    limits = SessionLimits(delta_interval_s=0.0, store_retry_s=0.002, tail_entries=1)
    chat = await stage.start(FakeEngine(saying("One")), line, limits)
    session_id = await chat.create()
    terminal = await chat.ask(session_id, "a")
    line.away = True
    reading = asyncio.create_task(chat.events(session_id))
    await asyncio.sleep(0.02)
    assert not reading.done()
    line.away = False
    assert (await reading)[-1] == terminal


async def test_a_redis_that_is_killed_costs_nothing(text: TextPipeline, tmp_path: Path) -> None:
    """The real thing dies twice in mid-answer and is started again: one whole reply, every event once."""
    server = EmbeddedRedis(tmp_path / "data")
    await server.start()
    try:
        async with open_redis(f"unix://{server.socket_path}", tmp_path) as redis:
            stage = Stage(redis, text)
            chat = await stage.start(FakeEngine(pseudo_random_token, pace_s=0.01), limits=PATIENT)
            session_id = await chat.create()
            await chat.send(session_id, "a", max_output_tokens=60, ignore_eos=True)
            for _ in range(2):
                await asyncio.sleep(0.15)
                assert server.pid is not None
                os.kill(server.pid, signal.SIGKILL)
            events = await chat.events(session_id)
            stored = await stage.stores[0].read_log(session_id, 0, 1000)
            await chat.manager.close()
            await stage.stores[0].close()
    finally:
        await server.stop()
    assert_coherent(events)
    assert events[-1]["response"]["usage"]["output_tokens"] == 60
    assert [from_wire(entry.wire) for entry in stored] == events
