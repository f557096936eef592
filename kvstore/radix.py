"""The prefix index: a radix tree over token ids, per tenant salt and model fingerprint, whose edges own pages.

It knows token ids and page numbers. It does not know memory, reference counts or leases: whoever evicts says which
pages are pinned, and whoever inserts maps the canonical pages it is told of.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from kvstore.arrays import PageArray, TokenArray, as_page_array, as_token_array, common_prefix
from kvstore.errors import ensure
from kvstore.eviction import EvictionPolicy, EvictionQueue, LeastRecentlyUsed
from kvstore.layout import KVLayout
from kvstore.node import Node, Resident, Root, Tail, disown_tail
from kvstore.results import NO_MATCH, NO_PAGES, Boundary, Eviction, Insertion, Match, TailInsertion


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
        self._roots: dict[bytes, Root] = {}

    def match(self, salt: bytes, token_ids: Sequence[int] | TokenArray) -> Match:
        """The longest prefix of `token_ids` with all its rows here, exact to the token."""
        tokens = as_token_array(token_ids)
        path, depth = self._walk(salt, tokens)
        if depth == 0:
            return NO_MATCH
        path[-1].last_used_s = self._clock()
        pages = _pages_of(path)[: self._layout.complete_pages(depth)]
        num_bytes = self._layout.boundary_bytes(depth)
        page = self._find_page(path[-1], len(pages)) if num_bytes else None
        boundary = Boundary(page, num_bytes) if page is not None else None
        match = Match(depth, pages, boundary, path[-1].owner_of(len(pages), self._layout))
        return match if boundary or not num_bytes else match.without_boundary(self._layout)

    def depth(self, salt: bytes, token_ids: Sequence[int] | TokenArray) -> int:
        """How many leading tokens a match would have; changes nothing."""
        tokens = as_token_array(token_ids)
        path, depth = self._walk(salt, tokens)
        if (
            not self._layout.boundary_bytes(depth)
            or self._find_page(path[-1], self._layout.complete_pages(depth)) is not None
        ):
            return depth
        return self._layout.complete_tokens(self._layout.complete_pages(depth))

    def lookup(self, salt: bytes, token_ids: Sequence[int] | TokenArray) -> PageArray:
        """The complete pages known for a prefix of `token_ids`; changes nothing."""
        path, depth = self._walk(salt, as_token_array(token_ids))
        return _pages_of(path)[: self._layout.complete_pages(depth)]

    def insert(self, salt: bytes, token_ids: Sequence[int] | TokenArray, pages: Sequence[int] | PageArray) -> Insertion:
        """Take in the complete pages of a path. Where the index has one already, that one stays: it is canonical.

        Raises ValueError unless `token_ids` completes exactly `pages`.
        """
        tokens, new_pages = as_token_array(token_ids), as_page_array(pages)
        layout = self._layout
        if layout.complete_pages(len(tokens)) != len(new_pages):
            raise ValueError(f"{len(pages)} pages: {len(tokens)} tokens complete {layout.complete_pages(len(tokens))}")
        if len(new_pages) == 0:
            return Insertion(new_pages, 0, None, None)
        tokens = tokens[: layout.tokens_to_fill(len(new_pages))]
        path, depth = self._walk(salt, tokens)
        known = _pages_of(path)[: layout.complete_pages(depth)]
        node, dropped = self._continue(salt, path, depth, tokens, new_pages[len(known) :])
        return Insertion(np.concatenate((known, new_pages[len(known) :])), len(known), dropped, node)

    def insert_tail(
        self, salt: bytes, token_ids: Sequence[int] | TokenArray, page: int, owner: Resident | None = None
    ) -> TailInsertion:
        """Take in the page after the complete ones, valid up to the end of `token_ids`, unless longer content is here.

        Raises ValueError when there is no such page, or the complete pages before it are not in the index.
        """
        tokens = as_token_array(token_ids)
        index = self._layout.complete_pages(len(tokens))
        path, depth = self._walk(salt, tokens)
        if not self._layout.boundary_bytes(len(tokens)) or self._layout.complete_pages(depth) != index:
            raise ValueError(f"tail of {len(tokens)} tokens: insert the {index} complete pages before it first")
        if depth == len(tokens) and (found := self._find_page(path[-1], index)) is not None:
            return TailInsertion(found == page, None)
        node, dropped = self._continue(salt, path, depth, tokens, NO_PAGES)
        node.set_tail(page, owner)
        self._queue.offer(node)
        return TailInsertion(True, dropped)

    def attach(self, resident: Resident, node: Node | None, num_pages: int) -> None:
        """From now on the session maps the first `num_pages` pages of the path through `node`."""
        resident.num_pages = num_pages
        _register(resident, node.owner_of(num_pages, self._layout) if node else None)

    def detach(self, resident: Resident) -> None:
        """From now on the session maps nothing of the index, nor a tail of its own."""
        disown_tail(resident)
        self.attach(resident, None, 0)

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

    def forget(
        self, salt: bytes, token_ids: Sequence[int] | TokenArray, num_kept: int, is_pinned: Callable[[int], bool]
    ) -> Eviction:
        """Let go of a path's pages that end behind its first `num_kept` tokens, and what follows on its last edge.

        Pages stay for which `is_pinned` holds, that a session maps, or below which another path goes on, and with them
        everything before them.
        """
        eviction = Eviction()
        for node in self._walk(salt, as_token_array(token_ids))[0][:0:-1]:
            if node.parent is not None and (not node.is_leaf or node.session_ids):
                break
            if node.parent is not None:  # else it was bare, and went with what hung below it
                num_left = max(0, self._layout.complete_pages(num_kept) - self._first_page(node))
                num_pages = len(eviction.pages) + max(0, node.num_pages - num_left)
                self._evict_from(node, num_pages, is_pinned, eviction)
        self._queue.sweep()
        return eviction

    def drop(self, salt: bytes) -> list[int]:
        """Forget everything under a salt; returns its pages. Raises ValueError while a session maps some of them."""
        root = self._roots.get(self._key(salt))
        nodes = list(_subtree(root)) if root else []
        if any(node.session_ids for node in nodes):
            raise ValueError("drop of a salt whose pages sessions still map: detach them first")
        self._roots.pop(self._key(salt), None)
        for node in nodes:
            node.parent = None
        self._queue.sweep()
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
        for key, root in self._roots.items():
            ensure(root.key == key and root.parent is None and root.end == 0, "a root is not one")
            ensure(root.is_empty and not root.residents and bool(root.children), "a root owns something, or is bare")
            for node in _subtree(root):
                self._check_children(node)
                self._check_node(node)

    def _check_children(self, node: Node) -> None:
        for token, child in node.children.items():
            ensure(child.parent is node and child.start == node.end, "a child hangs in the wrong place")
            ensure(len(child.tokens) > 0 and child.tokens.view[0] == token, "an edge does not begin with its token")

    def _check_node(self, node: Node) -> None:
        first, last = self._first_page(node), self._layout.complete_pages(node.end)
        ensure(len(node.pages) == last - first, f"an edge owns {len(node.pages)} pages, not {first} to {last}")
        ensure(node.tail is None or node.is_leaf, "an inner node has a tail")
        for resident in node.residents:
            ensure(resident.node is node, "a resident is registered at another node")
            ensure(first < resident.num_pages <= last, "a resident is registered at pages it does not map")
        if node.is_leaf:
            self._check_leaf(node)

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

    def _walk(self, salt: bytes, tokens: TokenArray) -> tuple[list[Node], int]:
        """The nodes on the way, root first (none without a root), and how many tokens agree."""
        root = self._roots.get(self._key(salt))
        path: list[Node] = [root] if root else []
        depth = 0
        while path and depth == path[-1].end and depth < len(tokens):
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

    def _continue(
        self, salt: bytes, path: list[Node], depth: int, tokens: TokenArray, pages: PageArray
    ) -> tuple[Node, Tail | None]:
        """Make the tree hold all of `tokens`, of which a walk found `depth`; `pages` are the new tokens' own."""
        dropped, node = None, path[-1] if path else self._new_root(salt)
        if depth < len(tokens):
            node, dropped = self._grow(node, depth, tokens[depth:], pages)
        node.last_used_s = self._clock()
        return node, dropped

    def _new_root(self, salt: bytes) -> Node:
        root = Root(self._key(salt))
        self._roots[root.key] = root
        return root

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
        node.parent.children[int(upper.tokens.view[0])] = upper
        upper.children[int(node.tokens.view[num_tokens])] = node
        node.parent, node.start = upper, depth
        node.tokens.drop_front(num_tokens)
        node.pages.drop_front(num_pages)
        for resident in [r for r in node.residents if r.num_pages <= self._first_page(node)]:
            _register(resident, upper)
        return upper

    def _evict_from(self, leaf: Node, num_pages: int, is_pinned: Callable[[int], bool], eviction: Eviction) -> None:
        before, end = len(eviction.pages), leaf.end
        if leaf.tail is not None and not is_pinned(leaf.tail.page):
            self._evict_tail(leaf, eviction)
        while leaf.tail is None and len(leaf.pages) and len(eviction.pages) < num_pages:
            start = self._last_group(leaf)
            group = leaf.pages.view[start:].tolist()
            if any(is_pinned(page) for page in group):
                break
            leaf.pages.truncate(start)
            eviction.pages += reversed(group)
        if len(eviction.pages) > before:
            eviction.num_tokens += end - self._trim(leaf, eviction)

    def _evict_tail(self, leaf: Node, eviction: Eviction) -> None:
        tail = leaf.take_tail()
        assert tail is not None
        eviction.pages.append(tail.page)
        if tail.owner is not None:
            eviction.residents[tail.owner] = None

    def _last_group(self, leaf: Node) -> int:
        """Where in the edge the pages begin that only leave together: those its last token completes.

        More than one only where a token is larger than a page, since an edge ends between tokens.
        """
        first = self._first_page(leaf)
        last_token = self._layout.tokens_to_fill(first + len(leaf.pages)) - 1
        return self._layout.complete_pages(last_token) - first

    def _trim(self, leaf: Node, eviction: Eviction) -> int:
        """Shorten a leaf to the pages it has left, and remove it, and parents left bare, when there are none.

        Returns how many tokens of the path are left.
        """
        node = leaf
        while node.is_leaf and node.tail is None:
            self._cut_residents(node, eviction)
            if len(node.pages):
                node.tokens.truncate(self._minimal_end(node) - node.start)
                break
            node = self._remove(node)
        return node.end

    def _cut_residents(self, node: Node, eviction: Eviction) -> None:
        num_pages = self._first_page(node) + len(node.pages)
        for resident in [r for r in node.residents if r.num_pages > num_pages]:
            eviction.residents[resident] = None
            self.attach(resident, node, num_pages)

    def _remove(self, node: Node) -> Node:
        """Take an empty leaf out; returns its parent, which was used when the child was."""
        parent, node.parent = node.parent, None
        assert parent is not None
        del parent.children[int(node.tokens.view[0])]
        parent.last_used_s = max(parent.last_used_s, node.last_used_s)
        self._queue.offer(parent)
        if isinstance(parent, Root) and not parent.children:
            del self._roots[parent.key]
        return parent


def _register(resident: Resident, node: Node | None) -> None:
    if resident.node is not None:
        del resident.node.residents[resident]
    resident.node = node
    if node is not None:
        node.residents[resident] = None


def _pages_of(path: Sequence[Node]) -> PageArray:
    return np.concatenate([node.pages.view for node in path]) if path else NO_PAGES


def _own_pages(node: Node) -> list[int]:
    return [*node.pages.view.tolist(), *([node.tail.page] if node.tail else [])]


def _subtree(node: Node) -> Iterator[Node]:
    """The node and all below it, each before its children."""
    stack = [node]
    while stack:
        node = stack.pop()
        yield node
        stack.extend(node.children.values())
