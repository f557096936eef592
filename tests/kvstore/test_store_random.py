"""Random turns of several sessions and tenants against a model that remembers every history in full."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from kvstore import Lease, OutOfPages
from tests.kvstore.fakes import (
    PAGE_BYTES,
    TOKEN_SHAPES,
    FlakyMemory,
    assert_rows,
    base_token_of,
    make_store,
    pages_of,
    rows_of,
    write_rows,
)

SESSIONS = [f"s{number}" for number in range(5)]
MAX_TOKENS = 80
picks = st.integers(0, 11)  # one of those that qualify, counted round
lengths = st.integers(1, 35)


def _beginning(trunk, cut, token, count):
    """Part of one of two long texts, then something of its own: histories that agree up to any token."""
    return [(place * (trunk + 3)) % 7 for place in range(cut)] + [100 + token] * count


token_lists = st.builds(_beginning, st.integers(0, 1), st.integers(0, 60), st.integers(0, 3), lengths)


@dataclass
class Plain:
    """What the model knows of a session: whose it is, its history, and the lease if one is held."""

    salt: bytes
    token_ids: list[int]
    lease: Lease | None = None


class StoreMachine(RuleBasedStateMachine):
    """Turns begin, write and end in any order; after every step all rows that count must be the right ones."""

    @initialize(
        token_bytes=st.sampled_from(sorted(TOKEN_SHAPES)),
        budget_tokens=st.one_of(st.integers(1, 30), st.integers(30, 200), st.just(2000)),
        max_ranges=st.integers(1, 5),
        prefix_sharing=st.sampled_from([True, True, True, False]),
        max_mappings=st.sampled_from([None, None, 12, 30]),
        tile_tokens=st.sampled_from([0, 5]),
    )
    def make(self, token_bytes, budget_tokens, max_ranges, prefix_sharing, max_mappings, tile_tokens):
        pages = -(-budget_tokens * token_bytes // PAGE_BYTES)
        self.memory = FlakyMemory(max_mappings=max_mappings)
        self.store = make_store(
            token_bytes=token_bytes, pages=pages + (tile_tokens > 0), max_ranges=max_ranges, max_tokens=MAX_TOKENS,
            memory=self.memory, prefix_sharing=prefix_sharing, tile_tokens=tile_tokens,
            clock=itertools.count().__next__, floor_bytes=8192,
        )  # fmt: skip
        self.ample = budget_tokens == 2000 and max_mappings is None
        self.sharing = prefix_sharing
        self.tile = tile_tokens
        self.reliable = True  # no refusal was injected: nothing may fail when there is ample memory
        self.sessions: dict[str, Plain] = {}
        self.histories: list[tuple[str, bytes, list[int]]] = []  # every history whose rows were released
        self.forgotten: set[str] = set()

    @rule(pick=picks, red=st.booleans(), token_ids=token_lists, reuse=st.sampled_from([True, True, False]))
    def turn(self, pick, red, token_ids, reuse):
        """A session turns up with tokens that may or may not begin as others do, and takes one turn."""
        self._whole_turn(SESSIONS[pick % len(SESSIONS)], b"red" if red else b"blue", token_ids, reuse)

    @rule(pick=picks, length=lengths, token=st.integers(0, 2), cut=st.sampled_from([0, 0, 1, 5]), whole=st.booleans())
    def next_turn(self, pick, length, token, cut, whole):
        """A session goes on, or is regenerated from some tokens before its end; perhaps it stays leased."""
        session_id = self._pick(pick, leased=False)
        if session_id:
            plain = self.sessions[session_id]
            kept = plain.token_ids[: len(plain.token_ids) - cut]
            take_turn = self._whole_turn if whole else self._lease
            take_turn(session_id, plain.salt, kept + [100 + token] * length)

    @rule(pick=picks, into=picks, kept=st.integers(1, MAX_TOKENS), length=lengths, red=st.booleans())
    def fork(self, pick, into, kept, length, red):
        """A session, perhaps the same one, begins as some session did, perhaps another tenant's."""
        source = self._pick(pick, leased=pick % 2 > 0)
        if source:
            plain = self.sessions[source]
            salt = b"red" if red else plain.salt
            self._whole_turn(SESSIONS[into % len(SESSIONS)], salt, plain.token_ids[:kept] + [200 + length] * length)

    @rule(pick=picks, token_ids=token_lists)
    def begin(self, pick, token_ids):
        """A session is leased and stays so while others take their turns."""
        self._lease(SESSIONS[pick % len(SESSIONS)], b"red", token_ids)

    @rule(pick=picks, num_tokens=lengths)
    def write(self, pick, num_tokens):
        """A leased session computes some of its missing rows."""
        session_id = self._pick(pick, leased=True)
        if session_id:
            self._write(self.sessions[session_id], num_tokens)

    @rule(pick=picks)
    def grow_ahead(self, pick):
        """Rows are mapped that may never be written; they must be zeros, whoever had their pages before."""
        session_id = self._pick(pick, leased=True)
        if session_id is None:
            return
        lease, token_ids = self.sessions[session_id].lease, self.sessions[session_id].token_ids
        before = (lease.kv_length, lease.capacity_tokens)
        try:
            lease.grow(len(token_ids))
        except OutOfPages:
            assert not self.ample or not self.reliable
            assert before == (lease.kv_length, lease.capacity_tokens)
        assert not rows_of(self.store, lease.base_token, lease.kv_length, lease.capacity_tokens).any()

    @rule(pick=picks, ahead=st.integers(0, 12), keep=st.booleans())
    def guard(self, pick, ahead, keep):
        """A kernel reads the whole tile in which a leased session's rows end; behind them it finds zeros."""
        session_id = self._pick(pick, leased=True)
        if session_id is None:
            return
        lease = self.sessions[session_id].lease
        num_tokens = min(lease.kv_length + ahead, MAX_TOKENS)
        try:
            lease.guard(num_tokens)
        except OutOfPages:
            assert not self.ample or not self.reliable
            return
        readable = -(-num_tokens // self.tile) * self.tile if self.tile else lease.kv_length
        assert not rows_of(self.store, lease.base_token, lease.kv_length, readable).any()
        if not keep:
            lease.unguard()

    @rule()
    def settle(self):
        """Before a step's kernels; what the system refuses for now it does not refuse for ever."""
        try:
            self.store.settle()
        except OutOfPages:
            assert not self.reliable

    @rule(pick=picks)
    def release(self, pick):
        """A turn ends, finished or not."""
        session_id = self._pick(pick, leased=True)
        if session_id:
            self._release(session_id)

    @rule(pick=picks)
    def drop(self, pick):
        """A session is deleted."""
        session_id = self._pick(pick, leased=False)
        if session_id:
            self.store.drop_session(session_id)
            assert session_id not in self.store.sessions()
            if not self.sharing:
                self.forgotten.add(session_id)  # if it was resident; else its pages wait for eviction

    @rule()
    def shrink(self):
        """An idle moment."""
        self.store.shrink()
        stats = self.store.stats()
        assert stats.pages.free == 0 or stats.pages.created - stats.pages.guard <= 2
        assert stats.physical_bytes == stats.pages.created * stats.page_bytes

    @precondition(lambda self: self.memory.countdown.remaining <= 0)
    @rule(nth=st.integers(1, 4))
    def refuse(self, nth):
        """The system is going to refuse a call."""
        self.memory.countdown.arm(nth)
        self.reliable = False

    @invariant()
    def holds_together(self):
        """Bookkeeping agrees, rows are right, tenants share nothing, and the budget is kept."""
        if not hasattr(self, "store"):
            return
        self.store.check_integrity()
        pages: dict[bytes, set[int]] = {}
        for session_id in self.store.sessions():
            plain = self.sessions[session_id]
            num_tokens = self.store.resident_tokens(session_id)
            base_token = base_token_of(self.store, session_id)
            assert_rows(self.store, base_token, plain.salt, plain.token_ids[:num_tokens])
            owner = plain.salt if self.sharing else session_id.encode()
            pages.setdefault(owner, set()).update(pages_of(self.store, session_id))
        assert sum(map(len, pages.values())) == len(set().union(*pages.values()))
        stats = self.store.stats()
        assert stats.physical_bytes <= stats.budget_bytes
        assert stats.num_mappings <= stats.max_mappings + 8  # unmapping is never refused

    def teardown(self):
        if hasattr(self, "store"):
            self.store.close()

    def _pick(self, pick, leased):
        """Some session that is leased, or is not; None when there is none."""
        known = [name for name, plain in self.sessions.items() if (plain.lease is not None) == leased]
        return known[pick % len(known)] if known else None

    def _whole_turn(self, session_id, salt, token_ids, reuse=True):
        if self._lease(session_id, salt, token_ids, reuse):
            self._write(self.sessions[session_id], MAX_TOKENS)
            self._release(session_id)

    def _lease(self, session_id, salt, token_ids, reuse=True):
        """Lease the session unless it is leased; whether it is now, with as many rows as there should be."""
        plain = self.sessions.get(session_id)
        if plain and plain.lease:
            return False
        token_ids = token_ids[: self.store.max_session_tokens]
        expected = self._expected(session_id, salt, token_ids)
        most = self._most(session_id, salt, token_ids)
        undisturbed = self.ample and self.reliable
        try:
            lease = self.store.lease(session_id, salt, token_ids, reuse=reuse)
        except OutOfPages:
            leased = [other for other in self.sessions.values() if other.lease]
            assert not undisturbed or len(leased) == self.store.stats().num_ranges
            return False  # it may have lost mapped rows; that it got no wrong ones is checked after every step
        self.sessions[session_id] = Plain(salt, list(token_ids), lease)
        assert lease.kv_length == lease.num_cached_tokens <= lease.capacity_tokens
        assert lease.kv_length <= (most if reuse else 0)
        assert lease.kv_length >= expected or not undisturbed or not reuse
        return True

    def _write(self, plain, num_tokens):
        before = (plain.lease.kv_length, plain.lease.capacity_tokens)
        try:
            write_rows(self.store, plain.lease, plain.salt, plain.token_ids[: plain.lease.kv_length + num_tokens])
        except OutOfPages:
            assert not self.ample or not self.reliable
            assert before == (plain.lease.kv_length, plain.lease.capacity_tokens)

    def _release(self, session_id):
        plain = self.sessions[session_id]
        self.histories.append((session_id, plain.salt, plain.token_ids[: plain.lease.kv_length]))
        plain.lease.release()
        plain.lease.release()
        plain.lease = None

    def _expected(self, session_id, salt, token_ids):
        """With no eviction: everything some released history shares with this one, to the token."""
        if session_id in self.forgotten:
            return 0
        known = [h for sid, s, h in self.histories if s == salt and (self.sharing or sid == session_id)]
        return min(len(token_ids) - 1, max((_shared(history, token_ids) for history in known), default=0))

    def _most(self, session_id, salt, token_ids):
        """No more than was ever written with this beginning."""
        running = [(sid, p.salt, p.token_ids[: p.lease.kv_length]) for sid, p in self.sessions.items() if p.lease]
        known = [h for sid, s, h in self.histories + running if s == salt and (self.sharing or sid == session_id)]
        return max((_shared(history, token_ids) for history in known), default=0) if known else 0


def _shared(left, right):
    return next((n for n, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))


TestStore = StoreMachine.TestCase
TestStore.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)  # fmt: skip


@pytest.mark.soak
def test_many_more_random_turns():
    """The same for longer."""
    run_state_machine_as_test(
        StoreMachine,
        settings=settings(
            max_examples=3000, stateful_step_count=80, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
