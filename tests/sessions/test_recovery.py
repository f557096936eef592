"""A server that dies at any moment: its successor finishes what was accepted, with the text it would have had."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from typing import Any

import pytest

from chatserve.errors import Overloaded, Unavailable
from chatserve.protocol.events import response_resumed
from chatserve.sessions.limits import SessionLimits
from chatserve.sessions.session import Change, Draft, LiveSession
from chatserve.storage.scripts import session_key
from chatserve.storage.session_store import FenceLost, SessionStore
from tests.sessions.conftest import (
    LIMITS,
    TOKENIZER,
    Chat,
    Stage,
    assert_coherent,
    pseudo_random_token,
    saying,
)
from tests.sessions.fakes import FakeEngine

ONE_BY_ONE = SessionLimits(delta_interval_s=0.0, delta_tokens=1, store_retry_s=0.005, requeue_delay_s=0.005)
PACE_S = 0.004  # long enough for each token's text to be an event of its own
TURN: dict[str, Any] = {"max_output_tokens": 14, "seed": 7, "ignore_eos": True}
STOPPED: dict[str, Any] = {"stop": ["e fi", "never"]}


async def undisturbed(stage: Stage, engine: FakeEngine, **turn: Any) -> tuple[dict[str, Any], int]:
    """The terminal event of a turn that nothing interrupts, and the number of its events."""
    chat = await stage.start(engine, limits=ONE_BY_ONE)
    session_id = await chat.create()
    terminal = await chat.ask(session_id, "a", **turn)
    return terminal, terminal["seq"]


async def cut_and_continued(
    stage: Stage, make_engine: Any, cut_after: int, **turn: Any
) -> tuple[list[Any], FakeEngine, Chat, str]:
    """The events of a turn whose server dies right after the log has `cut_after` events, as its successor has them."""
    line = stage.line()
    line.cut_after = cut_after
    chat = await stage.start(make_engine(), line, ONE_BY_ONE)
    session_id = await chat.create()
    accepting = asyncio.create_task(chat.send(session_id, "a", **turn))
    await asyncio.wait({accepting, asyncio.create_task(line.cut.wait())}, return_when=asyncio.FIRST_COMPLETED)
    await line.cut.wait()
    accepting.cancel()
    engine = make_engine()
    successor = await stage.start(engine, limits=ONE_BY_ONE)
    return await successor.events(session_id), engine, successor, session_id


@pytest.mark.parametrize("cut_after", range(3, 20))
async def test_a_death_at_any_event_does_not_change_the_text(stage: Stage, cut_after: int) -> None:
    """Killed behind each event of a turn in turn: the successor resumes and ends with the undisturbed text and ids."""
    expected, num_events = await undisturbed(stage, FakeEngine(pseudo_random_token, pace_s=PACE_S), **TURN)
    cut_after = min(cut_after, num_events - 3)  # the last events are written in one step
    events, _, successor, session_id = await cut_and_continued(
        stage, lambda: FakeEngine(pseudo_random_token, pace_s=PACE_S), cut_after, **TURN
    )
    assert_coherent(events)
    is_resumed = "response.resumed" in [event["type"] for event in events]
    assert is_resumed or cut_after > num_events // 2  # else the last write held the end as well
    assert sum(event["type"] == "response.in_progress" for event in events) == 1
    response, undisturbed_response = events[-1]["response"], expected["response"]
    assert response["text"] == undisturbed_response["text"]
    assert response["usage"]["output_tokens"] == undisturbed_response["usage"]["output_tokens"] == 14
    assert response["usage"]["input_tokens"] == undisturbed_response["usage"]["input_tokens"]
    assert response.get("resumed", False) == is_resumed
    after = await successor.ask(session_id, "b", max_output_tokens=2)
    assert after["response"]["cache"]["result"] == ("hit" if is_resumed else "miss")
    assert "resumed" not in after["response"]


@pytest.mark.parametrize("cut_after", range(3, 14))
async def test_a_death_before_a_stop_string_still_stops_there(stage: Stage, cut_after: int) -> None:
    """Held-back text that may begin a stop string is neither lost nor shown by the successor."""
    reply = "One two three four five six"
    expected, num_events = await undisturbed(stage, FakeEngine(saying(reply), pace_s=PACE_S), **STOPPED)
    cut_after = min(cut_after, num_events - 1)
    events, _, _, _ = await cut_and_continued(
        stage, lambda: FakeEngine(saying(reply), pace_s=PACE_S), cut_after, **STOPPED
    )
    assert_coherent(events)
    assert events[-1]["response"]["text"] == expected["response"]["text"] == reply.partition("e fi")[0]
    assert events[-1]["response"]["usage"]["output_tokens"] == expected["response"]["usage"]["output_tokens"]


async def test_a_turn_survives_one_death_after_another(stage: Stage) -> None:
    """Servers that die every few events still get the reply done, without a contradiction."""
    expected, _ = await undisturbed(stage, FakeEngine(pseudo_random_token, pace_s=PACE_S), **TURN)
    line = stage.line()
    line.cut_after = 4
    chat = await stage.start(FakeEngine(pseudo_random_token, pace_s=PACE_S), line, ONE_BY_ONE)
    session_id = await chat.create()
    await chat.send(session_id, "a", **TURN)
    for _ in range(3):
        await line.cut.wait()
        line = stage.line()
        line.cut_after = 4
        chat = await stage.start(FakeEngine(pseudo_random_token, pace_s=PACE_S), line, ONE_BY_ONE)
    await line.cut.wait()
    last = await stage.start(FakeEngine(pseudo_random_token, pace_s=PACE_S), limits=ONE_BY_ONE)
    events = await last.events(session_id)
    assert_coherent(events)
    assert sum(event["type"] == "response.resumed" for event in events) == 4
    assert events[-1]["response"]["text"] == expected["response"]["text"]


async def test_the_successor_submits_what_was_logged(stage: Stage) -> None:
    """The engine is given prompt and logged tokens, counted as generated, with the seed drawn at accept."""
    first = FakeEngine(pseudo_random_token, pace_s=PACE_S)
    line = stage.line()
    line.cut_after = 9
    chat = await stage.start(first, line, ONE_BY_ONE)
    session_id = await chat.create()
    await chat.send(session_id, "a", max_output_tokens=14, ignore_eos=True)
    await line.cut.wait()
    second = FakeEngine(pseudo_random_token, pace_s=PACE_S)
    await (await stage.start(second, limits=ONE_BY_ONE)).events(session_id)
    before, after = first.requests[0], second.requests[0]
    assert after.num_generated > 0
    assert list(after.token_ids[: -after.num_generated]) == list(before.token_ids)
    assert (after.sampling, after.max_output_tokens, after.num_history) == (before.sampling, 14, 0)


async def test_a_continued_reply_can_be_interrupted_too(stage: Stage) -> None:
    """The second part of a reply in two parts goes on after a death, with the prompt of its path."""
    ids = TOKENIZER.encode("Hello é😀 you there", add_special_tokens=False)
    line = stage.line()
    chat = await stage.start(FakeEngine(saying("Hello é😀 you there"), pace_s=PACE_S), line, ONE_BY_ONE)
    session_id = await chat.create()
    first = await chat.ask(session_id, "a", max_output_tokens=len(ids) // 2)
    line.cut_after = first["seq"] + 4
    await chat.send(session_id)
    await line.cut.wait()
    engine = FakeEngine(saying("Hello é😀 you there"), pace_s=PACE_S)
    successor = await stage.start(engine, limits=ONE_BY_ONE)
    second = (await successor.events(session_id, first["seq"]))[-1]
    assert first["response"]["text"] + second["response"]["text"] == "Hello é😀 you there"


async def test_a_full_queue_after_a_restart_is_waited_for(stage: Stage) -> None:
    """Responses taken up again are not refused because all of them come at once."""
    line = stage.line()
    line.cut_after = 5
    chat = await stage.start(FakeEngine(pseudo_random_token, pace_s=PACE_S), line, ONE_BY_ONE)
    session_id = await chat.create()
    await chat.send(session_id, "a", **TURN)
    await line.cut.wait()
    engine = FakeEngine(pseudo_random_token, pace_s=PACE_S)
    engine.failure = Overloaded("full")
    successor = await stage.start(engine, limits=ONE_BY_ONE)
    while len(engine.requests) < 3:
        await asyncio.sleep(0.005)
    engine.failure = None
    assert (await successor.events(session_id))[-1]["type"] == "response.incomplete"


async def test_each_response_is_taken_up_once(stage: Stage) -> None:
    """More running sessions than may idle in memory: every response is continued, and by one turn only."""
    line = stage.line()
    chat = await stage.start(FakeEngine(pseudo_random_token, gated=True), line, ONE_BY_ONE)
    ids = [await chat.create() for _ in range(8)]
    for session_id in ids:
        await chat.send(session_id, "a", **TURN)
    line.cut.set()
    engine = FakeEngine(pseudo_random_token)
    successor = await stage.start(engine, limits=dataclasses.replace(ONE_BY_ONE, max_idle_sessions=1))
    for events in await asyncio.gather(*(successor.events(session_id) for session_id in ids)):
        assert_coherent(events)
    assert sorted({request.session_id for request in engine.requests}) == sorted(ids)
    assert len(engine.requests) == len(ids)


@pytest.mark.parametrize("why", ["model", "prompt", "ids"])
async def test_a_response_that_cannot_go_on_fails_with_its_text(stage: Stage, why: str) -> None:
    """Another model, a prompt or ids that no longer mean the same: what was logged is kept, `server_interrupted`."""
    line = stage.line()
    line.cut_after = 9
    chat = await stage.start(FakeEngine(pseudo_random_token, pace_s=PACE_S), line, ONE_BY_ONE)
    session_id = await chat.create()
    await chat.send(session_id, "a", **TURN | {"max_output_tokens": 200})  # far from its end at the cut
    await line.cut.wait()
    engine = FakeEngine(pseudo_random_token, pace_s=PACE_S)
    if why == "model":
        engine.info = type(engine.info)("other", 4096, 512, 4096, 65536, 64, "cpu", "float32", "none")
    await _spoil(stage, session_id, why)
    successor = await stage.start(engine, limits=ONE_BY_ONE)
    events = await successor.events(session_id)
    assert_coherent(events)
    error = events[-1]["response"]["error"]
    assert (events[-1]["type"], error["code"], error["retryable"]) == ("response.failed", "server_interrupted", True)
    assert len(events[-1]["response"]["text"]) > 0
    assert engine.requests == []
    assert (await successor.ask(session_id, "b", max_output_tokens=2))["type"] == "response.incomplete"


async def _spoil(stage: Stage, session_id: str, what: str) -> None:
    """Change what is stored as no server would."""
    store = stage.stores[-1]
    meta = await store.take_fence(session_id)
    if what == "prompt":
        user = next(m for m in (await store.load_messages(session_id)).values() if m.role == "user")
        user.token_ids.append(5)
        await store.append(session_id, [], expected_head=meta.head_seq, messages=[user])
    if what == "ids":
        key = f"{{{session_id}}}:log"
        entries = await stage.redis.xrange(key)
        entries[-1][1][b"t"] = b"\x05\0\0\0"
        await stage.redis.delete(key)
        for entry_id, fields in entries:
            await stage.redis.xadd(key, fields, id=entry_id)


async def test_a_session_deleted_meanwhile_does_not_stop_the_start(stage: Stage) -> None:
    """A stale entry in the list of running responses is no reason not to serve."""
    await stage.redis.sadd("sessions:active", "sess_gone")
    chat = await stage.start(FakeEngine(saying("One")))
    assert (await chat.ask(await chat.create(), "a"))["type"] == "response.completed"


async def test_a_cancel_during_recovery_is_heard(stage: Stage) -> None:
    """A response that is about to be taken up again can be cancelled."""
    line = stage.line()
    line.cut_after = 6
    chat = await stage.start(FakeEngine(pseudo_random_token, pace_s=PACE_S), line, ONE_BY_ONE)
    session_id = await chat.create()
    response_id = (await chat.send(session_id, "a", **TURN)).response_id
    await line.cut.wait()
    engine = FakeEngine(pseudo_random_token, gated=True)
    successor = await stage.start(engine, limits=ONE_BY_ONE)
    assert await successor.manager.cancel_response("t", session_id, response_id) == "cancelling"
    events = await successor.events(session_id)
    assert_coherent(events)
    assert events[-1]["type"] == "response.cancelled"


async def test_drain_refuses_new_turns_and_waits_for_running_ones(stage: Stage) -> None:
    """Draining: `server_draining` for new turns, duplicates still answered, running ones end if they can."""
    engine = FakeEngine(saying("One two"), gated=True)
    chat = await stage.start(engine)
    session_id, other_id = await chat.create(), await chat.create()
    accepted = await chat.send(session_id, "a", key="same")
    draining = asyncio.create_task(chat.manager.drain(5.0))
    await asyncio.sleep(0.01)
    with pytest.raises(Unavailable) as refusal:
        await chat.send(other_id, "b")
    assert refusal.value.code == "server_draining"
    assert (await chat.send(session_id, "a", key="same")).response_id == accepted.response_id
    engine.allow(100)
    await draining
    assert (await chat.events(session_id))[-1]["response"]["text"] == "One two"


async def test_what_outlasts_the_drain_goes_on_after_a_restart(stage: Stage) -> None:
    """A turn still running at the end of the drain stays in the log as running; the next server finishes it."""
    engine = FakeEngine(saying("One two three"), gated=True)
    chat = await stage.start(engine, limits=ONE_BY_ONE)
    session_id = await chat.create()
    await chat.send(session_id, "a")
    engine.allow(2)
    await chat.events(session_id, until=["response.output_text.delta"])
    await chat.manager.drain(0.02)
    assert chat.manager.num_running == 0
    assert await stage.stores[0].active_sessions() == [session_id]
    successor = await stage.start(FakeEngine(saying("One two three")), limits=LIMITS)
    events = await successor.events(session_id)
    assert_coherent(events)
    assert events[-1]["response"]["text"] == "One two three"


@pytest.mark.parametrize("cut_after", [3, 6, 12])
async def test_who_comes_right_after_a_restart_sees_what_was_logged(stage: Stage, cut_after: int) -> None:
    """Before the successor has taken a response up, its snapshot has the logged text, and later deltas join it."""
    line = stage.line()
    line.cut_after = cut_after
    chat = await stage.start(FakeEngine(pseudo_random_token, pace_s=PACE_S), line, ONE_BY_ONE)
    session_id = await chat.create()
    accepting = asyncio.create_task(chat.send(session_id, "a", **TURN))
    await line.cut.wait()
    accepting.cancel()
    successor = await stage.start(FakeEngine(pseudo_random_token, pace_s=PACE_S), limits=ONE_BY_ONE)
    attached = await successor.manager.attach("t", session_id, None, None)
    assert attached.snapshot is not None
    text = attached.snapshot["active_response"]["text"]
    events = await successor.events(session_id, attached.after_seq)
    assert next(event for event in events if "offset" in event)["offset"] == len(text)
    assert events[-1]["response"]["text"] == text + "".join(event.get("delta", "") for event in events)


@pytest.mark.parametrize("num_lost", [1, 3])
async def test_nothing_made_for_a_lost_log_joins_the_one_that_came_back(stage: Stage, num_lost: int) -> None:
    """A store that forgot the last events in mid-answer: a new epoch, and the reply whole again behind what is left."""
    engine = FakeEngine(saying("One two three four five"), gated=True)
    chat = await stage.start(engine, limits=dataclasses.replace(LIMITS, delta_interval_s=0.0))
    session_id = await chat.create()
    epoch = (await chat.state(session_id))["epoch"]
    await chat.send(session_id, "a")
    engine.allow(2)
    await chat.events(session_id, until=["response.output_text.delta"])
    keys = [session_key(session_id, part) for part in ("meta", "msgs", "log")]
    kept = {key: await stage.redis.dump(key) for key in keys}
    for _ in range(num_lost):
        head_seq = (await chat.state(session_id))["head_seq"]
        engine.allow(1)
        await chat.events(session_id, head_seq, until=["response.output_text.delta"])
    for key, dump in kept.items():
        await stage.redis.restore(key, 0, dump, replace=True)
    engine.allow(100)
    async with asyncio.timeout(10):
        while (state := await chat.state(session_id))["active_response"] or state["epoch"] == epoch:
            await asyncio.sleep(0.01)
    log = await chat.events(session_id)
    assert_coherent(log)
    assert log[-1]["response"]["text"] == "One two three four five"


async def test_a_change_is_not_written_to_another_log_than_it_was_made_for(stage: Stage) -> None:
    """However often it is tried, what was made before the log was replaced is refused; what is made after is not."""
    chat = await stage.start(FakeEngine(saying("One")))
    session_id = await chat.create()
    store = SessionStore(stage.redis, "another", durable=False)
    stage.stores.append(store)
    live = LiveSession(store, await store.take_fence(session_id), {}, LIMITS, time.time)
    keys = [session_key(session_id, part) for part in ("meta", "log")]
    kept = {key: await stage.redis.dump(key) for key in keys}
    first, second, third = (Change([Draft(response_resumed(response_id="r", offset=0))]) for _ in range(3))
    await live.commit(first)
    for key, dump in kept.items():
        await stage.redis.restore(key, 0, dump, replace=True)
    for _ in range(3):
        with pytest.raises(FenceLost):
            await live.commit(second)
    assert len(await store.read_log(session_id, 0, 10)) == 1
    await live.commit(third)
    assert [entry.seq for entry in await store.read_log(session_id, 0, 10)] == [1, 2]
