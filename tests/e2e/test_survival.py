"""Restarts and deaths of the real server: nothing acknowledged is lost, and a cut answer continues as the same text."""

from __future__ import annotations

import random
import time

import psutil
import pytest

from chatserve.client import ChatClient
from tests.e2e.serving import ServerProcess, new_session, reply_to, serving

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


async def test_sessions_survive_a_restart(tmp_path):
    """After SIGTERM and a new start the sessions are listed and resumed, and what was told is remembered."""
    async with serving(tmp_path / "data") as server, ChatClient(server.url) as client:
        session_id = await new_session(client, title="Trip")
        await reply_to(client, session_id, "My name is Zorvin.")
    async with serving(tmp_path / "data") as server, ChatClient(server.url) as client:
        listed = (await server.get("/v1/sessions")).json()["data"]
        assert [session["title"] for session in listed] == ["Trip"]
        attached = await client.attach(session_id)
        assert attached["mode"] == "snapshot"
        reply = await reply_to(client, session_id, "What is my name?")
        assert "Zorvin" in reply["text"]
        assert reply["cache"]["reason"] == "not_saved"


async def test_idle_server_stops_quickly_and_cleanly(tmp_path):
    """SIGTERM on an idle server: status 0 in under 5 s, nothing else on stdout, no child left."""
    server = await ServerProcess.start(tmp_path / "data")
    children = psutil.Process(server.process.pid).children(recursive=True)
    assert children
    start = time.monotonic()
    status, rest = await server.stop()
    assert (status, rest) == (0, b"")
    assert time.monotonic() - start < 5
    assert not [child for child in children if child.is_running()]


async def test_killed_engine_continues_the_same_text(tmp_path):
    """kill -9 of the engine in mid-answer: the answer goes on, and equals that of an undisturbed session."""
    async with serving(tmp_path / "data") as server, ChatClient(server.url) as client:
        reference = (await reply_to(client, await new_session(client), LONG))["text"]
        session_id = await new_session(client)
        engine = server.child("chatserve.engine.process")
        await client.send(session_id, LONG, temperature=0)
        text, end, kinds = await collect(client, on_delta=lambda text: "20" in text and _kill(engine))
        assert "response.resumed" in kinds
        assert text == end["response"]["text"] == reference
        assert end["type"] == "response.completed"
        assert "Zorvin" in (await reply_to(client, session_id, "My name is Zorvin."))["text"]


@pytest.mark.parametrize("seed", range(2))
async def test_killed_server_loses_nothing(tmp_path, seed):
    """kill -9 of the whole server at a random instant of an answer: the message is there and the answer goes on."""
    await _kill_and_resume(tmp_path, random.Random(seed))


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(100, 200))
async def test_killed_server_loses_nothing_soak(tmp_path, seed):
    """The same at a hundred instants."""
    await _kill_and_resume(tmp_path, random.Random(seed))


async def _kill_and_resume(tmp_path, generator):
    server = await ServerProcess.start(tmp_path / "data")
    async with ChatClient(server.url) as client:
        reference = (await reply_to(client, await new_session(client), LONG))["text"]
        session_id = await new_session(client)
        accepted = await client.send(session_id, LONG, temperature=0)
        cut = generator.randrange(len(reference))
        seen = await _read_until(client, cut)
        server.kill()
        await server.process.wait()
    async with serving(tmp_path / "data") as server, ChatClient(server.url) as client:
        attached = await client.attach(session_id, after_seq=0)
        assert attached["mode"] == "replay"
        text, end, _ = await collect(client)
        assert text.startswith(seen)
        assert end["type"] == "response.completed"
        assert end["response"]["id"] == accepted["response_id"]
        assert text == end["response"]["text"] == reference


async def _read_until(client, num_characters):
    """Read deltas until so much text was seen; returns it."""
    seen = ""
    while len(seen) < num_characters:
        event = await client.next_event()
        if event["type"] == "response.output_text.delta":
            seen += event["delta"]
        if event["type"] in TERMINAL:
            break
    return seen


async def test_second_server_on_one_directory_is_refused(tmp_path):
    """Two servers on one data directory: the second ends with a clear error, the first serves on."""
    async with serving(tmp_path / "data") as server:
        with pytest.raises(AssertionError, match="data"):
            await ServerProcess.start(tmp_path / "data")
        assert (await server.get("/readyz")).status_code == 200


async def test_redis_away_at_start_is_a_clear_error(tmp_path):
    """A Redis that is not there ends the start with status 1 and a line that names its address."""
    with pytest.raises(AssertionError, match=r"status 1: [\s\S]*127\.0\.0\.1:1\b"):
        await ServerProcess.start(tmp_path / "data", "--redis-url", "redis://127.0.0.1:1/0")


def _kill(process):
    if process.is_running():
        process.kill()
