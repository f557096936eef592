"""The supervised engine process: real child, real model, killed in mid-answer, refused, stalled, restarted."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from chatserve.engine import client as client_module
from chatserve.engine.api import Finished, Forgotten, GenerationRequest, Resumed, SamplingParams, Started, Tokens
from chatserve.engine.client import EngineClient
from chatserve.engine.config import EngineConfig
from chatserve.errors import BadRequest, Overloaded, StartupError, Unavailable
from tests.model.checkpoints import make_checkpoint

PROMPTS = {"mine": range(10, 60), "other": range(200, 260)}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny random Llama in a directory."""
    directory = tmp_path_factory.mktemp("model")
    make_checkpoint(directory, "llama", max_position_embeddings=2048)
    return str(directory)


@pytest.fixture
async def engine(checkpoint):
    """A ready engine on the tiny model."""
    client = EngineClient(EngineConfig(model=checkpoint, kv_device_bytes=64 << 20, num_threads=1, max_waiting=4))
    await client.start()
    yield client
    await client.close()


def request(name: str, token_ids, **fields) -> GenerationRequest:
    """A greedy request that only its length ends."""
    settings = {"session_id": name, "num_history": 0, "max_output_tokens": 40} | fields
    return GenerationRequest(request_id=name, tenant="t", token_ids=list(token_ids), **settings)


async def collect(engine, a_request, on_progress=None):
    """All progress of one request; `on_progress` sees each item as it comes."""
    items = []
    async for item in engine.generate(a_request):
        items.append(item)
        if on_progress:
            on_progress(item, items)
    return items


def tokens_of(items):
    """The token ids in a list of progress."""
    return [token for item in items if isinstance(item, Tokens) for token in item.token_ids]


def signal_once(engine, number):
    """A progress callback that signals the engine's process once, after some twenty tokens."""
    sent = []

    def callback(item, items):
        if not sent and len(tokens_of(items)) > 20:
            sent.append(number)
            os.kill(engine.pid, number)

    return callback


async def test_progress_comes_in_order(engine):
    """Started first, then tokens, then exactly one end; the session's tokens are held afterwards."""
    items = await collect(engine, request("r", range(10, 60)))
    assert isinstance(items[0], Started)
    assert isinstance(items[-1], Finished)
    assert sum(isinstance(item, Finished) for item in items) == 1
    assert len(tokens_of(items)) == 40
    assert (await engine.cached_tokens("r", "t", [])).tokens["device"] == 0
    assert (await engine.cached_tokens("r", "t", [*range(10, 60), *tokens_of(items)])).tokens["device"] == 89
    assert await engine.integrity_fault() is None


async def test_turn_sends_only_new_tokens_and_reuses(engine):
    """The second turn names its history by a hash and finds it cached but for the last sampled token."""
    first = tokens_of(await collect(engine, request("r1", range(10, 60), session_id="s")))
    ids = [*range(10, 60), *first, 5, 6, 7]
    items = await collect(engine, request("r2", ids, session_id="s", num_history=90))
    assert items[0].cached_tokens == {"device": 89}
    assert items[0].miss_reason is None


async def test_killed_engine_continues_the_same_text(engine):
    """kill -9 in mid-answer: another engine goes on, and the whole reply equals the undisturbed one."""
    reference = tokens_of(await collect(engine, request("ref", range(10, 60), max_output_tokens=200)))

    a_request = request("r", range(10, 60), max_output_tokens=200)
    items = await collect(engine, a_request, signal_once(engine, signal.SIGKILL))
    assert any(isinstance(item, Resumed) for item in items)
    assert tokens_of(items) == reference


async def test_history_deleted_while_no_engine_is_there_is_gone_from_disk(checkpoint, tmp_path):
    """The engine that comes next is told, before anything else, what to forget of what the last one left on disk."""
    config = EngineConfig(
        model=checkpoint,
        kv_device_bytes=64 << 20,
        kv_host_bytes=16 << 20,
        kv_disk_bytes=64 << 20,
        kv_disk_path=str(tmp_path / "kv"),
        num_threads=1,
        max_waiting=4,
    )
    engine = EngineClient(config)
    await engine.start()
    ids = {
        name: [*prompt, *tokens_of(await collect(engine, request(name, prompt)))] for name, prompt in PROMPTS.items()
    }
    async with asyncio.timeout(60):
        while (await engine.stats())["written_pages"] < len(PROMPTS):
            await asyncio.sleep(0.01)
        os.kill(engine.pid, signal.SIGKILL)
        while engine.ready:
            await asyncio.sleep(0.01)
        await engine.delete_session("mine", "t", [Forgotten(ids["mine"])])
        while not engine.ready:
            await asyncio.sleep(0.01)
        while any((await engine.cached_tokens("mine", "t", ids["mine"])).tokens.values()):
            await asyncio.sleep(0.01)
        assert (await engine.cached_tokens("other", "t", ids["other"])).tokens["disk"] > 0
        await engine.delete_session("other", "t", [Forgotten(ids["other"])])
    assert not any((await engine.cached_tokens("other", "t", ids["other"])).tokens.values())
    await engine.close()


