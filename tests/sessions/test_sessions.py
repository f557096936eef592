"""Sessions as such: made once, changed, listed, forked, deleted, and never another tenant's."""

from __future__ import annotations

import asyncio
import dataclasses
import re
from typing import Any

import pytest

from chatserve.errors import BadRequest, Conflict, NotFound
from chatserve.sessions.ids import new_id
from chatserve.sessions.limits import SessionLimits
from chatserve.storage.session_store import IdempotencyConflict
from tests.sessions.conftest import LIMITS, TOKENIZER, Chat, Stage, command, pseudo_random_token, saying
from tests.sessions.fakes import FakeEngine


async def test_a_session_is_what_was_asked_for(stage: Stage) -> None:
    """Title, instructions, metadata and params are kept; a new session is empty, with one event."""
    chat = await stage.start(FakeEngine(saying("One")))
    fields: dict[str, Any] = {
        "title": "T",
        "instructions": "I",
        "metadata": {"a": "b"},
        "params": {"temperature": 0.5, "stop": ["x"]},
    }
    view, duplicate = await chat.manager.create_session("t", command("session.create", **fields))
    assert not duplicate
    assert {name: view[name] for name in fields} == fields
    assert (view["head_seq"], view["num_messages"], view["head_id"]) == (1, 0, None)
    assert (await chat.state(view["id"]))["context"] == {"used_tokens": 0, "max_tokens": 4096, "left_tokens": 4096}


async def test_a_repeated_create_makes_one_session(stage: Stage) -> None:
    """The same key gives the same session, all at once or later; with another body it is a conflict."""
    chat = await stage.start(FakeEngine(saying("One")))
    wish = command("session.create", title="x", key="same")
    made = await asyncio.gather(*(chat.manager.create_session("t", wish) for _ in range(5)))
    assert sorted(duplicate for _, duplicate in made) == [False, True, True, True, True]
    assert len({view["id"] for view, _ in made}) == 1
    with pytest.raises(IdempotencyConflict):
        await chat.manager.create_session("t", command("session.create", title="y", key="same"))
    _, duplicate = await chat.manager.create_session("other", wish)
    assert not duplicate


async def test_another_tenant_sees_nothing(stage: Stage) -> None:
    """Every command on another tenant's session says that there is none, and changes nothing."""
    chat = await stage.start(FakeEngine(saying("One")))
    session_id = await chat.create()
    terminal = await chat.ask(session_id, "a")
    before = await chat.state(session_id)
    manager = chat.manager
    message_id = terminal["response"]["message_id"]
    attempts: list[Any] = [
        manager.get_session("evil", session_id),
        manager.update_session("evil", command("session.update", session_id=session_id, title="x")),
        manager.delete_session("evil", session_id),
        manager.fork_session("evil", command("session.fork", session_id=session_id, at_message_id=message_id)),
        manager.create_response("evil", command("response.create", session_id=session_id, input="x")),
        manager.cancel_response("evil", session_id, terminal["response"]["id"]),
        manager.attach("evil", session_id, None, 0),
        manager.resume("evil", session_id, None, 0, False),
        manager.typing("evil", session_id),
    ]
    for attempt in attempts:
        with pytest.raises(NotFound) as refusal:
            await attempt
        assert refusal.value.code == "session_not_found"
    assert await chat.state(session_id) == before
    assert await manager.list_sessions("evil") == []


async def test_sessions_are_listed_last_used_first(stage: Stage) -> None:
    """A turn or an update moves a session up; pages follow one another."""
    chat = await stage.start(FakeEngine(saying("One")))
    ids = []
    for _ in range(4):
        ids.append(await chat.create())
        await asyncio.sleep(0.002)
    await chat.ask(ids[0], "a")
    listed = await chat.manager.list_sessions("t")
    assert [view["id"] for view in listed] == [ids[0], ids[3], ids[2], ids[1]]
    page = await chat.manager.list_sessions("t", 2, ids[0])
    assert [view["id"] for view in page] == [ids[3], ids[2]]


async def test_an_update_changes_what_is_given(stage: Stage) -> None:
    """Given fields change and are announced; nothing given writes nothing."""
    chat = await stage.start(FakeEngine(saying("One")))
    session_id = await chat.create(title="old", metadata={"a": "b"})
    update = command("session.update", session_id=session_id, title="new", pinned=True, params={"top_k": 3})
    view = await chat.manager.update_session("t", update)
    unchanged = await chat.manager.update_session("t", command("session.update", session_id=session_id))
    events = await chat.events(session_id, until=["session.updated"])
    assert (view["title"], view["metadata"], view["pinned"], view["params"]) == ("new", {"a": "b"}, True, {"top_k": 3})
    assert unchanged == view
    assert view["head_seq"] == 2
    assert events[-1]["session"]["title"] == "new"
    assert stage.records.touched[session_id]["pinned"] is True


