"""A deleted history leaves every tier, also over a restart; what others share stays for them."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvstore.arrays import common_prefix
from kvstore.forgetting import names_of
from kvstore.keys import PageKeys
from tests.kvstore.fakes import make_layout, make_store, run_turn
from tests.kvstore.test_disk import key_of, open_tier, payload_of, put, read, right_records
from tests.kvstore.test_tiers import bring_back, returning_turn, settle_all, tiered_store


def forget(store, session_id, tokens, num_kept=0):
    """Forget to the end."""
    store.forget(session_id, b"t", tokens, num_kept)
    deadline_s = time.monotonic() + 10
    while store.tend():
        assert time.monotonic() < deadline_s
    store.check_integrity()


def held(store, tokens):
    """Tokens of a history that anything of the store would give."""
    return sum(store.held_tokens("nobody", b"t", tokens).values())


def test_a_forgotten_history_is_in_no_tier(tmp_path):
    """Nothing of it is found on the device, in host memory, on disk, or after a restart; another's is."""
    store = tiered_store(tmp_path / "kv", pages=40)
    mine, other = list(range(150)), list(range(1000, 1100))
    run_turn(store, "mine", b"t", mine[:70])
    run_turn(store, "mine", b"t", mine)
    run_turn(store, "other", b"t", other)
    settle_all(store)
    assert held(store, mine) > 140
    forget(store, "mine", mine)
    assert (held(store, mine), store.resident_tokens("mine")) == (0, 0)
    assert not any(key in store.tiers.host for key in store.tiers.keys.of_path(b"t", np.arange(150, dtype=np.int32)))
    store.close()
    store = tiered_store(tmp_path / "kv", pages=40)
    assert bring_back(store, "mine", b"t", mine) == 0
    assert returning_turn(store, "other", b"t", [*other, 3]) == 100
    store.close()


def test_what_others_share_stays(tmp_path):
    """The prefix that the caller says is shared is kept on every tier, also where others are away."""
    store = tiered_store(tmp_path / "kv", pages=40)
    shared = list(range(60))
    mine, other = [*shared, *range(500, 560)], [*shared, *range(700, 760)]
    run_turn(store, "mine", b"t", mine)
    run_turn(store, "other", b"t", other)
    settle_all(store)
    store.drop_session("other")
    forget(store, "mine", mine, num_kept=60)
    assert held(store, mine) <= 60
    store.close()
    store = tiered_store(tmp_path / "kv", pages=40)
    assert returning_turn(store, "other", b"t", [*other, 3]) == 120
    store.close()


def test_what_the_index_knows_to_be_shared_stays():
    """A page below which another path goes on is kept, whatever the caller knows of it."""
    store = make_store(pages=64)
    shared = list(range(60))
    run_turn(store, "mine", b"t", [*shared, *range(500, 560)])
    run_turn(store, "other", b"t", [*shared, *range(700, 760)])
    forget(store, "mine", [*shared, *range(500, 560)])
    assert run_turn(store, "other", b"t", [*shared, *range(700, 760), 1]) == 120
    assert run_turn(store, "again", b"t", [*shared, *range(500, 560)]) == 60
    store.close()


def test_a_history_on_its_way_down_is_caught(tmp_path):
    """What is just being copied when it is to be forgotten does not turn up below afterwards."""
    for delay in range(12):
        store = tiered_store(tmp_path / f"kv{delay}", pages=40)
        tokens = list(range(150))
        run_turn(store, "s", b"t", tokens)
        for _ in range(delay):
            store.tend(idle=True)
            time.sleep(0.0002)
        store.forget("s", b"t", tokens, 0)
        settle_all(store)
        assert held(store, tokens) == 0
        store.close()


def test_names_are_those_of_pages_and_tails():
    """Every page behind what is kept, and every tail a turn may have left there, is named once."""
    layout, tokens = make_layout(), np.arange(100, dtype=np.int32)
    keys = PageKeys(layout, b"model")
    pages = keys.of_path(b"t", tokens)
    for num_kept in (0, 1, 40, 99, 100):
        names = list(names_of(keys, layout, b"t", tokens, num_kept))
        assert len(set(names)) == len(names)
        assert set(pages[layout.complete_pages(num_kept) :]) <= set(names)
        assert not set(pages[: layout.complete_pages(num_kept)]) & set(names)
    first = keys.first_token(3)
    assert keys.tail(pages[2], tokens[first : first + 1]) in names_of(keys, layout, b"t", tokens, 0)


@pytest.mark.parametrize("count", [5, 60])
def test_erased_records_stay_away(tmp_path, count):
    """Erased records are gone after a restart too, byte for byte; the rest is right, and the files take new records."""
    with open_tier(tmp_path / "pages") as tier:
        assert put(tier, *range(count))
        doomed = {key_of(number) for number in range(0, count, 2)}
        assert tier.erase(doomed) == len(doomed)
        assert right_records(tier) == count // 2
    with open_tier(tmp_path / "pages") as tier:
        assert not any(tier.contains(key) for key in doomed)
        assert tier.verify().bad == []
        assert put(tier, 1000, 1001)
        assert right_records(tier) == count // 2 + 2
    data = b"".join(file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())
    assert not any(payload_of(key)[:64] in data for key in doomed)
    assert payload_of(key_of(1))[:64] in data
    with open_tier(tmp_path / "pages") as tier:
        assert read(tier, key_of(0)) is None
        assert tier.stats().rejected == {}


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_forgetting_at_any_time_leaves_the_rest_right(tmp_path_factory, data):
    """Turns, idle moments, restarts and deletions in any order: what is deleted is gone, all other rows are right."""
    forget_now_and_then(tmp_path_factory.mktemp("kv") / "kv", data)


@pytest.mark.soak
@settings(max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_forgetting_at_any_time_for_long(tmp_path_factory, data):
    """The same, more often."""
    forget_now_and_then(tmp_path_factory.mktemp("kv") / "kv", data)


def forget_now_and_then(directory, data):
    """A store's life, told by `data`, in which sessions are deleted."""
    host_pages = data.draw(st.sampled_from([4, 20, 200]))
    store = tiered_store(directory, host_pages=host_pages, max_ranges=3)
    paths = {f"s{number}": [number % 2, *range(data.draw(st.integers(1, 40)))] for number in range(4)}
    for _ in range(data.draw(st.integers(5, 25))):
        action = data.draw(st.sampled_from(["turn", "turn", "turn", "idle", "forget", "forget", "restart"]))
        session_id = data.draw(st.sampled_from(sorted(paths)))
        path = paths[session_id]
        if action == "turn":
            path += data.draw(st.lists(st.integers(0, 2), min_size=1, max_size=30))
            del path[140:]
            returning_turn(store, session_id, b"t", path)
        elif action == "idle":
            store.tend(idle=True)
        elif action == "forget":
            store.forget(session_id, b"t", path, shared_with_others(paths, session_id))
        else:
            store.flush(time.monotonic() + 5)
            store.close()
            store = tiered_store(directory, host_pages=host_pages, max_ranges=3)
        store.check_integrity()
    session_id = data.draw(st.sampled_from(sorted(paths)))
    store.forget(session_id, b"t", paths[session_id], num_kept := shared_with_others(paths, session_id))
    settle_all(store)
    assert held(store, paths[session_id]) <= num_kept
    store.close()


def shared_with_others(paths, session_id):
    """How many tokens another session begins with too."""
    mine = np.array(paths[session_id], np.int32)
    return max(common_prefix(mine, np.array(path, np.int32)) for other, path in paths.items() if other != session_id)
