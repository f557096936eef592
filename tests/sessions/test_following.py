"""Attaching and following: the right beginning, then every event once, however late or slow the reader."""

from __future__ import annotations

import asyncio
import random
from contextlib import aclosing
from typing import Any

import pytest

from chatserve.errors import Unavailable
from chatserve.protocol.codec import from_wire
from chatserve.sessions.limits import SessionLimits
from tests.sessions.conftest import Chat, Stage, command, pseudo_random_token, saying
from tests.sessions.fakes import FakeEngine

SHORT_TAIL = SessionLimits(delta_interval_s=0.0, tail_entries=3, read_entries=4)


async def talked(chat: Chat, turns: int = 2) -> str:
    session_id = await chat.create()
    for turn in range(turns):
        await chat.ask(session_id, f"{turn}")
    return session_id


async def read_until(chat: Chat, session_id: str, after_seq: int, last_seq: int) -> list[int]:
    """The seqs a follower sees, up to `last_seq`; reading slowly now and then."""
    seen = []
    async with asyncio.timeout(20), aclosing(chat.manager.follow(session_id, after_seq)) as entries:
        async for entry in entries:
            seen.append(entry.seq)
            assert from_wire(entry.wire)["seq"] == entry.seq
            if entry.seq >= last_seq:
                break
            if random.random() < 0.1:
                await asyncio.sleep(0.002)
    return seen


async def test_without_a_cursor_one_attaches_to_a_snapshot(stage: Stage) -> None:
    """The snapshot is the session with its messages at the head; following goes on there."""
    chat = await stage.start(FakeEngine(saying("One", "Two")))
    session_id = await talked(chat)
    attached = await chat.manager.attach("t", session_id, None, None)
    assert (attached.mode, attached.after_seq) == ("snapshot", attached.head_seq)
    assert attached.snapshot is not None
    assert [message["content"][0]["text"] for message in attached.snapshot["messages"]] == ["0", "One", "1", "Two"]
    assert attached.snapshot["active_response"] is None


async def test_a_cursor_of_this_epoch_is_replayed(stage: Stage) -> None:
    """Any cursor within the log replays; 0 needs no epoch."""
    chat = await stage.start(FakeEngine(saying("One", "Two")), limits=SHORT_TAIL)
    session_id = await talked(chat)
    state = await chat.state(session_id)
    for epoch, after_seq in [(None, 0), (state["epoch"], 0), (state["epoch"], 5), (state["epoch"], state["head_seq"])]:
        attached = await chat.manager.attach("t", session_id, epoch, after_seq)
        assert (attached.mode, attached.after_seq, attached.snapshot) == ("replay", after_seq, None)
    assert await read_until(chat, session_id, 0, state["head_seq"]) == list(range(1, state["head_seq"] + 1))


async def test_a_cursor_that_cannot_be_trusted_gets_a_snapshot(stage: Stage) -> None:
    """Another epoch, none with a position, or a position beyond the head: never a partial replay."""
    chat = await stage.start(FakeEngine(saying("One", "Two")))
    session_id = await talked(chat)
    state = await chat.state(session_id)
    for epoch, after_seq in [(state["epoch"] + 1, 3), (None, 3), (state["epoch"], state["head_seq"] + 1)]:
        attached = await chat.manager.attach("t", session_id, epoch, after_seq)
        assert (attached.mode, attached.epoch) == ("snapshot", state["epoch"])


async def test_a_trimmed_cursor_gets_a_snapshot(stage: Stage) -> None:
    """Events of a finished response go after a while; then an old cursor gets the state instead, a new one a replay."""
    limits = SessionLimits(resume_ttl_s=0.02, trim_interval_s=0.01, tail_entries=1)
    chat = await stage.start(FakeEngine(saying("One", "Two")), limits=limits)
    session_id = await talked(chat)
    state = await chat.state(session_id)
    while await stage.stores[0].first_seq(session_id) is not None:
        await asyncio.sleep(0.005)
    old = await chat.manager.attach("t", session_id, state["epoch"], 2)
    new = await chat.manager.attach("t", session_id, state["epoch"], state["head_seq"])
    assert (old.mode, new.mode) == ("snapshot", "replay")
    assert old.snapshot is not None
    assert len(old.snapshot["messages"]) == 4
    with pytest.raises(Unavailable, match="attach again"):
        await read_until(chat, session_id, 2, state["head_seq"])


async def test_a_snapshot_in_mid_answer_joins_the_events_behind_it(stage: Stage) -> None:
    """The text in the snapshot and the deltas after it are the whole text, wherever one comes in."""
    engine = FakeEngine(pseudo_random_token, gated=True)
    chat = await stage.start(engine, limits=SessionLimits(delta_interval_s=0.0))
    session_id = await chat.create()
    await chat.send(session_id, "a", max_output_tokens=40, ignore_eos=True)

    async def joined(num_tokens: int) -> tuple[str, str]:
        engine.allow(num_tokens)
        await asyncio.sleep(0.003)
        attached = await chat.manager.attach("t", session_id, None, None)
        assert attached.snapshot is not None
        text = attached.snapshot["active_response"]["text"]
        assert text == attached.snapshot["messages"][-1]["content"][0]["text"]
        events = await chat.events(session_id, attached.after_seq)
        deltas = [event for event in events if event["type"].endswith("delta")]
        assert [delta["offset"] for delta in deltas][:1] in ([], [len(text)])
        return text + "".join(delta["delta"] for delta in deltas), events[-1]["response"]["text"]

    async with asyncio.TaskGroup() as group:
        readers = [group.create_task(joined(2)) for _ in range(5)]
        await asyncio.sleep(0.02)
        readers += [group.create_task(joined(1)) for _ in range(5)]
        await asyncio.sleep(0.02)
        engine.allow(100)
    assert len({whole for reader in readers for whole in reader.result()}) == 1


