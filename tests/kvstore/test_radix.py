"""The prefix index case by case, with pages of whole tokens and with tokens that straddle pages."""

from __future__ import annotations

import itertools

import pytest
import torch

from kvstore import IntegrityError, KVLayout, RadixIndex, Resident

WHOLE = KVLayout(1, 1, 1, torch.int8, 4)  # 2 tokens a page
STRADDLING = KVLayout(1, 1, 3, torch.int8, 16)  # 6 bytes a token: tokens 2 and 5 straddle pages 0|1 and 1|2


def make_index(layout=WHOLE, **options):
    return RadixIndex(layout, b"model", clock=itertools.count().__next__, **options)


def evict(index, count, pinned=()):
    eviction = index.evict(count, lambda page: page in pinned)
    index.check_integrity()
    return eviction


def test_unknown_salt_matches_nothing():
    """Not even that another tenant has these tokens."""
    index = make_index()
    index.insert(b"red", [1, 2, 3, 4], [10, 11])
    assert index.match(b"blue", [1, 2, 3, 4]).num_tokens == 0
    assert index.match(b"", [1, 2, 3, 4]).num_tokens == 0
    assert index.match(b"red", [1, 2, 3, 4]).pages.tolist() == [10, 11]


def test_fingerprint_and_salt_do_not_run_into_each_other():
    """A salt that continues a shorter fingerprint is another key."""
    keys = {
        RadixIndex(WHOLE, fingerprint)._key(salt) for fingerprint, salt in [(b"ab", b"c"), (b"a", b"bc"), (b"abc", b"")]
    }
    assert len(keys) == 3


def test_match_is_exact_to_the_token():
    """Mid-page, the rows of the page in which the prompts part can be copied."""
    index = make_index()
    index.insert(b"", [1, 2, 3, 4, 5, 6], [10, 11, 12])
    match = index.match(b"", [1, 2, 3, 9])
    assert (match.num_tokens, match.pages.tolist()) == (3, [10])
    assert (match.boundary.page, match.boundary.num_bytes) == (11, 2)
    assert index.match(b"", [1, 2, 3, 4, 9]).boundary is None


def test_boundary_rows_are_found_in_a_child_after_a_split():
    """The split moved the straddling page to the children; any of them has the common rows."""
    index = make_index()
    index.insert(b"", [1, 2, 3, 4], [10, 11])
    index.insert(b"", [1, 2, 3, 7], [10, 21])
    index.check_integrity()
    match = index.match(b"", [1, 2, 3])
    assert (match.num_tokens, match.pages.tolist()) == (3, [10])
    assert match.boundary.page in (11, 21)
    assert index.match(b"", [1, 2, 3, 7]).pages.tolist() == [10, 21]


def test_first_page_inserted_is_the_canonical_one():
    """The second session is told to use the first one's page, and brings only what is new."""
    index = make_index()
    index.insert(b"", [1, 2, 3, 4], [10, 11])
    insertion = index.insert(b"", [1, 2, 3, 4, 5, 6], [20, 21, 22])
    assert (insertion.pages.tolist(), insertion.num_known) == ([10, 11, 22], 2)
    assert sorted(index.pages()) == [10, 11, 22]
    assert index.lookup(b"", [1, 2, 3, 4, 9]).tolist() == [10, 11]


def test_tail_serves_its_rows_and_no_more():
    """A match ends where the tail's valid rows end, though its page has room."""
    index = make_index()
    index.insert(b"", [1, 2], [10])
    assert index.insert_tail(b"", [1, 2, 3], 11).taken
    match = index.match(b"", [1, 2, 3, 4])
    assert (match.num_tokens, match.boundary.page, match.boundary.num_bytes) == (3, 11, 2)


def test_longer_content_replaces_a_tail_and_refuses_another():
    """Rows stand in the index once: a tail goes when a page has its rows, and does not come back."""
    index = make_index(STRADDLING)
    index.insert(b"", [1, 2, 3], [10])
    assert index.insert_tail(b"", [1, 2, 3, 4], 11).dropped is None
    longer = index.insert_tail(b"", [1, 2, 3, 4, 5], 12)
    assert (longer.taken, longer.dropped.page) == (True, 11)
    assert not index.insert_tail(b"", [1, 2, 3, 4], 13).taken
    complete = index.insert(b"", [1, 2, 3, 4, 5, 6], [10, 14])
    assert complete.dropped.page == 12
    assert not index.insert_tail(b"", [1, 2, 3, 4, 5], 15).taken
    index.check_integrity()
    assert sorted(index.pages()) == [10, 14]


