"""Reading a session that another server writes: it stays with that server."""

from __future__ import annotations

import asyncio

import pytest

from chatserve.errors import NotFound, Unavailable
from chatserve.sessions.limits import SessionLimits
from tests.sessions.conftest import Stage, command, saying
from tests.sessions.fakes import FakeEngine


async def test_reading_leaves_the_writer_alone(stage: Stage) -> None:
    """Another server shows, resumes and forks a session in mid-answer; the answer goes on where it is made."""
    engine = FakeEngine(saying("One two three"), gated=True)
    writer = await stage.start(engine, limits=SessionLimits(delta_interval_s=0.0))
    session_id = await writer.create()
    await writer.send(session_id, "a")
    engine.allow(2)
    await writer.events(session_id, until=["response.output_text.delta"])
    fence = (await stage.stores[0].load_meta(session_id)).fence  # type: ignore[union-attr]
    reader = await stage.start(FakeEngine(saying("Another")))
    # A start takes over what runs, as after a crash: give it back, so that from here on nobody has to.
    await stage.stores[0].take_fence(session_id)
    state = await reader.state(session_id)
    resumed = await reader.manager.resume("t", session_id, None, 0, warm=False)
    await reader.manager.session_cache("t", session_id)
    user = state["messages"][0]
    fork, _ = await reader.manager.fork_session(
        "t", command("session.fork", session_id=session_id, at_message_id=user["id"])
    )
    assert (await stage.stores[0].load_meta(session_id)).fence == fence  # type: ignore[union-attr]
    assert fork["head_id"] is not None
    assert resumed["events"][0]["type"] == "session.created"
    with pytest.raises(NotFound):
        await reader.manager.get_session("another tenant", session_id)


async def test_a_session_at_rest_is_shown_without_its_fence(stage: Stage) -> None:
    """What was written is shown as the writer shows it, and the writer goes on without taking anything back."""
    writer = await stage.start(FakeEngine(saying("One", "Two")))
    reader = await stage.start(FakeEngine(saying("Another")))
    session_id = await writer.create()
    await writer.ask(session_id, "a")
    assert await reader.state(session_id) == await writer.state(session_id)
    assert reader.manager.num_live == 0
    assert (await writer.ask(session_id, "b"))["response"]["text"] == "Two"
    assert len((await reader.state(session_id))["messages"]) == 4


async def test_a_server_that_drains_takes_nothing_over(stage: Stage) -> None:
    """On its way out a server refuses to follow what it would have to take from another; reading still works."""
    other = await stage.start(FakeEngine(saying("One")))
    session_id = await other.create()
    leaving = await stage.start(FakeEngine(saying("Another")))
    await leaving.manager.drain(0.0)
    with pytest.raises(Unavailable) as refusal:
        await leaving.manager.attach("t", session_id, None, None)
    assert refusal.value.code == "server_draining"
    assert (await leaving.state(session_id))["messages"] == []
    assert (await other.ask(session_id, "a"))["response"]["text"] == "One"


async def test_a_cursor_of_an_epoch_that_ended_is_not_followed(stage: Stage) -> None:
    """Between attaching and following the log may be replaced: then the follower is told to attach again."""
    chat = await stage.start(FakeEngine(saying("One")))
    session_id = await chat.create()
    state = await chat.state(session_id)
    with pytest.raises(Unavailable, match="attach again"):
        async with asyncio.timeout(5):
            await anext(chat.manager.follow(session_id, 0, epoch=state["epoch"] + 1))
