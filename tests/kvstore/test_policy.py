"""Eviction by probability of return: what raises a leaf's rank, what lowers it, and the queue that notices."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace

import pytest

from bench.policy_sim.replay import replay_lru, replay_returns
from bench.policy_sim.requests import Request, make_scan
from kvstore.eviction import MAX_RECHECKS, EvictionQueue
from kvstore.planner import ReturnModel
from kvstore.policy import RECHECK_FRACTION, Outlook, Plan, ReturnPolicy, TokenCosts, rate_at
from kvstore.records import SessionRecord

FLAT = TokenCosts.flat(token_bytes=1000, prefill_tokens_per_s=10_000.0)
RECORD = SessionRecord(
    "s", last_activity_s=0.0, turns=3, tokens=4000, think_time_s=60.0,
    connected=False, typing=False, priority=0, pinned=False, owner="front",
)  # fmt: skip


class Clock:
    """Time as the test says."""

    def __init__(self, now_s=0.0):
        self.now_s = now_s

    def __call__(self):
        return self.now_s


@dataclass(eq=False)
class FakeLeaf:
    """The end of a path, used at `last_used_s`."""

    last_used_s: float = 0.0
    num_tokens: int = 4000
    session_ids: tuple[str, ...] = ("s",)
    num_pages: int = 10
    queued: bool = False
    is_leaf: bool = True


def make_policy(clock, *records, costs=FLAT, known_until_s=math.inf):
    """A policy whose planner knew these records, and nothing had been learned."""
    policy, model = ReturnPolicy(costs, clock=clock, wall_clock=clock), ReturnModel()
    outlooks = {record.session_id: model.outlook(record) for record in records}
    policy.plan = Plan(outlooks, model.stranger, known_until_s)
    return policy


def rank_of(record, *, age_s=100.0, **leaf):
    """The rank, `age_s` after its last activity, of a leaf of the session that the record describes."""
    return make_policy(Clock(record.last_activity_s + age_s), record).rank(FakeLeaf(**leaf))


def test_ranks_decay_with_time():
    """The longer a session is silent, the less its pages are worth: strictly, minutes and days."""
    ranks = [rank_of(RECORD, age_s=age_s) for age_s in (0, 1, 10, 60, 61, 600, 3600, 86_400, 864_000)]
    assert all(later < earlier for earlier, later in itertools.pairwise(ranks))
    assert ranks[-1] > 0


@pytest.mark.parametrize("change", [{"connected": True}, {"typing": True}, {"priority": 1}, {"pinned": True}])
def test_signs_of_life_and_wishes_raise_the_rank(change):
    """Connected, typing, priority and pin each make a leaf of the same age go later."""
    assert rank_of(replace(RECORD, **change)) > rank_of(RECORD)


def test_typing_is_more_than_being_connected():
    """Who types is about to return."""
    assert rank_of(replace(RECORD, typing=True, connected=True)) > rank_of(replace(RECORD, connected=True))


def test_pinned_go_last_but_go():
    """A pin outweighs any age, priority and presence; among pinned leaves the order is as among others."""
    pinned, wanted = replace(RECORD, pinned=True), replace(RECORD, priority=100, typing=True)
    assert rank_of(pinned, age_s=1e7) > rank_of(wanted, age_s=0)
    assert rank_of(pinned, age_s=50) > rank_of(pinned, age_s=500)
    assert math.isfinite(rank_of(replace(pinned, priority=100)))


def test_low_priority_goes_earlier():
    """A negative priority lowers the rank as a positive one raises it."""
    assert rank_of(replace(RECORD, priority=-1)) < rank_of(RECORD) < rank_of(replace(RECORD, priority=2))


def test_several_sessions_are_likelier_to_return_than_one():
    """A beginning that sessions share is worth what each of them makes it."""
    others = [replace(RECORD, session_id=name) for name in "abc"]
    policy = make_policy(Clock(100.0), RECORD, *others)
    ranks = [policy.rank(FakeLeaf(session_ids=ids)) for ids in (("s",), ("s", "a"), ("s", "a", "b"))]
    assert ranks == sorted(ranks)
    assert ranks[1] == pytest.approx(2 * ranks[0])


def test_shared_beginning_that_nobody_came_to_for_long_loses_its_rank():
    """Many sessions once do not keep it for ever: without a use its rate falls at least as the age grows."""
    crowd = [replace(RECORD, session_id=f"c{number}") for number in range(1000)]
    leaf = FakeLeaf(session_ids=tuple(record.session_id for record in crowd))
    fresh, old = (make_policy(Clock(now_s), *crowd).rank(leaf) for now_s in (10.0, 100_000.0))
    assert old < fresh / 1000


def test_order_of_sessions_does_not_matter():
    """Sets of ids have a different order in each process, ranks do not."""
    records = [replace(RECORD, session_id=f"s{n}", last_activity_s=0.1 * n**1.5) for n in range(50)]
    policy, ids = make_policy(Clock(1000.0), *records), [record.session_id for record in records]
    assert policy.rank(FakeLeaf(session_ids=ids)) == policy.rank(FakeLeaf(session_ids=ids[::-1]))


def test_without_records_the_older_goes_first():
    """No planner, no records: leaves go by plain age, at any distance."""
    policy = ReturnPolicy(FLAT, clock=Clock(1e6), wall_clock=Clock(2e9))
    ages_s = [0.0, 0.5, 3.0, 100.0, 101.0, 5000.0, 900_000.0]
    ranks = [policy.rank(FakeLeaf(last_used_s=1e6 - age_s)) for age_s in ages_s]
    assert ranks == sorted(ranks, reverse=True)
    assert len(set(ranks)) == len(ranks)


def test_use_that_no_record_tells_of_counts():
    """With records gone stale, a session used since then outranks one that was not, whatever its record says."""
    policy = make_policy(Clock(5000.0), RECORD, replace(RECORD, session_id="t", connected=True), known_until_s=200.0)
    assert policy.rank(FakeLeaf(last_used_s=4990.0)) > policy.rank(FakeLeaf(last_used_s=100.0, session_ids=("t",)))


def test_deep_tokens_cost_more_to_recompute():
    """Attention reads all that came before: of two leaves alike, the deeper one is kept."""
    costs = TokenCosts(1000, 10_000.0, 5_000.0, 30_000)
    assert costs.recompute_s(0) == pytest.approx(1e-4)
    assert costs.recompute_s(30_000) == pytest.approx(2e-4)
    policy = make_policy(Clock(100.0), RECORD, costs=costs)
    assert policy.rank(FakeLeaf(num_tokens=60_000)) == pytest.approx(3 * policy.rank(FakeLeaf(num_tokens=0)))


def test_copy_below_bounds_the_cost():
    """Where a tier below can give the rows back faster than the model, that is what losing them costs."""
    costs = TokenCosts(1000, 10_000.0, 5_000.0, 30_000, restore_bytes_per_s=50e6)
    assert costs.per_byte_s(100_000) == pytest.approx(1 / 50e6)
    assert replace(costs, restore_bytes_per_s=1e3).per_byte_s(0) == pytest.approx(1e-7)


@pytest.mark.parametrize("name", ["token_bytes", "prefill_tokens_per_s", "long_context_tokens", "restore_bytes_per_s"])
def test_rates_must_be_positive(name):
    """A rate of zero is refused by name."""
    with pytest.raises(ValueError, match=name):
        replace(TokenCosts(1, 1.0, 1.0, 1, 1.0), **{name: 0})


def test_curve_is_read_between_its_edges():
    """At an edge its value, between two edges something between, beyond the last one less and less."""
    curve = tuple(float(value) for value in range(33, 0, -1))
    assert rate_at(curve, 0.0) == 33
    assert 32 < rate_at(curve, 1.0) < 33
    assert rate_at(curve, 4.0) == pytest.approx(31)
    assert rate_at(curve, 1e9) < rate_at(curve, 1e8) < 1


def test_queue_notices_ranks_that_fall():
    """Two leaves change places by waiting alone: the one that was worth more is taken out first later on."""
    clock = Clock()
    policy, queue = ReturnPolicy(FLAT, clock=clock, wall_clock=clock), None
    steep, level = tuple(1.0 / (1 + place**3) for place in range(33)), (0.1,) * 33
    policy.plan = Plan({"quick": Outlook(0.0, steep), "steady": Outlook(0.0, level)}, known_until_s=math.inf)
    queue = EvictionQueue(policy)
    for session_id in ("quick", "steady"):
        queue.offer(FakeLeaf(session_ids=(session_id,)))
    assert queue.pop().session_ids == ("steady",)
    queue.offer(FakeLeaf(session_ids=("steady",)))
    clock.now_s = 3600.0
    assert queue.pop().session_ids == ("quick",)


def test_queue_notices_a_pin_that_was_taken_off():
    """Within the longest interval between checks an unpinned leaf is one like any other."""
    clock = Clock(100.0)
    policy = make_policy(clock, replace(RECORD, pinned=True), replace(RECORD, session_id="t", last_activity_s=90.0))
    queue = EvictionQueue(policy)
    for session_id in ("s", "t"):
        queue.offer(FakeLeaf(session_ids=(session_id,)))
    policy.plan = make_policy(clock, RECORD, replace(RECORD, session_id="t", last_activity_s=90.0)).plan
    clock.now_s += 60.0
    assert queue.pop().session_ids == ("s",)


def test_taking_out_asks_few_ranks_however_long_nothing_was_taken():
    """10,000 leaves whose ranks all are to be looked at again: each pop looks at a bounded number."""
    clock = Clock()
    policy = CountingPolicy(FLAT, clock=clock, wall_clock=clock)
    queue = EvictionQueue(policy)
    for number in range(10_000):
        queue.offer(FakeLeaf(last_used_s=-float(number)))
    clock.now_s, policy.asked = 3600.0, 0
    assert queue.pop().last_used_s == -9999.0
    assert policy.asked <= MAX_RECHECKS + 1


def test_queue_keeps_no_more_entries_than_a_few_for_each_leaf():
    """Days of falling ranks and of leaves that come and go leave nothing behind."""
    clock = Clock()
    policy = ReturnPolicy(FLAT, clock=clock, wall_clock=clock)
    queue = EvictionQueue(policy)
    for number in range(20_000):
        clock.now_s += 1.0
        queue.offer(FakeLeaf(last_used_s=clock.now_s))
        if number >= 100:
            assert abs(queue.pop().last_used_s - (number - 99)) < 100 * RECHECK_FRACTION + 1
    assert len(queue._heap) + len(queue._due) < 2000


def test_scan_does_not_flush_the_chat():
    """Documents that are read once push everything out by age; by return they go themselves."""
    requests, budget = make_scan()[:1500], 500_000
    assert replay_returns(requests, budget, FLAT).hit_rate > 1.05 * replay_lru(requests, budget, FLAT).hit_rate


def test_replay_is_repeatable():
    """The same requests give the same evictions, whatever order sets of strings have in this process."""
    requests = make_scan()[:400]
    scores = {replay_returns(requests, 250_000, FLAT).reused_tokens for _ in range(2)}
    assert len(scores) == 1


def test_everything_fits_without_evictions():
    """A budget above all pages finds whatever was there before, under either policy."""
    requests = [Request(float(turn), tuple(range(turn + 1)), (turn + 1) * 512, "s") for turn in range(4)]
    for replayed in (replay_lru(requests, 10**6, FLAT), replay_returns(requests, 10**6, FLAT)):
        assert (replayed.reused_tokens, replayed.asked_tokens) == ((0 + 1 + 2 + 3) * 512, (1 + 2 + 3 + 4) * 512)


class CountingPolicy(ReturnPolicy):
    """Counts how often a rank was asked for."""

    asked = 0

    def rank(self, leaf):
        self.asked += 1
        return super().rank(leaf)
