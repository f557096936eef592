"""What the store's calls cost on the step's path: lease, match, commit, grow, and eviction with many sessions.

python bench/store_calls.py [--tokens 30000] [--sessions 2000]
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Sequence

import torch

from kvstore import KVLayout, KVStore, PosixMemory, RadixIndex

LAYOUT = KVLayout(num_layers=5, num_kv_heads=2, head_dim=64, dtype=torch.float32, page_bytes=65536)
PAGES_A_SESSION = 50
SALT = b"tenant"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=30_000, help="history of the resident session; default 30000")
    parser.add_argument("--sessions", type=int, default=2000, help="sessions in the index; default 2000")
    options = parser.parse_args(arguments)
    print(f"{'':64} {'median':>10} {'99 %':>10}")
    for name, seconds in itertools.chain(measure_store(options.tokens), measure_index(options.sessions)):
        ordered = sorted(seconds)
        high = ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
        print(f"{name:64} {statistics.median(ordered) * 1e6:7.1f} us {high * 1e6:7.1f} us")


def measure_store(num_tokens: int) -> Iterable[tuple[str, list[float]]]:
    """Calls on one resident session of `num_tokens` tokens, and on one that shares all of them."""
    store = KVStore(
        LAYOUT, PosixMemory(LAYOUT.page_bytes),
        budget_bytes=(num_tokens + 20_000) * LAYOUT.token_bytes, max_tokens=num_tokens + 10_000, max_ranges=4,
        fingerprint=b"bench",
    )  # fmt: skip
    history = list(range(num_tokens))
    fill(store, "resident", history)
    prompt = [*history, 1, 2, 3]
    yield f"lease and release, {num_tokens} tokens resident", repeat(lambda: turn(store, "resident", prompt), 100)
    yield f"the same, {num_tokens} tokens borrowed from the index", repeat(lambda: borrow(store, prompt), 20)
    lease = store.lease("resident", SALT, prompt)
    lease.grow(num_tokens + 5000)
    yield "commit of one token", repeat(lambda: lease.commit([1]), 3000)
    lease.release()
    lease = store.lease("growing", SALT, [-1])
    sizes = iter(range(0, 5000 * LAYOUT.page_bytes, LAYOUT.page_bytes))
    yield "grow by one page", repeat(lambda: lease.grow(next(sizes) // LAYOUT.token_bytes), 300)
    lease.release()
    store.close()


def measure_index(num_sessions: int) -> Iterable[tuple[str, list[float]]]:
    """Matching and evicting among many sessions of 50 pages."""
    index = RadixIndex(LAYOUT, b"bench")
    num_tokens = LAYOUT.tokens_to_fill(PAGES_A_SESSION)
    prompts = [[session, *range(num_sessions, num_sessions + num_tokens - 1)] for session in range(num_sessions)]
    for session, prompt in enumerate(prompts):
        index.insert(SALT, prompt, range(session * PAGES_A_SESSION, (session + 1) * PAGES_A_SESSION))
    which = itertools.cycle(prompts)
    label = f"{num_sessions} sessions, {num_sessions * PAGES_A_SESSION} pages"
    yield f"match of {num_tokens} tokens, {label}", repeat(lambda: index.match(SALT, next(which)), 1000)
    yield f"eviction of one page, {label}", repeat(lambda: index.evict(1, lambda page: False), 1000)


def fill(store: KVStore, session_id: str, token_ids: Sequence[int]) -> None:
    """A session with all its rows committed; what stands in them does not matter here."""
    lease = store.lease(session_id, SALT, token_ids)
    lease.grow(len(token_ids))
    lease.commit(token_ids[lease.kv_length :])
    lease.release()


def turn(store: KVStore, session_id: str, token_ids: Sequence[int]) -> None:
    """A lease that computes nothing."""
    store.lease(session_id, SALT, token_ids).release()


def borrow(store: KVStore, token_ids: Sequence[int]) -> None:
    """A session that comes, maps everything, and goes."""
    turn(store, "borrower", token_ids)
    store.drop_session("borrower")


def repeat(call: Callable[[], object], count: int) -> list[float]:
    """Seconds of each of `count` calls."""
    seconds = []
    for _ in range(count):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return seconds


if __name__ == "__main__":
    main()