async def test_the_head_can_be_moved_to_another_branch(stage: Stage) -> None:
    """The next turn hangs on the branch that was chosen; a message that there is not is refused."""
    engine = FakeEngine(saying("One", "Two"))
    chat = await stage.start(engine)
    session_id = await chat.create()
    first = await chat.ask(session_id, "a")
    await chat.ask(session_id, "b", parent_id="root")
    head_id = first["response"]["message_id"]
    await chat.manager.update_session("t", command("session.update", session_id=session_id, head_id=head_id))
    await chat.ask(session_id, "c")
    assert "user\na<|im_end|>" in TOKENIZER.decode(engine.requests[2].token_ids)
    with pytest.raises(NotFound) as refusal:
        await chat.manager.update_session("t", command("session.update", session_id=session_id, head_id="msg_x"))
    assert (refusal.value.code, refusal.value.param) == ("message_not_found", "head_id")


async def test_a_fork_begins_with_the_same_tokens(stage: Stage) -> None:
    """A fork has copies of the messages under names of their own, and its next prompt has the same ids."""
    engine = FakeEngine(saying("One", "Two"))
    chat = await stage.start(engine)
    session_id = await chat.create(instructions="Be kind.", params={"top_k": 3})
    first = await chat.ask(session_id, "a")
    await chat.ask(session_id, "b")
    fork = command(
        "session.fork", session_id=session_id, at_message_id=first["response"]["message_id"], title="F", key="same"
    )
    view, duplicate = await chat.manager.fork_session("t", fork)
    again, duplicate_again = await chat.manager.fork_session("t", fork)
    state = await chat.state(view["id"])
    assert (duplicate, duplicate_again, again["id"]) == (False, True, view["id"])
    assert [message["content"][0]["text"] for message in state["messages"]] == ["a", "One"]
    original = {message["id"] for message in (await chat.state(session_id))["messages"]}
    assert not original & {message["id"] for message in state["messages"]}
    assert state["messages"][1]["response"]["message_id"] == state["messages"][1]["id"] == view["head_id"]
    assert (view["title"], view["params"]) == ("F", {"top_k": 3})
    await chat.ask(view["id"], "b")
    assert list(engine.requests[2].token_ids) == list(engine.requests[1].token_ids)
    assert engine.requests[2].num_history == 0  # the engine has not met this session


async def test_a_fork_at_a_user_message_can_be_answered(stage: Stage) -> None:
    """The fork's head is the user message; without input it is answered."""
    chat = await stage.start(FakeEngine(saying("One")))
    session_id = await chat.create()
    accepted = await chat.send(session_id, "a")
    await chat.events(session_id)
    fork = command("session.fork", session_id=session_id, at_message_id=accepted.message_id)
    view, _ = await chat.manager.fork_session("t", fork)
    assert (await chat.ask(view["id"]))["response"]["text"] == "One"


async def test_a_running_reply_cannot_be_forked(stage: Stage) -> None:
    """What is still being said has no end to fork at."""
    chat = await stage.start(FakeEngine(saying("One"), gated=True))
    session_id = await chat.create()
    await chat.send(session_id, "a")
    head_id = (await chat.state(session_id))["head_id"]
    with pytest.raises(Conflict):
        await chat.manager.fork_session("t", command("session.fork", session_id=session_id, at_message_id=head_id))


async def test_a_deleted_session_is_gone(stage: Stage) -> None:
    """Store, engine and list forget it; a running response is ended first."""
    engine = FakeEngine(saying("One"), gated=True)
    chat = await stage.start(engine)
    session_id = await chat.create()
    await chat.send(session_id, "a")
    await asyncio.sleep(0.01)
    await chat.manager.delete_session("t", session_id)
    assert session_id not in engine.held
    assert (chat.manager.num_running, await chat.manager.list_sessions("t")) == (0, [])
    for attempt in (chat.state(session_id), chat.send(session_id, "b"), chat.manager.delete_session("t", session_id)):
        with pytest.raises(NotFound):
            await attempt


async def test_deleting_a_session_keeps_what_others_share(stage: Stage) -> None:
    """The engine is told of every branch, and how much of it another session begins with; no other tenant's counts."""
    engine = FakeEngine(saying("One", "Two"))
    chat = await stage.start(engine)
    session_id = await chat.create(instructions="Be brief.")
    await chat.ask(session_id, "a")
    first = (await chat.state(session_id))["messages"]
    await chat.ask(session_id, "b")
    whole = list(engine.held[session_id])
    fork, _ = await chat.manager.fork_session(
        "t", command("session.fork", session_id=session_id, at_message_id=first[1]["id"])
    )
    await chat.ask(fork["id"], "other words")
    await chat.ask(session_id, "a", parent_id="root")
    alone = Chat(chat.manager, "another")
    await alone.ask(await alone.create(instructions="Be brief."), "b")
    await chat.manager.delete_session("t", session_id)
    shared = chat.manager.session_cache("t", fork["id"])
    assert (await shared)["tokens"] > 0
    branches = sorted(engine.forgotten, key=lambda history: -len(history[0]))
    assert len(branches) == 2
    assert branches[0][0][: len(whole)] == whole
    assert 0 < branches[1][1] < len(branches[1][0]) + 1
    num_forked = sum(len(ids) for ids in await token_ids_of(stage, fork["id"], 2))
    assert num_forked <= branches[0][1] < len(branches[0][0])


