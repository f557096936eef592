"""A line that breaks at any message boundary of a turn: the client applies exactly the log, and the turn runs once."""

from __future__ import annotations

import asyncio
import secrets

import pytest

from chatserve.client import ChatClient, Patience
from tests.heard import QUICK, Heard
from tests.live import LiveServer
from tests.proxy import Fault, Kind, Proxy

ASK = "Count from 1 to 20."
AT_ONCE = 6
WELCOMED = 2  # hello and welcome: a client whose first connection is refused says so instead of trying again


async def take_turn(client: ChatClient, title: str) -> tuple[str, Heard]:
    """A new session and one turn of it; gives what was heard of it, which must be the whole log."""
    session = await client.create_session(title=title)
    await client.attach(session["id"], after_seq=0)
    await client.send(session["id"], ASK, temperature=0)
    heard = Heard()
    while not heard.end:
        event = await client.next_event()
        assert event["type"] != "error", event
        assert event.get("mode") != "snapshot", "a cursor of a log that has everything is replayed"
        if "seq" in event:
            heard.apply(event)
    return session["id"], heard


async def turn_through(server: LiveServer, fault: Fault | None, reference: str | None = None) -> tuple[int, str, bool]:
    """A turn over a line with a fault: the first connection's messages, the text, and whether there was another."""
    title = secrets.token_hex(8)
    encoding = "msgpack" if fault is None or fault.after % 2 else "json"
    async with Proxy(server.url, fault) as proxy:
        patience = QUICK if fault else Patience()
        client = ChatClient(proxy.url, encoding=encoding, patience=patience)  # type: ignore[arg-type]
        async with asyncio.timeout(30), client:
            session_id, heard = await take_turn(client, title)
    state = (await asyncio.to_thread(server.get, f"/v1/sessions/{session_id}")).json()
    assert len(heard.seqs) == state["head_seq"]
    assert heard.text == heard.end["response"]["text"] == state["messages"][1]["content"][0]["text"]
    assert [message["role"] for message in state["messages"]] == ["user", "assistant"]
    assert reference in (None, heard.text)
    listed = (await asyncio.to_thread(server.get, "/v1/sessions?limit=200")).json()["data"]
    assert sum(session["title"] == title for session in listed) <= 1
    return proxy.lines[0].num_passed, heard.text, len(proxy.lines) > 1


async def break_everywhere(server: LiveServer, kind: Kind, step: int) -> None:
    """The fault at every `step`-th message boundary of a turn, several turns side by side."""
    num_messages, reference, _ = await turn_through(server, None)
    assert num_messages > 12
    slots = asyncio.Semaphore(AT_ONCE)

    async def one(after: int) -> bool:
        async with slots:
            return (await turn_through(server, Fault(kind, after), reference))[2]

    came_back = await asyncio.gather(*(one(after) for after in range(WELCOMED, num_messages, step)))
    assert kind == "delay" or sum(came_back) > len(came_back) // 2  # the last boundaries may not be reached


@pytest.mark.parametrize(
    ("kind", "step"), [("cut", 1), ("reset", 3), ("lose", 2), ("torn", 3), ("stall", 4), ("delay", 5)]
)
async def test_a_turn_survives_its_line(live_server: LiveServer, kind: Kind, step: int) -> None:
    """Each fault at message boundaries in either direction: all events once, the text as it should be, one turn."""
    await break_everywhere(live_server, kind, step)


@pytest.mark.soak
@pytest.mark.parametrize("kind", ["cut", "reset", "lose", "torn", "stall", "delay"])
async def test_a_turn_survives_its_line_everywhere(live_server: LiveServer, kind: Kind) -> None:
    """The same at every boundary, ten times over."""
    for _ in range(10):
        await break_everywhere(live_server, kind, 1)
