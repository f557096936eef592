"""Prepares evictions off the step's path: a thread that reads changed records, learns when people return, and plans.

`ReturnModel` learns from sessions' pauses how likely a return is; `EvictionPlanner` gives its policy a new `Plan` each
second. Neither touches the store, but for asking which sessions hold pages.
"""

from __future__ import annotations

import logging
import math
import random
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvstore.policy import AGE_EDGES_S, NUM_BINS, PRIOR_HAZARD, Outlook, Plan, ReturnPolicy
from kvstore.records import SessionRecord, SessionRecords

logger = logging.getLogger(__name__)

PERIOD_S = 1.0
OVERLAP_S = 2.0  # records are written a moment after they are dated, and clocks differ
HISTORY_S = 86_400.0  # how far back the first pass looks
STOP_TIMEOUT_S = 5.0

MAX_FOLLOWED = 4096  # sessions whose pauses are learned from at one time
MEMORY_S = 3600.0  # what was seen this long ago counts 1/e
REFIT_S = 10.0

TURN_BUCKETS = 8  # 1, 2, ... 8 and more turns
TOKEN_BUCKETS = 12  # up to 256 tokens, 512, ... from 2**18 on
PRESENCES = 3  # away, connected, typing
PRIOR_PRESENCE = (1.0, 2.0, 20.0)  # how much more they return, before anything was learned
MIN_PRESENCE_STEP = 1.1  # and at least, whatever was learned
PRIOR_COUNT = 1.0  # returns that a prior weighs as much as, in each bin and each bucket
FIT_ROUNDS = 4

PRIOR_PAUSE_S = 60.0
MAX_PAUSE_S = 3600.0  # who comes back the next day says nothing about how quickly anybody thinks
PACE_PRIOR_COUNT = 5.0  # pauses of the average person that a person's own are weighed against
MAX_PACE_COUNT = 5  # a running average knows no more pauses than that

PINNED_WEIGHT = 1e30  # above all that is not pinned, and still in order among themselves
PRIORITY_FACTOR = 4.0  # a level of priority
MAX_PRIORITY = 8

Array = npt.NDArray[np.float64]
SHAPE = (TURN_BUCKETS, TOKEN_BUCKETS, PRESENCES, NUM_BINS)
WIDTHS_S = np.diff(AGE_EDGES_S)
PRIOR = (PRIOR_HAZARD[:-1] + PRIOR_HAZARD[1:]) / 2


@dataclass(frozen=True, slots=True)
class Pause:
    """A pause that goes on: since when, and from which age on in this cell. Ages are divided by the person's pace."""

    active_s: float
    turns: int
    cell: int
    pace: float
    entered_age: float


