"""Who has which page: random operations against a dictionary of holders, and the cases that need a name."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvstore import IntegrityError, MemoryRefused, OutOfPages, PagePool, PageState
from tests.kvstore.fakes import PAGE_BYTES, PlainMemory, as_pages


def make_pool(pages=8, floor_pages=0):
    return PagePool(PlainMemory(), pages * PAGE_BYTES, floor_pages * PAGE_BYTES)


class PoolMachine(RuleBasedStateMachine):
    """Leases and an index take and give pages; the model counts holders by hand."""

    @initialize(pages=st.integers(1, 12), floor_pages=st.integers(0, 12), guards=st.sampled_from([0, 7]))
    def make(self, pages, floor_pages, guards):
        self.capacity, self.floor, self.guards = pages, min(pages, floor_pages), guards
        self.memory = PlainMemory()
        budget_bytes = (pages + guards) * PAGE_BYTES
        self.pool = PagePool(self.memory, budget_bytes, floor_pages * PAGE_BYTES, with_guards=guards > 0)
        self.leases: dict[int, int] = {}  # page: leases that hold it
        self.indexed: set[int] = set()

    @property
    def held(self):
        return self.leases.keys() | self.indexed

    @rule(count=st.integers(1, 5), after=st.one_of(st.none(), st.integers(0, 11)))
    def allocate(self, count, after):
        """Pages nobody had, of zeros, or OutOfPages with the true number of those to be had."""
        available = self.capacity - len(self.held)
        refusing = self.memory.countdown.remaining == 1
        try:
            pages = self.pool.allocate(count, after=after).tolist()
        except OutOfPages as shortage:
            named = (shortage.needed, shortage.available)
            assert refusing or (count > available and named == (count, available))
            return
        assert len(set(pages)) == count
        assert not set(pages) & self.held
        for page in pages:
            assert self.memory.pages[page] == bytes(8)
            self.memory.pages[page][:] = b"\1" * 8
            self.leases[page] = 1

    @rule(data=st.data())
    def share(self, data):
        """Another lease holds indexed pages."""
        for page in self._some(data, self.indexed):
            self.leases[page] = self.leases.get(page, 0) + 1

    def _some(self, data, pages, call="ref"):
        chosen = data.draw(st.lists(st.sampled_from(sorted(pages)), unique=True)) if pages else []
        getattr(self.pool, call)(as_pages(*chosen))
        return chosen

    @rule(data=st.data())
    def let_go(self, data):
        """Leases end."""
        for page in self._some(data, self.leases.keys(), "unref"):
            self.leases[page] -= 1
            if self.leases[page] == 0:
                del self.leases[page]

    @rule(data=st.data())
    def publish(self, data):
        """Pages with one writer enter the index."""
        self.indexed.update(self._some(data, self.leases.keys() - self.indexed, "publish"))

    @rule(data=st.data())
    def withdraw(self, data):
        """Pages leave the index, those with several leases excepted."""
        pages = [page for page in self.indexed if self.leases.get(page, 0) <= 1]
        self.indexed.difference_update(self._some(data, pages, "withdraw"))

    @rule()
    def shrink(self):
        """Free pages go back to the memory, but not below the floor."""
        refusing = self.memory.countdown.remaining == 1
        try:
            self.pool.shrink()
        except MemoryRefused:
            assert refusing
            return
        assert len(self.memory.pages) <= max(self.floor, len(self.held))

    @rule()
    def refuse_next(self):
        """The memory will say no to the next create or release."""
        self.memory.countdown.arm(1)

    @invariant()
    def counts_are_right(self):
        """Every page is in the state its holders give it, and the counts say so."""
        if not hasattr(self, "pool"):
            return
        self.pool.check_integrity()
        for page in range(self.capacity):
            assert self.pool.refs(page) == self.leases.get(page, 0) + (page in self.indexed)
            assert self.pool.state(page) is self._state(page)
        counts = self.pool.counts
        assert counts.free + counts.private + counts.indexed + counts.guard == counts.created
        assert (counts.created, counts.guard) == (len(self.memory.pages) + self.guards, self.guards)
        assert self.pool.num_idle == len(self.indexed - self.leases.keys())
        assert self.pool.num_available == self.capacity - len(self.held)

    def _state(self, page):
        states = [(self.indexed, PageState.INDEXED), (self.leases, PageState.PRIVATE)]
        here = PageState.FREE if page in self.memory.pages else PageState.ABSENT
        return next((state for pages, state in states if page in pages), here)


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)


def test_budget_below_one_page_is_refused():
    """The error names the budget and the page."""
    with pytest.raises(ValueError, match=r"budget_bytes=4095: .*4096"):
        PagePool(PlainMemory(), PAGE_BYTES - 1)
    with pytest.raises(ValueError, match="at least one page of 4096 bytes beside 7 guards"):
        PagePool(PlainMemory(), 7 * PAGE_BYTES, with_guards=True)


def test_pages_are_made_when_first_wanted():
    """The budget is a bound, not a reservation."""
    pool = make_pool(8)
    assert pool.counts.created == 0
    pool.allocate(3)
    assert (pool.counts.created, pool.num_available) == (3, 5)


def test_pages_come_in_runs():
    """A whole run is preferred to lower scattered pages, and the page after the last one to any run."""
    pool = make_pool(10)
    pages = pool.allocate(10)
    pool.unref(pages[[0, 2, 5, 6, 7]])
    assert pool.allocate(3).tolist() == [5, 6, 7]
    assert pool.allocate(1, after=1).tolist() == [2]
    pool.unref(as_pages(5, 8))
    assert pool.allocate(2, after=4).tolist() == [0, 5]


def test_page_after_the_last_is_found_at_the_end_of_the_budget():
    """Nothing lies behind the last page of the budget."""
    pool = make_pool(3)
    pool.unref(pool.allocate(3)[:1])
    assert pool.allocate(1, after=2).tolist() == [0]


def test_system_with_less_than_the_budget_is_a_smaller_budget():
    """What is free is said, so that the caller can evict the rest; nothing is lost."""
    pool = make_pool(8)
    pool.unref(pool.allocate(2))
    pool._memory.countdown.arm(1)
    with pytest.raises(OutOfPages, match="5 pages needed, 2 can be had"):
        pool.allocate(5)
    pool.check_integrity()
    assert len(pool.allocate(5)) == 5


def test_shrink_keeps_the_floor_and_what_is_held():
    """The highest free pages go first, so that what stays lies together."""
    pool = make_pool(8, floor_pages=4)
    pages = pool.allocate(8)
    pool.unref(pages[[1, 3, 5, 6, 7]])
    assert pool.shrink() == 4
    assert sorted(pool._memory.pages) == [0, 1, 2, 4]
    assert pool.shrink() == 0


@pytest.mark.parametrize(
    "damage",
    [
        lambda pool: pool._refs.__setitem__(0, 0),
        lambda pool: pool._refs.__setitem__(3, 1),
        lambda pool: pool._states.__setitem__(1, PageState.FREE),
        lambda pool: pool._refs.__setitem__(1, 5),
    ],
    ids=["no_holder", "free_but_held", "wrong_state", "idle_miscounted"],
)
def test_damage_is_found(damage):
    """The integrity check sees lost holders, and counters that no longer count."""
    pool = make_pool(4)
    pool.publish(pool.allocate(2))
    pool.unref(np.arange(2))
    pool.allocate(1)
    pool.check_integrity()
    damage(pool)
    with pytest.raises(IntegrityError):
        pool.check_integrity()
