"""Owns the physical pages: who may have one, how many hold it, and when its memory goes back to the system.

A page is free, private (one writer), indexed (the prefix index holds it, its rows do not change) or guard; the latter
the memory keeps to itself, they are only counted here. It knows no tokens, no addresses and not who holds what.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from kvstore.arrays import PageArray, as_page_array
from kvstore.errors import MemoryRefused, OutOfPages, ensure
from kvstore.memory import VirtualMemory


class PageState(IntEnum):
    """What a page number stands for; ABSENT numbers have no memory."""

    ABSENT = 0
    FREE = 1
    PRIVATE = 2
    INDEXED = 3


FREE_BYTE = np.uint8(PageState.FREE)  # compared with thousands of bytes, an enumeration's member is slow


@dataclass(frozen=True, slots=True)
class PageCounts:
    """Pages by state; `created` is their sum. `idle` is how many of the indexed ones no lease holds."""

    free: int
    private: int
    indexed: int
    guard: int
    created: int
    idle: int


class PagePool:
    """At most `budget_bytes` of pages, guards among them, made when first wanted and kept until `shrink`.

    `capacity_pages` can be handed out, numbers from 0 on. Page arrays passed in hold each page once. Raises ValueError
    when the budget is less than one page beside the guards.
    """

    def __init__(
        self, memory: VirtualMemory, budget_bytes: int, floor_bytes: int = 0, *, with_guards: bool = False
    ) -> None:
        self.num_guard = memory.create_guards() if with_guards else 0
        self.capacity_pages = budget_bytes // memory.page_bytes - self.num_guard
        if self.capacity_pages < 1:
            needed = f"must hold at least one page of {memory.page_bytes} bytes beside {self.num_guard} guards"
            raise ValueError(f"budget_bytes={budget_bytes}: {needed}")
        self._memory = memory
        self._floor_pages = min(self.capacity_pages, -(-floor_bytes // memory.page_bytes))
        self._states = np.zeros(self.capacity_pages, np.uint8)
        self._refs = np.zeros(self.capacity_pages, np.int32)  # holders: leases, plus the index for an indexed page
        self._dirty = np.zeros(self.capacity_pages, np.bool_)
        self._counts = dict.fromkeys(PageState, 0)
        self._counts[PageState.ABSENT] = self.capacity_pages
        self._num_idle = 0

    @property
    def num_available(self) -> int:
        """Pages that `allocate` can hand out now, made ones and ones still to be made."""
        return self._counts[PageState.FREE] + self._counts[PageState.ABSENT]

    @property
    def num_idle(self) -> int:
        """Indexed pages that nobody but the index holds: what eviction can free."""
        return self._num_idle

    @property
    def counts(self) -> PageCounts:
        """Pages by state."""
        counts = self._counts
        return PageCounts(
            free=counts[PageState.FREE],
            private=counts[PageState.PRIVATE],
            indexed=counts[PageState.INDEXED],
            guard=self.num_guard,
            created=self.capacity_pages - counts[PageState.ABSENT] + self.num_guard,
            idle=self._num_idle,
        )

    def state(self, page: int) -> PageState:
        """What the page is now."""
        return PageState(int(self._states[page]))

    def count(self, pages: PageArray, state: PageState) -> int:
        """How many of the pages are in this state."""
        return int(np.count_nonzero(self._states[pages] == state))

    def refs(self, page: int) -> int:
        """How many hold the page."""
        return int(self._refs[page])

    def allocate(self, num_pages: int, *, after: int | None = None) -> PageArray:
        """Pages of zeros, private, held once; neighbours of each other, and of page `after`, where there are such.

        All or nothing: raises OutOfPages when the budget, or the system, does not give so many.
        """
        self._ensure_free(num_pages)
        pages = self._choose(num_pages, after)
        self._zero(pages[self._dirty[pages]])
        self._set_state(pages, PageState.PRIVATE)
        self._refs[pages] = 1
        self._dirty[pages] = True
        return pages

    def ref(self, pages: PageArray) -> None:
        """One more holder of each page."""
        self._num_idle -= self._count_idle(pages)
        self._refs[pages] += 1

    def unref(self, pages: PageArray) -> None:
        """One holder less; pages nobody holds are free."""
        self._refs[pages] -= 1
        self._num_idle += self._count_idle(pages)
        self._set_state(pages[self._refs[pages] == 0], PageState.FREE)

    def publish(self, pages: PageArray) -> None:
        """The index takes hold of private pages: their rows no longer change."""
        assert (self._states[pages] == PageState.PRIVATE).all()
        self._set_state(pages, PageState.INDEXED)
        self._refs[pages] += 1

    def withdraw(self, pages: PageArray) -> None:
        """The index lets go of pages: free, or private where the one lease that wrote them still holds them."""
        assert (self._states[pages] == PageState.INDEXED).all()
        self._num_idle -= self._count_idle(pages)
        self._set_state(pages, PageState.PRIVATE)
        self.unref(pages)

    def shrink(self) -> int:
        """Give free pages back to the system, highest first, down to the floor; returns how many."""
        created = self.capacity_pages - self._counts[PageState.ABSENT]
        surplus = min(self._counts[PageState.FREE], created - self._floor_pages)
        if surplus <= 0:
            return 0
        pages = np.flatnonzero(self._states == PageState.FREE)[-surplus:]
        self._memory.release(pages)
        self._set_state(pages, PageState.ABSENT)
        return surplus

    def check_integrity(self) -> None:
        """Raise IntegrityError where counters, states and reference counts contradict each other."""
        states, refs = self._states, self._refs
        for state in PageState:
            ensure(np.count_nonzero(states == state) == self._counts[state], f"{state.name} pages are miscounted")
        counts = self.counts
        ensure(counts.free + counts.private + counts.indexed + counts.guard == counts.created, "pages are lost")
        held = (states == PageState.PRIVATE) | (states == PageState.INDEXED)
        ensure(bool(((refs > 0) == held).all()), "a held page has no holder, or a free page has one")
        idle = (states == PageState.INDEXED) & (refs == 1)
        ensure(np.count_nonzero(idle) == self._num_idle, "idle pages are miscounted")

    def check_holders(self, holdings: PageArray) -> None:
        """Raise IntegrityError unless each page is held as often as it stands in `holdings`."""
        expected = np.bincount(holdings, minlength=self.capacity_pages)
        for page in np.flatnonzero(expected != self._refs).tolist():
            ensure(False, f"page {page} has {self._refs[page]} references and {expected[page]} holders")

    def _ensure_free(self, num_pages: int) -> None:
        missing = num_pages - self._counts[PageState.FREE]
        if missing > self._counts[PageState.ABSENT]:
            raise OutOfPages(num_pages, self.num_available)
        if missing > 0:
            self._create(num_pages, missing)

    def _create(self, num_pages: int, missing: int) -> None:
        try:
            created = as_page_array(self._memory.create(missing))
        except MemoryRefused as refusal:  # the machine has less than the budget: the same remedies help
            raise OutOfPages(num_pages, self._counts[PageState.FREE]) from refusal
        self._set_state(created, PageState.FREE)
        self._dirty[created] = False

    def _zero(self, pages: PageArray) -> None:
        try:
            self._memory.zero(pages)
        except MemoryRefused as refusal:
            raise OutOfPages(len(pages), 0) from refusal

    def _choose(self, num_pages: int, after: int | None) -> PageArray:
        """Free pages: the run right after `after`, else the lowest run long enough, else the lowest pages."""
        if num_pages == 1:
            return self._choose_one(after)
        if after is not None and (self._states[after + 1 : after + 1 + num_pages] == PageState.FREE).sum() == num_pages:
            return np.arange(after + 1, after + 1 + num_pages)
        free = np.flatnonzero(self._states == PageState.FREE)
        whole_run = free[num_pages - 1 :] - free[: len(free) - num_pages + 1] == num_pages - 1
        start = int(whole_run.argmax())
        return free[start : start + num_pages] if whole_run[start] else free[:num_pages]

    def _choose_one(self, after: int | None) -> PageArray:
        """The same for one page, which decoding asks for all the time."""
        if after is None or after + 1 >= self.capacity_pages or self._states[after + 1] != PageState.FREE:
            return np.array([(self._states == FREE_BYTE).argmax()])
        return np.array([after + 1])

    def _set_state(self, pages: PageArray, state: PageState) -> None:
        before: npt.NDArray[np.int64] = np.bincount(self._states[pages], minlength=len(PageState))
        for old in PageState:
            self._counts[old] -= int(before[old])
        self._counts[state] += len(pages)
        self._states[pages] = state

    def _count_idle(self, pages: PageArray) -> int:
        return int(np.count_nonzero((self._states[pages] == PageState.INDEXED) & (self._refs[pages] == 1)))
