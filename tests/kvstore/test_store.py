"""Sessions lease rows: what is found again, what is shared, what is copied, and what a turn leaves behind."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from kvstore import IntegrityError, KVStore, LeaseHeld, OutOfPages, OutOfRanges, PageState
from kvstore.memory import GUARD
from tests.kvstore.fakes import (
    PAGE_BYTES,
    FlakyMemory,
    assert_rows,
    base_token_of,
    make_layout,
    make_store,
    pages_of,
    rows_of,
    run_turn,
    write_rows,
)

RED = b"red"  # a tenant
TALK = list(range(100, 160))  # 60 tokens of 384 bytes: 5 pages and 2,560 bytes, 10.67 tokens a page


@pytest.fixture
def store():
    """64 pages of 4 KiB, 8 ranges of 512 tokens and more."""
    store = make_store()
    yield store
    store.check_integrity()
    store.close()


def test_next_turn_finds_all_rows_in_place(store):
    """Nothing is mapped or copied: the same pages at the same addresses, written on behind the last row."""
    run_turn(store, "s", RED, TALK[:30])
    before = (base_token_of(store, "s"), pages_of(store, "s"))
    lease = store.lease("s", RED, TALK)
    assert lease.num_cached_tokens == 30
    assert (lease.base_token, pages_of(store, "s")) == before
    write_rows(store, lease, RED, TALK)
    lease.release()
    assert pages_of(store, "s")[:3] == before[1]
    assert_rows(store, before[0], RED, TALK)


def test_last_token_is_always_computed(store):
    """Its logits are wanted: regenerating from a wholly cached prompt leases all tokens but one."""
    run_turn(store, "s", RED, TALK)
    assert run_turn(store, "s", RED, TALK) == 59
    assert run_turn(store, "other", RED, TALK) == 59
    assert run_turn(store, "s", RED, TALK[:1]) == 0


def test_second_session_shares_complete_pages_and_copies_the_boundary(store):
    """Reuse is exact to the token; only the page in which they part is the second one's own."""
    run_turn(store, "a", RED, TALK)
    assert run_turn(store, "b", RED, [*TALK[:45], 7, 8, 9]) == 45
    assert pages_of(store, "b")[:4] == pages_of(store, "a")[:4]
    assert pages_of(store, "b")[4] != pages_of(store, "a")[4]
    assert_rows(store, base_token_of(store, "a"), RED, TALK)


def test_tenants_share_nothing(store):
    """The same tokens under another salt are other rows, in other pages."""
    run_turn(store, "a", RED, TALK)
    assert run_turn(store, "b", b"blue", TALK) == 0
    assert not set(pages_of(store, "a")) & set(pages_of(store, "b"))


def test_session_that_changes_its_tenant_starts_anew(store):
    """A session id is no way to another tenant's rows."""
    run_turn(store, "s", RED, TALK)
    assert run_turn(store, "s", b"blue", TALK) == 0


def test_branches_come_back_whole(store):
    """Going back and answering otherwise copies the page it goes back into; the first branch stays as it was."""
    run_turn(store, "s", RED, TALK)
    other = TALK[:33] + [1] * 20
    assert run_turn(store, "s", RED, other) == 33
    assert run_turn(store, "s", RED, [*TALK, 5]) == 60
    assert run_turn(store, "s", RED, [*other, 5]) == 53


def test_truncation_into_the_own_tail_copies_it(store):
    """The tail's rows are the index's: others may still want those that this session no longer has."""
    run_turn(store, "s", RED, TALK[:35])
    tail = pages_of(store, "s")[3]
    assert run_turn(store, "s", RED, [*TALK[:33], 1]) == 33
    assert pages_of(store, "s")[3] != tail
    assert run_turn(store, "other", RED, TALK[:36]) == 35


def test_leased_session_keeps_the_page_when_its_tail_is_covered(store):
    """Another session wrote further behind the same tokens; the tail leaves the index, not the lease that uses it."""
    run_turn(store, "a", RED, TALK[:35])
    lease = store.lease("a", RED, TALK)
    tail = pages_of(store, "a")[3]
    run_turn(store, "b", RED, TALK[:39])
    assert pages_of(store, "a")[3] == tail
    assert store.stats().pages.private == 1
    write_rows(store, lease, RED, TALK)
    lease.release()
    assert run_turn(store, "c", RED, [*TALK, 1]) == 60


