"""A stranger's conversation with the bundled model over WebSockets, through the real server."""

from __future__ import annotations

import pytest

from chatserve.client import ChatClient
from chatserve.client.errors import CommandFailedError
from tests.e2e.talking import new_session, reply_to

RULES = "You are a friendly assistant. " * 40


@pytest.mark.parametrize("encoding", ["msgpack", "json"])
async def test_told_facts_are_remembered(live_server, encoding):
    """What was said turns ago is answered, and each later turn finds its history cached."""
    async with ChatClient(live_server.url, encoding=encoding) as client:
        session_id = await new_session(client)
        replies = [
            await reply_to(client, session_id, line)
            for line in ("Hi there!", "My name is Zorvin.", "My dog is called Bruno.", "What is my name?")
        ]
    assert "Zorvin" in replies[-1]["text"]
    assert [reply["status"] for reply in replies] == ["completed"] * 4
    assert replies[0]["cache"]["reason"] == "first_turn"
    for reply in replies[1:]:
        usage = reply["usage"]
        assert reply["cache"] == {"result": "hit", "restored_from": "device", "reason": None}
        assert 0 < usage["input_tokens"] - usage["input_tokens_details"]["cached_tokens"] < 30
        assert usage["cached_tokens_details"]["device"] == usage["input_tokens_details"]["cached_tokens"]


async def test_sessions_share_a_beginning(live_server):
    """A second session with the same instructions finds their tokens cached in its first turn."""
    async with ChatClient(live_server.url) as client:
        cached = []
        for _ in range(2):
            session_id = await new_session(client, instructions=RULES)
            reply = await reply_to(client, session_id, "Hello!")
            cached.append(reply["usage"]["input_tokens_details"]["cached_tokens"])
    assert cached[0] < 10, "only what every prompt begins with"
    assert cached[1] > 150


async def test_fork_shares_and_parts(live_server):
    """A fork answers from the common history, reuses it, and leaves the original alone."""
    async with ChatClient(live_server.url) as client:
        session_id = await new_session(client)
        first = await reply_to(client, session_id, "My cat is called Velma.")
        answer = await client.command("session.fork", session_id=session_id, at_message_id=first["message_id"], key="f")
        fork_id = answer["session"]["id"]
        await client.attach(fork_id)
        told = await reply_to(client, fork_id, "What is my cat called?")
        await reply_to(client, session_id, "Actually, my cat is called Mimi.")
        original = await reply_to(client, session_id, "What is my cat called?")
    assert "Velma" in told["text"]
    assert told["usage"]["input_tokens_details"]["cached_tokens"] > 0
    assert "Mimi" in original["text"]


async def test_regenerate_and_edit(live_server):
    """Regenerating repeats a greedy reply; editing an earlier message changes what is remembered."""
    async with ChatClient(live_server.url) as client:
        session_id = await new_session(client)
        accepted = await client.send(session_id, "My name is Zorvin.", temperature=0)
        events = [event async for event in _until_end(client, accepted["response_id"])]
        first = events[-1]["response"]
        again = await client.respond(session_id, parent_id=accepted["message_id"], temperature=0)
        second = [event async for event in _until_end(client, again["response_id"])][-1]["response"]
        assert second["text"] == first["text"]
        edited = await client.respond(session_id, input="My name is Quilla.", parent_id=None, temperature=0)
        _ = [event async for event in _until_end(client, edited["response_id"])]
        answer = await reply_to(client, session_id, "What is my name?")
    assert "Quilla" in answer["text"]


async def test_cancel_keeps_what_was_said(live_server):
    """A cancelled reply keeps its text, ends once, and the next turn goes on from it."""
    async with ChatClient(live_server.url) as client:
        session_id = await new_session(client)
        accepted = await client.send(session_id, "Count from 1 to 90.", temperature=0)
        kinds = []
        async for event in _until_end(client, accepted["response_id"]):
            kinds.append(event["type"])
            if kinds.count("response.output_text.delta") == 2:
                await client.cancel(session_id, accepted["response_id"])
        response = event["response"]
        after = await reply_to(client, session_id, "Hello again!")
    assert response["status"] == "cancelled"
    assert response["text"]
    assert kinds.count("response.cancelled") == 1
    assert after["cache"]["result"] == "hit"


async def test_stop_string_ends_the_reply(live_server):
    """A stop string ends the reply before it and is not part of the text."""
    async with ChatClient(live_server.url) as client:
        session_id = await new_session(client)
        reply = await reply_to(client, session_id, "Count from 1 to 30.", stop=["9"])
        after = await reply_to(client, session_id, "Thank you!")
    assert reply["status"] == "completed"
    assert "8" in reply["text"]
    assert "9" not in reply["text"]
    assert after["status"] == "completed"


async def test_too_long_input_is_refused_with_the_remedy(live_server):
    """Input beyond the context is refused with the numbers, and the session stays usable."""
    async with ChatClient(live_server.url) as client:
        session_id = await new_session(client)
        with pytest.raises(CommandFailedError) as failure:
            await client.send(session_id, "word " * 9000)
        assert failure.value.error["code"] == "context_length_exceeded"
        assert (await reply_to(client, session_id, "Hello!"))["status"] == "completed"


async def _until_end(client, response_id):
    """The events of one response, its terminal one last."""
    async for event in client.events():
        if event.get("response_id", event.get("response", {}).get("id")) == response_id:
            yield event
            if event["type"] in ("response.completed", "response.incomplete", "response.cancelled", "response.failed"):
                return
