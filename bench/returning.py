"""People who come back to a server whose device cannot hold everybody: what the tiers below it give.

First sessions that take turns with pauses between them, more than fit on the device (workload `returning`). Then one
session alone, pushed out by others, which comes back from host memory: time to its first token, and bytes a second.

    python bench/returning.py [--scale 0.1] [--tokens 8192] -- --model DIR --kv-device-memory 32G --kv-host-memory 70G
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import sys
import time
import urllib.request
from pathlib import Path
from statistics import median
from typing import Any

from load.clients import Task, default_processes, run_clients
from load.over_ws import WsConnection, WsSession
from load.report import lines, summary
from load.server import Server, started
from load.turns import Turn
from load.workloads import WORKLOADS, Workload, random_ids

WARM_UP = Workload("warm-up", 1, 2, 32, 16)
NEXT_TOKENS = 16
SETTLE_S = 2.0


def main() -> None:
    """The crowd, then the single ones on a server with less device memory, which is sooner full."""
    place = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    arguments, given = parser().parse_args(sys.argv[1:place]), sys.argv[place + 1 :]
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    log = arguments.json.with_suffix(".log")
    figures: dict[str, Any] = {}
    if "crowd" in arguments.parts:
        with started(given, log) as server:
            figures["crowd"] = crowd(server, arguments)
    if "single" in arguments.parts:
        with started([*given, f"--kv-device-memory={arguments.single_device_memory}"], log) as server:
            figures["single"] = single(server, arguments)
    arguments.json.write_text(json.dumps(figures, indent=1))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    made.add_argument("--parts", default="crowd,single", help="comma-separated")
    made.add_argument("--scale", type=float, default=None, help="factor on sessions and tokens of the crowd")
    made.add_argument("--tokens", type=int, default=8192, help="history of the single session")
    made.add_argument("--single-device-memory", default="3G", help="--kv-device-memory of the second server")
    made.add_argument("--rounds", type=int, default=5)
    made.add_argument("--json", type=Path, default=Path("bench/results/returning.json"))
    return made


def crowd(server: Server, arguments: argparse.Namespace) -> dict[str, Any]:
    """All sessions at once, with pauses; the last turn is the one that counts."""
    workload = WORKLOADS["returning"]
    workload = workload if arguments.scale is None else workload.scaled(arguments.scale)
    warm_up = Task(server.url, None, "ws", WARM_UP, "warm-up", vocab_size(server))
    run_clients(warm_up, 1)
    figures = summary(
        run_clients(Task(server.url, None, "ws", workload, "crowd", vocab_size(server)), default_processes())
    )
    print("\n".join(lines("returning", figures)))
    print("  ".join(f"{name} {value:,.0f}" for name, value in moved_tokens(server).items()), flush=True)
    return figures


def single(server: Server, arguments: argparse.Namespace) -> dict[str, float]:
    """One session comes back after others have taken the device, some times."""
    turns = asyncio.run(come_back(server, arguments))
    token_bytes = server.get("/version", None)["token_bytes"]
    rates = [turn.num_restored * token_bytes / turn.restore_ms / 1e6 for turn in turns if turn.restore_ms]
    figures = {
        "ttft_ms": median(turn.ttft_ms for turn in turns),
        "restore_ms": median(turn.restore_ms for turn in turns),
        "restored_tokens": median(turn.num_restored for turn in turns),
        "restored_gb_per_s": median(rates) if rates else 0.0,
    }
    print(f"== one session of {arguments.tokens} tokens comes back, median of {len(turns)}")
    print("  ".join(f"{name} {value:,.2f}" for name, value in figures.items()), flush=True)
    return figures


async def come_back(server: Server, arguments: argparse.Namespace) -> list[Turn]:
    """The returning turns, each counted from attaching on: its first token is awaited as if nothing had been known."""
    fill = server.get("/version", None)["capacity_tokens"] * 95 // 100
    turns = []
    for number in range(arguments.rounds):
        connection = WsConnection(server.url, None)
        await connection.open()
        session = await talked(connection, server, f"single {number}", arguments.tokens)
        await session.detach()
        await asyncio.sleep(SETTLE_S)
        await talked(connection, server, f"other {number}", fill)
        await asyncio.sleep(SETTLE_S)
        ids = random_ids(NEXT_TOKENS, seed=f"next {number}", vocab_size=vocab_size(server))
        began_s = time.perf_counter()
        await session.attach(session.session_id)
        turn = await session.take_turn(1, ids, NEXT_TOKENS)
        turn.began_s = began_s
        turns.append(turn)
        await connection.close()
    return turns


async def talked(connection: WsConnection, server: Server, seed: str, num_tokens: int) -> WsSession:
    """A session with one turn."""
    session = WsSession(connection, 0)
    await session.open()
    ids = random_ids(num_tokens, seed=seed, vocab_size=vocab_size(server))
    await session.take_turn(0, ids, 2)
    return session


def moved_tokens(server: Server) -> dict[str, float]:
    """Tokens that went down, came back and were evicted so far, by tier."""
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=30) as response:
        counters = re.findall(r'^chatserve_kv_(\w+)_tokens_total{tier="(\w+)"} (\S+)$', response.read().decode(), re.M)
    return {f"{verb} {tier}": float(value) for verb, tier, value in counters}


def vocab_size(server: Server) -> int:
    """Of the model that is served."""
    return int(server.get("/v1/models", None)["data"][0]["vocab_size"])


if __name__ == "__main__":
    main()
