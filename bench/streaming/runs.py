"""The runs of `bench/frontend.py` with many readers; each gives the lines that it prints."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from load.server import Server, started

from streaming.readers import Heard, Reader, delays_ms, in_processes, opened, stream
from streaming.wire import Connection

STEP_MS = 50.0  # 20 tokens a second
FLAGS = (
    "--max-running=4096", "--max-waiting=4096", "--max-connections=10000", "--max-key-connections=10000",
    "--log-level=warning",
)  # fmt: skip
NUM_IDLE = 5_000
NUM_TURNS = 1_000
NUM_STALLED = 200
NUM_BESIDE = 100
STALLED_RECEIVE_BYTES = 4_096
NUM_UPDATES = 400  # more than the system takes for a reader that takes nothing
LONG_TITLE = "x" * 200
BIG_METADATA = {f"name{number}": "x" * 500 for number in range(15)}


@dataclass(frozen=True, slots=True)
class Stage:
    """What the runs are given on the command line."""

    log: Path
    profile: str
    connections: Sequence[int]
    seconds: float
    processes: int


@contextlib.contextmanager
def double(stage: Stage, *, step_ms: float = STEP_MS, trace: Path | None = None) -> Iterator[Server]:
    """A server whose engine is the double, with its trace in a file if one is named."""
    program = ("bench.load.double_server", str(step_ms), str(trace or "-"), stage.profile)
    with started(FLAGS, stage.log, program) as server:
        yield server


def streams(stage: Stage) -> Iterator[str]:
    """How late tokens come, by the number of connections, and what they cost the front end."""
    yield f"{'connections':>12} {'tokens/s':>9} {'p50 ms':>8} {'p99 ms':>8} {'max ms':>8} {'a message':>10} {'core':>6}"
    for num in stage.connections:
        yield _streams(stage, num)


def _streams(stage: Stage, num_connections: int) -> str:
    trace, num_tokens = stage.log.with_name("double.json"), round(stage.seconds * 1000 / STEP_MS)
    shares = [(number, num_tokens) for number in _shares(num_connections, stage.processes)]
    with double(stage, trace=trace) as server:
        given = in_processes(len(shares), stream, *((server, *share) for share in shares))
    return _line(num_connections, given, trace)


def _line(num: int, given: Sequence[Any], trace: Path) -> str:
    heard = [item for item in given if isinstance(item, Heard)]
    cpu_s = max(item for item in given if isinstance(item, float))
    delays, arrivals = delays_ms(heard, trace), [at_s for response in heard for at_s, _ in response.arrivals]
    lost = sum(response.ended != "response.incomplete" for response in heard)
    span_s, num_tokens = max(arrivals) - min(arrivals), sum(response.arrivals[-1][1] for response in heard)
    p50, p99 = np.percentile(delays, [50, 99])
    per_message = f"{num_tokens / len(arrivals):.1f} tok"
    return (
        f"{num:>12} {num_tokens / span_s:>9,.0f} {p50:>8.1f} {p99:>8.1f} {delays.max():>8.1f} {per_message:>10} "
        f"{cpu_s / span_s:>6.2f}" + (f"  {lost} replies did not end well" if lost else "")
    )


def _shares(num: int, num_processes: int) -> list[int]:
    return [num // num_processes + (rest < num % num_processes) for rest in range(num_processes)]


def idle(stage: Stage) -> Iterator[str]:
    """Memory of connections that say nothing: welcomed only, and following a session each."""
    with double(stage) as server:
        welcomed = in_processes(1, _hold, (server, NUM_IDLE, False))
    with double(stage) as server:
        following = in_processes(1, _hold, (server, NUM_IDLE, True))
    for what, (opened_s, kib, cpu_s) in (("welcomed", welcomed), ("following a session", following)):
        yield (
            f"{NUM_IDLE:,} connections, {what}: {kib:.1f} KiB each, opened in {opened_s:.1f} s, "
            f"{cpu_s * 100:.1f} % of a core while idle"
        )


async def _hold(server: Server, num: int, with_session: bool) -> list[float]:
    """Seconds to open them, KiB each of the server's memory, and its share of a core while they are idle."""

    async def one() -> Connection:
        connection = await Connection.open(server.url)
        if with_session:
            await connection.new_session()
        return connection

    warm = await opened(100, one)
    before_kib, began_s = server.rss_kib(), time.perf_counter()
    held = await opened(num, one)
    opened_s = time.perf_counter() - began_s
    kib = (server.rss_kib() - before_kib) / num
    cpu_s = server.cpu_s()["front end"]
    await asyncio.sleep(5)
    cpu_s = server.cpu_s()["front end"] - cpu_s
    for connection in (*warm, *held):
        connection.close()
    return [opened_s, kib, cpu_s / 5]