class ReturnModel:
    """How likely a session returns, by age, turns, tokens and presence: a hazard for each bin of age times factors.

    Returns and the time spent waiting for them are counted by cell and bin of age; a pause that is not over counts the
    time it lasted. So nothing is assumed about the shape of pauses, and sessions that never return are seen for what
    they are. Counts fade over MEMORY_S, few of them weigh less than the prior (gamma priors), and ages are in units of
    the person's own pace. Up to `max_followed` sessions are followed, whether they hold pages or not: what is learned
    must not depend on what was evicted. Beyond that a newcomer replaces one drawn by lot, which biases nothing.
    """

    def __init__(self, *, max_followed: int = MAX_FOLLOWED, memory_s: float = MEMORY_S) -> None:
        self._max_followed = max_followed
        self._memory_s = memory_s
        self._lots = random.Random(0)  # the same lots each time, so that runs can be repeated
        self._pauses: dict[str, Pause] = {}
        self._ids: list[str] = []
        self._returns = np.zeros((math.prod(SHAPE[:3]), NUM_BINS))
        self._waited = np.zeros((math.prod(SHAPE[:3]), NUM_BINS))
        self._pause_s, self._num_pauses = 0.0, 0.0
        self._fitted_s: float | None = None
        self._draw(self._waited)

    @property
    def num_followed(self) -> int:
        """Sessions whose pauses are watched."""
        return len(self._pauses)

    def observe(self, record: SessionRecord, now_s: float) -> None:
        """A record as it is now; an unchanged one does no harm."""
        pause = self._pauses.get(record.session_id)
        if record.turns < 1:
            return  # opened, nothing said yet: no pause between turns
        if pause is None:
            self._admit(record.session_id, now_s)
            age = max(0.0, now_s - record.last_activity_s) / self.pace_of(record)
            self._pauses[record.session_id] = self._pause_of(record, age)  # of the time before, nothing is known
        elif record.last_activity_s > pause.active_s or record.turns > pause.turns:
            self._end(pause, record.last_activity_s, returned=record.turns > pause.turns)
            self._pauses[record.session_id] = self._pause_of(record, 0.0)
        elif cell_of(record) != pause.cell:
            age = self._end(pause, now_s, returned=False)
            self._pauses[record.session_id] = self._pause_of(record, age)

    def refit(self, now_s: float) -> None:
        """Draw the curves anew from what was counted."""
        self._fade(now_s)
        self._draw(self._waited + self._still_waiting(now_s))

    def outlook(self, record: SessionRecord) -> Outlook:
        """What to expect of the session that the record describes."""
        weight = PRIORITY_FACTOR ** max(-MAX_PRIORITY, min(record.priority, MAX_PRIORITY))
        weight *= PINNED_WEIGHT if record.pinned else 1.0
        return Outlook(record.last_activity_s, self._curve(cell_of(record)), self.pace_of(record), weight)

    def pace_of(self, record: SessionRecord) -> float:
        """How many times as long as the average this person pauses; near 1 while few pauses are known."""
        average_s = (PRIOR_PAUSE_S + self._pause_s) / (1.0 + self._num_pauses)
        known = min(max(record.turns - 1, 0), MAX_PACE_COUNT) if record.think_time_s > 0 else 0
        own_s = min(record.think_time_s, MAX_PAUSE_S)
        return (known * own_s / average_s + PACE_PRIOR_COUNT) / (known + PACE_PRIOR_COUNT)

    def _draw(self, waited: Array) -> None:
        self._hazard, self._factors = _fit(self._returns.reshape(SHAPE), waited.reshape(SHAPE))
        self.stranger = worth_of(_by_age(self._returns.sum(0), waited.sum(0)))
        self._curves: dict[int, tuple[float, ...]] = {}

    def _admit(self, session_id: str, now_s: float) -> None:
        if len(self._ids) < self._max_followed:
            self._ids.append(session_id)
            return
        place = self._lots.randrange(len(self._ids))
        left = self._pauses.pop(self._ids[place])
        self._end(left, now_s, returned=False)
        self._ids[place] = session_id

    def _pause_of(self, record: SessionRecord, entered_age: float) -> Pause:
        return Pause(record.last_activity_s, record.turns, cell_of(record), self.pace_of(record), entered_age)

    def _end(self, pause: Pause, end_s: float, *, returned: bool) -> float:
        """Count a pause up to `end_s`; returns the age then."""
        pause_s = max(0.0, end_s - pause.active_s)
        age = max(pause_s / pause.pace, pause.entered_age)
        self._waited[pause.cell] += _time_in_bins(np.array([pause.entered_age]), np.array([age]))[0]
        if returned:
            self._returns[pause.cell, min(int(np.searchsorted(AGE_EDGES_S, age, "right")) - 1, NUM_BINS - 1)] += 1
            self._pause_s += min(pause_s, MAX_PAUSE_S)
            self._num_pauses += 1
        return age

    def _still_waiting(self, now_s: float) -> Array:
        """Time that the pauses which are not over have lasted, by cell and bin."""
        waited = np.zeros_like(self._waited)
        if self._pauses:
            rows = [(p.active_s, p.pace, p.entered_age, p.cell) for p in self._pauses.values()]
            active_s, pace, entered, cell = np.array(rows).T
            times = _time_in_bins(entered, np.maximum((now_s - active_s) / pace, entered))
            since_s = np.maximum((now_s - active_s)[:, None] - pace[:, None] * AGE_EDGES_S[1:], 0.0)
            np.add.at(waited, cell.astype(np.int64), times * np.exp(-since_s / self._memory_s))
        return waited

    def _fade(self, now_s: float) -> None:
        if self._fitted_s is not None:
            kept = math.exp(-max(0.0, now_s - self._fitted_s) / self._memory_s)
            self._returns *= kept
            self._waited *= kept
            self._pause_s, self._num_pauses = self._pause_s * kept, self._num_pauses * kept
        self._fitted_s = now_s

    def _curve(self, cell: int) -> tuple[float, ...]:
        if cell not in self._curves:
            turns, tokens, presence = np.unravel_index(cell, SHAPE[:3])
            factor = self._factors[0][turns] * self._factors[1][tokens] * self._factors[2][presence]
            self._curves[cell] = worth_of(self._hazard * factor)
        return self._curves[cell]


