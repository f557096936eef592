"""Readers are woken at once when few, and in turns, with what has gathered, when many."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest

from chatserve.engine.pacing import MAX_INTERVAL_S, NUM_PHASES, Pacing


def seen(pacing: Pacing, readers: range, woken: Counter[int]) -> None:
    """Something new for each of these readers."""
    for reader in readers:
        pacing.wake(reader, lambda reader=reader: woken.update([reader]))


@pytest.mark.parametrize(("readers", "interval_s"), [(1, 0.0), (12, 0.0), (100, 0.04), (5000, MAX_INTERVAL_S)])
async def test_interval_by_readers(readers: int, interval_s: float) -> None:
    """A few readers never wait, many wait longer, up to a bound; those that ended do not count."""
    pacing = Pacing()
    seen(pacing, range(readers), Counter())
    assert pacing.interval_s == pytest.approx(interval_s)
    for reader in range(readers):
        pacing.forget(reader)
    assert pacing.interval_s == 0.0


async def test_few_readers_are_woken_every_time() -> None:
    """Nothing gathers on a calm server."""
    pacing, woken = Pacing(), Counter[int]()
    for _ in range(5):
        seen(pacing, range(3), woken)
    assert set(woken.values()) == {5}


async def test_many_readers_are_woken_at_once_the_first_time_and_then_in_turns() -> None:
    """Each of many readers sees its first token at once, later ones together, and none is forgotten."""
    pacing, woken = Pacing(), Counter[int]()
    seen(pacing, range(100), woken)
    assert set(woken.values()) == {1}
    for _ in range(10):
        seen(pacing, range(100), woken)
    late = len([reader for reader in range(100) if woken[reader] == 1])
    assert late > 80
    async with asyncio.timeout(5):
        while any(woken[reader] < 2 for reader in range(12, 100)):
            await asyncio.sleep(0.005)
    assert max(woken[reader] for reader in range(12, 100)) == 2


async def test_those_who_begin_together_do_not_go_on_together() -> None:
    """Of readers that began in one moment no turn wakes more than its share."""
    pacing, turns = Pacing(), list[int]()
    for _ in range(2):
        for reader in range(80):
            pacing.wake(reader, lambda: turns.append(pacing._phase))
    num_at_once = len(turns)
    async with asyncio.timeout(5):
        while len(turns) < 160:
            await asyncio.sleep(0.005)
    assert num_at_once < 80 + 13  # the first ones were few still
    assert max(Counter(turns[num_at_once:]).values()) <= 80 / NUM_PHASES


async def test_a_reader_that_has_ended_is_not_woken() -> None:
    """What had gathered for it goes with it."""
    pacing, woken = Pacing(), Counter[int]()
    seen(pacing, range(50), woken)
    seen(pacing, range(50), woken)
    pacing.forget(49)
    await asyncio.sleep(0.1)
    assert woken[49] == 1
    assert woken[48] == 2
