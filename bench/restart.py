"""What a restart costs the people who come back: time to the first token of each session's next turn.

Sessions with a long history each, then the server ends, by SIGTERM or by `kill -9` of all its processes, and starts
again on the same directory. Beside it what the same turns take where the history has to be computed again.

    python bench/restart.py [--sessions 32] [--tokens 3000] [-- server arguments]
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import signal
import sys
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from load.over_ws import WsConnection, WsSession
from load.server import Server, started
from load.turns import Turn
from load.workloads import random_ids

NEXT_TOKENS = 16
SAVED_TOKENS = 'chatserve_kv_offloaded_tokens_total{tier="disk"}'
SETTLED_S = 2.0  # nothing was written for so long
SETTLE_TIMEOUT_S = 120.0


def main() -> None:
    """Each way to end, and what comes of it."""
    place = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    arguments = parser().parse_args(sys.argv[1:place])
    given = sys.argv[place + 1 :]
    print(
        f"{'ended by':>12} {'restored':>9} {'TTFT p50':>9} {'p90':>8} "
        f"{'recomputed p50':>15} {'p90':>8} {'stop':>7}   (ms, s)"
    )
    for name, number in (("SIGTERM", signal.SIGTERM), ("kill -9", signal.SIGKILL)):
        waits = arguments.settle or number == signal.SIGKILL
        figures = measure(arguments, number, given, waits=waits)
        print(
            f"{name:>12} {figures['restored']:>8.1%} {figures['p50']:>9.1f} {figures['p90']:>8.1f} "
            f"{figures['again_p50']:>15.1f} {figures['again_p90']:>8.1f} {figures['stop_s']:>7.2f}",
            flush=True,
        )


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    made.add_argument("--sessions", type=int, default=32)
    made.add_argument("--tokens", type=int, default=3000)
    made.add_argument("--settle", action="store_true", help="before SIGTERM too, wait until nothing is being saved")
    made.add_argument("--log", type=Path, default=Path("bench/results/restart.log"))
    return made


def measure(arguments: argparse.Namespace, number: int, flags: Sequence[str], *, waits: bool) -> dict[str, Any]:
    """One end, perhaps after waiting until all is saved, and the way back."""
    arguments.log.parent.mkdir(parents=True, exist_ok=True)
    directory = Path(tempfile.mkdtemp(prefix="chatserve-restart-"))
    try:
        with started(flags, arguments.log, data_dir=directory) as server:
            sessions = asyncio.run(talk(server, arguments.sessions, arguments.tokens))
            if waits:
                wait_until_saved(server)
            began_s = time.perf_counter()
            end(server, number)
            stop_s = time.perf_counter() - began_s
        with started(flags, arguments.log, data_dir=directory) as server:
            turns = asyncio.run(come_back(server, sessions))
            again = asyncio.run(compute_again(server, arguments.sessions, arguments.tokens + 2 * NEXT_TOKENS))
    finally:
        shutil.rmtree(directory)
    restored = sum(turn.num_cached for turn in turns) / sum(turn.num_input - NEXT_TOKENS for turn in turns)
    p50, p90 = spread_of(turns)
    again_p50, again_p90 = spread_of(again)
    return {
        "restored": restored, "p50": p50, "p90": p90, "again_p50": again_p50, "again_p90": again_p90, "stop_s": stop_s
    }  # fmt: skip


def spread_of(turns: Sequence[Turn]) -> tuple[float, float]:
    """Median and 90th percentile of the times to first token, in milliseconds."""
    times = sorted(turn.ttft_ms for turn in turns)
    return median(times), times[int(len(times) * 0.9)]


async def talk(server: Server, num_sessions: int, num_tokens: int) -> list[str]:
    """One turn in each session; their ids."""
    connection = await connected(server)
    sessions = [WsSession(connection, number) for number in range(num_sessions)]
    for session in sessions:
        await session.open()
        ids = random_ids(num_tokens, seed=f"restart {session.number}", vocab_size=vocab_size(server))
        await session.take_turn(0, ids, NEXT_TOKENS)
        await session.detach()
    await connection.close()
    return [session.session_id for session in sessions]


async def come_back(server: Server, session_ids: list[str]) -> list[Turn]:
    """The next turn of each, one after the other."""
    connection = await connected(server)
    turns = []
    for number, session_id in enumerate(session_ids):
        session = WsSession(connection, number)
        await session.attach(session_id)
        ids = random_ids(NEXT_TOKENS, seed=f"next {number}", vocab_size=vocab_size(server))
        turns.append(await session.take_turn(1, ids, NEXT_TOKENS))
        await session.detach()
    await connection.close()
    return turns


async def compute_again(server: Server, num_sessions: int, num_tokens: int) -> list[Turn]:
    """Turns of as many tokens that nobody has seen."""
    connection = await connected(server)
    turns = []
    for number in range(num_sessions):
        session = WsSession(connection, number)
        await session.open()
        ids = random_ids(num_tokens, seed=f"again {number}", vocab_size=vocab_size(server))
        turns.append(await session.take_turn(0, ids, NEXT_TOKENS))
        await session.detach()
    await connection.close()
    return turns


async def connected(server: Server) -> WsConnection:
    """A welcomed connection."""
    connection = WsConnection(server.url, None)
    await connection.open()
    return connection


def vocab_size(server: Server) -> int:
    """Of the model that is served."""
    return int(server.get("/v1/models", None)["data"][0]["vocab_size"])


def wait_until_saved(server: Server) -> None:
    """Return when no history has gone to disk for a while."""
    saved, since_s, began_s = "", time.monotonic(), time.monotonic()
    while time.monotonic() < min(since_s + SETTLED_S, began_s + SETTLE_TIMEOUT_S):
        with urllib.request.urlopen(f"{server.url}/metrics", timeout=30) as response:
            now = next(line for line in response.read().decode().splitlines() if line.startswith(SAVED_TOKENS))
        saved, since_s = now, time.monotonic() if now != saved else since_s
        time.sleep(0.2)


def end(server: Server, number: int) -> None:
    """Signal the server and wait for its end; `kill -9` takes its children with it."""
    assert server.pid is not None
    pids = [server.pid, *server.children()] if number == signal.SIGKILL else [server.pid]
    for pid in pids:
        os.kill(pid, number)
    server.wait()


if __name__ == "__main__":
    main()
