"""Records sessions' logs from a real server: what `web/test` and `test_logs.py` both apply. Run it by hand:

    python -m tests.page.record_logs

Each record has the log, the snapshot at its end, and arrivals: the events as a bad line may bring them, with
repetitions, merged deltas and gaps, each with the verdict that the client rule gives.
"""

from __future__ import annotations

import asyncio
import json
import random
import tempfile
from pathlib import Path
from typing import Any

from chatserve.client import ChatClient
from chatserve.protocol.events import TERMINAL_EVENTS
from tests.live import LiveServer

DATA = Path(__file__).parent / "data"
DELTA = "response.output_text.delta"
Event = dict[str, Any]


async def log_of(client: ChatClient, session_id: str) -> list[Event]:
    """The whole log of a session without a running reply."""
    attached = await client.attach(session_id, after_seq=0)
    return [await session_event(client) for _ in range(attached["head_seq"])]


async def session_event(client: ChatClient) -> Event:
    """The next event of a session."""
    while "seq" not in (event := await client.next_event()):
        pass
    return event


async def until(client: ChatClient, *kinds: str) -> Event:
    """The next event of one of these kinds."""
    while (event := await session_event(client))["type"] not in kinds:
        pass
    return event


async def turn(client: ChatClient, session_id: str, **fields: Any) -> Event:
    """A turn to its end; returns the response."""
    await client.respond(session_id, temperature=0, **fields)
    response: Event = (await until(client, *TERMINAL_EVENTS))["response"]
    return response


async def branches(client: ChatClient, session_id: str) -> None:
    """Turns, an edit, an answer again, a stop, going on, and a switch back."""
    first = await turn(client, session_id, input="My cat is called Möhre 🐈 and my name is Zoë.")
    await turn(client, session_id, input="What is my cat called?")
    await turn(client, session_id, input="My cat is called Momo.", parent_id="root")
    again = await turn(client, session_id, parent_id=first["parent_id"])
    accepted = await client.respond(session_id, input="Tell me a long story", ignore_eos=True, max_output_tokens=400)
    await until(client, DELTA)
    await client.cancel(session_id, accepted["response_id"])
    stopped = (await until(client, *TERMINAL_EVENTS))["response"]
    await turn(client, session_id, parent_id=stopped["message_id"], max_output_tokens=8)
    await client.update_session(session_id, head_id=again["message_id"], title="Branches")


async def titles(client: ChatClient, session_id: str) -> None:
    """A turn, a new title, a pin, and a reply that was cut off."""
    await turn(client, session_id, input="I live in Oslo.")
    await client.update_session(session_id, title="Oslo", pinned=True)
    await turn(client, session_id, input="Where do I live?", max_output_tokens=2)


def merged(first: Event, second: Event) -> Event:
    """Two deltas as one."""
    return {**second, "seq_from": first["seq"], "offset": first["offset"], "delta": first["delta"] + second["delta"]}


def arrivals(log: list[Event], seed: int) -> list[Event]:
    """The log as a bad line may bring it; a gap is followed by a replay from the last event applied."""
    draw, arrived, at = random.Random(seed), [], 0
    while at < len(log):
        fate = draw.random()
        can_merge = at + 1 < len(log) and log[at]["type"] == log[at + 1]["type"] == DELTA
        if fate < 0.15 and at + 1 < len(log):
            arrived.append({"verdict": "gap", "event": log[at + 1]})
        elif fate < 0.3 and at:
            arrived.append({"verdict": "drop", "event": log[draw.randrange(at)]})
        elif fate < 0.6 and can_merge:
            arrived.append({"verdict": "apply", "event": merged(log[at], log[at + 1])})
            at += 2
        else:
            arrived.append({"verdict": "apply", "event": log[at]})
            at += 1
    return arrived


async def record(url: str) -> None:
    """Write each record."""
    for seed, conversation in enumerate((branches, titles)):
        async with ChatClient(url) as client:
            session_id = (await client.create_session())["id"]
            await client.attach(session_id)
            await conversation(client, session_id)
        async with ChatClient(url) as client:
            snapshot = (await client.attach(session_id))["snapshot"]
            log = await log_of(client, session_id)
        written = {"snapshot": snapshot, "arrivals": arrivals(log, seed)}
        text = json.dumps(written, ensure_ascii=False, indent=None, separators=(",", ":"))
        (DATA / f"{conversation.__name__}.json").write_text(text + "\n")


def main() -> None:
    """Start a server, record, end it."""
    with tempfile.TemporaryDirectory() as directory:
        server = LiveServer(Path(directory) / "data").wait_ready()
        try:
            asyncio.run(record(server.url))
        finally:
            server.stop()


if __name__ == "__main__":
    main()
