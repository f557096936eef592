"""The store when memory, ranges or mappings are short, and when the system refuses: progress, and nothing half done."""

from __future__ import annotations

import itertools

import pytest

from kvstore import IntegrityError, OutOfMappings, OutOfPages
from tests.kvstore.fakes import (
    PAGE_BYTES,
    FlakyMemory,
    assert_rows,
    base_token_of,
    make_store,
    pages_of,
    run_turn,
    write_rows,
)

RED = b"red"  # a tenant
TALK = list(range(100, 160))  # 60 tokens of 384 bytes: 5 pages and 2,560 bytes


def test_idle_sessions_make_room_and_are_recomputed():
    """Every turn of more sessions than memory holds succeeds; what was evicted is computed again, rightly."""
    store = make_store(pages=14)
    histories = {name: [ord(name), *TALK[:40]] for name in "abcdef"}
    for turn in range(3):
        for name, history in histories.items():
            history += [turn] * 5
            run_turn(store, name, RED, history)
    stats = store.stats()
    assert stats.evicted_pages > 20
    assert stats.physical_bytes <= 14 * PAGE_BYTES
    store.close()


def test_evicted_end_is_cut_from_every_session_that_maps_it():
    """A page shared by three idle sessions is unmapped from all; what comes before stays resident."""
    store = make_store(pages=8)
    for name in ("a", "b", "c"):
        run_turn(store, name, RED, [*TALK, ord(name)])
    assert store.stats().held_bytes == 8 * PAGE_BYTES
    shared = pages_of(store, "a")[:5]
    run_turn(store, "new", b"blue", TALK[:50])  # wants 5 pages: the three tails and the last two shared ones
    assert [pages_of(store, name) for name in ("a", "b", "c")] == [shared[:3]] * 3
    assert [store.resident_tokens(name) for name in ("a", "b", "c")] == [32] * 3
    assert run_turn(store, "b", RED, [*TALK, ord("b"), 1]) == 32
    store.close()


def test_session_whose_pages_all_went_is_not_resident():
    """It costs no range any more, and comes back like a new one."""
    store = make_store(pages=6)
    run_turn(store, "a", RED, TALK)
    run_turn(store, "b", b"blue", TALK)
    assert store.sessions() == ["b"]
    assert run_turn(store, "a", RED, TALK) == 0
    store.close()


def test_eviction_in_the_middle_of_a_session_leaves_its_beginning():
    """Its own later pages went while it idled; a fork had kept the first ones in use."""
    store = make_store(pages=12)
    run_turn(store, "s", RED, TALK)
    run_turn(store, "fork", RED, [*TALK[:22], 5, 6])
    store.lease("other", b"blue", TALK).grow(60)
    assert run_turn(store, "s", RED, [*TALK, 1]) >= 21
    store.close()


def test_lease_does_not_evict_what_it_is_about_to_use():
    """Only matched pages are idle, so the boundary is given up, and the page it was in makes room for the copy."""
    store = make_store(pages=10)
    run_turn(store, "a", RED, TALK)  # 6 pages, idle
    holder = store.lease("holder", b"blue", TALK)
    holder.grow(42)  # the other 4
    lease = store.lease("b", RED, TALK)
    assert lease.num_cached_tokens == 53  # 4 complete pages and a copy of the fifth, into what was the tail
    assert_rows(store, lease.base_token, RED, TALK[:53])
    store.check_integrity()
    lease.release()
    holder.release()
    store.close()


