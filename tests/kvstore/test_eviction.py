"""The order of eviction: last use first, any other policy by its ranks, and stale entries sorted in again."""

from __future__ import annotations

import itertools

import torch

from kvstore import KVLayout, RadixIndex, Resident

LAYOUT = KVLayout(1, 1, 1, torch.int8, 4)  # 2 tokens a page


class ShortestFirst:
    """Evicts what is cheapest to recompute; remembers the leaves it saw."""

    def __init__(self):
        self.seen = []

    def rank(self, leaf):
        self.seen.append((leaf.num_tokens, leaf.num_pages, leaf.session_ids))
        return leaf.num_tokens


def make_index(**options):
    index = RadixIndex(LAYOUT, b"model", clock=itertools.count().__next__, **options)
    index.insert(b"", [1, 2, 3, 4], [10, 11])
    index.insert(b"", [5, 6], [20])
    index.insert(b"", [7, 8, 9, 10, 11, 12], [30, 31, 32])
    return index


def order(index):
    return list(itertools.takewhile(bool, (index.evict(1, lambda page: False).pages for _ in range(20))))


def test_least_recently_used_path_goes_first():
    """From its end, page by page, before the next path is touched."""
    assert order(make_index()) == [[11], [10], [20], [32], [31], [30]]


def test_match_is_a_use():
    """Also one that ends inside an edge."""
    index = make_index()
    index.match(b"", [1, 9])
    index.match(b"", [5, 6])
    assert order(index) == [[32], [31], [30], [11], [10], [20]]


def test_lookup_is_no_use():
    """Looking whether a page is known does not keep it."""
    index = make_index()
    index.lookup(b"", [1, 2, 3, 4])
    assert index.evict(1, lambda page: False).pages == [11]


def test_use_of_a_branch_does_not_keep_its_siblings():
    """The beginning lives as long as its last used continuation; the others go in their order."""
    index = make_index()
    index.insert(b"", [1, 2, 40, 41], [10, 12])
    index.match(b"", [1, 2, 3, 4])
    assert order(index) == [[20], [32], [31], [30], [12], [11], [10]]


def test_policy_decides():
    """It is asked about leaves with their length, their pages and who maps them."""
    policy = ShortestFirst()
    index = make_index(policy=policy)
    resident = Resident("s")
    index.attach(resident, index.insert(b"", [5, 6], [20]).node, 1)
    assert order(index) == [[20], [11], [10], [32], [31], [30]]
    assert (2, 1, {"s"}) in policy.seen
    assert (6, 3, set()) in policy.seen


def test_beginning_was_used_when_its_continuation_was():
    """A policy that looks at ages is not told that a prompt is old because its sessions went further."""
    ages = {}

    class Watching:
        def rank(self, leaf):
            ages[leaf.num_tokens] = leaf.last_used_s
            return 0.0

    index = RadixIndex(LAYOUT, b"model", clock=itertools.count().__next__, policy=Watching())
    for branch in (3, 5):
        index.insert(b"", [1, 2, branch, branch], [10, 10 + branch])
    index.match(b"", [1, 2, 3, 3])
    order(index)
    assert ages[2] == 2


def test_several_pages_come_from_as_few_paths_as_can_be():
    """One call takes a path to its beginning before it starts on the next."""
    assert make_index().evict(4, lambda page: False).pages == [11, 10, 20, 32]


def test_eviction_asks_for_few_ranks_however_many_paths_there_are():
    """2,000 sessions and 100,000 pages: the order is kept, not searched, each time a page is wanted."""
    policy = ShortestFirst()
    index = RadixIndex(LAYOUT, b"model", clock=itertools.count().__next__, policy=policy)
    for number in range(2000):
        tokens = [number, *range(2000, 2099)]
        index.insert(b"", tokens, range(number * 50, number * 50 + 50))
    policy.seen.clear()
    for _ in range(1000):
        assert len(index.evict(3, lambda page: False).pages) == 3
    assert len(policy.seen) < 5000
