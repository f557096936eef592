"""`chatserve serve` as a process: what it prints, how it starts, ends, and finds its sessions again."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from pathlib import Path

import psutil

from chatserve.client import ChatClient
from chatserve.client.snapshot import branch, text_of
from tests.live import free_port


async def finished(client, response_id, timeout_s=60.0):
    """The response object of a reply, waited for over reconnects."""
    async with asyncio.timeout(timeout_s):
        while True:
            event = await client.next_event()
            if event.get("response", {}).get("id") == response_id and event["type"] != "response.created":
                return event["response"]


async def test_conversation_goes_on_over_a_restart(start_server):
    """SIGTERM in mid-reply, then a new server: the client comes back by itself and the reply is finished.

    Each finished turn is one line in the log, which holds nothing that was said.
    """
    port = free_port()
    arguments = (f"--port={port}", "--drain-timeout-s=0.2", "--log-format=json")
    first = start_server(*arguments)
    assert set(first.ready) == {"event", "url", "pid", "model", "version"}
    async with ChatClient(first.url) as client:
        session_id = (await client.create_session(title="pets"))["id"]
        await client.attach(session_id)
        assert "Zorp" in (await client.ask(session_id, "My dog is called Zorp."))["text"]
        accepted = await client.send(session_id, "Count from 1 to 150.", temperature=0)
        reading = asyncio.create_task(finished(client, accepted["response_id"]))
        await asyncio.sleep(0.3)
        assert await asyncio.to_thread(first.stop) == 0
        second = await asyncio.to_thread(start_server, *arguments)
        response = await reading
        assert response["status"] == "completed"
        assert "149" in response["text"]
        replies = branch((await client.attach(session_id))["snapshot"])
        assert [message["role"] for message in replies] == ["user", "assistant"] * 2
        assert text_of(replies[-1]) == response["text"]
        assert "Zorp" in (await client.ask(session_id, "What is my dog called?"))["text"]
    listed = second.get("/v1/sessions").json()["data"]
    assert [(view["id"], view["title"], view["num_messages"]) for view in listed] == [(session_id, "pets", 6)]
    assert first.stdout_rest() == b""
    log = second.log.read_text()
    turn = next(json.loads(line) for line in log.splitlines() if accepted["response_id"] in line)
    assert (turn["output_tokens"], turn["level"]) == (response["usage"]["output_tokens"], "info")
    assert "Zorp" not in log


def test_sigterm_while_loading(start_server, tmp_path):
    """A server that is told to end before it is ready does so soon, with everything it has started."""
    server = start_server(wait=False)
    deadline_s = time.monotonic() + 30
    while not list(tmp_path.glob("data/redis/*.log")) and time.monotonic() < deadline_s:
        time.sleep(0.02)
    began_s = time.monotonic()
    assert server.stop(signal.SIGTERM) == 0
    assert time.monotonic() - began_s < 10
    assert server.stdout_rest() == b""
    assert "Traceback" not in server.log.read_text()
    assert [process for process in psutil.process_iter(["environ"]) if belongs_to(process, tmp_path)] == []


def belongs_to(process: psutil.Process, tmp_path: Path) -> bool:
    """Whether a process was started below this directory."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE and Path(process.cwd()).is_relative_to(tmp_path)
    except psutil.Error:
        return False


def test_the_front_end_is_light(live_server):
    """Only the engine has torch, which takes seconds and hundreds of megabytes; the operator hears no word of it."""
    front_end = psutil.Process(live_server.process.pid)
    with_torch = [
        "chatserve.engine.process" in process.cmdline()
        for process in (front_end, *front_end.children(recursive=True))
        if any("libtorch" in mapping.path for mapping in process.memory_maps())
    ]
    assert with_torch == [True]
    assert "PyTorch" not in live_server.log.read_text()