@pytest.mark.parametrize(("token_bytes", "length", "found"), [(384, 60, 32), (640, 25, 0)])
def test_boundary_is_given_up_down_to_whole_pages_rather_than_failing(token_bytes, length, found):
    """With every page in use a lease begins where no copy is needed; growing is what waits."""
    store = make_store(token_bytes=token_bytes, pages=6 if token_bytes == 384 else 4)
    leader = store.lease("a", RED, TALK[:length])
    write_rows(store, leader, RED, TALK[:length])
    lease = store.lease("b", RED, TALK[:length])
    assert lease.num_cached_tokens == lease.capacity_tokens == found
    with pytest.raises(OutOfPages):
        lease.grow(found + 1)
    leader.release()
    write_rows(store, lease, RED, TALK[:length])
    assert_rows(store, lease.base_token, RED, TALK[:length])
    lease.release()
    store.check_integrity()
    store.close()


def test_whole_tokens_need_no_copy_when_memory_is_full():
    """Where pages hold whole tokens, all complete pages are shared even with nothing left."""
    store = make_store(token_bytes=1024, pages=3)
    leader = store.lease("a", RED, TALK[:12])
    write_rows(store, leader, RED, TALK[:12])
    lease = store.lease("b", RED, TALK[:12])
    assert lease.num_cached_tokens == 8
    lease.release()
    leader.release()
    store.close()


