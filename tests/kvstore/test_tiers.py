"""Histories that left the device come back with the same rows: from host memory, from disk, after a restart."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvstore import KVStore, OutOfPages, offload
from kvstore.buffers import PlainBuffers
from kvstore.disk import DiskTier
from kvstore.host import HostTier
from kvstore.keys import PageKeys
from kvstore.tiers import Below
from kvstore.transfer import FileTransfers
from tests.kvstore.fakes import PAGE_BYTES, FlakyMemory, make_layout, make_store, run_turn

HOST_PAGES = 200


def tiered_store(
    directory: Path | None = None,
    *,
    host_pages: int = HOST_PAGES,
    pages: int = 16,
    disk_bytes: int = 64 << 20,
    **options,
) -> KVStore:
    """A store of little device memory over host memory and, where a directory is given, a disk."""
    memory = FlakyMemory()

    def open_disk(fingerprint: bytes, page_bytes: int) -> DiskTier:
        return DiskTier(directory, budget_bytes=disk_bytes, fingerprint=fingerprint, page_bytes=page_bytes)

    below = Below(
        PlainBuffers(host_pages * PAGE_BYTES, PAGE_BYTES),
        FileTransfers(memory.file, PAGE_BYTES),
        open_disk if directory else None,
    )
    return make_store(memory=memory, pages=pages, below=below, **options)


def settle_all(store: KVStore) -> None:
    """Everything that can go down has gone down."""
    assert store.flush(time.monotonic() + 10)
    store.check_integrity()


def bring_back(store: KVStore, session_id: str, salt: bytes, tokens: list[int]) -> int:
    """Promote and end at once, as a request does; how many pages came."""
    promotion = store.promote(session_id, salt, np.array(tokens[:-1], np.int32))
    if promotion is None:
        return 0
    while not promotion.is_over:
        store.tend()
        store.check_integrity()
    count = len(promotion.copies)
    store.end_promotion(promotion)
    return count


def returning_turn(store: KVStore, session_id: str, salt: bytes, tokens: list[int]) -> int:
    """A turn of someone who was away; the rows that were there are checked, the number of their tokens returned."""
    bring_back(store, session_id, salt, tokens)
    while store.is_moving:  # what is being copied is held, and this device has few pages
        store.tend()
    while True:
        try:
            return run_turn(store, session_id, salt, tokens)
        except OutOfPages:  # a page that is being copied is held: wait for that, as the engine does
            assert store.is_moving
            store.tend()


def pushed_out(tokens: list[int]) -> KVStore:
    """A store that has saved session `s` of tenant `t` in host memory, and whose device others have taken since."""
    store = tiered_store()
    run_turn(store, "s", b"t", tokens)
    settle_all(store)
    for other in range(5):
        run_turn(store, f"o{other}", b"t", [2000 + other, *range(120)])
    return store


def test_an_evicted_history_comes_back_from_host_memory():
    """What was copied down while idle is mapped again after others took the device, row for row."""
    store = tiered_store()
    mine = list(range(100))
    run_turn(store, "mine", b"t", mine)
    settle_all(store)
    for other in range(4):
        run_turn(store, f"o{other}", b"t", [1000 + other, *range(120)])
    assert run_turn(store, "else", b"t", [*mine[:50], 7]) < 20
    assert returning_turn(store, "mine", b"t", [*mine, 5]) == 100
    store.close()


def test_pressure_alone_sends_pages_down():
    """A device that runs short offloads without ever being idle."""
    store = tiered_store()
    for number in range(12):
        run_turn(store, f"s{number}", b"t", [number, *range(100)])
        for _ in range(50):
            store.tend()
            time.sleep(0.0005)
    assert store.tiers.offloads.num_offloaded > 20
    assert sum(bring_back(store, f"s{n}", b"t", [n, *range(100), 1]) for n in range(12)) > 20
    store.check_integrity()
    store.close()


def test_another_tenant_finds_nothing():
    """The same tokens under another salt have other keys."""
    store = tiered_store()
    run_turn(store, "a", b"alice", list(range(100)))
    settle_all(store)
    store.drop_session("a")
    assert bring_back(store, "b", b"bob", list(range(100))) == 0
    store.close()


def test_histories_survive_a_restart_on_disk(tmp_path):
    """A new store on the same directory finds every row, also of the last page; a store of another model finds none."""
    first = tiered_store(tmp_path / "kv")
    tokens = list(range(150))
    run_turn(first, "s", b"t", tokens)
    settle_all(first)
    first.close()
    foreign = tiered_store(tmp_path / "kv", fingerprint=b"another model")
    assert bring_back(foreign, "s", b"t", tokens) == 0
    foreign.close()
    run_turn(again := tiered_store(tmp_path / "kv2"), "s", b"t", tokens)
    settle_all(again)
    again.close()
    second = tiered_store(tmp_path / "kv2")
    assert returning_turn(second, "s", b"t", [*tokens, 3]) == 150
    assert second.tiers.promotions.counts.disk > 10
    second.close()


def test_where_the_missing_rows_are(tmp_path):
    """Below, let go because the disk was full, or in no tier at all: that is the reason a turn is told."""
    store = tiered_store(tmp_path / "kv", host_pages=40, disk_bytes=300 * PAGE_BYTES)
    old, recent, unknown = list(range(100)), list(range(1000, 1100)), list(range(2000, 2100))
    run_turn(store, "old", b"t", old)
    settle_all(store)
    for number in range(40):  # more than everything holds
        run_turn(store, f"s{number}", b"t", [5000 + number, *range(100)])
        settle_all(store)
    run_turn(store, "recent", b"t", recent)
    settle_all(store)
    run_turn(store, "last", b"t", list(range(3000, 3150)))
    assert store.missing("old", b"t", old) == "expired"
    assert store.missing("recent", b"t", recent) == "below"
    assert store.missing("unknown", b"t", unknown) == "gone"
    assert store.missing("old", b"someone else", old) == "gone"
    run_turn(store, "old", b"t", old)
    settle_all(store)
    run_turn(store, "last", b"t", list(range(3000, 3150)))
    assert store.missing("old", b"t", old) == "below"
    store.close()


def test_an_empty_disk_is_a_tier_too(tmp_path):
    """What may be stored there is said before anything is."""
    store = tiered_store(tmp_path / "kv")
    assert (store.stats().disk_bytes, store.stats().disk_budget_bytes) == (0, 64 << 20)
    store.close()


@pytest.mark.parametrize(("host_pages", "written"), [(40, 2), (8, 4)], ids=["room", "half_full"])
def test_the_disk_rests_between_writes(tmp_path, monkeypatch, host_pages, written):
    """Others who use the disk get most of its time, but where host memory fills up or the server ends."""
    monkeypatch.setattr(offload, "WRITE_BYTES", 2 * PAGE_BYTES)
    monkeypatch.setattr(offload, "REST", 1e6)
    store = tiered_store(tmp_path / "kv", host_pages=host_pages)
    run_turn(store, "s", b"t", list(range(80)))  # 8 pages
    until_s = time.monotonic() + 0.3
    while time.monotonic() < until_s:
        assert store.tend(idle=True)  # there is more to do
    assert store.stats().written_pages == written
    assert not store.is_moving
    settle_all(store)
    assert store.stats().written_pages == store.stats().offloaded_pages
    store.close()


def test_the_disk_rests_longer_while_a_first_token_is_awaited(tmp_path, monkeypatch):
    """What makes a turn durable on the same disk does not wait for histories that are written there."""
    monkeypatch.setattr(offload, "WRITE_BYTES", 2 * PAGE_BYTES)
    monkeypatch.setattr(offload, "REST", 0.0)
    monkeypatch.setattr(offload, "REST_WHILE_AWAITED", 1e6)
    store = tiered_store(tmp_path / "kv")
    run_turn(store, "s", b"t", list(range(80)))  # 8 pages
    until_s = time.monotonic() + 0.2
    while time.monotonic() < until_s:
        assert store.tend(idle=True, is_awaited=True)
    assert store.stats().written_pages == 2
    deadline_s = time.monotonic() + 30
    while store.tend(idle=True):  # nobody waits any more
        assert time.monotonic() < deadline_s
    assert store.stats().written_pages == store.stats().offloaded_pages
    store.close()


def test_a_flipped_byte_on_disk_is_recomputed(tmp_path):
    """What the checksum refuses, and what lies behind it, is computed again; the rows before it are used."""
    store = tiered_store(tmp_path / "kv")
    tokens = list(range(150))
    run_turn(store, "s", b"t", tokens)
    settle_all(store)
    store.close()
    segment = max((tmp_path / "kv").rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0)
    data = bytearray(segment.read_bytes())
    data[len(data) // 2] ^= 1
    segment.write_bytes(data)
    store = tiered_store(tmp_path / "kv")
    assert 0 < returning_turn(store, "s", b"t", [*tokens, 3]) < 140
    store.close()


def test_a_promotion_nobody_waits_for_ends_by_itself():
    """A request that was cancelled meanwhile leaves no page behind."""
    tokens = list(range(150))
    store = pushed_out(tokens)
    promotion = store.promote("s", b"t", np.array(tokens, np.int32))
    store.end_promotion(promotion)
    while store.tend():
        store.check_integrity()
    store.check_integrity()
    assert returning_turn(store, "s", b"t", [*tokens, 9]) > 100
    store.close()


def test_two_who_ask_for_the_same_history_wait_for_one_copy():
    """A request that comes while its history is being warmed waits for that, and both leave it when they are done."""
    tokens = list(range(150))
    store = pushed_out(tokens)
    first = store.promote("s", b"t", np.array(tokens, np.int32))
    second = store.promote("s", b"t", np.array([*tokens, 1, 2], np.int32))
    assert second is first
    store.end_promotion(first)
    while not second.is_over:
        store.tend()
        store.check_integrity()
    assert store.tiers.promotions.counts.host == len(first.copies)
    store.end_promotion(second)
    store.check_integrity()
    assert run_turn(store, "s", b"t", [*tokens, 9]) > 100
    store.close()


def test_keys_depend_on_all_that_rows_depend_on():
    """Another token anywhere before, another tenant, model or layout gives another key; a longer path the same ones."""
    layout, tokens = make_layout(), np.arange(100, dtype=np.int32)
    keys = PageKeys(layout, b"model")
    path = keys.of_path(b"t", tokens)
    assert len(set(path)) == len(path) == layout.complete_pages(100)
    assert keys.of_path(b"t", tokens[:60]) == path[: layout.complete_pages(60)]
    changed = tokens.copy()
    changed[15] = 7
    first = next(i for i, pair in enumerate(zip(path, keys.of_path(b"t", changed), strict=True)) if pair[0] != pair[1])
    assert layout.tokens_to_fill(first) <= 15 < layout.tokens_to_fill(first + 1)
    assert not set(path) & set(keys.of_path(b"u", tokens))
    assert not set(path) & set(PageKeys(layout, b"other").of_path(b"t", tokens))
    assert not set(path) & set(PageKeys(make_layout(page_bytes=2 * PAGE_BYTES), b"model").of_path(b"t", tokens))


def test_host_memory_forgets_the_least_recently_used_page_that_nobody_holds():
    """A held page stays, whatever its age; with all of them held there is no room."""
    host = HostTier(PlainBuffers(3 * 16, 16))
    pages = [host.reserve(bytes([number]), 16) for number in range(3)]
    assert host.reserve(b"x", 16) is None
    for page in pages:
        host.fill(page)
    held = host.pin(bytes([0]))
    host.unpin(host.pin(bytes([1])))
    assert host.reserve(b"x", 16) is not None
    assert bytes([2]) not in host
    assert bytes([0]) in host
    host.unpin(held)
    host.check_integrity()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_coming_and_going_leaves_every_row_right(tmp_path_factory, data):
    """Turns, branches, idle moments, restarts in any order in little memory: rows are right and the books whole."""
    come_and_go(tmp_path_factory.mktemp("kv") / "kv", data)


@pytest.mark.soak
@settings(max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_coming_and_going_for_long(tmp_path_factory, data):
    """The same, more often."""
    come_and_go(tmp_path_factory.mktemp("kv") / "kv", data)


def come_and_go(path, data):
    """A store's life, told by `data`."""
    directory = path if data.draw(st.booleans()) else None
    host_pages = data.draw(st.sampled_from([4, 20, 200]))
    store = tiered_store(directory, host_pages=host_pages, max_ranges=3)
    paths = {f"s{i}": [i % 2, *range(data.draw(st.integers(1, 60)))] for i in range(4)}
    for _ in range(data.draw(st.integers(5, 25))):
        action = data.draw(st.sampled_from(["turn", "turn", "turn", "branch", "idle", "restart"]))
        session_id = data.draw(st.sampled_from(sorted(paths)))
        path = paths[session_id]
        if action == "restart":
            store.flush(time.monotonic() + data.draw(st.sampled_from([0.0, 5.0])))
            store.close()
            store = tiered_store(directory, host_pages=host_pages, max_ranges=3)
        elif action == "idle":
            store.tend(idle=True)
        else:
            if action == "branch":
                del path[data.draw(st.integers(1, len(path))) :]
            path += data.draw(st.lists(st.integers(0, 2), min_size=1, max_size=30))
            del path[140:]
            returning_turn(store, session_id, b"t", path)
        store.check_integrity()
    store.flush(time.monotonic() + 5)
    store.check_integrity()
    store.close()


def test_a_store_without_host_memory_for_a_page_says_so():
    """Less than a page of host memory is an error that names it."""
    with pytest.raises(ValueError, match="buffers"):
        tiered_store(host_pages=0)
