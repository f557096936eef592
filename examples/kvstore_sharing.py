"""Two sessions with one beginning: the second finds the first one's rows, and both map the same physical pages.

    python examples/kvstore_sharing.py

`compute` stands for a model: it gives each token the rows that attention would read. The store runs on the CPU here.
"""

from __future__ import annotations

import torch

from kvstore import KVLayout, KVStore, Lease, PosixMemory

LAYOUT = KVLayout(num_layers=6, num_kv_heads=2, head_dim=64, dtype=torch.float32, page_bytes=65536)
INSTRUCTIONS = list(range(1000))  # token ids that both sessions begin with


def compute(token_ids: list[int]) -> torch.Tensor:
    """Keys and values [n, layers, 2, kv_heads, head_dim] of tokens."""
    values = torch.tensor(token_ids, dtype=LAYOUT.dtype)[:, None, None, None, None]
    return values.expand(-1, LAYOUT.num_layers, 2, LAYOUT.num_kv_heads, LAYOUT.head_dim)


def run_turn(store: KVStore, session_id: str, token_ids: list[int]) -> int:
    """Give a session the rows of these tokens, computing those that are missing; returns how many were there."""
    lease: Lease = store.lease(session_id, b"tenant", token_ids)
    lease.grow(len(token_ids))
    rows = store.arena[lease.base_token : lease.base_token + len(token_ids)]  # contiguous, whatever was shared
    rows[lease.kv_length :] = compute(token_ids[lease.kv_length :])
    lease.commit(token_ids[lease.kv_length :])
    assert torch.equal(rows, compute(token_ids))
    lease.release()
    return lease.num_cached_tokens


def main() -> None:
    """Run three turns of two sessions and print what each found and what the store holds."""
    store = KVStore(
        LAYOUT, PosixMemory(LAYOUT.page_bytes),
        budget_bytes=64 << 20, max_tokens=4096, max_ranges=16, fingerprint=b"example",
    )  # fmt: skip
    first, second = [*INSTRUCTIONS, *range(5000, 5100)], [*INSTRUCTIONS, *range(6000, 6100)]
    for session_id, token_ids in (("ann", first), ("ben", second), ("ann", [*first, *range(7000, 7020)])):
        cached = run_turn(store, session_id, token_ids)
        held = store.stats().held_bytes / 2**20
        print(f"{session_id}: {cached} of {len(token_ids)} tokens were there; the store holds {held:.1f} MiB")
    store.close()


if __name__ == "__main__":
    main()
