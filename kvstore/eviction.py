"""Which page goes first: an order over the leaves of the prefix index behind one small interface.

It sees a leaf's age, length and sessions; it does not know trees, memory or leases.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from itertools import count
from typing import Generic, Protocol, TypeVar, runtime_checkable

MAX_RECHECKS = 64  # what a pop may ask again, so that a step never waits for a long queue to be sorted
MAX_DEAD = 1024  # entries of leaves that left, before they are looked for


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


@runtime_checkable
class DecayingPolicy(EvictionPolicy, Protocol):
    """A policy whose ranks fall as well, with time and with what becomes known: it says when to ask again."""

    def now_s(self) -> float:
        """The time by the clock that `recheck_at_s` speaks of."""
        ...

    def recheck_at_s(self, leaf: Leaf) -> float:
        """When the leaf's rank may have fallen so far that its place in the order is to be looked at."""
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
    """Leaves in a policy's order: a heap whose entries are checked, and sorted in again, when they come up.

    That finds ranks that rose. Those that fell, where the policy says that they do, are found by a second heap of times
    to ask again. Taking a leaf out asks for at most MAX_RECHECKS ranks of others, however many are due.
    """

    def __init__(self, policy: EvictionPolicy) -> None:
        self._policy = policy
        self._decaying = policy if isinstance(policy, DecayingPolicy) else None
        self._heap: list[tuple[float, int, _Place[Node]]] = []
        self._due: list[tuple[float, int, _Place[Node]]] = []
        self._num_queued = 0
        self._sequence = count()

    def offer(self, node: Node) -> None:
        """Put a leaf in the order; one that is queued, or no leaf, is left alone."""
        if node.is_leaf and not node.queued:
            node.queued = True
            self._num_queued += 1
            place = _Place(node, self._policy.rank(node))
            heapq.heappush(self._heap, (place.rank, next(self._sequence), place))
            self._watch(place)

    def pop(self) -> Node | None:
        """Take out the leaf to evict first; offer it again if anything is left of it."""
        self._recheck()
        while self._heap:
            rank, _, place = heapq.heappop(self._heap)
            node = place.node
            if node is None or place.rank != rank:
                continue  # gone, or sorted in further down
            self._take_out(place, node)
            if not node.is_leaf:
                continue
            if self._policy.rank(node) <= rank:
                return node
            self.offer(node)  # it was used since it was queued
        return None

    def sweep(self) -> None:
        """Forget what is no leaf any more, so that it does not stay in memory until it comes up."""
        for rank, _, place in self._heap:
            if place.node is not None and place.rank == rank and not place.node.is_leaf:
                self._take_out(place, place.node)
        self._compact()

    def _take_out(self, place: _Place[Node], node: Node) -> None:
        place.node, node.queued = None, False
        self._num_queued -= 1

    def _watch(self, place: _Place[Node]) -> None:
        if self._decaying is not None and place.node is not None:
            due_s = self._decaying.recheck_at_s(place.node)
            heapq.heappush(self._due, (due_s, next(self._sequence), place))
            if len(self._due) + len(self._heap) > MAX_DEAD + 4 * self._num_queued:
                self._compact()

    def _recheck(self) -> None:
        """Sort in again those whose time has come and whose rank has fallen, up to MAX_RECHECKS of them."""
        if self._decaying is None:
            return
        now_s = self._decaying.now_s()
        for _ in range(MAX_RECHECKS):
            if not self._due or self._due[0][0] > now_s:
                return
            self._lower(heapq.heappop(self._due)[2])

    def _lower(self, place: _Place[Node]) -> None:
        if place.node is None:
            return
        rank = self._policy.rank(place.node)
        if rank < place.rank:
            place.rank = rank
            heapq.heappush(self._heap, (rank, next(self._sequence), place))
        self._watch(place)

    def _compact(self) -> None:
        """Drop the entries of places that were left or moved."""
        self._heap = [entry for entry in self._heap if entry[2].node is not None and entry[0] == entry[2].rank]
        self._due = [entry for entry in self._due if entry[2].node is not None]
        heapq.heapify(self._heap)
        heapq.heapify(self._due)


class _Place(Generic[Node]):
    """Where a leaf stands: the rank of its valid entry in the heap. `node` is None once it was taken out."""

    __slots__ = ("node", "rank")

    def __init__(self, node: Node, rank: float) -> None:
        self.node: Node | None = node
        self.rank = rank
