"""What is brought back, in which parts, and what is rather computed; and what eviction leaves for later."""

from __future__ import annotations

import time
from threading import Event

import numpy as np
import pytest

from kvstore import KVStore, tiers
from kvstore.transfer import FileTransfers
from tests.kvstore.fakes import PAGE_BYTES, run_turn
from tests.kvstore.test_tiers import pushed_out, returning_turn, settle_all, tiered_store

TOKENS = list(range(150))  # 14 complete pages and a tail


def promote(store: KVStore, tokens: list[int] = TOKENS):
    """Begin to bring back what there is of these tokens."""
    return store.promote("s", b"t", np.array(tokens, np.int32))


def until_over(store: KVStore, promotion) -> None:
    """Tick until all of it has come."""
    while not promotion.is_over:
        store.tend()
        store.check_integrity()


def test_each_batch_is_used_when_it_has_arrived(monkeypatch):
    """The index has the first pages while the last ones are still being copied, and in the end all of them."""
    monkeypatch.setattr(FileTransfers, "batch_bytes", 2 * PAGE_BYTES)
    store = pushed_out(TOKENS)
    promotion = promote(store)
    seen = set()
    while not promotion.is_over:
        store.tend()
        store.check_integrity()
        seen.add(promotion.num_arrived)
        complete = min(promotion.num_arrived, len(promotion.pages) - promotion.has_tail)
        held = store.held_tokens("s", b"t", TOKENS)["device"]
        assert held >= store.layout.complete_tokens(len(promotion.before) + complete)
    assert promotion.num_arrived == len(promotion.pages)
    assert all(count % 2 == 0 or count == len(promotion.pages) for count in seen)
    store.end_promotion(promotion)
    assert returning_turn(store, "s", b"t", [*TOKENS, 5]) == 150
    store.close()


def test_a_long_history_comes_in_parts(monkeypatch):
    """One promotion brings a bounded part and says whether something is left; the next goes on behind it."""
    monkeypatch.setattr(FileTransfers, "batch_bytes", PAGE_BYTES)
    monkeypatch.setattr(tiers, "PART_BATCHES", 4)
    store = pushed_out(TOKENS)
    parts = []
    while (promotion := promote(store)) is not None:
        until_over(store, promotion)
        while store.is_moving:  # what is on its way down is held, and this device has few pages
            store.tend()
        parts.append(promotion)
    assert [len(part.pages) for part in parts[:-1]] == [4] * (len(parts) - 1)
    assert len(parts) > 2
    assert [part.is_last for part in parts] == [False] * (len(parts) - 1) + [True]
    for part in parts:
        store.end_promotion(part)
    assert returning_turn(store, "s", b"t", [*TOKENS, 5]) == 150
    store.close()


def test_what_is_computed_sooner_is_not_brought_back():
    """Where host memory gives a token more slowly than it is computed, nothing is copied."""
    store = pushed_out(TOKENS)
    store.note_computed(1000, 0.001)
    store.note_computed(10, 0.0)
    for count in (1, 2):
        store.tiers.promotions.host_cost.observe(count, float(count))
    assert promote(store) is None
    store.close()


@pytest.mark.parametrize(("disk_page_s", "expected"), [(10.0, 7), (1e-7, 15)], ids=["slow_disk", "fast_disk"])
def test_a_slow_disk_leaves_its_part_to_be_computed(tmp_path, disk_page_s, expected):
    """What lies in host memory is brought back; what has to be read is where that is sooner, else it is computed."""
    store = tiered_store(tmp_path / "kv", host_pages=30, pages=24)
    run_turn(store, "s", b"t", TOKENS)
    settle_all(store)
    keys = store.tiers.keys.of_path(b"t", np.array(TOKENS, np.int32))
    store.forget("nobody", b"t", [], 0)
    for page in list(store.tiers.host._pages.values()):
        if page.key not in keys[:7]:
            store.tiers.host.forget(page.key)
    store._residency.evict(100)
    store.note_computed(1000, 1.0)
    store.note_computed(10, 0.01)
    for count in (1, 2):
        store.tiers.promotions.host_cost.observe(count, count * 1e-7)
        store.tiers.promotions.disk_cost.observe(count, count * disk_page_s)
    promotion = promote(store)
    assert len(promotion.pages) == expected
    until_over(store, promotion)
    store.end_promotion(promotion)
    store.close()


@pytest.mark.parametrize("failing", [None, 5], ids=["whole", "one_bad"])
def test_pages_go_up_while_others_are_read(tmp_path, monkeypatch, failing):
    """What was read is in the index while the disk is still busy; behind a page that was read badly nothing comes."""
    monkeypatch.setattr(FileTransfers, "batch_bytes", 2 * PAGE_BYTES)
    store = tiered_store(tmp_path / "kv")
    run_turn(store, "s", b"t", TOKENS)
    settle_all(store)
    store.close()
    store = tiered_store(tmp_path / "kv", pages=24)
    store.tiers.promotions.disk_cost.observe(1, 1e-6)  # a disk that is known: several batches at a time
    keys, read, may_go_on = store.tiers.keys.of_path(b"t", np.array(TOKENS, np.int32)), store.tiers.disk.read, Event()

    def read_slowly(key, buffer):
        number = keys.index(key)
        assert number < 4 or may_go_on.wait(10)
        return None if number == failing else read(key, buffer)

    monkeypatch.setattr(store.tiers.disk, "read", read_slowly)
    promotion = promote(store)
    assert len(promotion.unread) == 8
    deadline_s = time.monotonic() + 10
    while promotion.num_arrived < 4 and time.monotonic() < deadline_s:
        store.tend()
        store.check_integrity()
    assert (promotion.num_arrived, promotion.is_over) == (4, False)
    may_go_on.set()
    until_over(store, promotion)
    assert promotion.num_arrived == (8 if failing is None else failing)
    assert promotion.failure == (None if failing is None else "read_failed")
    store.end_promotion(promotion)
    store.check_integrity()
    store.close()


def test_a_copy_that_takes_too_long_is_not_waited_for(monkeypatch):
    """After the time in which the rows could have been computed, the one who asked goes on alone."""
    monkeypatch.setattr(tiers, "PATIENCE_S", 0.02)
    store = pushed_out(TOKENS)
    store.note_computed(100, 0.001)
    promotion = promote(store)
    assert promotion.is_awaited
    time.sleep(0.05)
    assert not promotion.is_over  # nobody has looked since
    assert not promotion.is_awaited
    until_over(store, promotion)
    store.end_promotion(promotion)
    store.close()


def test_pages_that_lie_below_too_are_evicted_first():
    """A history that is saved goes before one that is not, although it was used later."""
    store = tiered_store(pages=40)
    lost = [900, *range(100)]
    run_turn(store, "lost", b"t", lost)
    store.tiers.offloads._to_offload.clear()  # as if its turn had not come yet
    run_turn(store, "s", b"t", TOKENS)
    settle_all(store)
    for other in range(2):
        run_turn(store, f"o{other}", b"t", [2000 + other, *range(90)])
    assert store.held_tokens("lost", b"t", lost)["device"] == 101
    assert store.held_tokens("s", b"t", TOKENS)["device"] < 150
    store.close()
