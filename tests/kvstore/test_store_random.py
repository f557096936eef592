"""Random turns of several sessions and tenants against a model that remembers every history in full."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

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

SESSIONS = [f"s{number}" for number in range(6)]
SALTS = [b"red", b"blue"]
MAX_TOKENS = 80
session_ids = st.sampled_from(SESSIONS)
some_tokens = st.lists(st.integers(0, 2), min_size=1, max_size=30)


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
        pages=st.one_of(st.integers(1, 3), st.integers(4, 40), st.just(400)),
        max_ranges=st.integers(1, 6),
        prefix_sharing=st.sampled_from([True, True, True, False]),
        max_mappings=st.sampled_from([None, None, 12, 30]),
        tile_tokens=st.sampled_from([0, 0, 5]),
    )
    def make(self, token_bytes, pages, max_ranges, prefix_sharing, max_mappings, tile_tokens):
        pages = max(pages, -(-token_bytes // PAGE_BYTES))
        self.memory = FlakyMemory(max_mappings=max_mappings)
        self.store = make_store(
            token_bytes=token_bytes, pages=pages + (tile_tokens > 0), max_ranges=max_ranges, max_tokens=MAX_TOKENS,
            memory=self.memory, prefix_sharing=prefix_sharing, tile_tokens=tile_tokens,
            clock=itertools.count().__next__, floor_bytes=8192,
        )  # fmt: skip
        self.ample = pages == 400 and max_mappings is None
        self.sharing = prefix_sharing
        self.reliable = True  # no refusal was injected: nothing may fail when there is ample memory
        self.sessions: dict[str, Plain] = {}
        self.histories: list[tuple[str, bytes, list[int]]] = []  # every history whose rows were released

    @rule(session_id=session_ids, salt=st.sampled_from(SALTS), token_ids=some_tokens, reuse=st.booleans())
    def begin_anew(self, session_id, salt, token_ids, reuse):
        """A session turns up with tokens that may or may not begin as others do."""
        self._lease(session_id, salt, token_ids, reuse or len(token_ids) % 3 > 0)

    @rule(session_id=session_ids, new_tokens=some_tokens)
    def go_on(self, session_id, new_tokens):
        """The next turn of a session."""
        if session_id in self.sessions:
            plain = self.sessions[session_id]
            self._lease(session_id, plain.salt, plain.token_ids + new_tokens)

    @rule(session_id=session_ids, kept=st.integers(1, MAX_TOKENS), new_tokens=some_tokens)
    def branch(self, session_id, kept, new_tokens):
        """A session goes back to an earlier point and continues otherwise: edit, regenerate."""
        if session_id in self.sessions:
            plain = self.sessions[session_id]
            self._lease(session_id, plain.salt, plain.token_ids[:kept] + new_tokens)

    @rule(session_id=session_ids, other=session_ids, salt=st.sampled_from(SALTS), kept=st.integers(1, MAX_TOKENS))
    def fork(self, session_id, other, salt, kept):
        """A session begins as another one did, in its own tenant or the wrong one."""
        if other in self.sessions:
            self._lease(session_id, salt, self.sessions[other].token_ids[:kept])

    @rule(session_id=session_ids, num_tokens=st.integers(1, 40))
    def write(self, session_id, num_tokens):
        """A leased session computes some of its missing rows."""
        plain = self.sessions.get(session_id)
        if plain and plain.lease:
            before = (plain.lease.kv_length, plain.lease.capacity_tokens)
            try:
                write_rows(self.store, plain.lease, plain.salt, plain.token_ids[: plain.lease.kv_length + num_tokens])
            except OutOfPages:
                assert not self.ample or not self.reliable
                assert before == (plain.lease.kv_length, plain.lease.capacity_tokens)

    @rule(session_id=session_ids)
    def grow_ahead(self, session_id):
        """Rows are mapped that may never be written; they must be zeros, whoever had their pages before."""
        plain = self.sessions.get(session_id)
        if plain and plain.lease:
            try:
                plain.lease.grow(len(plain.token_ids))
            except OutOfPages:
                assert not self.ample or not self.reliable
            lease = plain.lease
            assert not rows_of(self.store, lease.base_token, lease.kv_length, lease.capacity_tokens).any()

    @rule(session_id=session_ids)
    def release(self, session_id):
        """A turn ends, finished or not."""
        plain = self.sessions.get(session_id)
        if plain and plain.lease:
            written = plain.token_ids[: plain.lease.kv_length]
            self.histories.append((session_id, plain.salt, written))
            plain.lease.release()
            plain.lease.release()
            plain.lease = None

    @rule(session_id=session_ids)
    def drop(self, session_id):
        """A session is deleted."""
        plain = self.sessions.get(session_id)
        if plain is None or plain.lease is None:
            self.store.drop_session(session_id)
            assert session_id not in self.store.sessions()
            if not self.sharing:
                self.histories = [known for known in self.histories if known[0] != session_id]

    @rule()
    def shrink(self):
        """An idle moment."""
        self.store.shrink()
        stats = self.store.stats()
        assert stats.pages.free == 0 or stats.pages.created <= 2
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

    def _lease(self, session_id, salt, token_ids, reuse=True):
        plain = self.sessions.get(session_id)
        if plain and plain.lease:
            return
        token_ids = token_ids[: self.store.max_session_tokens]
        expected = self._expected(session_id, salt, token_ids)
        most = self._most(session_id, salt, token_ids)
        undisturbed = self.ample and self.reliable
        try:
            lease = self.store.lease(session_id, salt, token_ids, reuse=reuse)
        except OutOfPages:
            leased = [other for other in self.sessions.values() if other.lease]
            assert not undisturbed or len(leased) == self.store.stats().num_ranges
            if plain:  # it may have lost mapped rows, never got wrong ones
                plain.token_ids = plain.token_ids[: self.store.resident_tokens(session_id)] or plain.token_ids
                if session_id in self.store.sessions() and plain.salt != salt:
                    assert self.store.resident_tokens(session_id) == 0
            return
        self.sessions[session_id] = Plain(salt, list(token_ids), lease)
        assert lease.kv_length == lease.num_cached_tokens <= lease.capacity_tokens
        assert lease.kv_length <= (most if reuse else 0)
        assert lease.kv_length >= expected or not undisturbed or not reuse

    def _expected(self, session_id, salt, token_ids):
        """With no eviction: everything some released history shares with this one, to the token."""
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
