"""The planner: what it reads, keeps, learns and survives."""

from __future__ import annotations

import itertools
import logging
import math
import threading
from dataclasses import replace

import numpy as np

from kvstore.planner import OVERLAP_S, REFIT_S, EvictionPlanner, ReturnModel, worth_of
from kvstore.policy import AGE_EDGES_S, NUM_BINS, Plan, ReturnPolicy, TokenCosts, rate_at
from kvstore.records import SessionRecord

FLAT = TokenCosts.flat(token_bytes=1000, prefill_tokens_per_s=10_000.0)
RECORD = SessionRecord(
    "s", last_activity_s=1000.0, turns=1, tokens=4000, think_time_s=0.0,
    connected=False, typing=False, priority=0, pinned=False, owner="front",
)  # fmt: skip


class FakeRecords:
    """Records by time of change; raises `error` while there is one."""

    def __init__(self):
        self.changes = []
        self.asked = []
        self.error = None

    def write(self, time_s, record):
        self.changes.append((time_s, record))

    def changed_since(self, time_s):
        self.asked.append(time_s)
        if self.error is not None:
            raise self.error
        return [record for changed_s, record in self.changes if changed_s >= time_s]


class Bench:
    """A planner with all that is around it."""

    def __init__(self, **options):
        self.now_s, self.records, self.holders = 1000.0, FakeRecords(), {"s"}
        self.policy = ReturnPolicy(FLAT)
        self.planner = EvictionPlanner(
            self.records, lambda: self.holders, self.policy, clock=lambda: self.now_s, **options
        )

    def run(self, after_s=0.0):
        self.now_s += after_s
        self.planner.run_once()
        return self.policy.plan.sessions


def test_pass_reads_only_what_changed_since_the_last():
    """After the first pass a source is asked for what is new, with a little overlap for late writes."""
    bench = Bench()
    for turns in range(3):
        bench.records.write(bench.now_s + 5.0, replace(RECORD, turns=turns))
        bench.run(after_s=5.0)
    assert bench.records.asked[1:] == [1005.0 - OVERLAP_S, 1010.0 - OVERLAP_S]


def test_silent_source_loses_no_change():
    """A source that answers with nothing while it is away is asked for all that it kept back."""
    bench = Bench()
    bench.records.write(1000.0, RECORD)
    bench.run()
    changed_since, bench.records.changed_since = bench.records.changed_since, lambda time_s: []
    for _ in range(20):
        bench.run(after_s=1.0)
    bench.records.write(1001.0, replace(RECORD, last_activity_s=1001.0))
    assert bench.policy.plan.known_until_s <= 1000.0
    bench.records.changed_since = changed_since
    assert bench.run(after_s=1.0)["s"].active_s == 1001.0


def test_only_sessions_with_pages_are_planned_for():
    """A record of a session without pages is not kept, and one that lost its pages is forgotten."""
    bench = Bench()
    for session_id in ("s", "t"):
        bench.records.write(1000.0, replace(RECORD, session_id=session_id))
    assert set(bench.run()) == {"s"}
    bench.holders = set()
    assert not bench.run(after_s=1.0)
    assert not bench.planner._kept


def test_unchanged_sessions_keep_their_outlook():
    """What is known of a session stays while others change."""
    bench = Bench()
    bench.holders = {"s", "t"}
    bench.records.write(1000.0, RECORD)
    bench.run()
    bench.records.write(1100.0, replace(RECORD, session_id="t", last_activity_s=1100.0))
    sessions = bench.run(after_s=100.0)
    assert {name: outlook.active_s for name, outlook in sessions.items()} == {"s": 1000.0, "t": 1100.0}


def test_changed_record_changes_the_outlook():
    """A pin that is written is in the next plan."""
    bench = Bench()
    bench.records.write(1000.0, RECORD)
    before = bench.run()["s"].rate(1010.0)
    bench.records.write(1001.0, replace(RECORD, pinned=True))
    assert bench.run(after_s=1.0)["s"].rate(1010.0) > 1e6 * before