def test_tail_of_other_tokens_stays():
    """Two sessions part within a page: each tail has its own rows."""
    index = make_index(STRADDLING)
    assert index.insert_tail(b"", [1, 2], 10).taken
    assert index.insert_tail(b"", [1, 3], 11).taken
    index.check_integrity()
    assert index.match(b"", [1, 2, 9]).boundary.page == 10
    assert index.match(b"", [1, 3, 9]).boundary.page == 11
    assert index.match(b"", [1, 9]).num_tokens == 1


def test_own_tail_inserted_again_is_the_same_tail():
    """A turn that wrote nothing changes nothing; one that wrote behind its tail makes it longer."""
    index = make_index(STRADDLING)
    owner = Resident("s")
    index.insert_tail(b"", [1], 10, owner)
    again = index.insert_tail(b"", [1], 10, owner)
    assert (again.taken, again.dropped) == (True, None)
    longer = index.insert_tail(b"", [1, 2], 10, owner)
    assert (longer.taken, longer.dropped.page) == (True, 10)
    index.check_integrity()
    assert owner.tail_node.end == 2


def test_own_tail_becomes_a_complete_page():
    """The dropped tail and the inserted page are one page; it stands in the index once."""
    index = make_index(STRADDLING)
    owner = Resident("s")
    index.insert_tail(b"", [1, 2], 10, owner)
    insertion = index.insert(b"", [1, 2, 3], [10])
    assert (insertion.num_known, insertion.dropped.page, owner.tail_node) == (0, 10, None)
    index.check_integrity()
    assert list(index.pages()) == [10]


def test_eviction_takes_the_tail_then_the_end():
    """What is left is always a usable prefix."""
    index = make_index()
    index.insert(b"", [1, 2, 3, 4], [10, 11])
    index.insert_tail(b"", [1, 2, 3, 4, 5], 12)
    assert evict(index, 1).pages == [12]
    assert index.match(b"", [1, 2, 3, 4, 5]).num_tokens == 4
    assert evict(index, 1).pages == [11]
    assert index.match(b"", [1, 2, 3, 4, 5]).num_tokens == 2
    assert evict(index, 5).pages == [10]
    assert evict(index, 1).pages == []


def test_eviction_of_a_straddled_page_leaves_the_tokens_before_the_straddler():
    """Token 2 lies half in page 1: without that page 2 tokens are usable, from a copy of page 0."""
    index = make_index(STRADDLING)
    index.insert(b"", [1, 2, 3, 4, 5, 6], [10, 11])
    eviction = evict(index, 1)
    assert (eviction.pages, eviction.num_tokens) == ([11], 3)
    match = index.match(b"", [1, 2, 3, 4])
    assert (match.num_tokens, match.pages.tolist(), match.boundary.page) == (2, [], 10)
    assert match.boundary.num_bytes == 12
    insertion = index.insert(b"", [1, 2, 3, 4, 5, 6], [20, 21])
    assert (insertion.pages.tolist(), insertion.num_known) == ([10, 21], 1)


def test_pages_of_a_large_token_leave_together():
    """Where a token fills several pages an edge cannot end inside it; a part of them would serve no one."""
    index = make_index(KVLayout(1, 1, 5, torch.int8, 4))  # 10 bytes a token: pages 0-1 complete with one, 0-4 with two
    index.insert(b"", [1, 2], [10, 11, 12, 13, 14])
    assert evict(index, 1, pinned=[13]).pages == []
    assert evict(index, 1).pages == [14, 13, 12]
    assert index.lookup(b"", [1, 2]).tolist() == [10, 11]


def test_parent_goes_after_its_children():
    """The shared beginning outlives its continuations however long ago it was itself the end of a match."""
    index = make_index()
    index.insert(b"", [1, 2], [10])
    index.insert(b"", [1, 2, 3, 4], [10, 11])
    index.insert(b"", [1, 2, 5, 6], [10, 12])
    assert evict(index, 2).pages == [11, 12]
    assert evict(index, 1).pages == [10]


def test_pinned_pages_and_what_leads_to_them_stay():
    """Only the unpinned end of a pinned path goes; the leaf is evictable again when the pin is gone."""
    index = make_index()
    index.insert(b"", [1, 2, 3, 4, 5, 6], [10, 11, 12])
    index.insert(b"", [7, 8], [20])
    assert evict(index, 5, pinned=[10, 11]).pages == [12, 20]
    assert evict(index, 5, pinned=[10, 11]).pages == []
    assert evict(index, 5, pinned=[10]).pages == [11]
    assert evict(index, 5).pages == [10]


