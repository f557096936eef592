"""The parts of the prefix index: a node with its edge of tokens and pages, a tail, and who has pages of it mapped.

An edge covers the half-open token range [start, end) and owns the pages whose last token lies in it,
[complete_pages(start), complete_pages(end)); a page that straddles a split therefore belongs to the child.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kvstore.arrays import GrowingArray, PageArray, TokenArray
from kvstore.layout import KVLayout


@dataclass(eq=False, slots=True)
class Resident:
    """A session whose range maps the first `num_pages` pages of a path, and perhaps the tail that it wrote.

    `node` owns the last of these pages (None when there is none); `tail_node` is where its tail hangs.
    """

    session_id: str
    num_pages: int = 0
    node: Node | None = None
    tail_node: Node | None = None


@dataclass(slots=True)
class Tail:
    """A page whose rows are valid up to its node's end; `owner` has it mapped and may write behind them."""

    page: int
    owner: Resident | None


class Node:
    """One edge of the tree, and what hangs below it."""

    __slots__ = ("children", "last_used_s", "pages", "parent", "queued", "residents", "start", "tail", "tokens")

    def __init__(
        self, parent: Node | None, start: int, tokens: Sequence[int] | TokenArray, pages: Sequence[int] | PageArray
    ) -> None:
        self.parent = parent
        self.start = start
        self.tokens: GrowingArray[np.int32] = GrowingArray(tokens, np.int32)
        self.pages: GrowingArray[np.int64] = GrowingArray(pages, np.int64)
        self.children: dict[int, Node] = {}
        self.tail: Tail | None = None
        self.residents: dict[Resident, None] = {}  # an ordered set
        self.last_used_s = 0.0
        self.queued = False

    @property
    def end(self) -> int:
        """Tokens from the root to the end of this edge."""
        return self.start + len(self.tokens)

    @property
    def is_leaf(self) -> bool:
        """In the tree, no root, and nothing below."""
        return self.parent is not None and not self.children

    @property
    def is_empty(self) -> bool:
        """Holds no page; allowed only above nodes that do."""
        return len(self.pages) == 0 and self.tail is None

    @property
    def num_tokens(self) -> int:
        """As `end`: a policy's word for it."""
        return self.end

    @property
    def num_pages(self) -> int:
        """Pages of this edge, the tail included."""
        return len(self.pages) + (self.tail is not None)

    @property
    def session_ids(self) -> set[str]:
        """Sessions that map pages of this edge, its tail included."""
        owners = [self.tail.owner] if self.tail and self.tail.owner else []
        return {resident.session_id for resident in [*self.residents, *owners]}

    def owner_of(self, num_pages: int, layout: KVLayout) -> Node | None:
        """Which of this node and its ancestors owns the last of the path's first `num_pages` pages; None for none."""
        node: Node | None = self
        while node is not None and layout.complete_pages(node.start) >= num_pages:
            node = node.parent
        return node

    def set_tail(self, page: int, owner: Resident | None) -> None:
        """Hang `page` at this edge's end, in the place of any tail."""
        self.take_tail()
        self.tail = Tail(page, owner)
        if owner is not None:
            disown_tail(owner)
            owner.tail_node = self

    def take_tail(self) -> Tail | None:
        """Remove and return the tail."""
        tail, self.tail = self.tail, None
        if tail is not None and tail.owner is not None:
            tail.owner.tail_node = None
        return tail


class Root(Node):
    """Where the paths of one salt begin; `key` is its place in the index. No edge, no pages, no parent."""

    __slots__ = ("key",)

    def __init__(self, key: bytes) -> None:
        super().__init__(None, 0, [], [])
        self.key = key


def disown_tail(resident: Resident) -> None:
    """The session no longer has its tail mapped; the tail itself stays."""
    node = resident.tail_node
    if node is not None and node.tail is not None:
        node.tail.owner = None
    resident.tail_node = None
