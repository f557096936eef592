"""The store: sessions lease rows of the arena, find again what is still there, and share what they have in common.

It composes pool, index and tensors, and is where a page changes hands. It knows token ids, pages and sessions; it
knows no model, no kernels and no chat. Single-threaded.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence

from kvstore.arrays import TokenArray, as_page_array, as_token_array
from kvstore.errors import LeaseHeld, OutOfPages
from kvstore.eviction import EvictionPolicy
from kvstore.forgetting import Forgetter
from kvstore.host import HostTier
from kvstore.integrity import check_frontier, check_holders
from kvstore.keeper import Keeper
from kvstore.keys import PageKeys
from kvstore.layout import KVLayout
from kvstore.memory import VirtualMemory
from kvstore.pool import PagePool
from kvstore.promotion import Promotion
from kvstore.radix import RadixIndex
from kvstore.residency import Residency
from kvstore.results import Missing
from kvstore.session import Lease, Session
from kvstore.stats import KVStats
from kvstore.tiers import Below, Tiers

DEFAULT_FLOOR_BYTES = 32 << 20
MAX_ARENA_TOKENS = 2**31 - 1


class KVStore:
    """Leases on sessions' KV rows within `budget_bytes` of pages; `memory` becomes the store's own.

    `max_ranges` sessions can be resident at once, each with addresses for `max_tokens` tokens and `tile_tokens` more
    that kernels may read past its end (see `Lease.guard`). The least recently used idle session makes room for a new
    one; its pages stay in the index. Without `prefix_sharing` a session finds only its own rows. `shrink` keeps
    `floor_bytes`.
    With `below`, evicted histories come back from host memory and disk: see `tend`, `promote` and `flush`.
    Raises ValueError when the budget does not hold one token, or the arena would pass 2**31 - 1 tokens.
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
        below: Below | None = None,
    ) -> None:
        range_bytes = layout.range_bytes(max_tokens, tile_tokens)
        _check_sizes(layout, memory, max_tokens, max_ranges * range_bytes)
        self._pool = PagePool(memory, budget_bytes, floor_bytes, with_guards=tile_tokens > 0)
        self.max_session_tokens = min(max_tokens, layout.complete_tokens(self._pool.capacity_pages))
        if self.max_session_tokens < 1:
            raise ValueError(f"budget_bytes={budget_bytes}: must hold at least one token of {layout.token_bytes} bytes")
        self.layout = layout
        self._memory = memory
        self._index = RadixIndex(layout, fingerprint, policy=policy, clock=clock)
        self._residency = Residency(
            layout, memory, self._pool, self._index,
            range_bytes=range_bytes, max_ranges=max_ranges,
        )  # fmt: skip
        self._keeper = Keeper(self._residency, self.max_session_tokens, tile_tokens)
        self.prefix_sharing = prefix_sharing
        self.tiers = self._make_tiers(below, fingerprint) if below else None
        self._residency.tiers = self._keeper.tiers = self.tiers
        self._forgetter = Forgetter(layout, self._residency)
        self._forgetter.tiers = self.tiers
        memory.reserve(max_ranges * range_bytes)
        rows = memory.view(0, max_ranges * range_bytes).view(layout.dtype)
        self.arena = rows.view(-1, layout.num_layers, 2, layout.num_kv_heads, layout.head_dim)

    def lease(
        self, session_id: str, salt: bytes, token_ids: Sequence[int] | TokenArray, *, reuse: bool = True
    ) -> Lease:
        """Hold the session's rows for a request whose history is `token_ids`, at most all but the last from cache.

        Rows come from where the session has them mapped, else from the index; `reuse=False` starts from none.
        Raises OutOfPages when no range or mapping can be had, LeaseHeld when the session is leased, ValueError for no
        token or more than `max_session_tokens`. Then no row is lost, though fewer may be mapped.
        """
        tokens = as_token_array(token_ids)
        if not 1 <= len(tokens) <= self.max_session_tokens:
            raise ValueError(f"{len(tokens)} tokens: between 1 and max_session_tokens={self.max_session_tokens} fit")
        session = self._unleased(session_id) or self._residency.open(session_id)
        session.salt = self._namespace(session_id, salt)
        self._residency.unpark(session)
        try:
            self._keeper.restore(session, tokens[: len(tokens) - 1 if reuse else 0])
        except OutOfPages:
            self._residency.park(session)
            raise
        session.lease = Lease(self._keeper, session, tokens[: session.tensor.num_tokens], self.layout)
        check_frontier(session, self._pool)
        return session.lease

    def drop_session(self, session_id: str) -> None:
        """Take the session's range away. Shared pages stay in the index; raises LeaseHeld while it is leased."""
        session = self._unleased(session_id)
        if session is None:
            return
        self._residency.close(session)
        if not self.prefix_sharing:
            pages = as_page_array(self._index.drop(session.salt))
            if self.tiers is not None:
                self.tiers.forget(pages)
            self._pool.withdraw(pages)

    def forget(self, session_id: str, salt: bytes, token_ids: Sequence[int] | TokenArray, num_kept: int) -> None:
        """Take a history out of every tier but for its first `num_kept` tokens, which others share; `tend` goes on.

        What the index knows to be shared stays. Raises LeaseHeld while the session is leased.
        """
        self.drop_session(session_id)
        self._forgetter.forget(self._namespace(session_id, salt), as_token_array(token_ids), num_kept)

    def promote(self, session_id: str, salt: bytes, token_ids: Sequence[int] | TokenArray) -> Promotion | None:
        """Begin to bring back the next part of what tiers below have of a history; `end_promotion` it.

        None where there is nothing, or nothing that takes longer to compute. Raises OutOfPages.
        """
        if self.tiers is None:
            return None
        return self.tiers.promote(self._namespace(session_id, salt), as_token_array(token_ids))

    def map_ahead(self, session_id: str, salt: bytes, token_ids: Sequence[int] | TokenArray) -> None:
        """Map the complete pages that there are of a history, so that leasing it takes less time; it may be evicted.

        Does nothing where the session is leased, or pages cannot be mapped now.
        """
        session = self._residency.sessions.get(session_id)
        if session is not None and session.lease is not None:
            return
        tokens = as_token_array(token_ids)
        num_pages = len(self._index.lookup(self._namespace(session_id, salt), tokens))
        with contextlib.suppress(OutOfPages):
            self.lease(session_id, salt, tokens[: self.layout.tokens_to_fill(num_pages)]).release()

    def end_promotion(self, promotion: Promotion) -> None:
        """The history is leased, or nobody waits for it any more: what was brought back may be evicted again."""
        if self.tiers is not None:
            self.tiers.promotions.end(promotion)

    def take_sources(self, session_id: str, salt: bytes, token_ids: Sequence[int] | TokenArray) -> dict[str, int]:
        """How many tokens of a history were brought back from which tier since anybody leased them last."""
        if self.tiers is None or not self.tiers.has_sources:
            return {}
        match = self._index.match(self._namespace(session_id, salt), as_token_array(token_ids)[:-1])
        boundary = [match.boundary.page] if match.boundary else []
        return self.tiers.take_sources([*match.pages.tolist(), *boundary], match.num_tokens)

    def tend(self, *, idle: bool = False, busy_s: float = 0.0, is_awaited: bool = False) -> bool:
        """Take care of what moves between tiers, once a step; whether there is more to do soon.

        `idle`: nothing runs. `busy_s`: for about so long the device is busy with what it was given.
        `is_awaited`: somebody waits for a first token.
        """
        if self.tiers is None:
            return False
        self.tiers.tend(idle=idle, busy_s=busy_s, is_awaited=is_awaited)
        self._forgetter.tend()
        return self.tiers.is_busy or self._forgetter.is_busy

    def note_computed(self, num_tokens: int, seconds: float) -> None:
        """So many tokens of prompts were computed in that time; what is quicker computed is not brought back."""
        if self.tiers is not None:
            self.tiers.prefill_cost.observe(num_tokens, seconds)

    def computing_s(self, num_tokens: int) -> float:
        """How long a step takes that computes so many tokens of prompts; 0 where that is not known."""
        return self.tiers.prefill_cost.estimate(num_tokens) if self.tiers is not None else 0.0

    @property
    def is_forgetting(self) -> bool:
        """Whether something that was to be forgotten is still in some tier."""
        return self._forgetter.is_busy

    @property
    def is_moving(self) -> bool:
        """Whether pages are held because they are being copied: what is refused for want of pages may be had soon."""
        return self.tiers is not None and self.tiers.is_moving

    def flush(self, deadline_s: float) -> bool:
        """Copy all histories down, until `time.monotonic()` passes the deadline; whether all are there.

        What is to be forgotten is forgotten first.
        """
        while self._forgetter.is_busy and time.monotonic() < deadline_s:
            self.tend()
            time.sleep(0.0005)
        return self.tiers is None or self.tiers.flush(deadline_s)

    @property
    def holds_foreign_pages(self) -> bool:
        """Whether the disk was another model's when it was opened, so that what it had of a history is of no use."""
        return self.tiers is not None and self.tiers.disk is not None and self.tiers.disk.was_foreign

    def sessions(self) -> list[str]:
        """Sessions that have rows mapped or are leased."""
        return list(self._residency.sessions)

    def resident_tokens(self, session_id: str) -> int:
        """Tokens whose rows the session has mapped; 0 for an unknown one."""
        session = self._residency.sessions.get(session_id)
        return session.tensor.num_tokens if session else 0

    def held_tokens(self, session_id: str, salt: bytes, token_ids: Sequence[int] | TokenArray) -> dict[str, int]:
        """How much of a history each tier would give: on the `device`, then of the rest in `host` memory and on `disk`.

        Tokens of complete pages; on the device all that the session has mapped.
        """
        tokens, namespace = as_token_array(token_ids), self._namespace(session_id, salt)
        pages = self._index.lookup(namespace, tokens)
        on_device = max(self.resident_tokens(session_id), self.layout.complete_tokens(len(pages)))
        below = self.tiers.below(namespace, tokens, len(pages)) if self.tiers else {}
        return {"device": min(on_device, len(tokens)), **below}

    def missing(self, session_id: str, salt: bytes, token_ids: Sequence[int] | TokenArray) -> Missing:
        """Where the rows are that the index does not have of a history."""
        tokens, namespace = as_token_array(token_ids), self._namespace(session_id, salt)
        if self.tiers is None:
            return "gone"
        return self.tiers.missing(namespace, tokens, len(self._index.lookup(namespace, tokens)))

    def restore_s(self, session_id: str, salt: bytes, token_ids: Sequence[int] | TokenArray) -> float:
        """How long it would take to bring back what tiers below have of a history, by what it took before."""
        tokens, namespace = as_token_array(token_ids), self._namespace(session_id, salt)
        if self.tiers is None:
            return 0.0
        return self.tiers.restore_s(namespace, tokens, len(self._index.lookup(namespace, tokens)))

    def stats(self) -> KVStats:
        """Pages and bytes by state, and what was evicted so far."""
        residency = self._residency
        return KVStats(
            page_bytes=self.layout.page_bytes,
            token_bytes=self.layout.token_bytes,
            budget_bytes=(self._pool.capacity_pages + self._pool.num_guard) * self.layout.page_bytes,
            physical_bytes=self._memory.physical_bytes,
            pages=self._pool.counts,
            num_sessions=len(residency.sessions),
            num_leases=len(residency.sessions) - len(residency.idle),
            num_ranges=residency.max_ranges,
            num_mappings=self._memory.num_mappings,
            max_mappings=self._memory.max_mappings,
            evicted_pages=residency.evicted_pages,
            evicted_tokens=residency.evicted_tokens,
            **(self.tiers.figures() if self.tiers else {}),
        )

    def settle(self) -> None:
        """Return when all that is mapped can be accessed: once a step, after leasing and growing, before kernels run.

        Idle sessions are unmapped and free pages given back where that is refused; raises OutOfMappings when nothing
        helps. A later call tries again.
        """
        self._residency.mapping(self._memory.settle)

    def shrink(self) -> None:
        """Give free pages' memory back to the system, down to the floor. For idle moments."""
        self._pool.shrink()

    def check_integrity(self) -> None:
        """Raise IntegrityError where a part's bookkeeping contradicts itself or another part's. Slow."""
        self._memory.check_integrity()
        self._pool.check_integrity()
        self._index.check_integrity()
        self._residency.check_integrity()
        check_holders(self._residency)
        if self.tiers is not None:
            self.tiers.host.check_integrity()

    def close(self) -> None:
        """Give everything back; the arena and leases must not be touched afterwards."""
        self._forgetter.close()
        if self.tiers is not None:
            self.tiers.close()
        self._memory.close()

    def _make_tiers(self, below: Below, fingerprint: bytes) -> Tiers:
        """Raises ValueError for host memory of less than one page."""
        keys = PageKeys(self.layout, fingerprint)
        host = HostTier(below.buffers)
        if not host.num_slots:
            raise ValueError(f"buffers: there must be memory for one page of {self.layout.page_bytes} bytes")
        return Tiers(
            self.layout, self._pool, keys, host, below.transfers,
            below.open_disk(keys.fingerprint, self.layout.page_bytes) if below.open_disk else None,
            insert=self._keeper.adopt, depth=self._index.depth, lookup=self._index.lookup,
            allocate=self._residency.allocate,
        )  # fmt: skip

    def _unleased(self, session_id: str) -> Session | None:
        session = self._residency.sessions.get(session_id)
        if session is not None and session.lease is not None:
            raise LeaseHeld(session_id)
        return session

    def _namespace(self, session_id: str, salt: bytes) -> bytes:
        """What separates index trees: the tenant's salt, and the session where nothing is shared."""
        if self.prefix_sharing:
            return salt
        return len(salt).to_bytes(8, "big") + salt + session_id.encode()


def _check_sizes(layout: KVLayout, memory: VirtualMemory, max_tokens: int, arena_bytes: int) -> None:
    if layout.page_bytes != memory.page_bytes:
        raise ValueError(
            f"page_bytes: {layout.page_bytes} in the layout, {memory.page_bytes} in memory; make them equal"
        )
    if max_tokens < 1 or arena_bytes < 1:
        raise ValueError(f"max_tokens={max_tokens}, arena of {arena_bytes} bytes: both must be positive")
    if arena_bytes // layout.token_bytes > MAX_ARENA_TOKENS:
        raise ValueError(f"arena of {arena_bytes // layout.token_bytes} tokens: lower max_tokens or max_ranges")
