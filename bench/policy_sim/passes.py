"""How long a pass of the planner takes with many records in the source and few sessions that hold pages."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, replace
from statistics import median

from kvstore.planner import REFIT_S, EvictionPlanner
from kvstore.policy import ReturnPolicy, TokenCosts
from kvstore.records import SessionRecord

from .replay import Clock

NUM_PASSES = 50


@dataclass(frozen=True)
class Passes:
    """Milliseconds of the first pass, which reads all, and of later ones; those that learn are the longest."""

    first_ms: float
    median_ms: float
    longest_ms: float

    def __str__(self) -> str:
        return f"first {self.first_ms:.0f} ms, then median {self.median_ms:.1f} ms, longest {self.longest_ms:.1f} ms"


class ManyRecords:
    """A source in order of change, as a sorted set gives it."""

    def __init__(self, num_records: int, clock: Clock) -> None:
        self._clock = clock
        self._records = {f"s{number}": _record(number) for number in range(num_records)}
        self._changed = list(self._records.values())

    def change(self, session_ids: list[str]) -> None:
        """A turn of each of these begins now."""
        self._changed = []
        for session_id in session_ids:
            old = self._records[session_id]
            self._records[session_id] = replace(old, turns=old.turns + 1, last_activity_s=self._clock())
            self._changed.append(self._records[session_id])

    def changed_since(self, time_s: float) -> list[SessionRecord]:
        """All at first, then what `change` was last called with."""
        return self._changed


def measure_passes(num_records: int = 100_000, num_holders: int = 2000, changed_per_pass: int = 100) -> Passes:
    """Passes a second apart in simulated time, each after some turns of sessions drawn by lot."""
    clock, lots = Clock(1e6), random.Random(0)
    records, policy = ManyRecords(num_records, clock), ReturnPolicy(TokenCosts.flat(131_072, 25_000.0))
    holders = [f"s{number}" for number in range(num_holders)]
    planner = EvictionPlanner(records, lambda: holders, policy, clock=clock)
    first_ms = _pass_ms(planner)
    later = []
    for _ in range(max(NUM_PASSES, int(3 * REFIT_S))):
        clock.now_s += 1.0
        anybody = [f"s{lots.randrange(num_records)}" for _ in range(changed_per_pass // 2)]
        records.change(anybody + lots.sample(holders, changed_per_pass // 2))
        later.append(_pass_ms(planner))
    return Passes(first_ms, median(later), max(later))


def _pass_ms(planner: EvictionPlanner) -> float:
    start_s = time.perf_counter()
    planner.run_once()
    return (time.perf_counter() - start_s) * 1000


def _record(number: int) -> SessionRecord:
    return SessionRecord(
        f"s{number}", 1e6 - number % 3600, 1 + number % 9, 2 ** (8 + number % 11), 30.0 + number % 60,
        connected=number % 2 == 0, typing=False, priority=0, pinned=False, owner="bench",
    )  # fmt: skip
