"""`ChatClient` against a real server: commands, events, and what it does when the connection breaks."""

import asyncio

import pytest

from chatserve.client import ChatClient, CommandFailedError, ConnectionEndedError
from chatserve.client.address import base_urls
from chatserve.client.cursor import Cursor
from chatserve.protocol import events


def delta(offset):
    return events.output_text_delta(response_id="r", offset=offset, delta="x")


async def next_of(client, kind):
    """The next event of one type."""
    async with asyncio.timeout(10):
        while (event := await client.next_event())["type"] != kind:
            pass
    return event


async def break_connections(served):
    """Close every connection as a restart would."""
    await served.services.hub.close_all(1012, "restart", 2.0)


@pytest.mark.parametrize("encoding", ["msgpack", "json"])
async def test_ask(served, encoding):
    """Create, attach, ask: the reply's response object comes back, in both encodings."""
    async with ChatClient(served.url, encoding=encoding) as client:
        session = await client.create_session(title="Grüße")
        assert session["title"] == "Grüße"
        attached = await client.attach(session["id"])
        assert attached["mode"] == "snapshot"
        response = await asyncio.wait_for(client.ask(session["id"], "a b c"), 5)
    assert (response["status"], response["text"]) == ("completed", "a b c")


async def test_other_commands(served):
    """Change, cancel, detach and delete a session."""
    async with ChatClient(served.url) as client:
        session_id = (await client.create_session())["id"]
        assert (await client.update_session(session_id, title="new"))["title"] == "new"
        assert await client.cancel(session_id, "resp_1") == "completed"
        await client.attach(session_id)
        await client.detach(session_id)
        await client.delete_session(session_id)
        with pytest.raises(CommandFailedError, match="session_not_found") as caught:
            await client.attach(session_id)
    assert caught.value.code == "session_not_found"


async def test_follows_again_from_the_cursor(served):
    """After a lost connection each event comes once, in order, also those written meanwhile."""
    async with ChatClient(served.url) as client:
        session_id = (await client.create_session())["id"]
        await client.attach(session_id, after_seq=0)
        assert (await next_of(client, "session.created"))["seq"] == 1
        await break_connections(served)
        for offset in range(3):
            await served.sessions.append(session_id, delta(offset))
        assert (await next_of(client, "client.disconnected"))["reason"]
        await next_of(client, "client.connected")
        seqs = [(await next_of(client, "response.output_text.delta"))["seq"] for _ in range(3)]
    assert seqs == [2, 3, 4]


async def test_snapshot_after_an_epoch(served):
    """Where the log is another one now, the snapshot is handed on and the cursor starts over."""
    async with ChatClient(served.url) as client:
        session_id = (await client.create_session())["id"]
        await client.attach(session_id, after_seq=0)
        client._cursors[session_id] = Cursor(epoch=99, seq=500)
        await break_connections(served)
        attached = await next_of(client, "session.attached")
        assert (attached["mode"], attached["head_seq"]) == ("snapshot", 1)
        await served.sessions.append(session_id, delta(0))
        assert (await next_of(client, "response.output_text.delta"))["seq"] == 2


async def test_unanswered_command_is_sent_again(served, monkeypatch):
    """A command whose answer was lost goes out again with the key it had, and is answered once."""
    keys = []
    create = served.sessions.create_session

    async def lose_the_first(tenant, command):
        keys.append(command.key)
        answer = await create(tenant, command)
        if len(keys) == 1:
            await asyncio.Event().wait()
        return answer

    monkeypatch.setattr(served.sessions, "create_session", lose_the_first)
    async with ChatClient(served.url) as client:
        creating = asyncio.create_task(client.create_session())
        async with asyncio.timeout(5):
            while not keys:
                await asyncio.sleep(0.01)
        await break_connections(served)
        session = await asyncio.wait_for(creating, 5)
    assert (len(keys), len(set(keys)), list(served.sessions.views)) == (2, 1, [session["id"]])


