"""The prefix index: a radix tree over token ids, per tenant salt and model fingerprint, whose edges own pages.

It knows token ids and page numbers. It does not know memory, reference counts or leases: whoever evicts says which
pages are pinned, and whoever inserts maps the canonical pages it is told of.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from kvstore.arrays import PageArray, TokenArray, as_page_array, as_token_array, common_prefix
from kvstore.errors import ensure
from kvstore.eviction import EvictionPolicy, EvictionQueue, LeastRecentlyUsed
from kvstore.layout import KVLayout
from kvstore.node import Node, Resident, Tail, disown_tail

NO_PAGES: PageArray = np.zeros(0, np.int64)


@dataclass(frozen=True, slots=True)
class Boundary:
    """The page in which a match ends: its first `num_bytes` bytes are rows of the matched tokens, to be copied."""

    page: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Match:
    """The longest prefix whose rows are all there: complete pages to map, and the boundary page to copy from.

    `node` is where the walk ended, for `RadixIndex.attach`.
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
        return Match(num_tokens, self.pages[:complete], boundary, self.node)


@dataclass(frozen=True, slots=True)
class Insertion:
    """What an insert did: the path's pages as they are now, how many were there before, and a tail it made redundant."""

    pages: PageArray
    num_known: int
    dropped: Tail | None
    node: Node


@dataclass(frozen=True, slots=True)
class TailInsertion:
    """Whether the index took the page, and a tail it made redundant (the same page when it was that tail before)."""

    taken: bool
    dropped: Tail | None


@dataclass(slots=True)
class Eviction:
    """Pages that left the index, the sessions that must unmap beyond their `num_pages`, and the tokens lost."""

    pages: list[int] = field(default_factory=list)
    residents: dict[Resident, None] = field(default_factory=dict)
    num_tokens: int = 0


