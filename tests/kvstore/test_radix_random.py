"""The prefix index against a plain dictionary of what each page holds, under random inserts, matches and evictions."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from kvstore import KVLayout, RadixIndex, Resident

SIZES = [(2, 8), (6, 16), (10, 16), (16, 16), (10, 4), (12, 4)]  # token_bytes, page_bytes
salts = st.sampled_from([b"red", b"blue"])
token_lists = st.lists(st.integers(0, 1), min_size=1, max_size=20).map(tuple)


class PlainIndex:
    """(salt, the tokens that decide its bytes): page, for complete pages by index and for tails."""

    def __init__(self, layout):
        self.layout = layout
        self.complete: dict[tuple, int] = {}
        self.tails: dict[tuple, int] = {}

    def key(self, salt, tokens, index):
        return salt, index, tokens[: self.layout.tokens_to_fill(index + 1)]

    def known(self, salt, tokens):
        """Complete pages of a prefix of these tokens."""
        keys = (self.key(salt, tokens, index) for index in range(self.layout.complete_pages(len(tokens))))
        return [self.complete[key] for key in itertools.takewhile(self.complete.__contains__, keys)]

    def holders(self, salt, tokens):
        """Pages in which the boundary rows of just these tokens stand."""
        index = self.layout.complete_pages(len(tokens))
        pages = [
            page for (s, i, toks), page in self.complete.items() if (s, i, toks[: len(tokens)]) == (salt, index, tokens)
        ]
        return pages + [
            page
            for (s, toks), page in self.tails.items()
            if s == salt and toks[: len(tokens)] == tokens and self.layout.complete_pages(len(toks)) == index
        ]

    def longest(self, salt, tokens):
        """How many leading tokens have all their rows here, trying every length."""
        for length in range(len(tokens), 0, -1):
            whole = len(self.known(salt, tokens[:length])) == self.layout.complete_pages(length)
            if whole and (not self.layout.boundary_bytes(length) or self.holders(salt, tokens[:length])):
                return length
        return 0

    def drop_covered_tails(self):
        """Tails whose rows stand in another page leave the index."""
        covered = {key: page for key, page in self.tails.items() if len(self.holders(*key)) > 1}
        for key in covered:
            del self.tails[key]
        return set(covered.values())

    def pages(self):
        return [*self.complete.values(), *self.tails.values()]


class RadixMachine(RuleBasedStateMachine):
    """Paths, tails and residents come and go; matches must be exact and evictions leave only whole prefixes."""

    @initialize(size=st.sampled_from(SIZES))
    def make(self, size):
        token_bytes, page_bytes = size
        self.layout = KVLayout(1, 1, token_bytes // 2, torch.int8, page_bytes)
        self.index = RadixIndex(self.layout, b"model", clock=itertools.count().__next__)
        self.plain = PlainIndex(self.layout)
        self.numbers = itertools.count()
        self.residents: dict[Resident, tuple] = {}

    @rule(salt=salts, tokens=token_lists)
    def insert(self, salt, tokens):
        """What is there already stays, the rest is taken in, and a tail that it covers is dropped."""
        count = self.layout.complete_pages(len(tokens))
        known = self.plain.known(salt, tokens)
        pages = known + [next(self.numbers) for _ in range(count - len(known))]
        insertion = self.index.insert(salt, tokens, [-1 - page for page in known] + pages[len(known) :])
        assert insertion.pages.tolist() == pages
        assert insertion.num_known == len(known)
        for index, page in enumerate(pages):
            self.plain.complete[self.plain.key(salt, tokens, index)] = page
        self._check_dropped(insertion.dropped)

    @rule(salt=salts, tokens=token_lists, owned=st.booleans())
    def insert_tail(self, salt, tokens, owned):
        """A tail is taken unless its rows are there."""
        known = self.plain.known(salt, tokens)
        if not self.layout.boundary_bytes(len(tokens)) or len(known) < self.layout.complete_pages(len(tokens)):
            return
        page = next(self.numbers)
        resident = self._resident(salt, tokens, len(known)) if owned else None
        insertion = self.index.insert_tail(salt, tokens, page, resident)
        assert insertion.taken == (not self.plain.holders(salt, tokens))
        if insertion.taken:
            self.plain.tails[salt, tokens] = page
        self._check_dropped(insertion.dropped)
        assert not resident or (resident.tail_node is not None) == insertion.taken

    def _check_dropped(self, dropped):
        assert ({dropped.page} if dropped else set()) == self.plain.drop_covered_tails()

    @rule(salt=salts, tokens=token_lists)
    def match(self, salt, tokens):
        """The longest prefix there is, with the right pages, and a boundary page that holds its rows."""
        match = self.index.match(salt, tokens)
        assert match.num_tokens == self.plain.longest(salt, tokens)
        found = tokens[: match.num_tokens]
        assert match.pages.tolist() == self.plain.known(salt, found)
        num_bytes = self.layout.boundary_bytes(match.num_tokens)
        assert (match.boundary.num_bytes if match.boundary else 0) == num_bytes
        assert not match.boundary or match.boundary.page in self.plain.holders(salt, found)

    @rule(salt=salts, tokens=token_lists)
    def lose_boundary(self, salt, tokens):
        """A match that does without its boundary page is the longest that does."""
        match = self.index.match(salt, tokens)
        while match.boundary is not None:
            shorter = match.without_boundary(self.layout)
            assert shorter.num_tokens == self.layout.complete_tokens(len(match.pages)) < match.num_tokens
            assert shorter.pages.tolist() == match.pages[: self.layout.complete_pages(shorter.num_tokens)].tolist()
            assert not shorter.boundary or shorter.boundary.page in match.pages
            match = shorter

    @rule(salt=salts, tokens=token_lists)
    def map_path(self, salt, tokens):
        """A session maps what is known of a path."""
        self._resident(salt, tokens, len(self.plain.known(salt, tokens)))

    def _resident(self, salt, tokens, num_pages):
        resident = Resident(f"s{next(self.numbers)}")
        match = self.index.match(salt, tokens[: self.layout.tokens_to_fill(num_pages)])
        node = match.node
        if len(match.pages) < num_pages:  # the walk ended there, but without the rows of its last token
            node = self.index.insert(salt, tokens[: self.layout.tokens_to_fill(num_pages)], [0] * num_pages).node
        self.index.attach(resident, node, num_pages)
        self.residents[resident] = (salt, tokens, num_pages)
        return resident

    @rule(data=st.data())
    def unmap(self, data):
        """A session goes away."""
        if self.residents:
            resident = data.draw(st.sampled_from(list(self.residents)))
            del self.residents[resident]
            self.index.detach(resident)

    @rule(count=st.integers(1, 8), salt=salts, tokens=token_lists)
    def evict(self, count, salt, tokens):
        """As many pages go as are wanted and not pinned; the ends of paths first; sessions on them are told."""
        pinned = set(self.plain.known(salt, tokens))
        evictable = len(self.plain.pages()) - len(pinned)
        eviction = self.index.evict(count, pinned.__contains__)
        gone = set(eviction.pages)
        owners = [r for r in self.residents if r.tail_node is None and r in eviction.residents]
        assert len(gone) == len(eviction.pages) >= min(count, evictable)
        assert not gone & pinned
        assert len(gone) <= count or self.layout.token_bytes > self.layout.page_bytes
        for held in (self.plain.complete, self.plain.tails):
            for key in [key for key, page in held.items() if page in gone]:
                del held[key]
        for resident, (s, toks, num_pages) in self.residents.items():
            left = min(num_pages, len(self.plain.known(s, toks)))
            assert resident.num_pages == left
            assert (left == num_pages and resident not in owners) or resident in eviction.residents
            self.residents[resident] = (s, toks, left)

    @rule(salt=salts)
    def drop(self, salt):
        """A salt is forgotten once nobody maps its pages."""
        mapped = any(s == salt and (n or r.tail_node) for r, (s, _, n) in self.residents.items())
        if not mapped:
            pages = {page for key, page in [*self.plain.complete.items(), *self.plain.tails.items()] if key[0] == salt}
            assert set(self.index.drop(salt)) == pages
            self.plain.complete = {key: page for key, page in self.plain.complete.items() if key[0] != salt}
            self.plain.tails = {key: page for key, page in self.plain.tails.items() if key[0] != salt}

    @invariant()
    def holds_what_the_model_holds(self):
        """The same pages, every path whole, every tail behind its complete pages."""
        if not hasattr(self, "index"):
            return
        self.index.check_integrity()
        assert sorted(self.index.pages()) == sorted(self.plain.pages())
        for salt, index, tokens in self.plain.complete:
            assert len(self.plain.known(salt, tokens)) > index
        for salt, tokens in self.plain.tails:
            assert len(self.plain.known(salt, tokens)) == self.layout.complete_pages(len(tokens))
        for resident, (salt, tokens, num_pages) in self.residents.items():
            assert self.index.path_pages(resident).tolist() == self.plain.known(salt, tokens)[:num_pages]


TestRadix = RadixMachine.TestCase
TestRadix.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)


@pytest.mark.soak
def test_many_more_random_paths():
    """The same for longer."""
    run_state_machine_as_test(
        RadixMachine,
        settings=settings(
            max_examples=5000, stateful_step_count=80, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
