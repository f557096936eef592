"""`GET .../events`: the log as server-sent events, gone on with where a client was cut off."""

import asyncio
import socket

import pytest

from chatserve.server import event_stream
from chatserve.server.http_transport import HttpTransport
from tests.server.real import ALICE, KEYS, sse_events


async def turn(http, path, text="Hello"):
    """A turn that has ended."""
    return (await http.post(f"{path}/responses", json={"input": text})).json()


async def session_path(http):
    return f"/v1/sessions/{(await http.post('/v1/sessions')).json()['id']}"


async def take(http, path, until, **options):
    """The events of a stream up to the first of a name."""
    async with asyncio.timeout(5), http.stream("GET", f"{path}/events", **options) as response:
        assert response.status_code == 200
        events = []
        async for event in sse_events(response):
            events.append(event)
            if event.name == until:
                return events
    return events


async def test_replay_then_live(real):
    """After the cursor come the events of the log, then those that happen, each once and in order."""
    async with real() as server, server.http() as http:
        path = await session_path(http)
        await turn(http, path)
        reading = asyncio.create_task(take(http, path, "session.deleted", params={"after_seq": 0}))
        await asyncio.sleep(0.05)
        await turn(http, path, "And now?")
        await http.delete(path)
        events = await reading
    assert (events[0].name, events[0].id, events[0].data["mode"]) == ("session.attached", None, "replay")
    epoch = events[0].data["epoch"]
    assert [event.id for event in events[1:]] == [f"{epoch}:{seq}" for seq in range(1, len(events))]
    assert [event.name for event in events].count("response.completed") == 2


async def test_last_event_id_at_every_event(real):
    """Wherever a stream was cut, what its last id asks for is exactly what was missed."""
    async with real() as server, server.http() as http:
        path = await session_path(http)
        await turn(http, path)
        whole = await take(http, path, "response.completed", params={"after_seq": 0})
        for missed in range(2, len(whole)):
            cut = {"Last-Event-ID": whole[missed - 1].id}
            rest = await take(http, path, "response.completed", headers=cut)
            assert [event.id for event in rest[1:]] == [event.id for event in whole[missed:]]


@pytest.mark.parametrize("cursor", [None, "epoch", "seq"])
async def test_snapshot_where_the_cursor_does_not_count(real, cursor):
    """Without a cursor, with one of another epoch or beyond the head: the state at the head, with the head's id."""
    async with real() as server, server.http() as http:
        path = await session_path(http)
        await turn(http, path)
        session = (await http.get(path)).json()
        headers = {
            None: {},
            "epoch": {"Last-Event-ID": f"{session['epoch'] + 1}:1"},
            "seq": {"Last-Event-ID": f"{session['epoch']}:{session['head_seq'] + 5}"},
        }[cursor]
        attached = (await take(http, path, "session.attached", headers=headers))[0]
    assert (attached.id, attached.data["mode"]) == (f"{session['epoch']}:{session['head_seq']}", "snapshot")
    assert attached.data["snapshot"]["messages"] == session["messages"]


async def test_snapshot_where_the_log_is_trimmed(real):
    """A cursor whose events are gone gets the state instead of a part of them, then goes on."""
    async with real() as server, server.http() as http:
        path = await session_path(http)
        await turn(http, path)
        session = (await http.get(path)).json()
        session_id = session["id"]
        live = server.services.sessions._registry._live[session_id]
        live.tail._entries.clear()
        await server.redis.xtrim(f"{{{session_id}}}:log", minid=f"{session['head_seq']}-0", approximate=False)
        cut = {"Last-Event-ID": f"{session['epoch']}:2"}
        attached = (await take(http, path, "session.attached", headers=cut))[0]
    assert (attached.data["mode"], attached.data["head_seq"]) == ("snapshot", session["head_seq"])


@pytest.mark.parametrize("sent", ["x", "1", "1:2:3", "-1:2", "1:", "9" * 40 + ":1"])
async def test_bad_last_event_id(real, sent):
    """What is no id of ours is refused by name."""
    async with real() as server, server.http() as http:
        path = await session_path(http)
        answer = await http.get(f"{path}/events", headers={"Last-Event-ID": sent})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "last-event-id")


async def test_signs_of_life(real, monkeypatch):
    """A stream in which nothing happens says that it is there."""
    monkeypatch.setattr(event_stream, "HEARTBEAT_S", 0.02)
    async with real() as server, server.http() as http:
        path = await session_path(http)
        async with asyncio.timeout(5), http.stream("GET", f"{path}/events") as response:
            lines = response.aiter_lines()
            while not (line := await anext(lines)).startswith(":"):
                pass
    assert line == ": still here"


async def test_streams_count_as_connections(real):
    """A key's streams are bounded with its WebSockets; one that ends makes room."""
    async with real(max_key_connections=1, api_keys=KEYS) as server, server.http(ALICE) as http:
        path = await session_path(http)
        async with http.stream("GET", f"{path}/events") as response:
            assert (await anext(sse_events(response))).name == "session.attached"
            refused = await http.get(f"{path}/events")
            assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limited")
        async with asyncio.timeout(5):
            while server.services.hub.num_connections:
                await asyncio.sleep(0.01)
        await take(http, path, "session.attached")


async def test_drain(real):
    """A draining server says goodbye on its streams and ends them; new ones are refused."""
    async with real() as server, server.http() as http:
        path = await session_path(http)
        async with asyncio.timeout(5), http.stream("GET", f"{path}/events") as response:
            events = sse_events(response)
            await anext(events)
            server.services.hub.begin_drain(3.0)
            assert (await anext(events)).name == "goaway"
            await server.services.hub.close_all(1012, "bye", 1.0)
            assert [event async for event in events] == []
        assert (await http.get(f"{path}/events")).status_code == 503


async def test_reader_that_takes_nothing_is_cut_off(real, monkeypatch):
    """A stream whose reader stalls loses its connection and its place, and nobody else waits for it."""
    monkeypatch.setattr(HttpTransport, "stall_timeout_s", 0.2)
    async with real() as server, server.http() as http:
        large = {"instructions": "x" * 900_000}  # in every event of this session
        path = f"/v1/sessions/{(await http.post('/v1/sessions', json=large)).json()['id']}"
        host, port = server.url.removeprefix("http://").split(":")
        with socket.socket() as stalled:
            stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            stalled.connect((host, int(port)))
            stalled.sendall(f"GET {path}/events HTTP/1.1\r\nHost: {host}:{port}\r\n\r\n".encode())
            async with asyncio.timeout(10):
                while not server.services.hub.num_connections:
                    await asyncio.sleep(0.01)
                while server.services.hub.num_connections:
                    await http.patch(path, json={"title": "more"})
        assert (await http.get(path)).status_code == 200