class EvictionPlanner:
    """Gives `policy` a new plan each `period_s`, from `records` and the sessions that `holders` says hold pages.

    A pass reads the records changed since the last one, keeps those of holders, and swaps the plan in whole: whoever
    ranks leaves meanwhile sees the old plan or the new one, and takes no lock. While records cannot be read, plans go
    on with the last values known. `run_once` is one pass; `start` runs them on a thread.
    """

    def __init__(
        self,
        records: SessionRecords,
        holders: Callable[[], Iterable[str]],
        policy: ReturnPolicy,
        *,
        period_s: float = PERIOD_S,
        clock: Callable[[], float] = time.time,
        model: ReturnModel | None = None,
    ) -> None:
        self._records = records
        self._holders = holders
        self._policy = policy
        self._period_s = period_s
        self._clock = clock
        self._model = model or ReturnModel()
        self._kept: dict[str, SessionRecord] = {}
        self._outlooks: dict[str, Outlook] = {}
        self._known_until_s = -math.inf
        self._refit_s = -math.inf
        self._away = False
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Make plans from now on; once only."""
        assert self._thread is None, "the planner was started before"
        self._thread = threading.Thread(target=self._run, name="kvstore-planner", daemon=True)
        self._thread.start()

    def stop(self, timeout_s: float = STOP_TIMEOUT_S) -> bool:
        """Make no more plans; False when the thread still waits for records after `timeout_s`. Harmless to repeat."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join(timeout_s)
        return self._thread is None or not self._thread.is_alive()

    def run_once(self) -> None:
        """Read what changed, learn from it, and give the policy its next plan. Raises nothing that records raise."""
        now_s = self._clock()
        changed = [record for record in self._changed(now_s) if record.last_activity_s > 0]  # else it tells no age yet
        for record in changed[-MAX_FOLLOWED:]:  # the newest: more would only replace each other
            self._model.observe(record, now_s)
        self._keep(changed)
        self._expect(now_s, changed)
        self._policy.plan = Plan(dict(self._outlooks), self._model.stranger, self._known_until_s)

    def _expect(self, now_s: float, changed: Iterable[SessionRecord]) -> None:
        """An outlook for each record kept: for the changed ones, and for all when the model has learned."""
        stale = [record for record in changed if record.session_id in self._kept]
        if now_s >= self._refit_s + REFIT_S:
            self._model.refit(now_s)
            self._refit_s, stale = now_s, list(self._kept.values())
        for record in stale:
            self._outlooks[record.session_id] = self._model.outlook(record)

    def _run(self) -> None:
        while not self._stopping.is_set():
            self.run_once()
            self._stopping.wait(self._period_s)

    def _changed(self, now_s: float) -> list[SessionRecord]:
        since_s = max(self._known_until_s, now_s - HISTORY_S)
        try:
            changed = self._records.changed_since(since_s)
        except Exception as error:  # noqa: BLE001 - any store may be behind it; plans go on without it
            self._note_away(error)
            return []
        if self._away:
            logger.info("session records can be read again")
        self._away = False
        if changed:  # none may also mean that the source is away and does not say so
            self._known_until_s = now_s - OVERLAP_S
        return changed

    def _note_away(self, error: Exception) -> None:
        if not self._away:
            logger.warning("session records cannot be read, evictions go by the last ones known: %s", error)
        self._away = True

    def _keep(self, changed: Iterable[SessionRecord]) -> None:
        """The newest record of each session that holds pages, and of no other."""
        holders = set(self._holders())
        for session_id in self._kept.keys() - holders:
            del self._kept[session_id], self._outlooks[session_id]
        self._kept |= {record.session_id: record for record in changed if record.session_id in holders}


