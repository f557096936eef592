"""Deleting a session on a real server: nothing of it answers any more, and nothing of it is computed from."""

from __future__ import annotations

from chatserve.client import ChatClient
from tests.e2e.talking import new_session, reply_to

WORDS = " ".join(f"The {number}th parcel went to house {number * 7} on the left." for number in range(40))


async def test_deleted_session_is_computed_anew(live_server):
    """The same words in a new session find nothing of the deleted one's; before it was deleted they did."""
    async with ChatClient(live_server.url) as client:
        first = await new_session(client)
        await reply_to(client, first, WORDS, max_output_tokens=2)
        second = await new_session(client)
        shared = (await reply_to(client, second, WORDS, max_output_tokens=2))["usage"]["input_tokens_details"]
        assert shared["cached_tokens"] > 300
        for session_id in (first, second):
            await client.delete_session(session_id)
            assert live_server.get(f"/v1/sessions/{session_id}").status_code == 404
        usage = (await reply_to(client, await new_session(client), WORDS, max_output_tokens=2))["usage"]
    assert usage["input_tokens_details"]["cached_tokens"] < 128
