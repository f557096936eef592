"""The store: sessions lease rows of the arena, find again what is still there, and share what they have in common.

It composes pool, index and tensors, and is where a page changes hands. It knows token ids, pages and sessions; it
knows no model, no kernels and no chat. Single-threaded.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import ParamSpec

import torch

from kvstore.arrays import PageArray, TokenArray, as_page_array, as_token_array, common_prefix
from kvstore.errors import LeaseHeld, MemoryRefused, OutOfMappings, OutOfPages, OutOfRanges
from kvstore.eviction import EvictionPolicy
from kvstore.layout import KVLayout
from kvstore.memory import VirtualMemory
from kvstore.node import Resident, Tail, disown_tail
from kvstore.pool import PagePool, PageState
from kvstore.radix import RadixIndex
from kvstore.results import NO_MATCH, Boundary, Match
from kvstore.session import Lease, Session
from kvstore.stats import KVStats
from kvstore.tensor import VirtualTensor

DEFAULT_FLOOR_BYTES = 32 << 20
MAX_ARENA_TOKENS = 2**31 - 1
P = ParamSpec("P")


class KVStore:
    """Leases on sessions' KV rows within `budget_bytes` of pages; `memory` becomes the store's own.

    `max_ranges` sessions can be resident at once, each with addresses for `max_tokens` tokens and `tile_tokens` more
    that kernels may read past its end. The least recently used idle session makes room for a new one; its pages stay
    in the index. Without `prefix_sharing` a session finds only its own rows. `shrink` keeps `floor_bytes`.
    Raises ValueError when the budget does not hold one page, or the arena would pass 2**31 - 1 tokens.
    """

    def __init__(
        self,
        layout: KVLayout,
        memory: VirtualMemory,
        *,
        budget_bytes: int,
        max_tokens: int,
        max_ranges: int,
        fingerprint: bytes,
        clock: Callable[[], float] = time.monotonic,
        prefix_sharing: bool = True,
        policy: EvictionPolicy | None = None,
        tile_tokens: int = 0,
        floor_bytes: int = DEFAULT_FLOOR_BYTES,
    ) -> None:
        self.layout = layout
        self._memory = memory
        self._range_bytes = layout.range_bytes(max_tokens, tile_tokens)
        self._check_sizes(max_tokens, max_ranges)
        self._pool = PagePool(memory, budget_bytes, floor_bytes)
        self._index = RadixIndex(layout, fingerprint, policy=policy, clock=clock)
        self._guard_pages = layout.pages_for(tile_tokens)
        self._guard_page = self._pool.allocate_guard() if tile_tokens else None
        usable_pages = self._pool.capacity_pages - (self._guard_page is not None)
        self.max_session_tokens = min(max_tokens, layout.complete_tokens(usable_pages))
        self._prefix_sharing = prefix_sharing
        self._max_ranges = max_ranges
        self._free_ranges = list(range(max_ranges))[::-1]
        self._sessions: dict[str, Session] = {}
        self._idle: dict[str, Session] = {}  # least recently used first
        self._evicted_pages = 0
        self._evicted_tokens = 0
        memory.reserve(max_ranges * self._range_bytes)
        self.arena = self._view_arena()

    def lease(self, session_id: str, salt: bytes, token_ids: Sequence[int], *, reuse: bool = True) -> Lease:
        """Hold the session's rows for a request whose history is `token_ids`, at most all but the last from cache.

        Rows come from where the session has them mapped, else from the index; `reuse=False` starts from none.
        Raises OutOfPages when no range or mapping can be had, LeaseHeld when the session is leased, ValueError for no
        token or more than `max_session_tokens`. Then no row is lost, though fewer may be mapped.
        """
        tokens = as_token_array(token_ids)
        if not 1 <= len(tokens) <= self.max_session_tokens:
            raise ValueError(f"{len(tokens)} tokens: between 1 and max_session_tokens={self.max_session_tokens} fit")
        session = self._sessions.get(session_id)
        if session is not None and session.lease is not None:
            raise LeaseHeld(session_id)
        if session is None:
            session = self._open(session_id)
        self._idle.pop(session_id, None)
        session.salt = self._namespace(session_id, salt)
        try:
            num_tokens = self._restore(session, tokens[: len(tokens) - 1 if reuse else 0])
        except OutOfPages:
            self._park(session)
            raise
        base_token = session.tensor.offset // self.layout.token_bytes
        session.lease = Lease(self, session, base_token, tokens[:num_tokens], self._publish_at(session))
        self._assert_frontier(session)
        return session.lease

    def drop_session(self, session_id: str) -> None:
        """Take the session's range away. Shared pages stay in the index; raises LeaseHeld while it is leased."""
        session = self._sessions.get(session_id)
        if session is None:
            return
        if session.lease is not None:
            raise LeaseHeld(session_id)
        self._close(session)
        if not self._prefix_sharing:
            self._pool.withdraw(as_page_array(self._index.drop(session.salt)))

    def sessions(self) -> list[str]:
        """Sessions that have rows mapped or are leased."""
        return list(self._sessions)

    def resident_tokens(self, session_id: str) -> int:
        """Tokens whose rows the session has mapped; 0 for an unknown one."""
        session = self._sessions.get(session_id)
        return session.tensor.num_tokens if session else 0

    def stats(self) -> KVStats:
        """Pages and bytes by state, and what was evicted so far."""
        return KVStats(
            page_bytes=self.layout.page_bytes,
            budget_bytes=self._pool.capacity_pages * self.layout.page_bytes,
            physical_bytes=self._memory.physical_bytes,
            pages=self._pool.counts,
            num_sessions=len(self._sessions),
            num_leases=len(self._sessions) - len(self._idle),
            num_ranges=self._max_ranges,
            num_mappings=self._memory.num_mappings,
            max_mappings=self._memory.max_mappings,
            evicted_pages=self._evicted_pages,
            evicted_tokens=self._evicted_tokens,
        )

    def shrink(self) -> None:
        """Give free pages' memory back to the system, down to the floor. For idle moments."""
        self._pool.shrink()

    def close(self) -> None:
        """Give everything back; the arena and leases must not be touched afterwards."""
        self._memory.close()
