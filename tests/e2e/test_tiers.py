"""A person comes back after a restart: the history is there again without being computed, and the answer is right."""

from __future__ import annotations

import asyncio

import pytest

from chatserve.client import ChatClient
from tests.e2e.talking import new_session, reply_to

FACTS = [f"My friend number {number} is called Zorp{number}, and I like trees." for number in range(6)]


async def converse(client: ChatClient) -> str:
    """A session of some turns that ends with the one thing to remember."""
    session_id = await new_session(client)
    for fact in [*FACTS, "My dog is called Zarnik."]:
        await reply_to(client, session_id, fact)
    return session_id


@pytest.mark.parametrize("graceful", [False, pytest.param(True, marks=pytest.mark.soak)])
async def test_a_history_comes_back_from_disk_after_a_restart(start_server, graceful):
    """Ended by SIGTERM or killed with everything: the next turn's tokens come from disk, and the dog has its name."""
    first = start_server()
    async with ChatClient(first.url) as client:
        session_id = await converse(client)
    await asyncio.sleep(0.5)  # idle for a moment
    held = first.get(f"/v1/sessions/{session_id}/cache").json()
    assert held["device"] == held["tokens"] - 1
    if graceful:
        assert first.stop() == 0
    else:
        first.process.kill()
        first.process.wait()
        await asyncio.sleep(1.0)  # its children go with it
    second = start_server()
    cache = second.get(f"/v1/sessions/{session_id}/cache").json()
    assert cache["device"] == 0
    assert cache["disk"] == cache["tokens"] - 1
    async with ChatClient(second.url) as client:
        await client.attach(session_id)
        reply = await reply_to(client, session_id, "What is my dog called?")
    assert "Zarnik" in reply["text"]
    assert reply["usage"]["cached_tokens_details"]["disk"] == cache["disk"]
    assert reply["cache"]["restored_from"] == "disk"