def test_same_prompt_computed_twice_at_once_is_kept_once(store):
    """Both started cold; the second to complete a page maps the first one's and frees its own."""
    leases = {name: store.lease(name, RED, TALK) for name in ("a", "b")}
    for length in (11, 22, 40, 60):
        for lease in leases.values():
            write_rows(store, lease, RED, TALK[:length])
            store.check_integrity()
    assert pages_of(store, "a")[:5] == pages_of(store, "b")[:5]
    assert store.stats().pages.private == 2
    for lease in leases.values():
        assert_rows(store, lease.base_token, RED, TALK)
        lease.release()
        store.check_integrity()
    assert store.stats().pages.indexed == 6
    assert store.resident_tokens("a") == 60
    assert store.resident_tokens("b") == 53  # its tail was the same rows again; complete pages are all it has mapped


def test_follower_finds_the_pages_a_running_prefill_completed(store):
    """Complete pages enter the index at commit, before the leader is done."""
    leader = store.lease("leader", RED, TALK)
    write_rows(store, leader, RED, TALK[:40])
    assert run_turn(store, "follower", RED, TALK) == 32  # 3 pages hold 32 tokens
    write_rows(store, leader, RED, TALK)
    leader.release()


def test_cancelled_prefill_keeps_what_was_committed(store):
    """Rows beyond were mapped but never written; their pages are free at once."""
    lease = store.lease("s", RED, TALK)
    lease.grow(60)
    write_rows(store, lease, RED, TALK[:25])
    lease.release()
    assert store.stats().pages.private == 0
    assert store.resident_tokens("s") == 25
    assert run_turn(store, "s", RED, TALK) == 25


def test_pages_are_zero_when_handed_out():
    """Whoever had them: with one tenant's rows evicted, the next one reads zeros behind its own."""
    store = make_store(pages=6)
    run_turn(store, "a", RED, TALK)
    lease = store.lease("b", b"blue", TALK)
    lease.grow(60)
    assert not rows_of(store, lease.base_token, 0, lease.capacity_tokens).any()
    lease.release()
    store.close()


def test_copied_boundary_page_has_zeros_behind_its_rows(store):
    """The donor's later rows are not copied along."""
    run_turn(store, "a", RED, TALK)
    lease = store.lease("b", RED, TALK[:35])
    assert lease.kv_length == 34
    assert not rows_of(store, lease.base_token, 34, lease.capacity_tokens).any()
    lease.release()


def test_no_reuse_starts_from_nothing_and_ends_shared(store):
    """For comparisons: everything is computed again, and then it is the same content again."""
    run_turn(store, "s", RED, TALK)
    held = store.stats().pages.indexed
    assert run_turn(store, "s", RED, TALK, reuse=False) == 0
    assert store.stats().pages.indexed == held


def test_without_prefix_sharing_a_session_has_its_own_rows_only():
    """It finds its own continuation; another session with the same tokens does not; drop frees everything."""
    store = make_store(prefix_sharing=False)
    run_turn(store, "a", RED, TALK[:40])
    assert run_turn(store, "b", RED, TALK) == 0
    assert run_turn(store, "a", RED, TALK) == 40
    store.drop_session("a")
    store.drop_session("b")
    store.check_integrity()
    assert store.stats().held_bytes == 0
    store.close()


def test_salts_and_sessions_do_not_run_into_each_other_without_sharing():
    """Tenant `a` with session `bc` is not tenant `ab` with session `c`."""
    store = make_store(prefix_sharing=False)
    run_turn(store, "bc", b"a", TALK)
    assert run_turn(store, "c", b"ab", TALK) == 0
    store.close()


def test_dropped_session_leaves_its_pages_to_others(store):
    """A fork of a deleted session costs its new tokens only."""
    run_turn(store, "a", RED, TALK)
    store.drop_session("a")
    store.drop_session("a")
    assert (store.sessions(), store.resident_tokens("a")) == ([], 0)
    assert run_turn(store, "b", RED, [*TALK, 1]) == 60


def test_least_recently_used_idle_session_gives_its_range():
    """Its pages stay in the index: mapped again, not computed again."""
    store = make_store(max_ranges=2)
    for name in ("a", "b"):
        run_turn(store, name, RED, [ord(name), *TALK])
    run_turn(store, "a", RED, [ord("a"), *TALK, 1])
    run_turn(store, "c", RED, [ord("c"), *TALK])
    assert sorted(store.sessions()) == ["a", "c"]
    assert run_turn(store, "b", RED, [ord("b"), *TALK, 1]) == 61
    store.close()


def test_leased_ranges_are_not_taken():
    """With every range leased a new session has to wait; nothing is changed."""
    store = make_store(max_ranges=1)
    lease = store.lease("a", RED, TALK)
    with pytest.raises(OutOfRanges, match="all 1 ranges are leased"):
        store.lease("b", RED, TALK)
    assert store.sessions() == ["a"]
    lease.release()
    run_turn(store, "b", RED, TALK)
    store.close()


