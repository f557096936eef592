"""Which page goes first: an order over the leaves of the prefix index behind one small interface.

It sees a leaf's age, length and sessions; it does not know trees, memory or leases.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from itertools import count
from typing import Generic, Protocol, TypeVar


class Leaf(Protocol):
    """What a policy may look at: the end of a path through the index, whose last pages could go."""

    @property
    def last_used_s(self) -> float:
        """When a lease last matched or extended it, by the store's clock."""
        ...

    @property
    def num_tokens(self) -> int:
        """Tokens from the path's beginning to its end: what losing it makes longer to recompute."""
        ...

    @property
    def num_pages(self) -> int:
        """Pages of its own, the tail included."""
        ...

    @property
    def session_ids(self) -> Iterable[str]:
        """Sessions whose ranges map pages of it."""
        ...


class EvictionPolicy(Protocol):
    """Ranks leaves; the lowest rank is evicted first. A rank may rise with time or use; it must not fall."""

    def rank(self, leaf: Leaf) -> float:
        """The leaf's rank now; called for each candidate when memory is short, so it must be cheap."""
        ...


class LeastRecentlyUsed:
    """The leaf that was used longest ago goes first."""

    def rank(self, leaf: Leaf) -> float:
        """Its time of last use."""
        return leaf.last_used_s


class QueuedLeaf(Leaf, Protocol):
    """A leaf as the queue holds it."""

    queued: bool

    @property
    def is_leaf(self) -> bool:
        """False once something hangs below it or it left the index."""
        ...


Node = TypeVar("Node", bound=QueuedLeaf)


class EvictionQueue(Generic[Node]):
    """Leaves in a policy's order: a heap whose entries are checked, and sorted in again, when they come up."""

    def __init__(self, policy: EvictionPolicy) -> None:
        self._policy = policy
        self._heap: list[tuple[float, int, Node]] = []
        self._sequence = count()

    def offer(self, node: Node) -> None:
        """Put a leaf in the order; one that is queued, or no leaf, is left alone."""
        if node.is_leaf and not node.queued:
            node.queued = True
            heapq.heappush(self._heap, (self._policy.rank(node), next(self._sequence), node))

    def pop(self) -> Node | None:
        """Take out the leaf to evict first; offer it again if anything is left of it."""
        while self._heap:
            rank, _, node = heapq.heappop(self._heap)
            node.queued = False
            if not node.is_leaf:
                continue
            if self._policy.rank(node) <= rank:
                return node
            self.offer(node)  # it was used since it was queued
        return None

    def sweep(self) -> None:
        """Forget what is no leaf any more, so that it does not stay in memory until it comes up."""
        kept = [entry for entry in self._heap if entry[2].is_leaf]
        for _, _, node in self._heap:
            node.queued = node.is_leaf
        heapq.heapify(kept)
        self._heap = kept
