"""What a lease does to pages: find a session's rows again, make room for new ones, index complete pages, let go.

Here pages change between private and indexed, and here it is decided what is mapped, copied or dropped. A leased
session holds one reference on each page of its tensor; the index holds one on each page that it owns.
"""

from __future__ import annotations

from kvstore.arrays import PageArray, TokenArray, as_page_array, common_prefix
from kvstore.errors import KVError, OutOfPages, ensure
from kvstore.node import Tail
from kvstore.pool import PageState
from kvstore.residency import Residency
from kvstore.results import NO_PAGES, Match
from kvstore.session import Session


class Keeper:
    """The rules of leasing over a `Residency`; see `Lease` and `KVStore` for what callers may expect."""

    def __init__(self, residency: Residency) -> None:
        self._residency = residency
        self._layout = residency.layout
        self._memory = residency.memory
        self._pool = residency.pool
        self._index = residency.index

    def restore(self, session: Session, tokens: TokenArray) -> None:
        """Give an unleased session the rows of the longest prefix of `tokens` there are, and pin them.

        What it has mapped stays as far as it is the same, the rest is borrowed, the boundary page copied, unless it is
        the session's own tail and ends just there. Raises OutOfMappings; then the session has fewer pages, or as many.
        """
        match = self._index.match(session.salt, tokens)
        if self._ends_in_own_tail(session, match):
            self._pool.ref(session.tensor.pages.view)
            session.tensor.num_tokens = match.num_tokens
            return
        match, copied = self._pin(match)
        ...