def test_leased_session_is_not_leased_again_nor_dropped(store):
    """One writer a session."""
    lease = store.lease("s", RED, TALK)
    with pytest.raises(LeaseHeld, match="'s' is leased"):
        store.lease("s", RED, TALK)
    with pytest.raises(LeaseHeld):
        store.drop_session("s")
    lease.release()
    lease.release()
    with pytest.raises(ValueError, match="lease on session 's' was released"):
        lease.grow(3)
    with pytest.raises(ValueError, match="was released"):
        lease.commit([1])


def test_lease_counts_what_it_may_write(store):
    """Rows are written only where they are mapped, and only up to the longest session."""
    lease = store.lease("s", RED, TALK)
    assert (lease.session_id, lease.kv_length, lease.capacity_tokens) == ("s", 0, 0)
    lease.grow(11)
    assert lease.capacity_tokens == 21
    with pytest.raises(ValueError, match="commit up to 22 tokens: only 21 are mapped"):
        lease.commit(range(22))
    with pytest.raises(ValueError, match="grow to 513 tokens: a session holds at most 512"):
        lease.grow(513)
    lease.release()
    for length in (0, 513):
        with pytest.raises(ValueError, match=f"{length} tokens: between 1 and max_session_tokens=512"):
            store.lease("s", RED, [1] * length)


def test_longest_session_is_what_the_whole_budget_holds():
    """A request that can never fit is known as such before it waits; one just as long as that can be leased."""
    store = make_store(pages=3)
    assert store.max_session_tokens == 32
    run_turn(store, "other", RED, [9] * 30)
    run_turn(store, "s", RED, TALK[:32])
    assert store.resident_tokens("s") == 32
    store.close()


def test_arena_rows_are_the_layouts(store):
    """Row `base_token + t` is token t: [layers, 2, heads, head_dim], all ranges in one tensor."""
    layout = store.layout
    assert store.arena.shape[1:] == (layout.num_layers, 2, layout.num_kv_heads, layout.head_dim)
    assert store.arena.dtype == torch.float32
    assert store.arena.shape[0] * layout.token_bytes == 8 * layout.range_bytes(512, 0)
    bases = [store.lease(f"s{number}", RED, [1]).base_token for number in range(8)]
    assert bases == [number * store.arena.shape[0] // 8 for number in range(8)]


CHILD = """
import os
from tests.kvstore.fakes import base_token_of, make_store, rows_of, run_turn
store = make_store()
run_turn(store, "a", b"red", list(range(40)))
run_turn(store, "b", b"red", list(range(40)) + [7])

def exit_of(session_id, token):
    child = os.fork()
    if child == 0:
        rows_of(store, base_token_of(store, session_id), token, token + 1).fill(0)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

print(exit_of("b", 31), exit_of("b", 32), exit_of("a", 31))
"""


def test_borrowed_rows_cannot_be_written():
    """A stray write into shared rows ends the process, not the other session's answer; own pages are writable."""
    child = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, check=True)
    assert child.stdout.split() == ["-11", "0", "0"]


def test_rows_past_the_end_may_be_read_where_kernels_do_so():
    """With tiles of 20 tokens the tile in which the rows end can be read after `guard`, at no page of its own."""
    store = make_store(tile_tokens=20)
    run_turn(store, "a", RED, TALK)
    lease = store.lease("b", RED, [*TALK, 1])
    write_rows(store, lease, RED, TALK)
    lease.guard(61)
    store.settle()
    assert not store.arena[lease.base_token + 60 : lease.base_token + 80].any()
    assert store.stats().pages.guard == 1
    store.check_integrity()
    store.shrink()
    lease.release()
    store.check_integrity()
    store.close()


def test_guards_are_taken_away_by_growth_and_release():
    """An idle or growing session has pages, then nothing; one may be guarded as often as it likes."""
    store = make_store(tile_tokens=64)
    lease = store.lease("s", RED, TALK)
    write_rows(store, lease, RED, TALK[:20])
    num_pages, places = len(pages_of(store, "s")), store._memory.mapped
    for change in (lease.unguard, lambda: lease.grow(lease.capacity_tokens + 1), lease.release):
        lease.guard(20)
        assert GUARD in places(0, 20)
        change()
        store.check_integrity()
        assert GUARD not in places(0, 20)
    assert num_pages <= 64 * 384 // PAGE_BYTES
    store.close()


