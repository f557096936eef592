"""A welcomed connection: commands, following sessions, bad input, slow readers, ends."""

import asyncio
import socket

import pytest
from websockets.asyncio.client import connect

from chatserve.errors import Overloaded, Unavailable
from chatserve.protocol import events
from chatserve.protocol.commands import SessionCreate
from chatserve.server.services import Timeouts
from tests.server.conftest import HELLO, Peer


async def new_session(peer):
    return (await peer.ask(type="session.create", id="new", key="key-1"))["session"]["id"]


async def test_turn_on_an_attached_session(served):
    """Create, attach, send: the events come in order with contiguous seq, and the answer names the head."""
    peer = await served.peer()
    session_id = await new_session(peer)
    attached = await peer.ask(type="session.attach", id="c1", session_id=session_id, after_seq=0)
    assert attached == {
        "type": "session.attached",
        "id": "c1",
        "session_id": session_id,
        "epoch": 1,
        "head_seq": 1,
        "mode": "replay",
    }
    await peer.tell(type="response.create", id="c2", session_id=session_id, key="k2", input="a b c")
    heard = [await peer.hear() for _ in range(8)]
    log = [event for event in heard if "seq" in event]
    assert [event["seq"] for event in log] == [1, 2, 3, 4, 5, 6, 7]
    assert "".join(event.get("delta", "") for event in log) == "a b c "
    answers = [event for event in heard if event["type"] == "ok"]
    response_id = log[-1]["response"]["id"]
    assert answers == [
        {
            "type": "ok",
            "id": "c2",
            "message_id": log[1]["message"]["id"],
            "response_id": response_id,
            "head_seq": 3,
            "duplicate": False,
        }
    ]


async def test_json_connection(served):
    """The JSON subprotocol says the same in text."""
    peer = Peer(await served.connect(subprotocol="chatserve.v1.json"), "json")
    assert (await peer.ask(**HELLO))["type"] == "welcome"
    session = (await peer.ask(type="session.create", id="c1", key="k1", title="Überblick"))["session"]
    assert session["title"] == "Überblick"
    attached = await peer.ask(type="session.attach", id="c2", session_id=session["id"], after_seq=0)
    assert (attached["type"], attached["mode"]) == ("session.attached", "replay")
    assert await peer.hear() == {
        "type": "session.created",
        "session": session,
        "session_id": session["id"],
        "seq": 1,
        "ts": 1000,
    }


async def test_replay_after_a_cursor(served):
    """Attaching with a cursor brings what came after it, once, then what follows."""
    writer = await served.peer()
    session_id = await new_session(writer)
    await served.sessions.append(session_id, events.output_text_delta(response_id="r", offset=0, delta="x"))
    reader = await served.peer()
    await reader.ask(type="session.attach", id="c1", session_id=session_id, epoch=1, after_seq=1)
    assert (await reader.hear())["seq"] == 2
    await served.sessions.append(session_id, events.output_text_delta(response_id="r", offset=1, delta="y"))
    assert (await reader.hear())["seq"] == 3


async def test_resume_in_hello(served):
    """Hello with cursors is answered by welcome, an announcement for each session, and an error for one that is not."""
    writer = await served.peer()
    session_id = await new_session(writer)
    resume = [
        {"session_id": session_id, "epoch": 1, "after_seq": 0},
        {"session_id": "sess_gone", "epoch": 1, "after_seq": 5},
    ]
    reader = await served.peer(resume=resume)
    heard = [await reader.hear() for _ in range(3)]
    by_type = {event["type"]: event for event in heard}
    assert by_type["session.attached"]["session_id"] == session_id
    assert "id" not in by_type["session.attached"]
    assert by_type["session.created"]["seq"] == 1
    assert by_type["error"]["session_id"] == "sess_gone"
    assert by_type["error"]["error"]["code"] == "session_not_found"


async def test_detach_stops_events(served):
    """After detach nothing of the session arrives; attaching again goes on from the cursor."""
    peer = await served.peer()
    session_id = await new_session(peer)
    await peer.ask(type="session.attach", id="c1", session_id=session_id)
    assert await peer.ask(type="session.detach", id="c2", session_id=session_id) == {"type": "ok", "id": "c2"}
    await served.sessions.append(session_id, events.output_text_delta(response_id="r", offset=0, delta="x"))
    assert (await peer.ask(type="ping", t=3.0))["type"] == "pong"


async def test_attaching_twice_moves_the_cursor(served):
    """A second attach replaces the first: one copy of each event, from the new cursor."""
    peer = await served.peer()
    session_id = await new_session(peer)
    for number in range(2):
        await peer.tell(type="session.attach", id=f"c{number}", session_id=session_id, after_seq=0)
    await peer.tell(type="session.detach", id="end", session_id="sess_other")
    heard = []
    while not heard or heard[-1].get("id") != "end":
        heard.append(await peer.hear())
    await served.sessions.append(session_id, events.output_text_delta(response_id="r", offset=0, delta="x"))
    assert (await peer.hear())["seq"] in (1, 2)
    assert sum(event["type"] == "session.attached" for event in heard) == 2


