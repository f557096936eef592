"""Whether sessions that are only kept cost those that run: step times with many resident sessions and with few.

Two engines on the bundled model take their steps in turn, one with 2,000 resident sessions and a planner that reads
100,000 session records, the other with 10 and none. Redis is started for the records.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import tempfile
import time
from array import array
from pathlib import Path
from statistics import median

from redis.asyncio import Redis

from chatserve.engine.build import build
from chatserve.engine.config import EngineConfig
from chatserve.engine.core import EngineCore
from chatserve.storage.connection import open_redis, socket_url
from chatserve.storage.scripts import RECORD_CHANGES, session_key

RUNNING, HISTORY, STEPS = 8, 40, 300
BATCH = 5000


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sessions", type=int, default=2000)
    parser.add_argument("--records", type=int, default=100_000)
    asyncio.run(measure(**vars(parser.parse_args())))


async def measure(sessions: int, records: int) -> None:
    """Fill one engine and Redis, then let both engines step in turn."""
    with tempfile.TemporaryDirectory() as directory:
        async with open_redis(None, Path(directory)) as redis:
            await write_records(redis, records)
            many, few = engine(sessions + RUNNING), engine(10 + RUNNING)
            fill(many, sessions)
            fill(few, 10)
            many.handle({"verb": "read_records", "url": socket_url(redis)})
            await asyncio.sleep(4)  # the planner's first pass reads all there are
            times = await asyncio.to_thread(in_turn, many, few)
            pass_s = planner_pass_s(many)
    print(f"step, {sessions:,} resident: {median(times[0]) * 1e3:.2f} ms; 10 resident: {median(times[1]) * 1e3:.2f} ms")
    print(f"ratio {median(times[0]) / median(times[1]):.3f} (aim: at most 1.10)")
    print(f"planner pass with {records:,} records: {pass_s * 1e3:.1f} ms (aim: at most 50)")
    many.close(1.0)
    few.close(1.0)


async def write_records(redis: Redis, count: int) -> None:
    """Records of sessions, the resident ones first."""
    now_ms = int(time.time() * 1000)
    for first in range(0, count, BATCH):
        pipeline = redis.pipeline(transaction=False)
        for number in range(first, min(first + BATCH, count)):
            name, at_ms = f"s{number}", now_ms - random.randrange(60_000)
            row = {"last_activity_s": at_ms / 1000, "turns": 3, "tokens": HISTORY, "think_time_s": 30.0, "owner": "me"}
            pipeline.hset(session_key(name, "record"), mapping=row)
            pipeline.zadd(RECORD_CHANGES, {name: at_ms})
        await pipeline.execute()


def engine(num_sessions: int) -> EngineCore:
    """Memory for all of them."""
    core, info = build(EngineConfig(model="bundled", device="cpu", num_threads=1, max_context=512, max_running=64))
    assert info.capacity_tokens > num_sessions * 2 * HISTORY
    return core


def submit(core: EngineCore, name: str, num_tokens: int) -> None:
    """A session's first turn."""
    ids = array("i", random.Random(name).choices(range(300, 1200), k=HISTORY))
    core.handle(
        {
            "verb": "submit", "request_id": name, "session_id": name, "tenant": "t", "num_history": 0,
            "history_hash": b"", "num_history_sent": 0, "token_ids": ids.tobytes(), "num_generated": 0,
            "num_computed": 0, "max_output_tokens": num_tokens, "sampling": {}, "stop_token_ids": [], "reuse": True,
        }
    )  # fmt: skip


def fill(core: EngineCore, count: int) -> None:
    """Sessions that have said something and are idle since."""
    for number in range(count):
        submit(core, f"s{number}", 1)
        while not core.idle:
            core.step()
        core.take_events()


def in_turn(many: EngineCore, few: EngineCore) -> tuple[list[float], list[float]]:
    """Seconds of each engine's steps while as many sessions decode on both."""
    times: tuple[list[float], list[float]] = ([], [])
    for core in (many, few):
        for number in range(RUNNING):
            submit(core, f"running{number}", 450)
        for _ in range(20):
            core.step()
    for _ in range(STEPS):
        for core, taken in zip((many, few), times, strict=True):
            began_s = time.perf_counter()
            core.step()
            taken.append(time.perf_counter() - began_s)
            core.take_events()
    return times


def planner_pass_s(core: EngineCore) -> float:
    """The longest of some passes after the first."""
    assert core._planner is not None
    taken = []
    for _ in range(5):
        began_s = time.perf_counter()
        core._planner.run_once()
        taken.append(time.perf_counter() - began_s)
    return max(taken)


if __name__ == "__main__":
    main()