async def test_killed_engine_continues_sampled_text(engine):
    """The same with temperature: draws are keyed by seed and position, so the continuation repeats them."""
    sampling = SamplingParams(temperature=1.0, seed=11)
    fields = {"max_output_tokens": 120, "sampling": sampling}
    reference = tokens_of(await collect(engine, request("ref", range(10, 60), **fields)))
    items = await collect(engine, request("r", range(10, 60), **fields), signal_once(engine, signal.SIGKILL))
    assert tokens_of(items) == reference


async def test_second_death_fails_the_request(engine):
    """A request in flight at two deaths fails with server_interrupted instead of killing a third engine."""
    deaths = 0

    def kill_each(item, items):
        nonlocal deaths
        if isinstance(item, Started | Resumed) or (deaths == 1 and isinstance(item, Tokens) and engine.pid):
            deaths += 1
            os.kill(engine.pid, signal.SIGKILL)

    with pytest.raises(Unavailable) as failure:
        await collect(engine, request("r", range(10, 60), max_output_tokens=1500), kill_each)
    assert failure.value.code == "server_interrupted"


async def test_not_ready_while_dead_and_request_waits(engine):
    """Between two engines `ready` is False, and a request made then is answered by the next one."""
    os.kill(engine.pid, signal.SIGKILL)
    while engine.ready:
        await asyncio.sleep(0.01)
    items = await collect(engine, request("r", range(10, 60)))
    assert engine.ready
    assert len(tokens_of(items)) == 40


async def test_stalled_engine_is_replaced(engine, monkeypatch):
    """An engine that stops answering while a request runs is killed, and the request goes on."""
    monkeypatch.setattr(client_module, "STALL_TIMEOUT_S", 1.0)
    reference = tokens_of(await collect(engine, request("ref", range(10, 60), max_output_tokens=100)))
    await engine.close()
    await engine.start()  # the watchdog reads its patched limit
    stop = signal_once(engine, signal.SIGSTOP)
    items = await collect(engine, request("r", range(10, 60), max_output_tokens=100), stop)
    assert tokens_of(items) == reference


async def test_cancel_ends_with_cancelled(engine):
    """A cancel is answered by the terminal item cancelled, and the history stays."""

    def cancel(item, items):
        if len(tokens_of(items)) >= 10:
            engine.cancel("r")

    items = await collect(engine, request("r", range(10, 60), max_output_tokens=1500), cancel)
    assert items[-1].reason == "cancelled"
    assert (await engine.cached_tokens("r", "t", range(2000))).tokens["device"] >= 59


async def test_closed_iterator_cancels(engine):
    """A reader that walks away frees the engine: the next request of the session is served."""
    stream = engine.generate(request("r", range(10, 60), session_id="s", max_output_tokens=1900))
    async for item in stream:
        if isinstance(item, Tokens):
            break
    await stream.aclose()
    items = await collect(engine, request("r2", range(10, 60), session_id="s"))
    assert len(tokens_of(items)) == 40


async def test_too_long_prompt_is_refused(engine):
    """A prompt beyond the context is refused with the numbers and the remedy."""
    with pytest.raises(BadRequest, match="2048") as failure:
        await collect(engine, request("r", [10] * 2100))
    assert failure.value.code == "context_length_exceeded"


async def test_full_queue_is_refused(engine):
    """More requests than may run and wait: the excess is refused with queue_full and a time to retry."""
    results = await asyncio.gather(
        *(collect(engine, request(f"r{i}", range(10 + i, 60 + i), max_output_tokens=60)) for i in range(80)),
        return_exceptions=True,
    )
    refused = [result for result in results if isinstance(result, Overloaded)]
    assert refused
    assert all(error.retry_after_ms for error in refused)
    assert all(len(tokens_of(result)) == 60 for result in results if isinstance(result, list))


async def test_missing_model_is_a_clear_error(tmp_path):
    """A model directory that is not there stops the start with its name in the message."""
    with pytest.raises(StartupError, match="nowhere"):
        await EngineClient(EngineConfig(model=str(tmp_path / "nowhere"))).start()


def test_engine_of_a_dead_parent_does_not_start():
    """Whoever adopted it, be it process 1 or another; its parent's number tells, not whose child it is now."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        command = [sys.executable, "-m", "chatserve.engine.process", str(theirs.fileno()), str(os.getpid() + 1)]
        child = subprocess.run(command, pass_fds=[theirs.fileno()], capture_output=True, text=True, check=False)
    assert child.returncode == 1
    assert "died before its engine" in child.stderr


async def test_engine_ends_with_its_parent(checkpoint, tmp_path):
    """kill -9 of the front end ends the engine within moments."""
    script = (
        "import asyncio, sys\n"
        "from chatserve.engine.client import EngineClient\n"
        "from chatserve.engine.config import EngineConfig\n"
        "async def main():\n"
        "    engine = EngineClient(EngineConfig(model=sys.argv[1], num_threads=1))\n"
        "    await engine.start()\n"
        "    print(engine.pid, flush=True)\n"
        "    await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    parent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script, checkpoint, stdout=asyncio.subprocess.PIPE
    )
    pid = int(await parent.stdout.readline())
    parent.kill()
    await parent.wait()
    async with asyncio.timeout(5):
        while _alive(pid):
            await asyncio.sleep(0.05)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False
