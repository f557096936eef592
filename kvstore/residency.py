"""Who is resident: ranges and pages are handed out here, and taken from idle sessions when there are none left.

It knows sessions as owners of ranges and mapped pages; what rows mean and who shares them is the keeper's business.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import ParamSpec

from kvstore.arrays import PageArray, TokenArray, as_page_array
from kvstore.errors import MemoryRefused, OutOfMappings, OutOfPages, OutOfRanges, ensure
from kvstore.layout import KVLayout
from kvstore.memory import VirtualMemory
from kvstore.node import Resident, disown_tail
from kvstore.pool import PagePool
from kvstore.radix import RadixIndex
from kvstore.results import Eviction
from kvstore.session import Session
from kvstore.tensor import VirtualTensor
from kvstore.tiers import Tiers

MAX_SPARED = 256  # pages that one eviction passes over because they lie nowhere else

P = ParamSpec("P")


class Residency:
    """Resident sessions, each with one of `max_ranges` ranges of `range_bytes`; the idle ones in order of last use."""

    def __init__(
        self,
        layout: KVLayout,
        memory: VirtualMemory,
        pool: PagePool,
        index: RadixIndex,
        *,
        range_bytes: int,
        max_ranges: int,
    ) -> None:
        self.layout = layout
        self.memory = memory
        self.pool = pool
        self.index = index
        self.sessions: dict[str, Session] = {}
        self.idle: dict[str, Session] = {}  # least recently used first
        self.tiers: Tiers | None = None
        self.evicted_pages = 0
        self.evicted_tokens = 0
        self.max_ranges = max_ranges
        self._range_bytes = range_bytes
        self._free_ranges = list(range(max_ranges))[::-1]

    def open(self, session_id: str) -> Session:
        """A new session with an empty range, if need be that of the least recently used idle one.

        Raises OutOfRanges when every range is leased.
        """
        if not self._free_ranges and not self.recycle():
            raise OutOfRanges(self.max_ranges)
        number = self._free_ranges.pop()
        range_pages = self._range_bytes // self.layout.page_bytes
        tensor = VirtualTensor(self.memory, self.layout, number * self._range_bytes, range_pages)
        session = Session(session_id, number, tensor, Resident(session_id))
        self.sessions[session_id] = session
        return session

    def park(self, session: Session) -> None:
        """The session is idle from now on: its pages may be evicted, its range recycled."""
        self.idle[session.session_id] = session
        self._close_if_empty(session)

    def unpark(self, session: Session) -> None:
        """The session is about to be leased: its range is not recycled any more."""
        self.idle.pop(session.session_id, None)

    def close(self, session: Session) -> None:
        """Unmap everything and take the range back; what the index holds of the session stays there."""
        session.tensor.cut(0)
        self.index.detach(session.resident)
        self._free_ranges.append(session.range_number)
        self.idle.pop(session.session_id, None)
        del self.sessions[session.session_id]

    def recycle(self) -> bool:
        """Close the least recently used idle session; False when there is none."""
        session = next(iter(self.idle.values()), None)
        if session is not None:
            self.close(session)
        return session is not None

    def allocate(self, num_pages: int, *, after: int | None = None) -> PageArray:
        """Pages of zeros from the pool, idle ones evicted for them as needed.

        Raises OutOfPages; where eviction could not have been enough, nothing is evicted.
        """
        while True:
            try:
                return self.pool.allocate(num_pages, after=after)
            except OutOfPages as shortage:
                missing = num_pages - shortage.available
                evictable = self.pool.num_idle
                if missing > evictable or not self.evict(missing):
                    raise OutOfPages(num_pages, shortage.available + evictable) from shortage

    def evict(self, num_pages: int) -> int:
        """Free up to `num_pages` idle pages, unmapping them from every idle range; returns how many.

        Those that lie on another tier too go first.
        """
        num_freed = 0
        if self.tiers is not None:
            num_freed = self._let_go(self.index.evict(num_pages, self._sparing_unsaved(self.tiers)))
        if num_freed < num_pages:
            num_freed += self._let_go(self.index.evict(num_pages - num_freed, self._is_pinned))
        return num_freed

    def _sparing_unsaved(self, tiers: Tiers) -> Callable[[int], bool]:
        """Whether a page is pinned, or would be lost; the latter is said of a limited number only, to be quick."""
        spared = iter(range(MAX_SPARED))
        return lambda page: self._is_pinned(page) or (not tiers.is_saved(page) and next(spared, None) is not None)

    def forget(self, salt: bytes, tokens: TokenArray, num_kept: int) -> int:
        """Free the pages behind a history's first tokens that nobody else shares or holds now; returns how many."""
        return self._let_go(self.index.forget(salt, tokens, num_kept, self._is_pinned))

    def _is_pinned(self, page: int) -> bool:
        return self.pool.refs(page) > 1

    def _let_go(self, eviction: Eviction) -> int:
        for resident in eviction.residents:
            self.cut(self.sessions[resident.session_id], resident.num_pages)
        pages = as_page_array(eviction.pages)
        if self.tiers is not None:
            self.tiers.forget(pages)
        self.pool.withdraw(pages)
        self.evicted_pages += len(eviction.pages)
        self.evicted_tokens += eviction.num_tokens
        return len(eviction.pages)

    def cut(self, session: Session, num_pages: int) -> None:
        """Unmap all but the session's first pages; an idle session left with none loses its range."""
        session.tensor.cut(num_pages)
        if num_pages <= session.resident.num_pages:
            disown_tail(session.resident)
        if session.session_id in self.idle:
            self._close_if_empty(session)

    def mapping(self, call: Callable[P, None], *args: P.args, **kwargs: P.kwargs) -> None:
        """Make a call that maps pages, or waits for them to be; while it is refused, unmap idle sessions, then give
        free pages back. Raises OutOfMappings when that does not help.
        """
        while True:
            try:
                return call(*args, **kwargs)
            except (OutOfMappings, MemoryRefused) as refusal:
                if not self._relieve(refusal):
                    raise self._as_out_of_mappings(refusal) from refusal

    def check_integrity(self) -> None:
        """Raise IntegrityError where ranges, idle sessions and mapped pages contradict each other."""
        ranges = [session.range_number for session in self.sessions.values()]
        ensure(sorted(ranges + self._free_ranges) == list(range(self.max_ranges)), "a range is lost or owned twice")
        idle = {session_id for session_id, session in self.sessions.items() if session.lease is None}
        ensure(idle == set(self.idle), "the idle sessions are not those without a lease")
        for session in self.sessions.values():
            session.tensor.check_integrity()

    def _close_if_empty(self, session: Session) -> None:
        if not len(session.tensor.pages):
            self.close(session)

    def _relieve(self, refusal: OutOfMappings | MemoryRefused) -> bool:
        """Give something up that the system may miss; False when there is nothing."""
        if self.recycle():
            return True
        if isinstance(refusal, OutOfMappings):
            return False
        with contextlib.suppress(MemoryRefused):
            return self.pool.shrink() > 0
        return False

    def _as_out_of_mappings(self, refusal: OutOfMappings | MemoryRefused) -> OutOfMappings:
        if isinstance(refusal, OutOfMappings):
            return refusal
        return OutOfMappings(self.memory.num_mappings + 1, self.memory.num_mappings)