def test_source_that_is_away_is_survived_and_said_once(caplog):
    """The last values stay, one warning is logged however long it lasts, and what was missed is read afterwards."""
    caplog.set_level(logging.INFO, logger="kvstore.planner")
    bench = Bench()
    bench.records.write(1000.0, RECORD)
    bench.run()
    known_until_s, bench.records.error = bench.policy.plan.known_until_s, ConnectionError("gone")
    for _ in range(20):
        sessions = bench.run(after_s=1.0)
    assert sessions["s"].active_s == 1000.0
    assert bench.policy.plan.known_until_s == known_until_s
    bench.records.write(1010.0, replace(RECORD, turns=2, last_activity_s=1010.0))
    bench.records.error = None
    assert bench.run(after_s=1.0)["s"].active_s == 1010.0
    assert [entry.levelname for entry in caplog.records] == ["WARNING", "INFO"]


def test_record_without_a_time_tells_nothing():
    """A session that was opened and did nothing yet is a stranger, and its first turn is no return after ages."""
    bench, model = Bench(model=ReturnModel()), ReturnModel()
    opened = replace(RECORD, last_activity_s=0.0, turns=0, connected=True)
    bench.records.write(1000.0, opened)
    assert not bench.run()
    assert model.pace_of(replace(RECORD, turns=9, think_time_s=60.0)) == 1.0
    for record in (opened, RECORD):
        model.observe(record, 1000.0)
    model.refit(1001.0)
    assert model.pace_of(replace(RECORD, turns=9, think_time_s=60.0)) == 1.0


def test_return_on_the_next_day_does_not_change_what_is_average():
    """One pause of a day among ten of a minute leaves a person who pauses for a minute near the average."""
    model = ReturnModel()
    for number, pause_s in enumerate([60.0] * 10 + [86_400.0]):
        record = replace(RECORD, session_id=f"s{number}")
        model.observe(record, 1000.0)
        model.observe(replace(record, turns=2, last_activity_s=1000.0 + pause_s), 1000.0 + pause_s)
    assert model.pace_of(replace(RECORD, turns=2, think_time_s=60.0)) > 0.8


def test_plan_is_replaced_not_changed():
    """Who holds a plan sees it whole while the next one is made."""
    bench = Bench()
    bench.records.write(1000.0, RECORD)
    bench.run()
    held = bench.policy.plan
    bench.holders = set()
    bench.run(after_s=1.0)
    assert set(held.sessions) == {"s"}


def test_thread_plans_until_it_is_stopped():
    """`start` makes plans without being asked, `stop` ends the thread, and may be repeated."""
    planned = threading.Event()

    class Policy(ReturnPolicy):
        def __setattr__(self, name, value):
            super().__setattr__(name, value)
            if name == "plan" and value.sessions:
                planned.set()

    records = FakeRecords()
    records.write(math.inf, RECORD)
    planner = EvictionPlanner(records, lambda: ["s"], Policy(FLAT), period_s=0.001)
    planner.start()
    assert planned.wait(10.0)
    assert planner.stop()
    assert planner.stop()
    assert not any(thread.name == "kvstore-planner" for thread in threading.enumerate())


def test_stop_says_when_a_source_holds_the_thread():
    """A source that blocks does not block who stops the planner for longer than asked."""
    release, asked = threading.Event(), threading.Event()

    class Blocking(FakeRecords):
        def changed_since(self, time_s):
            asked.set()
            release.wait(10.0)
            return []

    planner = EvictionPlanner(Blocking(), list, ReturnPolicy(FLAT))
    planner.start()
    assert asked.wait(10.0)
    assert not planner.stop(timeout_s=0.01)
    release.set()
    assert planner.stop()


def test_planner_that_never_started_can_be_stopped():
    """Nothing to wait for."""
    assert Bench().planner.stop()


def learned(*, turns=400, pause_s=100.0, return_turns=(1,)):
    """A model after sessions of which those with `return_turns` turns returned after `pause_s` and others never."""
    model, now_s = ReturnModel(), 0.0
    for number in range(turns):
        now_s += 5.0
        kind = 1 + number % 2 * 4
        record = replace(RECORD, session_id=f"s{number}", last_activity_s=now_s, turns=kind)
        model.observe(record, now_s)
        if kind in return_turns:
            later_s = now_s + pause_s
            model.observe(replace(record, turns=kind + 1, last_activity_s=later_s), later_s)
    model.refit(now_s + 2000.0)
    return model