class RadixIndex:
    """Trees of pages by (fingerprint, salt). A page stands in it once, as part of an edge or as a tail.

    Every leaf ends where its last page is just complete, or where its tail's rows end; so what is there, is usable.
    """

    def __init__(
        self,
        layout: KVLayout,
        fingerprint: bytes,
        *,
        policy: EvictionPolicy | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._layout = layout
        self._fingerprint = fingerprint
        self._clock = clock
        self._queue: EvictionQueue[Node] = EvictionQueue(policy or LeastRecentlyUsed())
        self._roots: dict[bytes, Node] = {}

    def match(self, salt: bytes, token_ids: Sequence[int] | TokenArray) -> Match:
        """The longest prefix of `token_ids` with all its rows here, exact to the token."""
        tokens = as_token_array(token_ids)
        path, depth = self._walk(salt, tokens)
        if depth == 0:
            return Match(0, NO_PAGES, None, path[0] if path else None)
        path[-1].last_used_s = self._clock()
        pages = _pages_of(path)[: self._layout.complete_pages(depth)]
        num_bytes = self._layout.boundary_bytes(depth)
        if num_bytes == 0:
            return Match(depth, pages, None, path[-1])
        page = self._find_page(path[-1], len(pages))
        if page is None:
            return Match(depth, pages, None, path[-1]).without_boundary(self._layout)
        return Match(depth, pages, Boundary(page, num_bytes), path[-1])

    def lookup(self, salt: bytes, token_ids: Sequence[int] | TokenArray) -> PageArray:
        """The complete pages known for a prefix of `token_ids`; changes nothing."""
        path, depth = self._walk(salt, as_token_array(token_ids))
        return _pages_of(path)[: self._layout.complete_pages(depth)]

    def insert(
        self, salt: bytes, token_ids: Sequence[int] | TokenArray, pages: Sequence[int] | PageArray
    ) -> Insertion:
        """Take in the complete pages of a path. Where the index has one already, that one stays: it is canonical.

        Raises ValueError unless `token_ids` completes exactly `pages`.
        """
        tokens, new_pages = as_token_array(token_ids), as_page_array(pages)
        layout = self._layout
        if layout.complete_pages(len(tokens)) != len(new_pages):
            raise ValueError(f"{len(tokens)} tokens complete {layout.complete_pages(len(tokens))} pages, not {len(pages)}")
        tokens = tokens[: layout.tokens_to_fill(len(new_pages))]
        path, depth = self._walk(salt, tokens, create=True)
        node, dropped, known = path[-1], None, _pages_of(path)[: layout.complete_pages(depth)]
        if depth < len(tokens):
            node, dropped = self._grow(node, depth, tokens[depth:], new_pages[len(known) :])
        node.last_used_s = self._clock()
        return Insertion(np.concatenate((known, new_pages[len(known) :])), len(known), dropped, node)

    def insert_tail(
        self, salt: bytes, token_ids: Sequence[int] | TokenArray, page: int, owner: Resident | None = None
    ) -> TailInsertion:
        """Take in the page after the complete ones, valid up to the end of `token_ids`, unless longer content is here.

        Raises ValueError when there is no such page, or the complete pages before it are not in the index.
        """
        tokens = as_token_array(token_ids)
        index = self._layout.complete_pages(len(tokens))
        path, depth = self._walk(salt, tokens, create=True)
        if not self._layout.boundary_bytes(len(tokens)) or self._layout.complete_pages(depth) != index:
            raise ValueError(f"tail of {len(tokens)} tokens: insert the {index} complete pages before it first")
        node, dropped = path[-1], None
        node.last_used_s = self._clock()
        if depth < len(tokens):
            node, dropped = self._grow(node, depth, tokens[depth:], NO_PAGES)
            node.last_used_s = self._clock()
        elif (found := self._find_page(node, index)) is not None and found != page:
            return TailInsertion(taken=False, dropped=None)
        elif found is not None:
            dropped = node.take_tail()
        node.set_tail(page, owner)
        self._queue.offer(node)
        return TailInsertion(taken=True, dropped=dropped)

    def attach(self, resident: Resident, node: Node | None, num_pages: int) -> None:
        """The session now maps the first `num_pages` pages of the path through `node`, and, for now, no tail."""
        self.detach(resident)
        while node is not None and node.parent is not None and self._first_page(node) >= num_pages:
            node = node.parent
        resident.node, resident.num_pages = node, num_pages
        if node is not None:
            node.residents[resident] = None

    def move(self, resident: Resident, node: Node, num_pages: int) -> None:
        """As `attach`, but the session's tail, if any, stays its own."""
        tail_node, resident.tail_node = resident.tail_node, None
        self.attach(resident, node, num_pages)
        resident.tail_node = tail_node

    def detach(self, resident: Resident) -> None:
        """The session maps nothing of the index any more."""
        disown_tail(resident)
        node, resident.node, resident.num_pages = resident.node, None, 0
        if node is not None:
            del node.residents[resident]
            self._forget_empty_root(node)

    def evict(self, num_pages: int, is_pinned: Callable[[int], bool]) -> Eviction:
        """Let go of up to `num_pages` pages: leaves in the policy's order, tail first, then from the end.

        Pages for which `is_pinned` holds stay, and with them everything before them on their paths.
        """
        eviction, blocked = Eviction(), []
        while len(eviction.pages) < num_pages and (leaf := self._queue.pop()) is not None:
            before = len(eviction.pages)
            self._evict_from(leaf, num_pages, is_pinned, eviction)
            if len(eviction.pages) > before:
                self._queue.offer(leaf)
            else:
                blocked.append(leaf)
        for leaf in blocked:
            self._queue.offer(leaf)
        return eviction

    def drop(self, salt: bytes) -> list[int]:
        """Forget everything under a salt; returns its pages. Raises ValueError while a session maps some of them."""
        nodes = list(_subtree(self._roots.get(self._key(salt))))
        if any(node.residents for node in nodes):
            raise ValueError("drop of a salt whose pages sessions still map: detach them first")
        self._roots.pop(self._key(salt), None)
        for node in nodes:
            node.parent = None  # the eviction queue passes it over
            node.children = {}
        return [page for node in nodes for page in _own_pages(node)]

    def pages(self) -> Iterator[int]:
        """Every page in the index, once each."""
        for root in self._roots.values():
            for node in _subtree(root):
                yield from _own_pages(node)

    def path_pages(self, resident: Resident) -> PageArray:
        """The complete pages that a session maps, from the path's beginning."""
        path: list[Node] = []
        node = resident.node
        while node is not None:
            path.append(node)
            node = node.parent
        return _pages_of(path[::-1])[: resident.num_pages]

    def check_integrity(self) -> None:
        """Raise IntegrityError where a tree breaks the rules of its edges, pages, tails or residents."""
        pages = list(self.pages())
        ensure(len(pages) == len(set(pages)), "a page stands in the index twice")
        for root in self._roots.values():
            ensure(root.parent is None and root.is_empty and root.end == 0, "a root owns something")
            ensure(bool(root.children or root.residents), "an empty root was kept")
            for node in _subtree(root):
                self._check_node(node)

    def _check_node(self, node: Node) -> None:
        layout = self._layout
        for token, child in node.children.items():
            ensure(child.parent is node and child.start == node.end, "a child hangs in the wrong place")
            ensure(len(child.tokens) > 0 and child.tokens.view[0] == token, "an edge does not begin with its token")
        owned = layout.complete_pages(node.end) - layout.complete_pages(node.start)
        ensure(len(node.pages) == owned, f"an edge to token {node.end} owns {len(node.pages)} pages, not {owned}")
        if node.is_leaf:
            self._check_leaf(node)
        ensure(node.tail is None or node.is_leaf, "an inner node has a tail")
        for resident in node.residents:
            ensure(resident.node is node, "a resident is registered at another node")
            first, last = layout.complete_pages(node.start), layout.complete_pages(node.end)
            inside = first < resident.num_pages <= last if node.parent else resident.num_pages == 0
            ensure(inside, f"a resident of {resident.num_pages} pages is registered at pages {first} to {last}")

    def _check_leaf(self, node: Node) -> None:
        ensure(not node.is_empty, "a leaf holds no page")
        ensure(node.queued, "a leaf is not queued for eviction")
        if node.tail is None:
            ensure(node.end == self._minimal_end(node), "a leaf has tokens without rows")
            return
        ensure(self._layout.boundary_bytes(node.end) > 0, "a tail has no rows")
        owner = node.tail.owner
        ensure(owner is None or owner.tail_node is node, "a tail's owner does not know it")

    def _key(self, salt: bytes) -> bytes:
        return hashlib.sha256(len(self._fingerprint).to_bytes(8, "big") + self._fingerprint + salt).digest()

    def _walk(self, salt: bytes, tokens: TokenArray, *, create: bool = False) -> tuple[list[Node], int]:
        """The nodes on the way, root first (none without a root), and how many tokens agree."""
        node = self._roots.get(self._key(salt))
        if node is None:
            if not create:
                return [], 0
            node = self._roots[self._key(salt)] = Node(None, 0, [], [])
        path, depth = [node], 0
        while depth == path[-1].end and depth < len(tokens):
            child = path[-1].children.get(int(tokens[depth]))
            if child is None:
                break
            depth += common_prefix(child.tokens.view, tokens[depth:])
            path.append(child)
        return path, depth

    def _find_page(self, node: Node | None, index: int) -> int | None:
        """Page `index` of some path through the end of a walk at `node`.

        All that hangs below shares the walked tokens, so the first page found on any way down has their rows.
        """
        while node is not None:
            offset = index - self._first_page(node)
            if offset < len(node.pages):
                return int(node.pages.view[offset])
            if node.tail is not None:
                return node.tail.page
            node = next(iter(node.children.values()), None)
        return None

    def _first_page(self, node: Node) -> int:
        return self._layout.complete_pages(node.start)

    def _minimal_end(self, node: Node) -> int:
        """Where an edge with these pages ends when it has no token too many; at its start when it has no page."""
        if len(node.pages) == 0:
            return node.start
        return self._layout.tokens_to_fill(self._first_page(node) + len(node.pages))

    def _grow(self, node: Node, depth: int, tokens: TokenArray, pages: PageArray) -> tuple[Node, Tail | None]:
        """Continue a path beyond `depth` in `node`: a leaf's edge is extended, else a child is hung there."""
        if depth < node.end:
            node = self._split(node, depth)
        elif node.is_leaf:
            dropped = node.take_tail()  # the longer content covers its rows
            node.tokens.extend(tokens)
            node.pages.extend(pages)
            return node, dropped
        child = Node(node, depth, tokens, pages)
        node.children[int(tokens[0])] = child
        self._queue.offer(child)
        return child, None

    def _split(self, node: Node, depth: int) -> Node:
        """Cut an edge in two; the new node above takes the tokens before `depth` and the pages they complete."""
        num_tokens = depth - node.start
        num_pages = self._layout.complete_pages(depth) - self._first_page(node)
        assert node.parent is not None
        upper = Node(node.parent, node.start, node.tokens.view[:num_tokens], node.pages.view[:num_pages])
        upper.last_used_s = node.last_used_s
        upper.parent = node.parent
        node.parent.children[int(upper.tokens.view[0])] = upper
        upper.children[int(node.tokens.view[num_tokens])] = node
        node.parent, node.start = upper, depth
        node.tokens.drop_front(num_tokens)
        node.pages.drop_front(num_pages)
        for resident in [r for r in node.residents if r.num_pages <= self._first_page(node)]:
            self._register(resident, upper)
        return upper

    def _register(self, resident: Resident, node: Node) -> None:
        assert resident.node is not None
        del resident.node.residents[resident]
        resident.node = node
        node.residents[resident] = None

    def _evict_from(self, leaf: Node, num_pages: int, is_pinned: Callable[[int], bool], eviction: Eviction) -> None:
        before, end = len(eviction.pages), leaf.end
        if leaf.tail is not None and not is_pinned(leaf.tail.page):
            tail = leaf.take_tail()
            assert tail is not None
            eviction.pages.append(tail.page)
            if tail.owner is not None:
                eviction.residents[tail.owner] = None
        while leaf.tail is None and len(leaf.pages) and len(eviction.pages) < num_pages:
            page = int(leaf.pages.view[-1])
            if is_pinned(page):
                break
            leaf.pages.truncate(len(leaf.pages) - 1)
            eviction.pages.append(page)
        if len(eviction.pages) > before:
            self._trim(leaf, eviction)
            eviction.num_tokens += end - max(leaf.end, leaf.start)

    def _trim(self, leaf: Node, eviction: Eviction) -> None:
        """Shorten a leaf's edge to the pages it has left; remove it, and parents left bare, when there are none."""
        node: Node | None = leaf
        while node is not None and node.is_leaf and node.tail is None:
            node.tokens.truncate(self._minimal_end(node) - node.start)
            self._cut_residents(node, eviction)
            node = self._remove(node) if node.is_empty else None

    def _cut_residents(self, node: Node, eviction: Eviction) -> None:
        num_pages = self._first_page(node) + len(node.pages)
        for resident in [r for r in node.residents if r.num_pages > num_pages]:
            eviction.residents[resident] = None
            resident.num_pages = num_pages
            above = node
            while above.parent is not None and self._first_page(above) >= num_pages:
                above = above.parent
            self._register(resident, above)

    def _remove(self, node: Node) -> Node | None:
        """Take an empty leaf out; returns its parent. The parent was used when the child was."""
        parent, node.parent = node.parent, None
        assert parent is not None
        token = next(token for token, child in parent.children.items() if child is node)
        del parent.children[token]
        parent.last_used_s = max(parent.last_used_s, node.last_used_s)
        self._queue.offer(parent)
        self._forget_empty_root(parent)
        return parent

    def _forget_empty_root(self, node: Node) -> None:
        if node.parent is None and not node.children and not node.residents:
            key = next((key for key, root in self._roots.items() if root is node), None)
            if key is not None:
                del self._roots[key]


def _pages_of(path: Sequence[Node]) -> PageArray:
    return np.concatenate([node.pages.view for node in path]) if path else NO_PAGES


def _own_pages(node: Node) -> list[int]:
    return node.pages.view.tolist() + ([node.tail.page] if node.tail else [])


def _subtree(node: Node | None) -> Iterator[Node]:
    """The node and all below it, each before its children."""
    stack = [node] if node is not None else []
    while stack:
        node = stack.pop()
        yield node
        stack.extend(node.children.values())