@pytest.mark.parametrize("seed", range(3))
async def test_every_reader_sees_every_event_once(stage: Stage, seed: int) -> None:
    """Readers who come at any moment with any cursor, fast or slow, see each event after it exactly once."""
    random.seed(seed)
    chat = await stage.start(FakeEngine(pseudo_random_token), limits=SHORT_TAIL)
    session_id = await chat.create()
    num_readers, num_attached, seen = 30, 0, []

    async def talk() -> None:
        turn = 0
        while num_attached < num_readers or turn < 3:
            turn += 1
            await chat.ask(session_id, f"{turn}", max_output_tokens=random.randrange(1, 30), ignore_eos=True)
        await chat.manager.update_session("t", command("session.update", session_id=session_id, title="the end"))

    async def read() -> None:
        nonlocal num_attached
        await asyncio.sleep(random.random() * 0.2)
        head_seq = (await chat.state(session_id))["head_seq"]
        attached = await chat.manager.attach("t", session_id, None, random.choice([0, None]))
        assert attached.after_seq == 0 or attached.after_seq >= head_seq
        num_attached += 1
        events: list[Any] = await chat.events(session_id, attached.after_seq, until=["session.updated"])
        seen.append((attached.after_seq, [event["seq"] for event in events]))

    await asyncio.gather(talk(), *(read() for _ in range(num_readers)))
    head_seq = (await chat.state(session_id))["head_seq"]
    for after_seq, seqs in seen:
        assert seqs == list(range(after_seq + 1, head_seq + 1))


async def test_a_reader_that_stands_still_holds_up_nobody(stage: Stage) -> None:
    """A reply runs to its end while a follower reads nothing; the follower then gets all of it from the store."""
    chat = await stage.start(FakeEngine(pseudo_random_token), limits=SHORT_TAIL)
    session_id = await chat.create()
    async with aclosing(chat.manager.follow(session_id, 0)) as entries:
        seqs = [(await anext(entries)).seq]
        terminal = await chat.ask(session_id, "a", max_output_tokens=50, ignore_eos=True)
        while seqs[-1] < terminal["seq"]:
            seqs.append((await anext(entries)).seq)
    assert seqs == list(range(1, terminal["seq"] + 1))


async def test_following_ends_with_the_session(stage: Stage) -> None:
    """A deleted session's readers get `session.deleted` as the last event, and nothing after."""
    chat = await stage.start(FakeEngine(saying("One", "Two")))
    session_id = await talked(chat)
    head_seq = (await chat.state(session_id))["head_seq"]

    async def read() -> list[Any]:
        return [from_wire(entry.wire) async for entry in chat.manager.follow(session_id, 0)]

    readers = [asyncio.create_task(read()) for _ in range(3)]
    await asyncio.sleep(0.01)
    await chat.manager.delete_session("t", session_id)
    for events in await asyncio.gather(*readers):
        assert [event["seq"] for event in events] == list(range(1, head_seq + 2))
        assert events[-1]["type"] == "session.deleted"


async def test_a_follower_makes_the_session_connected(stage: Stage) -> None:
    """Eviction learns of the first follower and of the end of the last."""
    chat = await stage.start(FakeEngine(saying("One", "Two")))
    session_id = await talked(chat)
    async with aclosing(chat.manager.follow(session_id, 0)) as entries:
        await anext(entries)
        assert stage.records.touched[session_id]["connected"] is True
    assert stage.records.touched[session_id]["connected"] is False


async def test_resume_gives_events_or_a_snapshot_with_the_cache(stage: Stage) -> None:
    """A known cursor gets the events behind it, an unknown one the state; both say how much is held ready."""
    engine = FakeEngine(saying("One", "Two"))
    chat = await stage.start(engine)
    session_id = await talked(chat)
    state = await chat.state(session_id)
    replayed = await chat.manager.resume("t", session_id, state["epoch"], 4, warm=True)
    fresh = await chat.manager.resume("t", session_id, None, None, warm=False)
    assert [event["seq"] for event in replayed["events"]] == list(range(5, state["head_seq"] + 1))
    assert fresh["snapshot"]["messages"] == state["messages"]
    assert (replayed["mode"], fresh["mode"]) == ("replay", "snapshot")
    assert replayed["cache"] == {
        "tokens": state["context"]["used_tokens"],
        "device": len(engine.held[session_id]),
        "restore_ms_estimate": 0.0,
    }
    assert stage.records.touched[session_id]["typing"] is True


async def test_resume_in_mid_answer_shows_the_active_response(stage: Stage) -> None:
    """Who comes back while the reply runs is told which, and how far it is."""
    engine = FakeEngine(saying("One two three"), gated=True)
    chat = await stage.start(engine, limits=SessionLimits(delta_interval_s=0.0))
    session_id = await chat.create()
    accepted = await chat.send(session_id, "a")
    engine.allow(2)
    await chat.events(session_id, until=["response.output_text.delta"])
    resumed = await chat.manager.resume("t", session_id, None, 0, warm=False)
    assert resumed["active_response"]["id"] == accepted.response_id
    assert "One two three".startswith(resumed["active_response"]["text"])
    engine.allow(100)
    await chat.events(session_id)
