"""What the prefix index answers: matches, insertions and evictions, as plain values."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from kvstore.arrays import PageArray
from kvstore.layout import KVLayout
from kvstore.node import Node, Resident, Tail

# Where rows are that the index lacks: in a tier below, let go by a full disk, or neither.
Missing = Literal["below", "expired", "gone"]
NO_PAGES: PageArray = np.zeros(0, np.int64)


@dataclass(frozen=True, slots=True)
class Boundary:
    """The page in which a match ends: its first `num_bytes` bytes are rows of the matched tokens, to be copied."""

    page: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Match:
    """The longest prefix whose rows are all there: complete pages to map, and the boundary page to copy from.

    `node` owns the last complete page, for `RadixIndex.attach`.
    """

    num_tokens: int
    pages: PageArray
    boundary: Boundary | None
    node: Node | None = None

    def without_boundary(self, layout: KVLayout) -> Match:
        """The longest shorter match that does not need this one's boundary page."""
        num_tokens = layout.complete_tokens(len(self.pages))
        num_bytes = layout.boundary_bytes(num_tokens)
        complete = layout.complete_pages(num_tokens)
        boundary = Boundary(int(self.pages[complete]), num_bytes) if num_bytes else None
        node = self.node.owner_of(complete, layout) if self.node else None
        return Match(num_tokens, self.pages[:complete], boundary, node)


NO_MATCH = Match(0, NO_PAGES, None)


@dataclass(frozen=True, slots=True)
class Insertion:
    """The path's pages as they are now, how many of them were there before, and a tail they made redundant."""

    pages: PageArray
    num_known: int
    dropped: Tail | None
    node: Node | None


@dataclass(frozen=True, slots=True)
class TailInsertion:
    """Whether the index has the page now, and a tail it made redundant."""

    taken: bool
    dropped: Tail | None


@dataclass(slots=True)
class Eviction:
    """Pages that left the index, the sessions that must unmap beyond their `num_pages`, and the tokens lost."""

    pages: list[int] = field(default_factory=list)
    residents: dict[Resident, None] = field(default_factory=dict)
    num_tokens: int = 0
