"""`chatserve serve` as a process: what it prints, how it starts, ends, and finds its sessions again."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import time

import pytest

from chatserve.client import ChatClient
from chatserve.client.snapshot import branch, text_of

READY_FIELDS = {"event", "url", "pid", "model", "version"}


async def finished_within(client, response_id, timeout_s):
    """The response object of a reply, waited for over reconnects."""
    async with asyncio.timeout(timeout_s):
        async for event in client.events():
            if event.get("response", {}).get("id") == response_id and event["type"] != "response.created":
                return event["response"]


async def test_conversation_survives_a_restart(start_server):
    """Talk, end the server with SIGTERM, start it again on the same data: the session goes on, its cache warm or not."""
    first = start_server()
    assert set(first.ready) == READY_FIELDS
    async with ChatClient(first.url) as client:
        session_id = (await client.create_session(title="pets"))["id"]
        await client.attach(session_id)
        assert "Zorp" in (await client.ask(session_id, "My dog is called Zorp."))["text"]
    began_s = time.monotonic()
    assert first.stop(signal.SIGTERM) == 0
    assert time.monotonic() - began_s < 5
    assert first.stdout_rest() == b""
    second = start_server()
    async with ChatClient(second.url) as client:
        attached = await client.attach(session_id)
        assert [message["role"] for message in branch(attached["snapshot"])] == ["user", "assistant"]
        assert "Zorp" in (await client.ask(session_id, "What is my dog called?"))["text"]
    listed = second.get("/v1/sessions").json()["data"]
    assert [(view["id"], view["title"], view["num_messages"]) for view in listed] == [(session_id, "pets", 4)]
    assert "Zorp" not in second.log.read_text()
    assert "response completed" in second.log.read_text()


async def test_reply_goes_on_over_a_restart(start_server):
    """A reply that is cut by SIGTERM is continued by the next server, and the client that came back sees one text."""
    port = free_port()
    first = start_server(f"--port={port}", "--drain-timeout-s=0.2")
    async with ChatClient(first.url) as client:
        session_id = (await client.create_session())["id"]
        await client.attach(session_id)
        accepted = await client.send(
            session_id, "My dog is called Zorp.", ignore_eos=True, max_output_tokens=1500, temperature=0.0
        )
        goaway_or_gone = asyncio.create_task(finished_within(client, accepted["response_id"], 60))
        await asyncio.sleep(0.3)
        assert await asyncio.to_thread(first.stop) == 0
        await asyncio.to_thread(start_server, f"--port={port}")
        response = await goaway_or_gone
        assert (response["status"], response["usage"]["output_tokens"]) == ("incomplete", 1500)
        snapshot = (await client.attach(session_id))["snapshot"]
    assert text_of(branch(snapshot)[-1]) == response["text"]


async def test_acknowledged_message_survives_kill(start_server):
    """What was acknowledged is there after kill -9 of the server, and its reply is made."""
    first = start_server()
    async with ChatClient(first.url) as client:
        session_id = (await client.create_session())["id"]
        accepted = await client.send(session_id, "My dog is called Zorp.")
        first.stop(signal.SIGKILL)
    second = start_server()
    async with ChatClient(second.url) as client:
        attached = await client.attach(session_id, after_seq=0)
        response = await finished_within(client, accepted["response_id"], 30)
        assert attached["mode"] == "replay"
        assert response["status"] == "completed"
        messages = branch((await client.attach(session_id))["snapshot"])
    assert [text_of(message) for message in messages] == ["My dog is called Zorp.", response["text"]]


def test_second_server_on_the_same_data(live_server, start_server, tmp_path):
    """A data directory has one server; the second ends with status 1 and says so."""
    data_dir = live_server.data_dir
    second = start_server(data_dir=data_dir, log=tmp_path / "second.log", wait=False)
    assert second.process.wait(60) == 1
    assert str(data_dir) in second.log.read_text()
    assert second.stdout_rest() == b""


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--redis-url=redis://127.0.0.1:1/0"], "cannot reach Redis at redis://127.0.0.1:1/0"),
        (["--device=cuda"], "--device cpu"),
        (["--model=/nowhere/at/all"], "/nowhere/at/all"),
        (["--host=198.51.100.7", "--insecure"], "cannot listen on 198.51.100.7"),
    ],
)
def test_cannot_start(start_server, arguments, expected):
    """What keeps the server from starting is said in a line, with status 1 and no trace of Python."""
    server = start_server(*arguments, wait=False)
    assert server.process.wait(60) == 1
    log = server.log.read_text()
    assert expected in log
    assert "Traceback" not in log


def test_sigterm_while_loading(start_server):
    """A server that is told to end before it is ready does, and leaves nothing running."""
    server = start_server(wait=False)
    time.sleep(3)
    began_s = time.monotonic()
    server.stop(signal.SIGTERM)
    assert time.monotonic() - began_s < 10
    assert server.stdout_rest() == b""


def test_json_logs(start_server):
    """With --log-format json every line of ours on stderr after the summary is an object."""
    server = start_server("--log-format=json")
    server.stop()
    lines = [line for line in server.log.read_text().splitlines() if "shutting down" in line]
    assert json.loads(lines[0])["message"] == "shutting down"


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
