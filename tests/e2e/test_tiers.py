"""A person comes back after a restart: the history is there again without being computed, and the answer is right."""

from __future__ import annotations

import asyncio
import itertools
import time
from pathlib import Path

import httpx
import pytest

from chatserve.client import ChatClient
from tests.e2e.talking import new_session, reply_to
from tests.e2e.test_survival import start_redis
from tests.live import LiveServer, free_port

OTHER_FACT = "Zebras and yaks live far from here, and so does my friend Zorp."
FACTS = [f"My friend number {number} is called Zorp{number}, and I like trees." for number in range(6)]


async def converse(client: ChatClient) -> str:
    """A session of some turns that ends with the one thing to remember."""
    session_id = await new_session(client)
    for fact in [*FACTS, "My dog is called Zarnik."]:
        await reply_to(client, session_id, fact)
    return session_id


def flip_a_byte(data_dir: Path) -> None:
    """In the page that was saved first."""
    oldest = min((data_dir / "kv").glob("*.seg"))
    data = bytearray(oldest.read_bytes())
    data[1000] ^= 1
    oldest.write_bytes(data)


@pytest.mark.parametrize("graceful", [False, pytest.param(True, marks=pytest.mark.soak)])
async def test_histories_come_back_from_disk_after_a_restart(start_server, tmp_path, graceful):
    """Ended by SIGTERM or killed with everything: the next turn's tokens come from disk, and the dog has its name.

    A history with a flipped byte is computed again: the same answer, and the reason is told.
    """
    first = start_server()
    async with ChatClient(first.url) as client:
        damaged = await new_session(client)
        await reply_to(client, damaged, OTHER_FACT)
        whole = await new_session(client)
        await reply_to(client, whole, OTHER_FACT)
        expected = await reply_to(client, whole, "Who lives far from here?")
        session_id = await converse(client)
    await asyncio.sleep(0.5)  # idle for a moment
    held = first.get(f"/v1/sessions/{session_id}/cache").json()
    assert held["device"] == held["tokens"] - 1
    if graceful:
        assert first.stop() == 0
    else:
        first.process.kill()
        first.process.wait()
        await asyncio.sleep(1.0)  # its children go with it
    flip_a_byte(tmp_path / "data")
    second = start_server()
    cache = second.get(f"/v1/sessions/{session_id}/cache").json()
    assert cache["device"] == 0
    assert cache["disk"] == cache["tokens"] - 1
    async with ChatClient(second.url) as client:
        await client.attach(damaged)  # first: once it is known how fast it computes, a server does not read so little
        again = await reply_to(client, damaged, "Who lives far from here?")
        await client.attach(session_id)
        reply = await reply_to(client, session_id, "What is my dog called?")
    assert "Zarnik" in reply["text"]
    assert reply["usage"]["cached_tokens_details"]["disk"] == cache["disk"]
    assert reply["cache"]["restored_from"] == "disk"
    assert again["text"] == expected["text"]
    assert again["cache"]["reason"] == "checksum_failed"
    assert again["usage"]["cached_tokens_details"]["disk"] == 0


def test_a_second_server_on_the_histories_is_refused(live_server, start_server):
    """Two servers with one --kv-disk-path: the second ends with an error that names it, the first serves on."""
    second = start_server(f"--kv-disk-path={live_server.data_dir / 'kv'}", wait=False)
    assert second.process.wait(30) == 1
    log = " ".join(second.log.read_text().split())
    assert "--kv-disk-path" in log
    assert "in use by the process" in log
    assert live_server.get("/readyz").status_code == 200


def fill_device(server: LiveServer, until_s: float) -> None:
    """Prompts of others, which no session and no Redis knows, until everything else has left the device."""
    with httpx.Client(base_url=server.url, trust_env=False, timeout=30) as http:
        for number in itertools.count():
            prompt = [300 + (number * 31 + index * 7) % 900 for index in range(500)]
            http.post("/v1/completions", json={"prompt": prompt, "max_tokens": 4}).raise_for_status()
            if number > 8 and time.monotonic() > until_s:
                return


@pytest.mark.parametrize("away_s", [1.5, pytest.param(30.0, marks=pytest.mark.soak)])
async def test_tiers_go_on_without_redis(start_server, tmp_path, away_s):
    """While Redis is away histories go down and are evicted; with it back, a session's history comes back up."""
    port = free_port()
    redis = await start_redis(port, tmp_path)
    server = start_server(f"--redis-url=redis://127.0.0.1:{port}/0", "--kv-device-memory=8M")
    async with ChatClient(server.url) as client:
        session_id = await converse(client)
        redis.kill()
        await redis.wait()
        await asyncio.to_thread(fill_device, server, time.monotonic() + away_s)
        redis = await start_redis(port, tmp_path)
        async with asyncio.timeout(30):
            while server.get("/readyz").status_code != 200:
                await asyncio.sleep(0.1)
        reply = await reply_to(client, session_id, "What is my dog called?")
    assert "Zarnik" in reply["text"]
    assert reply["cache"]["result"] == "hit"
    assert reply["cache"]["restored_from"] in ("host", "disk")
    server.stop()
    redis.terminate()
    await redis.wait()