@pytest.mark.parametrize(
    ("token_bytes", "pages"),
    [*itertools.product([384, 1024], [1, 2, 3, 4]), *itertools.product([10240, 12288], [3, 4, 5, 6])],
)
def test_smallest_budgets_make_progress(token_bytes, pages):
    """Sessions that each fill the whole budget take turns, and each turn's rows are right."""
    store = make_store(token_bytes=token_bytes, pages=pages)
    length = store.max_session_tokens
    for turn in range(6):
        history = [turn % 3, *TALK[: length - 1]]
        run_turn(store, f"s{turn % 3}", RED, history)
        run_turn(store, "fork", RED, history[: length // 2 + 1])
        assert store.stats().physical_bytes <= pages * PAGE_BYTES
    assert length == pages * PAGE_BYTES // token_bytes
    store.close()


def test_impossible_growth_evicts_nobody():
    """A request that cannot get its pages anyway does not empty the cache trying, however often it tries."""
    store = make_store(pages=10)
    run_turn(store, "idle", RED, TALK[:30])
    store.lease("holder", b"blue", TALK).grow(50)
    lease = store.lease("s", b"green", TALK)
    for _ in range(3):
        with pytest.raises(OutOfPages):
            lease.grow(60)
    assert store.resident_tokens("idle") == 30
    assert (lease.capacity_tokens, store.stats().evicted_pages) == (0, 0)
    store.close()


def test_idle_ranges_are_unmapped_when_mappings_are_short():
    """Scattered pages take many mappings; idle sessions lose theirs, their rows stay in the index."""
    store = make_store(memory=FlakyMemory(max_mappings=8), pages=200)
    for name in "abcdef":
        run_turn(store, name, RED, [ord(name), *TALK])
        assert store.stats().num_mappings <= 8
    assert len(store.sessions()) < 6
    assert run_turn(store, "a", RED, [ord("a"), *TALK, 1]) == 61
    store.close()


def test_leased_sessions_are_never_unmapped_for_mappings():
    """When only leases are left the lease or growth that wants more is told to wait; nothing is changed."""
    store = make_store(memory=FlakyMemory(max_mappings=5), pages=200)
    leases = [store.lease(name, RED, [ord(name), *TALK]) for name in "abc"]
    write_rows(store, leases[0], RED, [ord("a"), *TALK])
    leases[1].grow(60)
    with pytest.raises(OutOfMappings):
        leases[2].grow(60)
    store.check_integrity()
    assert_rows(store, leases[0].base_token, RED, [ord("a"), *TALK])
    for lease in leases:
        lease.release()
    assert run_turn(store, "c", RED, [ord("c"), *TALK]) == 0
    store.close()


@pytest.mark.parametrize("nth", range(1, 8))
def test_refused_call_leaves_a_lease_undone(nth):
    """Whichever create or map is refused while a fork is leased and grown: as before, and it works the next time."""
    store = make_store(max_ranges=2)
    run_turn(store, "a", RED, TALK)
    run_turn(store, "b", RED, [*TALK[:20], 9, 9])
    before = {name: store.resident_tokens(name) for name in ("a", "b")}
    store._memory.countdown.arm(nth)
    refused = False
    lease = None
    try:
        lease = store.lease("b", RED, [*TALK, 1, 2])
        lease.grow(200)
    except OutOfPages:
        refused = True
    store.check_integrity()
    if lease is None:
        assert store.resident_tokens("b") <= before["b"]
    else:
        assert lease.capacity_tokens == (lease.kv_length + 4 if refused else 202)
        lease.release()
    assert run_turn(store, "b", RED, [*TALK, 1, 2]) == 60
    assert_rows(store, base_token_of(store, "b"), RED, [*TALK, 1, 2])
    store.close()


def test_refused_adoption_is_tried_again():
    """Without a mapping for the canonical page a session keeps its own, private, and changes over at its next page."""
    store = make_store()
    leases = [store.lease(name, RED, TALK) for name in ("a", "b")]
    write_rows(store, leases[0], RED, TALK[:22])
    leases[1].grow(60)
    store._memory.countdown.arm(1)
    write_rows(store, leases[1], RED, TALK[:22])
    store.check_integrity()
    assert pages_of(store, "a")[:2] != pages_of(store, "b")[:2]
    write_rows(store, leases[1], RED, TALK[:40])
    store.check_integrity()
    assert pages_of(store, "a")[:2] == pages_of(store, "b")[:2]
    for lease in leases:
        lease.release()
    store.close()


def test_adoption_refused_until_release_drops_the_duplicates():
    """The rows are in the index already, so the session loses its mapping of them and nothing else."""
    store = make_store()
    leases = [store.lease(name, RED, TALK) for name in ("a", "b")]
    write_rows(store, leases[0], RED, TALK)
    leases[1].grow(60)
    store._memory.countdown.arm(1)
    write_rows(store, leases[1], RED, TALK)
    store._memory.countdown.arm(1)
    leases[1].release()
    store.check_integrity()
    assert "b" not in store.sessions()
    leases[0].release()
    assert run_turn(store, "b", RED, [*TALK, 1]) == 60
    store.close()


def test_lost_page_is_found_after_pressure():
    """The check that every pressure test relies on sees a page that nobody holds."""
    store = make_store(pages=8)
    run_turn(store, "a", RED, TALK)
    store._pool.allocate(1)
    with pytest.raises(IntegrityError, match="has 1 references and 0 holders"):
        store.check_integrity()
    store.close()


def test_refused_settling_is_helped_by_what_idle_sessions_give_up():
    """The idle session loses its mappings, then the call is made again."""
    store = make_store(pages=30)
    run_turn(store, "idle", RED, TALK)
    lease = store.lease("s", b"blue", TALK)
    lease.grow(60)
    store._memory.countdown.arm(1)
    store.settle()
    assert store.sessions() == ["s"]
    lease.release()
    store.close()


def test_refused_settling_is_helped_by_free_pages():
    """With no idle session left, the pages that hold nothing go back to the system."""
    store = make_store(pages=30, floor_bytes=0)
    lease = store.lease("s", RED, TALK)
    lease.grow(200)
    lease.release()
    lease = store.lease("t", RED, TALK)
    assert store.stats().pages.free > 0
    store._memory.countdown.arm(1)
    store.settle()
    assert store.stats().pages.free == 0
    lease.release()
    store.close()


def test_settling_that_nothing_helps_is_out_of_mappings():
    """The request must wait; once the system has what it needs, it goes on."""
    store = make_store(pages=30, floor_bytes=0)
    lease = store.lease("s", RED, TALK)
    lease.grow(60)
    store._memory.countdown.arm(1)
    with pytest.raises(OutOfMappings):
        store.settle()
    store.settle()
    lease.release()
    store.check_integrity()
    store.close()