async def test_ping_is_answered_while_a_command_takes_its_time(served, monkeypatch):
    """A slow command holds up the commands behind it, not the pong; all are answered in order in the end."""
    peer, go_on = await served.peer(), asyncio.Event()
    create = served.sessions.create_session

    async def slow(tenant, command):
        await go_on.wait()
        return await create(tenant, command)

    monkeypatch.setattr(served.sessions, "create_session", slow)
    await peer.tell(type="session.create", id="c1", key="k1")
    await peer.tell(type="session.detach", id="c2", session_id="s")
    assert (await peer.ask(type="ping", t=2.5))["t"] == 2.5
    go_on.set()
    assert [(await peer.hear())["id"] for _ in range(2)] == ["c1", "c2"]


async def test_what_was_said_before_leaving_is_carried_out(served, monkeypatch):
    """A connection that closes right behind its commands leaves none of them undone."""
    peer = await served.peer()
    create = served.sessions.create_session

    async def slow(tenant, command):
        await asyncio.sleep(0.02)
        return await create(tenant, command)

    monkeypatch.setattr(served.sessions, "create_session", slow)
    for number in range(5):
        await peer.tell(type="session.create", id=f"c{number}", key=f"k{number}")
    await peer.socket.close()
    async with asyncio.timeout(5):
        while served.services.hub.num_connections:
            await asyncio.sleep(0.01)
    assert len(served.sessions.views) == 5


async def test_too_many_sessions_followed(serve):
    """Past the limit attach is refused; one that is followed already may be attached again."""
    served = await serve(max_connection_sessions=1)
    peer = await served.peer()
    session_id = await new_session(peer)
    other = (await served.sessions.create_session("local", SessionCreate(id="x", key="k2")))[0]["id"]
    await peer.tell(type="session.attach", id="c1", session_id=session_id)
    await peer.tell(type="session.attach", id="c2", session_id=other)
    await peer.tell(type="session.attach", id="c3", session_id=session_id)
    answers = {}
    while len(answers) < 3:
        event = await peer.hear()
        if "id" in event:
            answers[event["id"]] = event.get("error", {}).get("code", event["type"])
    assert answers == {"c1": "session.attached", "c2": "rate_limited", "c3": "session.attached"}


@pytest.mark.parametrize(
    ("command", "code", "param"),
    [
        ({"type": "session.destroy", "id": "c1"}, "unknown_type", "type"),
        ({"type": "session.create", "id": "c1"}, "missing_field", "key"),
        ({"type": "session.create", "id": "c1", "key": "k", "title": 5}, "invalid_value", "title"),
        ({"type": "session.attach", "id": "c1", "session_id": "sess_none"}, "session_not_found", "session_id"),
    ],
)
async def test_refused_command(served, command, code, param):
    """A refusal carries the command's id, the code and the field, and the connection goes on."""
    peer = await served.peer()
    answer = await peer.ask(**command)
    assert (answer["type"], answer["id"]) == ("error", "c1")
    assert (answer["error"]["code"], answer["error"]["param"]) == (code, param)
    assert (await peer.ask(type="ping", t=1.5))["t"] == 1.5


@pytest.mark.parametrize(
    ("fault", "code", "retryable"),
    [
        (Unavailable("redis is away"), "storage_unavailable", True),
        (Overloaded("full", retry_after_ms=5), "queue_full", True),
        (KeyError("a fault of ours"), "internal_error", False),
    ],
)
async def test_failed_command(served, fault, code, retryable):
    """Whatever a command runs into becomes an error object that tells nothing of our insides."""
    peer = await served.peer()
    session_id = await new_session(peer)
    served.sessions.fault = fault
    await peer.tell(type="response.create", id="c2", session_id=session_id, key="k", input="hi")
    answer = await peer.hear()
    while answer.get("id") != "c2":
        answer = await peer.hear()
    assert answer["session_id"] == session_id
    assert (answer["error"]["code"], answer["error"]["retryable"]) == (code, retryable)
    assert "a fault" not in answer["error"]["message"]


@pytest.mark.parametrize("garbage", [b"\xc1", b"", b"\x93\x01\x02\x03", "text on a msgpack connection"])
async def test_bad_message(served, garbage):
    """What is no command at all is answered, then the connection closes with 4400."""
    peer = await served.peer()
    await peer.socket.send(garbage)
    assert (await peer.hear())["error"]["code"] == "bad_message"
    assert await peer.closed_with() == 4400


async def test_message_too_large(serve):
    """A message past the limit closes with 1009 before it is read into memory."""
    served = await serve(max_message_bytes="4k")
    peer = await served.peer()
    await peer.socket.send(b"x" * 5000)
    assert await peer.closed_with() == 1009


async def test_sessions_changed_reaches_the_tenant_only(serve):
    """Other connections of the tenant learn that the list changed, those of another tenant do not."""
    served = await serve(api_keys=("alice=alices-key", "bob=bobs-key-2"))
    alice, other = await served.peer(token="alices-key"), await served.peer(token="alices-key")
    bob = await served.peer(token="bobs-key-2")
    await alice.tell(type="session.create", id="c1", key="k1")
    assert await other.hear_any() == {"type": "sessions.changed"}
    await bob.tell(type="ping", t=1.0)
    assert (await bob.hear_any())["type"] == "pong"


