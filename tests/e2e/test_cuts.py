"""One client through the deaths of its server, and through a Redis that loses its last second."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from pathlib import Path

import pytest

from chatserve.client import ChatClient
from chatserve.client.errors import CommandFailedError
from chatserve.storage.redis_binary import find_redis_binary
from tests.e2e.test_survival import is_listening
from tests.heard import QUICK, Heard
from tests.live import free_port

LONG = "Count from 1 to 40."
LONGER = "Count from 1 to 100."


async def test_clients_through_a_killed_server(start_server):
    """A kill (-9) at five random instants of turns, then SIGTERM in another: clients apply exactly the log."""
    await _kill_in_turns(start_server, range(5))


@pytest.mark.soak
@pytest.mark.parametrize("first", range(100, 200, 5))
async def test_clients_through_a_killed_server_soak(start_server, first):
    """The same at a hundred instants."""
    await _kill_in_turns(start_server, range(first, first + 5))


async def _kill_in_turns(start_server, seeds):
    """One kill that meets a turn for each seed, each at its own instant."""
    port = free_port()
    server = start_server(f"--port={port}")
    reference, turn_s = await _undisturbed(server)
    pauses = {seed: random.Random(seed).uniform(0, turn_s) for seed in seeds}
    turns = [asyncio.create_task(_take_turn(server.url, pauses[seed])) for seed in seeds]
    await asyncio.sleep(turn_s)
    server.stop(signal.SIGKILL)
    server = await asyncio.to_thread(start_server, f"--port={port}")
    for seed, (session_id, heard) in zip(seeds, await asyncio.wait_for(asyncio.gather(*turns), 90), strict=True):
        state = (await asyncio.to_thread(server.get, f"/v1/sessions/{session_id}")).json()
        assert heard.seqs == list(range(1, state["head_seq"] + 1)), seed
        assert heard.text == reference, seed
        assert [message["role"] for message in state["messages"]] == ["user", "assistant"], seed
    await _leave_in_mid_turn(server)


async def _leave_in_mid_turn(server):
    """SIGTERM while a reply is made: clients are told, it comes to its end, no other begins, and the server is gone."""
    heard, kinds = Heard(), []
    async with ChatClient(server.url, patience=QUICK) as client:
        session_id = (await client.create_session())["id"]
        await client.attach(session_id, after_seq=0)
        await client.send(session_id, LONGER, temperature=0)
        stopping = asyncio.create_task(asyncio.to_thread(server.stop))
        while "goaway" not in kinds:
            kinds.append((await _take(client, heard))["type"])
        with pytest.raises(CommandFailedError, match="server_draining"):
            await client.send(session_id, "Hello!")
        while "client.disconnected" not in kinds:
            kinds.append((await _take(client, heard))["type"])
    assert heard.end["type"] == "response.completed"
    assert await stopping == 0


async def _take(client, heard):
    event = await asyncio.wait_for(client.next_event(), 30)
    if "seq" in event:
        heard.apply(event)
    return event


async def _undisturbed(server):
    """The reply as it should be, and about how long a turn takes among others."""
    began_s = time.monotonic()
    turns = await asyncio.gather(*(_take_turn(server.url, 0.0) for _ in range(2)))
    return turns[0][1].text, time.monotonic() - began_s


async def _take_turn(url, pause_s):
    """Attach from the beginning, wait, say something, and apply events until the reply has ended."""
    heard = Heard()
    async with ChatClient(url, patience=QUICK) as client:
        session_id = (await client.create_session())["id"]
        await client.attach(session_id, after_seq=0)
        await asyncio.sleep(pause_s)
        await client.send(session_id, LONG, temperature=0)
        while not heard.end:
            event = await client.next_event()
            assert event.get("mode") != "snapshot"
            if "seq" in event:
                heard.apply(event)
    return session_id, heard


async def test_redis_that_loses_its_last_second(start_server, tmp_path):
    """What a Redis with `appendfsync everysec` forgets begins a new epoch: a snapshot for the client, never a gap."""
    async with ForgetfulRedis(tmp_path / "redis") as redis:
        server = start_server(f"--redis-url=redis://127.0.0.1:{redis.port}/0")
        async with ChatClient(server.url, patience=QUICK) as client:
            await _lose_in_mid_answer(redis, client)
            await _lose_at_rest(redis, client, server)
        server.stop()


async def _lose_in_mid_answer(redis, client):
    """The reply goes on from where the log still has it, and comes to the same text."""
    session_id, heard, epoch = await _follow_new(client)
    await _say(client, session_id, heard, LONG)
    reference = heard.text
    session_id, heard, epoch = await _follow_new(client)
    await client.send(session_id, LONG, temperature=0)
    await _hear(client, session_id, heard, until=lambda: len(heard.text) > 10)
    redis.remember()
    await _hear(client, session_id, heard, until=lambda: len(heard.text) > 40)
    await redis.lose()
    await _hear(client, session_id, heard, until=lambda: heard.epoch > epoch and heard.end)
    assert heard.text == reference


async def _lose_at_rest(redis, client, server):
    """A whole reply is lost: the next command is refused, the client gets the state as it is, and the reply anew."""
    session_id, heard, epoch = await _follow_new(client)
    await client.send(session_id, LONG, temperature=0)
    await _hear(client, session_id, heard, until=lambda: len(heard.text) > 10)
    redis.remember()
    await _hear(client, session_id, heard, until=lambda: heard.end)
    reference = heard.text
    await redis.lose()
    async with asyncio.timeout(30):
        while server.get("/readyz").status_code != 200:
            await asyncio.sleep(0.05)
    with pytest.raises(CommandFailedError) as refusal:  # it would stand on a log that is not there any more
        await client.send(session_id, "Hello!", temperature=0)
    assert refusal.value.error["retryable"] is True
    await _hear(client, session_id, heard, until=lambda: heard.epoch > epoch and heard.end)
    assert heard.text == reference
    await _say(client, session_id, heard, "Hello!")
    state = server.get(f"/v1/sessions/{session_id}").json()
    assert (state["epoch"], state["head_seq"]) == (heard.epoch, heard.head_seq)
    assert [message["state"] for message in state["messages"]] == ["complete"] * 4


async def _follow_new(client):
    session_id = (await client.create_session())["id"]
    attached = await client.attach(session_id, after_seq=0)
    return session_id, Heard(epoch=attached["epoch"]), attached["epoch"]


async def _say(client, session_id, heard, text):
    """A turn to its end."""
    accepted = await client.send(session_id, text, temperature=0)
    await _hear(client, session_id, heard, until=lambda: heard.end and heard.head_seq > accepted["head_seq"])


async def _hear(client, session_id, heard, *, until):
    """Apply what comes of a session, snapshots too, until something holds."""
    async with asyncio.timeout(30):
        while not until():
            event = await client.next_event()
            if event.get("session_id") != session_id:
                continue
            if event["type"] == "session.attached" and event["mode"] == "snapshot":
                heard.start_over(event)
            elif "seq" in event:
                heard.apply(event)


class ForgetfulRedis:
    """A Redis that can be killed and come back without what it was told last, as after a power cut."""

    def __init__(self, directory: Path) -> None:
        self.port = free_port()
        self._directory = directory
        self._sizes: dict[Path, int] = {}

    async def __aenter__(self):
        self._directory.mkdir()
        await self._start()
        return self

    async def __aexit__(self, *_):
        self._process.kill()
        await self._process.wait()

    def remember(self):
        """What was written until now is on the disk."""
        files = self._directory.rglob("*.aof")
        self._sizes = {file: file.stat().st_size for file in files if file.stat().st_size}

    async def lose(self):
        """Die, and come back with what was remembered."""
        self._process.kill()
        await self._process.wait()
        for file, size in self._sizes.items():
            with file.open("r+b") as log:
                log.truncate(size)
        await self._start()

    async def _start(self):
        binary = await find_redis_binary()
        where = f"--port {self.port} --bind 127.0.0.1 --dir {self._directory}"
        options = f"{where} --appendonly yes --appendfsync everysec".split()
        self._process = await asyncio.create_subprocess_exec(binary.path, *options, stdout=asyncio.subprocess.DEVNULL)
        async with asyncio.timeout(20):
            while not await is_listening(self.port):
                await asyncio.sleep(0.02)