async def test_delete_that_was_carried_out_before_is_done(served, monkeypatch):
    """A delete whose answer was lost finds no session when it is sent again, and that is what was wanted."""
    delete = served.sessions.delete_session

    async def lose_the_answer(tenant, session_id):
        await delete(tenant, session_id)
        await asyncio.Event().wait()

    async with ChatClient(served.url) as client:
        session_id = (await client.create_session())["id"]
        monkeypatch.setattr(served.sessions, "delete_session", lose_the_answer)
        deleting = asyncio.create_task(client.delete_session(session_id))
        async with asyncio.timeout(5):
            while session_id in served.sessions.views:
                await asyncio.sleep(0.01)
        monkeypatch.setattr(served.sessions, "delete_session", delete)
        await break_connections(served)
        await asyncio.wait_for(deleting, 5)
        with pytest.raises(CommandFailedError, match="session_not_found"):
            await client.delete_session(session_id)


async def test_gap_is_filled(served, monkeypatch):
    """An event that goes missing makes the client attach again at its cursor; nothing is applied out of order."""
    follow, dropped = served.sessions.follow_batches, []

    async def with_a_hole(session_id, after_seq, *, epoch):
        async for batch in follow(session_id, after_seq, epoch=epoch):
            for entry in batch:
                if entry.seq == 3 and not dropped:
                    dropped.append(entry.seq)
                else:
                    yield [entry]

    monkeypatch.setattr(served.sessions, "follow_batches", with_a_hole)
    async with ChatClient(served.url) as client:
        session_id = (await client.create_session())["id"]
        await client.attach(session_id, after_seq=0)
        for offset in range(4):
            await served.sessions.append(session_id, delta(offset))
        seqs = [(await next_of(client, "response.output_text.delta"))["seq"] for _ in range(4)]
    assert (dropped, seqs) == ([3], [2, 3, 4, 5])


@pytest.mark.parametrize("token", [None, "wrong-key"])
async def test_wrong_key_is_final(serve, token):
    """A key that the server does not take is not tried again."""
    served = await serve(api_keys=("alice=alices-key",))
    with pytest.raises(ConnectionEndedError, match="API key") as caught:
        await ChatClient(served.url, token=token).connect()
    assert caught.value.code == 4401


async def test_nobody_listens():
    """The first connection fails at once, naming the address."""
    with pytest.raises(ConnectionEndedError, match=r"127\.0\.0\.1:1"):
        await ChatClient("http://127.0.0.1:1").connect()


async def test_refusal_while_connected_ends_the_client(served):
    """A final close code ends waiting commands and events with the reason."""
    async with ChatClient(served.url) as client:
        waiting = asyncio.create_task(client.next_event())
        for member in list(served.services.hub._members):
            member.close_soon(4401, "the key was withdrawn")
        with pytest.raises(ConnectionEndedError, match="withdrawn"):
            await asyncio.wait_for(waiting, 5)
        with pytest.raises(ConnectionEndedError, match="withdrawn"):
            await client.create_session()


async def test_closing_ends_who_waits(served):
    """Whoever waits for an event when the client is closed is told so."""
    client = ChatClient(served.url)
    await client.connect()
    waiting = asyncio.create_task(client.next_event())
    await asyncio.sleep(0)
    await client.close()
    with pytest.raises(ConnectionEndedError, match="closed"):
        await waiting


@pytest.mark.parametrize(
    ("seq", "seq_from", "verdict", "cursor_after"),
    [(5, None, "apply", 5), (7, 5, "apply", 7), (4, None, "drop", 4), (3, 1, "drop", 4), (6, None, "gap", 4)],
)
def test_cursor(seq, seq_from, verdict, cursor_after):
    """Apply the next event or a merged run of them, drop the old, notice what is missing."""
    cursor = Cursor(epoch=1, seq=4)
    assert cursor.judge({"seq": seq} | ({"seq_from": seq_from} if seq_from else {})) == verdict
    assert cursor.seq == cursor_after


@pytest.mark.parametrize(
    ("url", "http", "ws"),
    [
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000", "ws://127.0.0.1:8000"),
        ("localhost:8000", "http://localhost:8000", "ws://localhost:8000"),
        ("https://chat.example.org/base/", "https://chat.example.org/base", "wss://chat.example.org/base"),
        ("wss://chat.example.org", "https://chat.example.org", "wss://chat.example.org"),
    ],
)
def test_address(url, http, ws):
    """An address as people write it gives both URLs."""
    assert base_urls(url) == (http, ws)


@pytest.mark.parametrize("url", ["ftp://x", "http://", "", "unix:///tmp/x"])
def test_bad_address(url):
    """What is no server address is refused with an example of one."""
    with pytest.raises(ValueError, match="http://HOST:PORT"):
        base_urls(url)