def cell_of(record: SessionRecord) -> int:
    """In which cell of the model a session is: by its turns, its tokens, and whether its person is there."""
    turns = min(max(record.turns, 1), TURN_BUCKETS) - 1
    tokens = min(max(record.tokens.bit_length() - 8, 0), TOKEN_BUCKETS - 1)
    presence = 2 if record.typing else int(record.connected)
    return (turns * TOKEN_BUCKETS + tokens) * PRESENCES + presence


def worth_of(hazard: Array) -> tuple[float, ...]:
    """The value of keeping by age, at the edges, from returns per second in each bin.

    It is the best that waiting can give: the most returns per second of waiting over any time from now on (Gittins'
    index), so a return that is due soon counts before its time. Never more for the older of two that are alike: it
    would be kept for a return that the younger one will still make.
    """
    spent = np.concatenate(([0.0], np.cumsum(hazard * WIDTHS_S)))[:-1]
    reached = np.triu(np.exp(-np.maximum(spent[None, :] - spent[:, None], 0.0)))  # [from, to]: not back before
    returned = reached * -np.expm1(-hazard * WIDTHS_S)
    waited = np.cumsum(returned / hazard, axis=1)
    rates = np.divide(np.cumsum(returned, axis=1), waited, out=np.zeros_like(waited), where=waited > 0.0)
    best = np.append(rates.max(axis=1), hazard[-1])
    falling = np.maximum.accumulate(best[::-1])[::-1]
    return tuple((falling * _TIE_BREAK).tolist())


_TIE_BREAK = 1.0 - 1e-6 * np.arange(NUM_BINS + 1)  # where nothing else differs, the older one goes first


def _fit(returns: Array, waited: Array) -> tuple[Array, list[Array]]:
    """Hazard by bin, and a factor for each bucket of turns, tokens and presence, by alternating between them.

    Arrays are [turns, tokens, presence, bin]. Each is (returns + prior) / (expected + prior): few counts change little.
    """
    priors = [np.ones(TURN_BUCKETS), np.ones(TOKEN_BUCKETS), np.array(PRIOR_PRESENCE)]
    factors = list(priors)
    for _ in range(FIT_ROUNDS):
        weighted = waited * _cells(factors)[..., None]
        hazard = _by_age(returns.sum((0, 1, 2)), weighted.sum((0, 1, 2)))
        for axis, prior in enumerate(priors):
            others = tuple({0, 1, 2} - {axis})
            expected = (waited @ hazard * _cells(factors)).sum(others) / factors[axis]
            factors[axis] = (returns.sum((*others, 3)) + PRIOR_COUNT * prior) / (expected + PRIOR_COUNT)
        factors[2] = _rising(factors[2])
    return hazard, factors


def _by_age(returns: Array, waited: Array) -> Array:
    """Returns per second in each bin of age, arrays [bin].

    What few have reached is taken to go on as the ages before it: with the same chance of a return for each doubling of
    the age, not with that of the prior, which would promise much to those who have long been gone.
    """
    hazard, level = np.empty(NUM_BINS), 1.0
    for place, prior in enumerate(PRIOR):
        hazard[place] = (returns[place] + PRIOR_COUNT) / (waited[place] + PRIOR_COUNT / (level * prior))
        level = hazard[place] / prior
    return hazard


def _cells(factors: list[Array]) -> Array:
    """The product of a cell's three factors, [turns, tokens, presence]."""
    turns, tokens, presence = factors
    return turns[:, None, None] * tokens[:, None] * presence


def _rising(presence: Array) -> Array:
    """Whoever is there counts more than whoever is not, and whoever types most."""
    steps = MIN_PRESENCE_STEP ** np.arange(PRESENCES)
    raised: Array = np.maximum.accumulate(presence / steps) * steps
    return raised


def _time_in_bins(start: Array, end: Array) -> Array:
    """How much of each age range [start, end), arrays [n], falls into each bin: [n, NUM_BINS]."""
    edges = AGE_EDGES_S[:-1]
    return np.clip(end[:, None] - edges, 0.0, WIDTHS_S) - np.clip(start[:, None] - edges, 0.0, WIDTHS_S)