async def test_failed_following_is_reported(served, monkeypatch):
    """If a session's log cannot be read on, the client is told which session stands still."""
    peer = await served.peer()
    session_id = await new_session(peer)

    async def broken(session_id, after_seq, *, epoch):
        raise Unavailable("redis is away")
        yield

    monkeypatch.setattr(served.sessions, "follow_batches", broken)
    await peer.tell(type="session.attach", id="c1", session_id=session_id)
    event = await peer.hear()
    while event["type"] != "error":
        event = await peer.hear()
    assert event["session_id"] == session_id
    assert event["error"]["code"] == "storage_unavailable"
    assert "id" not in event


async def test_reader_that_was_behind_gets_merged_deltas(served):
    """Who reads nothing for a while gets the rest in fewer events: each begins where the last ended, no text amiss."""
    peer = await served.peer()
    session_id = await new_session(peer)
    started = await slow_peer(served, 1 << 16)
    await started.ask(type="session.attach", id="c1", session_id=session_id, after_seq=0)
    num_deltas, size = 1500, 4000
    for number in range(num_deltas):
        delta = events.output_text_delta(response_id="r", offset=number * size, delta=f"{number:06}" + "é" * (size - 6))
        await served.sessions.append(session_id, delta)
    last, text, num_heard = 0, 0, 0
    while last < num_deltas + 1:
        event = await started.hear()
        assert event.get("seq_from", event["seq"]) == last + 1
        last, num_heard = event["seq"], num_heard + 1
        if "delta" in event:
            assert event["offset"] == text
            assert event["delta"].startswith(f"{text // size:06}")
            text += len(event["delta"])
    assert text == num_deltas * size
    assert num_heard < num_deltas
    started.socket.transport.abort()


async def slow_peer(served, num_bytes=4096):
    """A welcomed connection whose side of the line holds little."""
    raw = socket.create_connection(("127.0.0.1", int(served.url.rpartition(":")[2])))
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, num_bytes)
    address = served.url.replace("http", "ws") + "/v1/ws"
    options = {"subprotocols": ["chatserve.v1.msgpack"], "proxy": None, "max_queue": 1, "ping_interval": None}
    peer = Peer(await connect(address, sock=raw, **options))
    assert (await peer.ask(**HELLO))["type"] == "welcome"
    return peer


async def test_slow_reader_holds_up_nobody(serve):
    """Who stops reading is cut off; another reader of the same session gets everything meanwhile."""
    served = await serve(timeouts=Timeouts(stuck_s=0.3))
    quick = await served.peer()
    session_id = await new_session(quick)
    slow = await slow_peer(served)
    await slow.ask(type="session.attach", id="c1", session_id=session_id, after_seq=0)
    await quick.ask(type="session.attach", id="c1", session_id=session_id, after_seq=0)
    delta = "x" * 60_000
    for number in range(200):  # 12 MB: more than the sockets between us hold
        await served.sessions.append(
            session_id, events.output_text_delta(response_id="r", offset=number * 60_000, delta=delta)
        )
    seqs = []
    while not seqs or seqs[-1] < 201:
        seqs += [event["seq"] for event in [await quick.hear()] if "seq" in event]
    assert seqs == list(range(1, 202))
    async with asyncio.timeout(5):
        while served.services.hub.num_connections > 1:
            await asyncio.sleep(0.02)
    assert (await quick.ask(type="ping", t=1.0))["type"] == "pong"
    slow.socket.transport.abort()


async def test_disconnect_ends_the_connection_only(served):
    """A peer that vanishes leaves nothing behind, and its session goes on."""
    peer = await served.peer()
    session_id = await new_session(peer)
    await peer.ask(type="session.attach", id="c1", session_id=session_id)
    peer.socket.transport.abort()
    async with asyncio.timeout(5):
        while served.services.hub.num_connections:
            await asyncio.sleep(0.01)
    await served.sessions.append(session_id, events.output_text_delta(response_id="r", offset=0, delta="x"))
    assert session_id in served.sessions.views


async def test_hello_while_draining_is_told_to_leave(served):
    """Who was connected before the drain and says hello only then hears goaway behind the welcome."""
    peer = Peer(await served.connect())
    served.services.hub.begin_drain(5)
    assert (await peer.ask(**HELLO))["type"] == "welcome"
    assert (await peer.hear())["type"] == "goaway"


async def test_close_all(served):
    """At the end every connection gets what was queued for it and a close code that says to come back."""
    peers = [await served.peer() for _ in range(3)]
    served.services.hub.begin_drain(0)
    await served.services.hub.close_all(1012, "the server is shutting down", 2.0)
    assert served.services.hub.num_connections == 0
    for peer in peers:
        assert (await peer.hear())["type"] == "goaway"
        assert await peer.closed_with() == 1012
