"""Memory that sessions with one beginning take, over the bytes of their distinct tokens, with and without sharing.

Sizes default to the bundled model's layout. Held bytes are measured twice: by the store's own count and by the blocks
that the system holds for its memfd. Exit status 1 when sharing takes more than 1.10 of the distinct bytes.

    python bench/sharing.py [--sessions 64] [--shared 1024] [--private 512] [--page-bytes 65536]
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvstore import KVLayout, KVStore, PosixMemory

AIM = 1.10


@dataclass(frozen=True)
class Measured:
    """Bytes held once all sessions are idle, and the tokens each found without computing them, on average."""

    name: str
    held_bytes: int
    memfd_bytes: int
    cached_tokens: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table; 1 when the aim is missed."""
    options = _parser().parse_args(arguments)
    layout = KVLayout(options.layers, options.kv_heads, options.head_dim, torch.float32, options.page_bytes)
    prompts = make_prompts(options.sessions, options.shared, options.private)
    distinct_bytes = (options.shared + options.sessions * options.private) * layout.token_bytes
    rows = [measure(layout, prompts, prefix_sharing=sharing) for sharing in (True, False)]
    print(f"{options.sessions} sessions, {options.shared} shared and {options.private} private tokens each; ", end="")
    print(
        f"{layout.token_bytes} bytes a token, {layout.page_bytes} a page; distinct: {distinct_bytes / 2**20:.1f} MiB\n"
    )
    print_table(rows, distinct_bytes)
    return 0 if max(rows[0].held_bytes, rows[0].memfd_bytes) <= AIM * distinct_bytes else 1


def make_prompts(num_sessions: int, shared: int, private: int) -> list[list[int]]:
    """Token ids of each session: the same beginning, then ids nobody else has."""
    first = [shared + session * private for session in range(num_sessions)]
    return [[*range(shared), *range(start, start + private)] for start in first]


def measure(layout: KVLayout, prompts: Sequence[Sequence[int]], *, prefix_sharing: bool) -> Measured:
    """Run one turn of each session; raises AssertionError when a row read back is not the one written."""
    memory = PosixMemory(layout.page_bytes)
    longest = max(map(len, prompts))
    store = KVStore(
        layout, memory,
        budget_bytes=2 * len(prompts) * layout.range_bytes(longest, 0), max_tokens=longest, max_ranges=len(prompts),
        fingerprint=b"bench", prefix_sharing=prefix_sharing,
    )  # fmt: skip
    cached = [run_turn(store, f"session-{number}", prompt) for number, prompt in enumerate(prompts)]
    store.check_integrity()
    stats = store.stats()
    blocks = os.fstat(memory.file).st_blocks
    name = "with sharing" if prefix_sharing else "without sharing"
    measured = Measured(name, stats.held_bytes, blocks * 512, sum(cached) / len(cached))
    store.close()
    return measured


def run_turn(store: KVStore, session_id: str, token_ids: Sequence[int]) -> int:
    """Write each missing token's id into its rows and check all of them; returns the cached tokens."""
    lease = store.lease(session_id, b"tenant", token_ids)
    lease.grow(len(token_ids))
    rows = store.arena[lease.base_token : lease.base_token + len(token_ids)].flatten(start_dim=1)
    expected = torch.tensor(token_ids, dtype=rows.dtype)[:, None].expand_as(rows)
    rows[lease.kv_length :] = expected[lease.kv_length :]
    assert torch.equal(rows, expected), f"{session_id}: a row is not the one that was written"
    lease.commit(token_ids[lease.kv_length :])
    lease.release()
    return lease.num_cached_tokens


def print_table(rows: Sequence[Measured], distinct_bytes: int) -> None:
    """One line a way of running, sizes in MiB and as multiples of the distinct tokens' bytes."""
    print(f"{'':16} {'store, MiB':>11} {'ratio':>6} {'memfd, MiB':>11} {'ratio':>6} {'cached tokens':>14}")
    for row in rows:
        figures = [(size / 2**20, size / distinct_bytes) for size in (row.held_bytes, row.memfd_bytes)]
        columns = " ".join(f"{size:11.1f} {ratio:6.3f}" for size, ratio in figures)
        print(f"{row.name:16} {columns} {row.cached_tokens:14.1f}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    defaults = {
        "sessions": 64, "shared": 1024, "private": 512, "layers": 6, "kv-heads": 2, "head-dim": 64, "page-bytes": 65536,
    }  # fmt: skip
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
