"""Restarts and deaths of the real server: nothing acknowledged is lost, and a cut answer continues as the same text."""

from __future__ import annotations

import asyncio
import time

import psutil
import pytest

from chatserve.client import ChatClient
from chatserve.client.errors import CommandFailedError
from chatserve.storage.redis_binary import find_redis_binary
from tests.e2e.talking import engine_of, new_session, reply_to
from tests.live import free_port

LONG = "Count from 1 to 60."
TERMINAL = ("response.completed", "response.incomplete", "response.cancelled", "response.failed")


async def collect(client, *, on_delta=None):
    """Apply events until a response ends; returns (its text by its deltas, the terminal event, all types)."""
    text, kinds = "", []
    async for event in client.events():
        kinds.append(event["type"])
        if event["type"] == "response.output_text.delta":
            assert event["offset"] == len(text)
            text += event["delta"]
            if on_delta:
                on_delta(text)
        if event["type"] in TERMINAL:
            return text, event, kinds
    raise AssertionError("unreachable: events() ends by raising")


async def test_sessions_survive_a_restart(start_server):
    """After SIGTERM and a new start the sessions are listed and resumed, and what was told is remembered."""
    server = start_server()
    async with ChatClient(server.url) as client:
        session_id = await new_session(client, title="Trip")
        await reply_to(client, session_id, "My name is Zorvin.")
    server.stop()
    server = start_server()
    listed = server.get("/v1/sessions").json()["data"]
    assert [session["title"] for session in listed] == ["Trip"]
    async with ChatClient(server.url) as client:
        attached = await client.attach(session_id)
        assert attached["mode"] == "snapshot"
        reply = await reply_to(client, session_id, "What is my name?")
    assert "Zorvin" in reply["text"]
    assert (reply["cache"]["restored_from"], reply["cache"]["reason"]) == ("disk", None)


def test_idle_server_stops_quickly_and_cleanly(start_server):
    """SIGTERM on an idle server: status 0 in under 5 s, nothing else on stdout, no child left."""
    server = start_server()
    children = psutil.Process(server.process.pid).children(recursive=True)
    assert children
    start = time.monotonic()
    assert server.stop() == 0
    assert time.monotonic() - start < 5
    assert server.stdout_rest() == b""
    assert not [child for child in children if child.is_running()]


async def test_killed_engine_continues_the_same_text(start_server):
    """kill -9 of the engine in mid-answer: the answer goes on, and equals that of an undisturbed session."""
    server = start_server()
    async with ChatClient(server.url) as client:
        reference = (await reply_to(client, await new_session(client), LONG))["text"]
        session_id = await new_session(client)
        engine = engine_of(server)
        await client.send(session_id, LONG, temperature=0)
        text, end, kinds = await collect(client, on_delta=lambda text: "20" in text and _kill(engine))
        assert "response.resumed" in kinds
        assert text == end["response"]["text"] == reference
        assert end["type"] == "response.completed"
        assert "Zorvin" in (await reply_to(client, session_id, "My name is Zorvin."))["text"]


def test_second_server_on_one_directory_is_refused(start_server, tmp_path):
    """Two servers on one data directory: the second ends with a clear error, the first serves on."""
    server = start_server()
    second = start_server(log=tmp_path / "second.log", wait=False)
    assert second.process.wait(30) == 1
    assert str(tmp_path / "data") in second.log.read_text().replace("\n", "")
    assert server.get("/readyz").status_code == 200


def test_redis_away_at_start_is_a_clear_error(start_server):
    """A Redis that is not there ends the start with status 1 and a line that names its address."""
    server = start_server("--redis-url=redis://127.0.0.1:1/0", wait=False)
    assert server.process.wait(30) == 1
    assert "127.0.0.1:1" in server.log.read_text()


async def test_redis_lost_while_serving(start_server, tmp_path):
    """With its Redis gone the server refuses turns as storage_unavailable; with it back, it goes on where it was."""
    port = free_port()
    redis = await start_redis(port, tmp_path)
    server = start_server(f"--redis-url=redis://127.0.0.1:{port}/0")
    async with ChatClient(server.url) as client:
        session_id = await new_session(client)
        await reply_to(client, session_id, "My name is Zorvin.")
        redis.kill()
        await redis.wait()
        with pytest.raises(CommandFailedError) as refusal:
            await client.send(session_id, "Hello!")
        assert refusal.value.error["code"] == "storage_unavailable"
        assert refusal.value.error["retryable"] is True
        assert server.get("/readyz").status_code == 503
        redis = await start_redis(port, tmp_path)
        async with asyncio.timeout(30):
            while server.get("/readyz").status_code != 200:
                await asyncio.sleep(0.1)
        reply = await reply_to(client, session_id, "What is my name?")
    assert "Zorvin" in reply["text"]
    server.stop()
    redis.terminate()
    await redis.wait()


async def start_redis(port, directory):
    """A Redis of its own that keeps what it acknowledged; returns once it answers."""
    binary = await find_redis_binary()
    options = (f"--port {port} --bind 127.0.0.1 --dir {directory} --appendonly yes --appendfsync always").split()
    process = await asyncio.create_subprocess_exec(binary.path, *options, stdout=asyncio.subprocess.DEVNULL)
    async with asyncio.timeout(20):
        while not await is_listening(port):
            await asyncio.sleep(0.05)
    return process


async def is_listening(port):
    """Whether something accepts connections there."""
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return False
    writer.close()
    await writer.wait_closed()
    return True


def _kill(process):
    if process.is_running():
        process.kill()
