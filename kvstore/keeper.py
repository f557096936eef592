"""What a lease does to pages: find a session's rows again, make room for new ones, index complete pages, let go.

Here pages change between private and indexed, and here it is decided what is mapped, copied or dropped. A leased
session holds one reference on each page of its tensor; the index holds one on each page that it owns.
"""

from __future__ import annotations

import contextlib

import numpy as np

from kvstore.arrays import PageArray, TokenArray, as_page_array, common_prefix
from kvstore.errors import MemoryRefused, OutOfPages
from kvstore.node import Tail
from kvstore.pool import PageState
from kvstore.promotion import Promotion
from kvstore.residency import Residency
from kvstore.results import NO_PAGES, Boundary, Insertion, Match
from kvstore.session import Session
from kvstore.tiers import Tiers


class Keeper:
    """The rules of leasing over a `Residency`; see `Lease` and `KVStore` for what callers may expect."""

    def __init__(self, residency: Residency, max_session_tokens: int, tile_tokens: int) -> None:
        self._residency = residency
        self._max_session_tokens = max_session_tokens
        self._tile_tokens = tile_tokens
        self._layout = residency.layout
        self._pool = residency.pool
        self._index = residency.index
        self.tiers: Tiers | None = None

    def adopt(self, promotion: Promotion) -> None:
        """Index the pages that have arrived, as if just computed; a tail unless longer content is there."""
        salt, has_tail = promotion.salt, promotion.has_tail and promotion.has_arrived
        path = np.concatenate((promotion.before, promotion.pages[: promotion.num_arrived - has_tail]))
        tokens = promotion.tokens if has_tail else promotion.tokens[: self._layout.tokens_to_fill(len(path))]
        insertion = self._index.insert(salt, tokens, path)
        self._pool.publish(insertion.pages[insertion.num_known :])
        self._drop(insertion.dropped)
        self._tell_tiers(salt, tokens, insertion)
        if has_tail:
            self._adopt_tail(salt, tokens, insertion.pages, promotion.pages[-1:])

    def _adopt_tail(self, salt: bytes, tokens: TokenArray, before: PageArray, page: PageArray) -> None:
        insertion = self._index.insert_tail(salt, tokens, int(page[0]))
        if insertion.taken:
            self._pool.publish(page)
            if self.tiers is not None:
                self.tiers.tail_indexed(salt, tokens, before, int(page[0]))
        self._drop(insertion.dropped)

    def restore(self, session: Session, tokens: TokenArray) -> None:
        """Give an unleased session the rows of the longest prefix of `tokens` there is, and pin them.

        What it has mapped stays as far as it is the same, the rest is borrowed, the boundary page copied unless it is
        the session's own tail and ends just there. Raises OutOfMappings; then the session maps as much or less.
        """
        match = self._index.match(session.salt, tokens)
        if _ends_in_own_tail(session, match):
            self._pool.ref(session.tensor.pages.view)
            return
        match, copied = self._pin(match)
        num_same = common_prefix(session.tensor.pages.view, match.pages)
        self._residency.cut(session, num_same)
        self._index.attach(session.resident, match.node, num_same)
        try:
            self._map(session, match.pages[num_same:], copied)
        except OutOfPages:
            self._residency.cut(session, num_same)
            self._pool.unref(match.pages)
            self._pool.unref(copied)
            raise
        self._index.attach(session.resident, match.node, len(match.pages))
        session.tensor.num_tokens = match.num_tokens

    def grow(self, session: Session, num_tokens: int) -> None:
        """Map pages of zeros so that `num_tokens` tokens fit; see `Lease.grow`."""
        if num_tokens > self._max_session_tokens:
            raise ValueError(f"grow to {num_tokens} tokens: a session holds at most {self._max_session_tokens}")
        tensor = session.tensor
        last = int(tensor.pages.view[-1]) if len(tensor.pages) else None
        pages = self._residency.allocate(self._layout.pages_for(num_tokens) - len(tensor.pages), after=last)
        try:
            self._residency.mapping(tensor.extend, pages)
        except OutOfPages:
            self._pool.unref(pages)
            raise

    def guard(self, session: Session, num_tokens: int) -> None:
        """Map guards up to the end of the tile in which `num_tokens` end; see `Lease.guard`."""
        if self._tile_tokens:
            num_tiles = -(-num_tokens // self._tile_tokens)
            num_pages = self._layout.pages_for(num_tiles * self._tile_tokens)
            self._residency.mapping(session.tensor.guard, num_pages)

    def publish(self, session: Session) -> int:
        """Index the pages that are complete now; returns the number of tokens that completes the next one."""
        num_pages = self._layout.complete_pages(session.tensor.num_tokens)
        if num_pages > session.resident.num_pages:
            # Without a mapping for a canonical page the session keeps its own, private, until the next page completes.
            with contextlib.suppress(OutOfPages):
                self._publish_pages(session, num_pages)
        return self._layout.tokens_to_fill(num_pages + 1)

    def release(self, session: Session) -> None:
        """Index what is complete and the tail, free the rest, and leave the session idle with what the index has."""
        session.tensor.unguard()
        self.publish(session)
        num_kept = session.resident.num_pages + self._publish_tail(session)
        pages = session.tensor.pages.view.copy()
        self._residency.cut(session, num_kept)
        self._pool.unref(pages)
        session.lease = None
        self._residency.park(session)

    def _pin(self, match: Match) -> tuple[Match, PageArray]:
        """Hold the match's pages, and one page with a copy of its boundary rows.

        Pinned before allocating, so that making room cannot evict what is being leased. Where no page is left for the
        copy, the boundary page is given up (and may then make room itself): the match gets shorter, it does not fail.
        """
        self._pool.ref(match.pages)
        while match.boundary is not None:
            try:
                return match, self._copy(match.boundary)
            except OutOfPages:
                shorter = match.without_boundary(self._layout)
                self._pool.unref(match.pages[len(shorter.pages) :])
                match = shorter
        return match, NO_PAGES

    def _copy(self, boundary: Boundary) -> PageArray:
        """One private page with the boundary's rows, and zeros behind them."""
        source = as_page_array([boundary.page])
        self._pool.ref(source)
        try:
            copy = self._residency.allocate(1)
            self._copy_rows(boundary, copy)
            return copy
        finally:
            self._pool.unref(source)

    def _copy_rows(self, boundary: Boundary, copy: PageArray) -> None:
        try:
            self._residency.memory.copy(boundary.page, int(copy[0]), boundary.num_bytes)
        except MemoryRefused as refusal:
            self._pool.unref(copy)
            raise OutOfPages(1, 0) from refusal

    def _map(self, session: Session, borrowed: PageArray, copied: PageArray) -> None:
        mapping, tensor = self._residency.mapping, session.tensor
        if len(borrowed):
            mapping(tensor.borrow, borrowed)
        if len(copied):
            mapping(tensor.extend, copied)

    def _publish_pages(self, session: Session, num_pages: int) -> None:
        assert session.lease is not None
        tokens = session.lease.tokens.view[: self._layout.tokens_to_fill(num_pages)]
        self._adopt(session, self._index.lookup(session.salt, tokens))
        insertion = self._index.insert(session.salt, tokens, session.tensor.pages.view[:num_pages])
        self._index.attach(session.resident, insertion.node, num_pages)
        self._tell_tiers(session.salt, tokens, insertion)
        taken, dropped = insertion.pages[insertion.num_known :], insertion.dropped
        if dropped is not None and dropped.page in taken:  # the session's own tail has become a complete page
            self._pool.publish(taken[taken != dropped.page])
            return
        self._pool.publish(taken)
        self._drop(dropped)

    def _tell_tiers(self, salt: bytes, tokens: TokenArray, insertion: Insertion) -> None:
        if self.tiers is not None:
            self.tiers.indexed(salt, tokens, insertion.pages, insertion.num_known)

    def _adopt(self, session: Session, known: PageArray) -> None:
        """Where someone else's page with the same rows is indexed already, map that one and free our own."""
        first = session.resident.num_pages
        theirs = known[first:]
        if len(theirs) == 0:
            return
        ours = session.tensor.pages.view[first : len(known)].copy()
        self._residency.mapping(session.tensor.replace, first, theirs)
        self._pool.ref(theirs)
        self._pool.unref(ours)

    def _publish_tail(self, session: Session) -> bool:
        """Index the page after the complete ones; False when there is none or the index has as much of its rows."""
        assert session.lease is not None
        tensor = session.tensor
        num_pages = self._layout.complete_pages(tensor.num_tokens)
        if not self._layout.boundary_bytes(tensor.num_tokens) or session.resident.num_pages < num_pages:
            return False
        page = int(tensor.pages.view[num_pages])
        insertion = self._index.insert_tail(session.salt, session.lease.tokens.view, page, session.resident)
        if insertion.taken and self._pool.state(page) is PageState.PRIVATE:
            self._pool.publish(as_page_array([page]))
        if insertion.taken and self.tiers is not None:
            self.tiers.tail_indexed(session.salt, session.lease.tokens.view, tensor.pages.view[:num_pages], page)
        if insertion.dropped is not None and insertion.dropped.page != page:
            self._drop(insertion.dropped)
        return insertion.taken

    def _drop(self, tail: Tail | None) -> None:
        """A tail left the index, covered by longer content. A leased owner keeps the page, an idle one does not."""
        if tail is None:
            return
        owner = self._residency.sessions.get(tail.owner.session_id) if tail.owner else None
        if owner is not None and owner.lease is None:
            self._residency.cut(owner, owner.resident.num_pages)
        if self.tiers is not None:
            self.tiers.forget(as_page_array([tail.page]))
        self._pool.withdraw(as_page_array([tail.page]))


def _ends_in_own_tail(session: Session, match: Match) -> bool:
    """Whether the match is just what the session has mapped, so that it can go on writing behind its tail's rows."""
    node = session.resident.tail_node
    if node is None or node.tail is None or match.boundary is None:
        return False
    return node.tail.page == match.boundary.page and node.end == match.num_tokens