def test_pinned_tail_keeps_the_whole_path():
    """It is of use only behind its complete pages."""
    index = make_index()
    index.insert(b"", [1, 2], [10])
    index.insert_tail(b"", [1, 2, 3], 11)
    assert evict(index, 5, pinned=[11]).pages == []
    assert evict(index, 5).pages == [11, 10]


def test_eviction_tells_the_sessions_that_map_the_page():
    """Those further up the path keep what they have; a tail concerns its owner only."""
    index = make_index()
    long = index.insert(b"", [1, 2, 3, 4], [10, 11])
    owner, borrower, short = Resident("owner"), Resident("borrower"), Resident("short")
    index.insert_tail(b"", [1, 2, 3, 4, 5], 12, owner)
    for resident, num_pages in [(owner, 2), (borrower, 2), (short, 1)]:
        index.attach(resident, long.node, num_pages)
    assert list(evict(index, 1).residents) == [owner]
    assert (owner.num_pages, owner.tail_node) == (2, None)
    assert list(evict(index, 1).residents) == [owner, borrower]
    assert [r.num_pages for r in (owner, borrower, short)] == [1, 1, 1]
    assert list(evict(index, 1).residents) == [short, owner, borrower]


def test_split_sends_residents_where_their_last_page_is():
    """A session that maps only the common part is not cut when the rest goes."""
    index = make_index()
    node = index.insert(b"", [1, 2, 3, 4], [10, 11]).node
    short, long = Resident("short"), Resident("long")
    index.attach(short, node, 1)
    index.attach(long, node, 2)
    index.insert(b"", [1, 2, 5, 6], [10, 12])
    index.check_integrity()
    assert index.path_pages(short).tolist() == [10]
    assert index.path_pages(long).tolist() == [10, 11]


def test_detached_resident_leaves_its_tail_behind():
    """The rows stay useful to others; nobody is told when they go."""
    index = make_index()
    owner = Resident("s")
    index.insert_tail(b"", [1], 10, owner)
    index.detach(owner)
    eviction = evict(index, 1)
    assert (eviction.pages, list(eviction.residents)) == ([10], [])


def test_drop_forgets_one_salt():
    """All its pages are returned, also for the eviction queue; others stay."""
    index = make_index()
    index.insert(b"red", [1, 2, 3, 4], [10, 11])
    index.insert(b"red", [1, 2, 5, 6], [10, 12])
    index.insert_tail(b"red", [7], 13)
    index.insert(b"blue", [1, 2], [20])
    assert sorted(index.drop(b"red")) == [10, 11, 12, 13]
    assert index.drop(b"red") == []
    index.check_integrity()
    assert evict(index, 9).pages == [20]


def test_drop_of_mapped_pages_is_refused():
    """Sessions must unmap first."""
    index = make_index()
    index.attach(Resident("s"), index.insert(b"red", [1, 2], [10]).node, 1)
    with pytest.raises(ValueError, match="detach them first"):
        index.drop(b"red")


def test_pages_and_tokens_must_agree():
    """The index refuses pages that the tokens do not complete, and tails without their beginning."""
    index = make_index()
    with pytest.raises(ValueError, match="2 pages: 3 tokens complete 1"):
        index.insert(b"", [1, 2, 3], [10, 11])
    with pytest.raises(ValueError, match="insert the 1 complete pages before it first"):
        index.insert_tail(b"", [1, 2, 3], 11)
    with pytest.raises(ValueError, match="tail of 2 tokens"):
        index.insert_tail(b"", [1, 2], 11)
    assert index.insert(b"", [1], []).pages.tolist() == []
    index.check_integrity()


@pytest.mark.parametrize(
    "damage",
    [
        lambda leaf: leaf.pages.truncate(1),
        lambda leaf: leaf.tokens.truncate(3),
        lambda leaf: leaf.tokens.extend([9]),
        lambda leaf: setattr(leaf, "queued", False),
        lambda leaf: leaf.pages.view.__setitem__(0, 11),
        lambda leaf: leaf.set_tail(12, None),
        lambda leaf: setattr(leaf, "start", 1),
        lambda leaf: leaf.residents.update({Resident("s", 1, None): None}),
    ],
)
def test_damage_is_found(damage):
    """Each rule of the tree is checked."""
    index = make_index()
    leaf = index.insert(b"", [1, 2, 3, 4], [10, 11]).node
    index.check_integrity()
    damage(leaf)
    with pytest.raises(IntegrityError):
        index.check_integrity()