def turns(stage: Stage) -> Iterator[str]:
    """What a turn takes at the beginning and at the end of a long session, and opening it then."""
    with double(stage, step_ms=0.5) as server:
        seconds = in_processes(1, _take_turns, (server.url, NUM_TURNS))
        rss_kib = server.rss_kib()
    *each, attach_s = seconds
    first, last = np.median(each[:100]) * 1000, np.median(each[-100:]) * 1000
    yield (
        f"{NUM_TURNS:,} turns of 3 and 4 tokens: {first:.2f} ms each at the beginning, {last:.2f} ms at the end "
        f"(medians of 100); attaching then takes {attach_s * 1000:.1f} ms; the server holds {rss_kib / 1024:.0f} MiB"
    )


async def _take_turns(url: str, num: int) -> list[float]:
    reader = Reader()
    await reader.open(url)
    seconds = []
    for _ in range(num):
        began_s = time.perf_counter()
        await reader.take_turn(4)
        seconds.append(time.perf_counter() - began_s)
    began_s = time.perf_counter()
    await reader.connection.ask("session.attach", session_id=reader.session_id)
    return [*seconds, time.perf_counter() - began_s]


def stalled(stage: Stage) -> Iterator[str]:
    """How late tokens come to some while others have stopped reading, and how much the server holds for those."""
    yield f"{'connections':>12} {'tokens/s':>9} {'p50 ms':>8} {'p99 ms':>8} {'max ms':>8} {'a message':>10} {'core':>6}"
    yield _streams(stage, NUM_BESIDE)
    trace, num_tokens = stage.log.with_name("double.json"), round(2 * stage.seconds * 1000 / STEP_MS)
    with double(stage, trace=trace) as server:
        before_kib = server.rss_kib()
        given = in_processes(2, _either, (server, "read", num_tokens), (server, "stall", NUM_STALLED))
        peak_kib = server.peak_rss_mib()["front end"] * 1024
    [figures] = [item for item in given if isinstance(item, Stalled)]
    yield _line(NUM_BESIDE, given, trace)
    yield (
        f"beside {NUM_STALLED} that read nothing of {figures.num_bytes / 1e6:.1f} MB each: "
        f"{(peak_kib - before_kib) / 1024:.0f} MiB more at most, {figures.num_closed} of them closed by the server"
    )


@dataclass(frozen=True, slots=True)
class Stalled:
    """What each reader that read nothing would have had to read, and how many the server closed."""

    num_bytes: int
    num_closed: int


async def _either(server: Server, what: str, number: int) -> list[Any]:
    if what == "read":
        return await stream(server, NUM_BESIDE, number)
    return [await _stall(server, number)]


async def _stall(server: Server, num: int) -> Stalled:
    """Readers that ask for a long log and read nothing of it."""
    writer = await Connection.open(server.url)
    session_id = await writer.new_session()
    for number in range(NUM_UPDATES):
        metadata = {**BIG_METADATA, "number": str(number)}
        await writer.ask("session.update", session_id=session_id, title=LONG_TITLE, metadata=metadata)

    async def one() -> Connection:
        connection = await Connection.open(server.url, receive_bytes=STALLED_RECEIVE_BYTES)
        connection.stop_reading()
        connection.tell("session.attach", id="a", session_id=session_id, after_seq=0)
        return connection

    num_files = server.num_files()
    readers = await opened(num, one)
    await asyncio.sleep(40)  # the server gives a reader 30 s
    num_closed = num - (server.num_files() - num_files)
    for reader in readers:
        reader.close()
    num_bytes = NUM_UPDATES * sum(map(len, BIG_METADATA.values()))
    return Stalled(num_bytes, num_closed)


RUNS: dict[str, Callable[[Stage], Iterator[str]]] = {
    "streams": streams,
    "idle": idle,
    "turns": turns,
    "stalled": stalled,
}
