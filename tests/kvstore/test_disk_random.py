"""Random runs of the disk tier beside a dictionary: what is there is right, what went is what was used longest ago."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from kvstore.disk import TierState
from tests.kvstore.test_disk import PAGE_BYTES, QuickCalls, bytes_on_disk, key_of, open_tier, payload_of, read

LENGTHS = [1, 40, 64, 200, PAGE_BYTES - 1, PAGE_BYTES]
numbers = st.integers(0, 150)


def record_of(number):
    """A key and its bytes, of a length that depends on it."""
    key = key_of(number)
    return key, payload_of(key, LENGTHS[number % len(LENGTHS)])


class DiskMachine(RuleBasedStateMachine):
    """`order` are the keys that must be there, least recently used first; `ever` is all that was put."""

    def __init__(self):
        super().__init__()
        self.path = Path(tempfile.mkdtemp(prefix="disk-tier-"))
        self.tier = None
        self.ever = {}
        self.order = []
        self.is_resized = False  # the first write after that deletes files as they are

    def teardown(self):
        if self.tier is not None:
            self.tier.close()
        shutil.rmtree(self.path)

    @initialize(pages=st.integers(5, 80))
    def make(self, pages):
        """Budgets from the smallest on, with files of one page to files of five."""
        self.pages = pages
        self.open()

    def open(self, **options):
        self.tier = open_tier(self.path, **{"pages": self.pages, "calls": QuickCalls()} | options)

    @rule(batch=st.lists(numbers, min_size=1, max_size=6))
    def put(self, batch):
        """The batch is the most recently used; to make room, the least recently used went, in that order."""
        records = [record_of(number) for number in batch]
        keys = [key for key, _ in records]
        new = [key for key in dict.fromkeys(keys) if key not in self.order]
        stored = self.tier.put(records)
        assert stored == sum(self.tier.contains(key) for key, _ in records)
        self.ever |= dict(records)
        for key in keys:
            self.use(key)
        self.order += new
        self.expect_only_oldest_gone()
        self.is_resized &= not new
        assert self.tier.contains(new[-1] if new else keys[-1])

    @rule(first=numbers, count=st.integers(1, 60))
    def put_many(self, first, count):
        """Enough for files to fill and go."""
        for number in range(first, first + count, 3):
            self.put([number, number + 1, number + 2])

    @rule(number=numbers)
    def read(self, number):
        """What must be there is there, and is the most recently used; what is not there is a miss."""
        key = key_of(number)
        assert read(self.tier, key) == (self.ever[key] if key in self.order else None)
        self.use(key)

    @rule(some=st.sets(numbers, max_size=30))
    def touch(self, some):
        """As reading, without the bytes."""
        for key in map(key_of, sorted(some)):
            assert self.tier.touch(key) == (key in self.order)
            self.use(key)

    @rule(some=st.sets(numbers, max_size=60))
    def drop(self, some):
        """Dropped keys are misses."""
        keys = set(map(key_of, some))
        assert self.tier.drop(keys) == len(keys & set(self.order))
        self.order = [key for key in self.order if key not in keys]

    @rule()
    def compact(self):
        """The files get smaller, or stay."""
        before = bytes_on_disk(self.path)
        freed = self.tier.compact()
        assert before - bytes_on_disk(self.path) == freed
        self.expect_only_oldest_gone()

    @rule()
    def verify(self):
        """Everything is right."""
        found = self.tier.verify()
        assert (found.records, found.bad) == (len(self.order), [])

    @rule()
    def reopen(self):
        """All that was there is there; dropped keys may be back, with the right bytes."""
        self.tier.close()
        self.open()
        keys = self.tier.keys()
        assert set(self.order) <= set(keys) <= self.ever.keys()
        assert all(read(self.tier, key) == self.ever[key] for key in keys)
        self.order = keys

    @rule()
    def reopen_for_another_model(self):
        """Another model sees nothing, takes a part of the room, and leaves what is left."""
        self.tier.close()
        with open_tier(self.path, pages=self.pages, fingerprint=b"other", calls=QuickCalls()) as other:
            assert not any(other.contains(key) for key in self.ever)
            assert other.put([record_of(1000)]) == 1
            assert bytes_on_disk(self.path) <= other.budget_bytes
        self.reopen_with_less()

    @rule(pages=st.integers(5, 80))
    def resize(self, pages):
        """With another budget what is left is right."""
        self.pages, self.is_resized = pages, True
        self.tier.close()
        self.reopen_with_less()

    @invariant()
    def keeps_its_word(self):
        """Sizes, keys and budget, after every step."""
        if self.tier is None:
            return
        assert self.tier.keys() == self.order
        assert bytes_on_disk(self.path) <= self.tier.budget_bytes
        stats = self.tier.stats()
        assert (stats.records, stats.state) == (len(self.order), TierState.OPEN)
        assert stats.live_bytes <= stats.file_bytes + 36 * stats.records  # the newest file has no footer yet
        assert not set(stats.rejected) - {"foreign"}

    def reopen_with_less(self):
        self.open()
        self.order = self.tier.keys()
        assert set(self.order) <= self.ever.keys()
        assert all(read(self.tier, key) == self.ever[key] for key in self.order)

    def use(self, key):
        if key in self.order:
            self.order.remove(key)
            self.order.append(key)

    def expect_only_oldest_gone(self):
        """What is left is the end of the order."""
        left = self.tier.keys()
        expected = [key for key in self.order if key in left] if self.is_resized else self.order[-len(left) :]
        assert left == (expected if left else [])
        self.order = left


TestDisk = DiskMachine.TestCase
TestDisk.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


@pytest.mark.soak
def test_many_more_random_runs():
    """The same for longer."""
    run_state_machine_as_test(
        DiskMachine,
        settings=settings(
            max_examples=2000, stateful_step_count=80, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
