"""What a restart costs the people who come back: time to the first token of each session's next turn.

Sessions with a long history each, then the server ends, by SIGTERM or by `kill -9` of all its processes, and starts
again on the same directory. Beside it the same with histories computed again, because nothing was saved.

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
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from load.over_ws import WsConnection, WsSession
from load.server import Server, started
from load.workloads import random_ids

SAVED, UNSAVED = (), ("--kv-disk-space=0", "--kv-host-memory=0")
NEXT_TOKENS = 16
SETTLE_S = 3.0


def main() -> None:
    """Each way to end, and what comes of it."""
    place = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    arguments = parser().parse_args(sys.argv[1:place])
    given = sys.argv[place + 1 :]
    print(f"{'ended by':>12} {'histories':>11} {'restored':>9} {'TTFT p50':>9} {'p90':>8} {'stop':>7}   (ms, s)")
    for name, number, flags in (
        ("SIGTERM", signal.SIGTERM, SAVED), ("kill -9", signal.SIGKILL, SAVED), ("SIGTERM", signal.SIGTERM, UNSAVED),
    ):  # fmt: skip
        figures = measure(arguments, number, [*flags, *given])
        saved = "recomputed" if flags else "saved"
        print(
            f"{name:>12} {saved:>11} {figures['restored']:>8.1%} {figures['p50']:>9.1f} {figures['p90']:>8.1f} "
            f"{figures['stop_s']:>7.2f}",
            flush=True,
        )


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    made.add_argument("--sessions", type=int, default=32)
    made.add_argument("--tokens", type=int, default=3000)
    made.add_argument("--log", type=Path, default=Path("bench/results/restart.log"))
    return made


def measure(arguments: argparse.Namespace, number: int, flags: Sequence[str]) -> dict[str, Any]:
    """One end and the way back."""
    arguments.log.parent.mkdir(parents=True, exist_ok=True)
    directory = Path(tempfile.mkdtemp(prefix="chatserve-restart-"))
    try:
        with started(flags, arguments.log, data_dir=directory) as server:
            sessions = asyncio.run(talk(server, arguments.sessions, arguments.tokens))
            time.sleep(SETTLE_S if number == signal.SIGKILL else 0)
            began_s = time.perf_counter()
            end(server, number)
            stop_s = time.perf_counter() - began_s
        with started(flags, arguments.log, data_dir=directory) as server:
            turns = asyncio.run(come_back(server, sessions))
    finally:
        shutil.rmtree(directory)
    times = sorted(turn.ttft_ms for turn in turns)
    restored = sum(turn.num_cached for turn in turns) / sum(turn.num_input - NEXT_TOKENS for turn in turns)
    return {"restored": restored, "p50": median(times), "p90": times[int(len(times) * 0.9)], "stop_s": stop_s}


async def talk(server: Server, num_sessions: int, num_tokens: int) -> list[str]:
    """One turn in each session; their ids."""
    connection = await connected(server)
    sessions = [WsSession(connection, number) for number in range(num_sessions)]
    for session in sessions:
        await session.open()
        ids = random_ids(num_tokens, seed=f"restart {session.number}", vocab_size=vocab_size(server))
        await session.take_turn(0, ids, NEXT_TOKENS)
    await connection.close()
    return [session.session_id for session in sessions]


async def come_back(server: Server, session_ids: list[str]) -> list[Any]:
    """The next turn of each, one after the other."""
    connection = await connected(server)
    turns = []
    for number, session_id in enumerate(session_ids):
        session = WsSession(connection, number)
        await session.attach(session_id)
        ids = random_ids(NEXT_TOKENS, seed=f"next {number}", vocab_size=vocab_size(server))
        turns.append(await session.take_turn(1, ids, NEXT_TOKENS))
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


def end(server: Server, number: int) -> None:
    """Signal the server and wait for its end; `kill -9` takes its children with it."""
    assert server.pid is not None
    pids = [server.pid, *server.children()] if number == signal.SIGKILL else [server.pid]
    for pid in pids:
        os.kill(pid, number)
    server.wait()


if __name__ == "__main__":
    main()