def test_who_returned_is_expected_to_return():
    """Learned either way round: those with as many turns as others that came back outrank those that never did."""
    for returning, gone in ((1, 5), (5, 1)):
        model = learned(return_turns=(returning,))
        rates = [
            model.outlook(replace(RECORD, last_activity_s=0.0, turns=turns)).rate(50.0) for turns in (returning, gone)
        ]
        assert rates[0] > 3 * rates[1]


def test_pauses_are_learned_not_assumed():
    """Before the usual pause a return is likely, long after it is not; both by what was seen."""
    short, long = (learned(pause_s=pause_s).stranger for pause_s in (20.0, 500.0))
    assert rate_at(short, 5.0) > rate_at(long, 5.0)
    assert rate_at(short, 300.0) < rate_at(long, 300.0)


def test_slow_person_is_waited_for():
    """After ten minutes of silence a person known to pause so long is likelier to return than a quick one."""
    model = learned()
    slow, quick = (
        model.outlook(replace(RECORD, last_activity_s=0.0, turns=9, think_time_s=pause_s)) for pause_s in (600.0, 10.0)
    )
    assert slow.rate(600.0) > quick.rate(600.0)
    assert slow.rate(20.0) < quick.rate(20.0)


def test_late_return_keeps_no_more_than_an_early_one():
    """Nothing that was never seen is promised to those who have long been gone."""
    stranger = learned().stranger
    assert rate_at(stranger, 5000.0) < rate_at(stranger, 50.0) / 50


def test_following_is_bounded_and_unbiased():
    """With a tenth of the sessions followed at a time, the share of those who return is about the same."""
    rates = []
    for max_followed in (4096, 40):
        model, now_s = ReturnModel(max_followed=max_followed), 0.0
        for number in range(4000):
            now_s += 1.0
            model.observe(replace(RECORD, session_id=f"s{number}", last_activity_s=now_s), now_s)
            if number % 3 == 0 and number >= 30:
                back = replace(RECORD, session_id=f"s{number - 30}", last_activity_s=now_s, turns=2)
                model.observe(back, now_s)
            if number % 100 == 0:
                model.refit(now_s)
        model.refit(now_s)
        assert model.num_followed <= max_followed
        rates.append(rate_at(model.stranger, 20.0))
    assert 0.5 < rates[1] / rates[0] < 2.0


def test_same_record_twice_changes_nothing():
    """Passes overlap, so records are read twice."""
    once, twice = ReturnModel(), ReturnModel()
    back = replace(RECORD, turns=2, last_activity_s=1030.0)
    for model, times in ((once, 1), (twice, 3)):
        for record in (RECORD, back):
            for _ in range(times):
                model.observe(record, record.last_activity_s)
        model.refit(1100.0)
    assert once.stranger == twice.stranger


def test_old_habits_fade():
    """What people did a day ago weighs less than what they do now."""
    model = learned(return_turns=())
    before, now_s = rate_at(model.stranger, 20.0), 100_000.0
    model.refit(now_s)
    for number in range(200):
        now_s += 5.0
        model.observe(replace(RECORD, session_id=f"t{number}", last_activity_s=now_s), now_s)
        model.observe(replace(RECORD, session_id=f"t{number}", last_activity_s=now_s + 30.0, turns=2), now_s + 30.0)
    model.refit(now_s + 60.0)
    assert rate_at(model.stranger, 20.0) > 3 * before


def test_worth_looks_ahead_to_a_return_that_is_due():
    """Where returns come after a pause only, waiting for them is worth something before, and nothing behind."""
    hazard = np.full(NUM_BINS, 1e-9)
    hazard[10] = 0.1
    worth = worth_of(hazard)
    assert worth[0] > 1e-4
    assert worth[10] > 0.05
    assert worth[11] < 1e-8
    assert all(later < earlier for earlier, later in itertools.pairwise(worth[:11]))


def test_plan_before_the_first_pass_knows_nobody():
    """A policy can rank from the start."""
    assert not Plan().sessions
    assert len(Plan().stranger) == len(AGE_EDGES_S)


def test_curves_are_drawn_anew_at_intervals():
    """What is learned reaches sessions whose records did not change."""
    bench = Bench()
    bench.records.write(990.0, RECORD)
    before = bench.run()["s"]
    assert bench.run(after_s=1.0)["s"] is before
    assert bench.run(after_s=REFIT_S)["s"] is not before
