"""A store for attention KV rows of many sessions, which find again and share what they have in common.

Rows live in one arena of virtual addresses, each session's in a contiguous range whose physical pages are mapped as it
grows. Sessions with the same beginning map the same pages; what is idle is evicted when memory is short. Usable alone:

    layout = KVLayout(num_layers=5, num_kv_heads=2, head_dim=64, dtype=torch.float32, page_bytes=65536)
    store = KVStore(
        layout, PosixMemory(layout.page_bytes),
        budget_bytes=1 << 30, max_tokens=4096, max_ranges=256, fingerprint=b"model and weights",
    )
    lease = store.lease("session-1", b"tenant", token_ids)   # rows [0, lease.kv_length) are there already
    lease.grow(len(token_ids))                               # map the rest
    rows = store.arena[lease.base_token : lease.base_token + len(token_ids)]
    rows[lease.kv_length :] = compute(token_ids, rows)       # [n, num_layers, 2, num_kv_heads, head_dim]
    lease.commit(token_ids[lease.kv_length :])
    lease.release()                                          # still there at the next turn, unless evicted
"""

from kvstore.errors import (
    CudaFault,
    IntegrityError,
    KVError,
    LeaseHeld,
    MemoryRefused,
    OutOfMappings,
    OutOfPages,
    OutOfRanges,
)
from kvstore.eviction import EvictionPolicy, Leaf, LeastRecentlyUsed
from kvstore.layout import KVLayout
from kvstore.memory import VirtualMemory, default_page_bytes
from kvstore.node import Resident, Tail
from kvstore.pool import PageCounts, PagePool, PageState
from kvstore.posix import PosixMemory
from kvstore.radix import RadixIndex
from kvstore.records import SessionRecord, SessionRecords
from kvstore.results import Boundary, Eviction, Insertion, Match, TailInsertion
from kvstore.session import Lease
from kvstore.stats import KVStats
from kvstore.store import KVStore
from kvstore.tensor import VirtualTensor

__all__ = [
    "Boundary",
    "CudaFault",
    "Eviction",
    "EvictionPolicy",
    "Insertion",
    "IntegrityError",
    "KVError",
    "KVLayout",
    "KVStats",
    "KVStore",
    "Leaf",
    "Lease",
    "LeaseHeld",
    "LeastRecentlyUsed",
    "Match",
    "MemoryRefused",
    "OutOfMappings",
    "OutOfPages",
    "OutOfRanges",
    "PageCounts",
    "PagePool",
    "PageState",
    "PosixMemory",
    "RadixIndex",
    "Resident",
    "SessionRecord",
    "SessionRecords",
    "Tail",
    "TailInsertion",
    "VirtualMemory",
    "VirtualTensor",
    "default_page_bytes",
]
