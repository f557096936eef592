"""Every response ends in exactly one terminal event: cancelled anywhere, failed anyhow, or asked for twice."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest

from chatserve.engine.api import Resumed
from chatserve.errors import Conflict, NotFound, Overloaded, Unavailable
from chatserve.sessions.accounting import Account
from chatserve.sessions.limits import SessionLimits
from chatserve.storage.session_store import IdempotencyConflict
from tests.sessions.conftest import TERMINAL, TOKENIZER, Chat, Stage, pseudo_random_token, saying
from tests.sessions.fakes import FakeEngine

REPLY = "One two three four five six"
AT_ONCE = SessionLimits(delta_interval_s=0.0, cancel_grace_s=0.2)


async def all_events(chat: Chat, session_id: str) -> list[Any]:
    """Everything in the log now."""
    head_seq = (await chat.state(session_id))["head_seq"]
    events: list[Any] = []
    while len(events) < head_seq:
        events += await chat.events(session_id, len(events), until=[*TERMINAL, "session.updated"])
    return events


def terminals(events: list[Any], response_id: str) -> list[str]:
    return [event["type"] for event in events if event["type"] in TERMINAL and event["response"]["id"] == response_id]


@pytest.mark.parametrize("num_tokens", range(8))
async def test_a_cancel_keeps_what_was_said(stage: Stage, num_tokens: int) -> None:
    """Cancelled after any number of tokens: their text and ids stay, and the next turn goes on behind them."""
    engine = FakeEngine(saying(REPLY, "Fine"), gated=True)
    chat = await stage.start(engine, limits=AT_ONCE)
    session_id = await chat.create()
    accepted = await chat.send(session_id, "a")
    engine.allow(num_tokens)
    while len(engine.held.get(session_id, [])) < (num_tokens and len(engine.requests[0].token_ids) + num_tokens - 1):
        await asyncio.sleep(0.001)
    assert await chat.manager.cancel_response("t", session_id, accepted.response_id) == "cancelling"
    terminal = (await chat.events(session_id))[-1]
    said = TOKENIZER.decode(TOKENIZER.encode(REPLY, add_special_tokens=False)[:num_tokens])
    assert (terminal["type"], terminal["response"]["text"]) == ("response.cancelled", said)
    engine.allow(100)
    await chat.ask(session_id, "b")
    assert f"assistant\n{said}<|im_end|>\n<|im_start|>user\nb" in TOKENIZER.decode(engine.requests[-1].token_ids)


async def test_a_cancel_repeated_or_too_late_gives_the_status(stage: Stage) -> None:
    """Cancelling again changes nothing; a finished response says how it finished; an unknown one is not found."""
    chat = await stage.start(FakeEngine(saying("One")))
    session_id = await chat.create()
    accepted = await chat.send(session_id, "a")
    await chat.events(session_id)
    for _ in range(2):
        assert await chat.manager.cancel_response("t", session_id, accepted.response_id) == "completed"
    with pytest.raises(NotFound) as refusal:
        await chat.manager.cancel_response("t", session_id, "resp_none")
    assert refusal.value.code == "response_not_found"
    assert terminals(await all_events(chat, session_id), accepted.response_id) == ["response.completed"]


async def test_a_cancel_at_any_moment_ends_once(stage: Stage) -> None:
    """Whenever the cancel comes between accept and end, there is one terminal event and the session is free again."""
    chat = await stage.start(FakeEngine(pseudo_random_token), limits=AT_ONCE)

    async def cancelled_after(delay_s: float) -> None:
        session_id = await chat.create()
        accepted = await chat.send(session_id, "a", max_output_tokens=60, ignore_eos=True)
        await asyncio.sleep(delay_s)
        await chat.manager.cancel_response("t", session_id, accepted.response_id)
        await chat.events(session_id)
        assert len(terminals(await all_events(chat, session_id), accepted.response_id)) == 1
        await chat.ask(session_id, "b", max_output_tokens=2)

    await asyncio.gather(*(cancelled_after(step / 1000) for step in range(30)))


async def test_a_deaf_engine_does_not_hold_up_a_cancel(stage: Stage) -> None:
    """An engine that never answers is left behind after a moment."""
    engine = FakeEngine(saying(REPLY), gated=True)
    engine.deaf = True
    chat = await stage.start(engine, limits=AT_ONCE)
    session_id = await chat.create()
    accepted = await chat.send(session_id, "a")
    await asyncio.sleep(0.02)
    engine.cancel = lambda request_id: None  # type: ignore[method-assign]
    await chat.manager.cancel_response("t", session_id, accepted.response_id)
    assert (await chat.events(session_id))[-1]["type"] == "response.cancelled"


@pytest.mark.parametrize(
    ("failure", "code", "retryable"),
    [
        (Unavailable("died twice", code="server_interrupted"), "server_interrupted", True),
        (Overloaded("too many wait"), "queue_full", True),
        (RuntimeError("a bug"), "internal_error", False),
    ],
)
async def test_a_failure_keeps_the_text_and_names_the_reason(
    stage: Stage, caplog: pytest.LogCaptureFixture, failure: Exception, code: str, retryable: bool
) -> None:
    """Whatever the engine raises in mid-answer, what was said is kept, and a fault of ours is in the log."""
    engine = FakeEngine(saying(REPLY), gated=True)
    chat = await stage.start(engine, limits=AT_ONCE)
    session_id = await chat.create()
    accepted = await chat.send(session_id, "a")
    engine.allow(3)
    await chat.events(session_id, until=["response.output_text.delta"])
    await asyncio.sleep(0.01)
    engine.failure = failure
    with caplog.at_level(logging.ERROR):
        engine.allow()
        terminal = (await chat.events(session_id))[-1]
    error = terminal["response"]["error"]
    assert (error["code"], error["retryable"]) == (code, retryable)
    assert terminal["response"]["text"] == TOKENIZER.decode(TOKENIZER.encode(REPLY, add_special_tokens=False)[:3])
    assert terminals(await all_events(chat, session_id), accepted.response_id) == ["response.failed"]
    assert ("a bug" in caplog.text) == isinstance(failure, RuntimeError)


async def test_an_engine_that_just_ends_is_a_failure(stage: Stage) -> None:
    """A stream without a last word does not leave the response open."""
    engine = FakeEngine(saying("One"))

    async def silent(request: Any) -> Any:
        for nothing in ():
            yield nothing

    engine.generate = silent  # type: ignore[method-assign]
    chat = await stage.start(engine)
    terminal = await chat.ask(await chat.create(), "a")
    assert terminal["response"]["error"]["code"] == "internal_error"


@pytest.mark.parametrize("broken", ["start", "usage", "timings"])
async def test_a_bug_of_ours_still_ends_the_response(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    """A fault while the events are made ends the response once, as failed, with what was seen of it."""
    chat = await stage.start(FakeEngine(saying("One")), limits=AT_ONCE)
    session_id = await chat.create()
    num_calls = 0
    sound = getattr(Account, broken)

    def faulty(*args: Any, **kwargs: Any) -> Any:
        nonlocal num_calls
        num_calls += 1
        if num_calls == 1:
            raise ZeroDivisionError(broken)
        return sound(*args, **kwargs)

    monkeypatch.setattr(Account, broken, faulty)
    accepted = await chat.send(session_id, "a")
    terminal = (await chat.events(session_id))[-1]
    assert terminal["response"]["error"]["code"] == "internal_error"
    assert terminals(await all_events(chat, session_id), accepted.response_id) == ["response.failed"]
    await chat.ask(session_id, "b", parent_id="root")


async def test_an_engine_that_was_replaced_is_announced(stage: Stage) -> None:
    """When the engine says that it goes on after a death, followers learn from which code point."""
    engine = FakeEngine(saying(REPLY), gated=True)
    chat = await stage.start(engine, limits=AT_ONCE)
    session_id = await chat.create()
    await chat.send(session_id, "a")
    engine.allow(3)
    while len(engine.held.get(session_id, [])) < len(engine.requests[0].token_ids) + 2:
        await asyncio.sleep(0.001)
    engine.extra.append(Resumed())
    engine.allow(100)
    events = await chat.events(session_id)
    resumed = next(event for event in events if event["type"] == "response.resumed")
    before = [event for event in events if event["type"].endswith("delta") and event["seq"] < resumed["seq"]]
    assert resumed["offset"] == len("".join(event["delta"] for event in before)) > 0
    assert (events[-1]["response"]["text"], events[-1]["response"]["resumed"]) == (REPLY, True)


async def test_one_response_at_a_time(stage: Stage) -> None:
    """A second turn in a session with a running response is a conflict; another session is free."""
    engine = FakeEngine(saying(REPLY), gated=True)
    chat = await stage.start(engine)
    session_id, other_id = await chat.create(), await chat.create()
    await chat.send(session_id, "a")
    with pytest.raises(Conflict) as refusal:
        await chat.send(session_id, "b")
    assert refusal.value.code == "response_in_progress"
    await chat.send(other_id, "b")
    assert chat.manager.num_running == 2


async def test_a_repeated_command_gives_the_same_response(stage: Stage) -> None:
    """The same key gives the same ids while it runs and after; all at once, one of them is not a duplicate."""
    engine = FakeEngine(saying(REPLY), gated=True)
    chat = await stage.start(engine)
    session_id = await chat.create()
    together = await asyncio.gather(*(chat.send(session_id, "a", key="same") for _ in range(8)))
    engine.allow(100)
    await chat.events(session_id)
    together.append(await chat.send(session_id, "a", key="same"))
    assert sorted(accepted.duplicate for accepted in together) == [False, *[True] * 8]
    assert len({(one.message_id, one.response_id, one.head_seq) for one in together}) == 1
    assert len(engine.requests) == 1


async def test_a_key_with_another_body_is_a_conflict(stage: Stage) -> None:
    """A key says one thing only, also with the response long finished."""
    chat = await stage.start(FakeEngine(saying("One")))
    session_id = await chat.create()
    await chat.ask(session_id, "a", key="same")
    with pytest.raises(IdempotencyConflict) as refusal:
        await chat.send(session_id, "b", key="same")
    assert refusal.value.code == "idempotency_conflict"


async def test_a_caller_that_goes_away_does_not_undo_the_turn(stage: Stage) -> None:
    """A connection lost in the middle of the command leaves no half-accepted turn."""
    chat = await stage.start(FakeEngine(saying("One")))
    session_id = await chat.create()
    for steps in range(12):
        caller = asyncio.create_task(chat.send(session_id, f"{steps}", parent_id="root", key=f"gone-{steps}"))
        for _ in range(steps):
            await asyncio.sleep(0)
        caller.cancel()
        await asyncio.wait({caller})
        repeated = await _accepted(chat, session_id, steps)
        terminal = (await chat.events(session_id, repeated.head_seq))[-1]
        assert terminal["response"]["id"] == repeated.response_id


async def _accepted(chat: Chat, session_id: str, steps: int) -> Any:
    """Send again with the same key, as clients do, until the server says that it has it."""
    while True:
        try:
            return await chat.send(session_id, f"{steps}", parent_id="root", key=f"gone-{steps}")
        except Conflict:  # the turn before it still runs
            await asyncio.sleep(0.001)