async def token_ids_of(stage: Stage, session_id: str, num_messages: int) -> list[list[int]]:
    """The ids of a session's first messages."""
    stored = await stage.stores[0].load_messages(session_id)
    return [message.token_ids for message in list(stored.values())[:num_messages]]


async def test_idle_sessions_leave_memory_and_come_back(stage: Stage) -> None:
    """Memory holds a bounded number of idle sessions; one that left answers as before, in order, after its return."""
    limits = SessionLimits(max_idle_sessions=3)
    chat = await stage.start(FakeEngine(saying("One", "Two", "Three")), limits=limits)
    ids = [await chat.create() for _ in range(10)]
    for session_id in ids:
        await chat.ask(session_id, "a")
    before = [await chat.state(session_id) for session_id in ids]
    assert chat.manager.num_live <= 4
    second = await asyncio.gather(*(chat.ask(session_id, "b") for session_id in ids))
    after = [await chat.state(session_id) for session_id in ids]
    assert {terminal["response"]["text"] for terminal in second} == {"Two"}
    for old, new in zip(before, after, strict=True):
        assert new["messages"][:2] == old["messages"]
        assert new["epoch"] == old["epoch"]


async def test_a_session_in_use_stays_in_memory(stage: Stage) -> None:
    """However many others come by, a running turn and its follower keep their session."""
    engine = FakeEngine(saying("One"), gated=True)
    chat = await stage.start(engine, limits=SessionLimits(max_idle_sessions=1))
    session_id = await chat.create()
    await chat.send(session_id, "a")
    for _ in range(5):
        await chat.state(await chat.create())
    following = asyncio.create_task(chat.events(session_id))
    engine.allow(100)
    assert (await following)[-1]["response"]["text"] == "One"


async def test_eviction_learns_what_it_needs(stage: Stage) -> None:
    """Turns, tokens, pauses, typing and the tenant's priority are recorded."""
    now = [1000.0]
    chat = await stage.start(FakeEngine(saying("One", "Two")))
    chat.manager._clock = lambda: now[0]
    chat.manager._priority_of = {"t": 3}.get
    session_id = await chat.create()
    await chat.ask(session_id, "a")
    await chat.manager.typing("t", session_id)
    assert stage.records.touched[session_id]["typing"] is True
    while chat.manager.num_running:
        await asyncio.sleep(0)
    now[0] += 30
    await chat.ask(session_id, "b")
    while chat.manager.num_running:
        await asyncio.sleep(0)
    record = stage.records.touched[session_id]
    assert (record["turns"], record["typing"], record["last_activity_s"]) == (2, False, 1030.0)
    assert record["think_time_s"] == pytest.approx(30.0)
    assert record["priority"] == 3
    assert record["tokens"] == (await chat.state(session_id))["context"]["used_tokens"]


async def test_a_session_keeps_the_date_of_its_creation(stage: Stage) -> None:
    """The template's date is fixed when the session is made, and a fork has its original's."""
    chat = await stage.start(FakeEngine(saying("One")))
    chat.manager._clock = lambda: 1_000_000_000.0
    session_id = await chat.create()
    terminal = await chat.ask(session_id, "a")
    chat.manager._clock = lambda: 1_700_000_000.0
    fork = command("session.fork", session_id=session_id, at_message_id=terminal["response"]["message_id"])
    view, _ = await chat.manager.fork_session("t", fork)
    for made in (session_id, view["id"]):
        meta = await stage.stores[0].load_meta(made)
        assert meta is not None
        assert meta.template_date in ("2001-09-08", "2001-09-09")  # either side of the date line


async def test_page_cursors_must_exist(stage: Stage) -> None:
    """A `before` that is in no list is refused rather than taken as the beginning."""
    chat = await stage.start(FakeEngine(saying("One")))
    with pytest.raises(BadRequest):
        await chat.manager.list_sessions("t", 2, "sess_none")


async def test_sessions_survive_a_restart(stage: Stage) -> None:
    """A new server has the sessions, their messages and branches as the old one had them."""
    chat = await stage.start(FakeEngine(pseudo_random_token))
    session_id = await chat.create(title="x", params={"max_output_tokens": 6})
    first = await chat.ask(session_id, "a")
    await chat.ask(session_id, "b")
    await chat.ask(session_id, "c", parent_id=first["response"]["message_id"])
    before = await chat.state(session_id)
    await chat.manager.close()
    successor: Chat = await stage.start(FakeEngine(pseudo_random_token), limits=dataclasses.replace(LIMITS))
    assert await successor.state(session_id) == before


def test_ids_are_url_safe_unique_and_sort_by_time() -> None:
    """Names need no escaping and later ones sort behind earlier ones."""
    ids = [new_id("sess", 1_700_000_000_000 + step) for step in range(1000)]
    assert all(re.fullmatch(r"sess_[0-9a-z]{26}", name) for name in ids)
    assert ids == sorted(set(ids))