def test_store_without_tiles_has_no_guards():
    """Where no kernel reads past an end nothing is mapped there."""
    store = make_store()
    lease = store.lease("s", RED, TALK)
    write_rows(store, lease, RED, TALK[:20])
    lease.guard(20)
    lease.unguard()
    assert store._memory.mapped(0, 20).tolist().count(-1) == 20 - len(pages_of(store, "s"))
    assert store.stats().pages.guard == 0
    store.close()


def test_idle_memory_goes_back_to_the_system():
    """Down to the floor; pages that hold rows are kept."""
    store = make_store(floor_bytes=2 * PAGE_BYTES)
    lease = store.lease("s", RED, TALK)
    lease.grow(400)
    write_rows(store, lease, RED, TALK)
    lease.release()
    assert store.stats().physical_bytes == 38 * PAGE_BYTES
    store.shrink()
    stats = store.stats()
    assert stats.physical_bytes == stats.held_bytes == 6 * PAGE_BYTES
    assert run_turn(store, "s", RED, [*TALK, 1]) == 60
    store.close()


def test_stats_are_plain_numbers(store):
    """What the front end is sent."""
    run_turn(store, "s", RED, TALK)
    lease = store.lease("t", RED, TALK)
    figures = store.stats().as_map()
    assert figures["pages"] == {"free": 0, "private": 1, "indexed": 6, "guard": 0, "created": 7, "idle": 1}
    assert (figures["num_sessions"], figures["num_leases"], figures["num_ranges"]) == (2, 1, 8)
    assert figures["held_bytes"] == figures["physical_bytes"] == 7 * PAGE_BYTES
    assert (figures["evicted_pages"], figures["evicted_tokens"]) == (0, 0)
    lease.release()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"max_ranges": 0}, "both must be positive"),
        ({"budget_bytes": 4095}, "budget_bytes=4095: must hold at least one page of 4096 bytes"),
        ({"budget_bytes": 4096, "tile_tokens": 1}, "budget_bytes=4096"),
        ({"max_ranges": 2**22}, "lower max_tokens or max_ranges"),
        ({"memory": FlakyMemory(8192)}, "4096 in the layout, 8192 in memory"),
    ],
)
def test_impossible_sizes_are_refused_by_name(options, message):
    """At construction, with the value and what to do."""
    sizes = {"budget_bytes": 1 << 20, "max_tokens": 512, "max_ranges": 4, "fingerprint": b""}
    memory = options.pop("memory", None) or FlakyMemory()
    with pytest.raises(ValueError, match=message):
        KVStore(make_layout(), memory, **(sizes | options))
    memory.close()


@pytest.mark.parametrize(
    "damage",
    [
        lambda store: store._pool.ref(store._residency.sessions["s"].tensor.pages.view[:1]),
        lambda store: setattr(store._residency.sessions["s"].tensor, "num_tokens", 59),
        lambda store: store._residency.idle.clear(),
        lambda store: store._residency._free_ranges.pop(),
        lambda store: store._memory.unmap(0, 1),
        lambda store: store._index.attach(store._residency.sessions["s"].resident, None, 0),
        lambda store: store._pool._set_state(store._residency.sessions["s"].tensor.pages.view[:1], PageState.PRIVATE),
    ],
)
def test_damage_is_found(damage):
    """The integrity check spans the parts: holders, mappings, ranges, and the index's view of a session."""
    store = make_store()
    run_turn(store, "s", RED, TALK)
    damage(store)
    with pytest.raises(IntegrityError):
        store.check_integrity()
    store.close()


def test_write_frontier_is_asserted(store):
    """An indexed page behind the last row would be written by its lease: found before it happens."""
    lease = store.lease("s", RED, TALK)
    write_rows(store, lease, RED, TALK)
    store._residency.sessions["s"].tensor.num_tokens = 20
    with pytest.raises(IntegrityError, match="may write into a page that is not its own"):
        store.check_integrity()
    store._residency.sessions["s"].tensor.num_tokens = 60
    lease.release()


def test_out_of_pages_names_what_could_be_had():
    """Evictable pages count; pinned ones do not."""
    store = make_store(pages=10)
    run_turn(store, "idle", RED, [9] * 30)
    lease = store.lease("a", RED, TALK)
    write_rows(store, lease, RED, TALK)
    other = store.lease("b", b"blue", TALK)
    with pytest.raises(OutOfPages, match="6 pages needed, 4 can be had"):
        other.grow(60)
    assert store.stats().evicted_pages == 0
    lease.release()
    other.grow(60)
    other.release()
    store.close()
