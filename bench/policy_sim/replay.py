"""A prefix index of pages without memory behind it, fed with requests: what of each was still there.

The index, the queue, the policies and the planner are the store's own; only time, records and pages are simulated.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from kvstore import EvictionPolicy, KVLayout, LeastRecentlyUsed, RadixIndex, Resident
from kvstore.arrays import as_token_array
from kvstore.node import Node
from kvstore.planner import EvictionPlanner
from kvstore.policy import ReturnPolicy, TokenCosts
from kvstore.records import SessionRecord
from kvstore.results import Eviction

from .requests import BLOCK_TOKENS, Request

LAYOUT = KVLayout(1, 1, 1, torch.int8, BLOCK_TOKENS * 2)  # a token of 2 bytes: the index only counts them
PASS_EVERY_S = 1.0


@dataclass
class Clock:
    """Simulated time."""

    now_s: float = 0.0

    def __call__(self) -> float:
        return self.now_s


@dataclass
class Score:
    """What a replay found again. `saved_s` and `asked_s` are the seconds of prefill of these tokens and of all."""

    reused_tokens: int = 0
    asked_tokens: int = 0
    saved_s: float = 0.0
    asked_s: float = 0.0

    @property
    def hit_rate(self) -> float:
        """Tokens reused over tokens asked for."""
        return self.reused_tokens / self.asked_tokens

    @property
    def time_saved(self) -> float:
        """Seconds of prefill saved over seconds without a cache."""
        return self.saved_s / self.asked_s


@dataclass
class Records:
    """Session records as the product writes them at the start of a turn, read as a planner reads them."""

    latest: dict[str, SessionRecord] = field(default_factory=dict)
    changes: list[tuple[float, str]] = field(default_factory=list)

    def note(self, request: Request) -> None:
        """A turn begins; its session's average pause is updated as the product does it."""
        old, session_id = self.latest.get(request.session_id), request.session_id
        turns, pause_s = (old.turns + 1, request.time_s - old.last_activity_s) if old else (1, 0.0)
        average_s = 0.7 * old.think_time_s + 0.3 * pause_s if old and old.think_time_s else pause_s
        self.latest[session_id] = SessionRecord(
            session_id, request.time_s, turns, request.num_tokens, average_s,
            connected=False, typing=False, priority=0, pinned=False, owner="replay",
        )  # fmt: skip
        self.changes.append((request.time_s, session_id))

    def changed_since(self, time_s: float) -> list[SessionRecord]:
        """As `SessionRecords` says."""
        first = bisect.bisect_left(self.changes, (time_s, ""))
        return [self.latest[session_id] for session_id in dict.fromkeys(entry[1] for entry in self.changes[first:])]


class Replay:
    """`budget_tokens` of pages, evicted by `policy` as the store does it, under requests in the order of their times.

    The store takes as many pages as it needs from the end of one path; `singly` asks the policy after each.
    """

    def __init__(
        self, budget_tokens: int, policy: EvictionPolicy, costs: TokenCosts, clock: Clock, *, singly: bool = False
    ) -> None:
        self.clock = clock
        self.sessions: dict[str, Resident] = {}
        self.score = Score()
        self._costs = costs
        self._singly = singly
        self._index = RadixIndex(LAYOUT, b"replay", policy=policy, clock=clock)
        self._free = list(range(budget_tokens // BLOCK_TOKENS))

    def serve(self, request: Request) -> None:
        """Count what of the request is there, and take in the rest, as far as it can be made to fit."""
        self.clock.now_s = request.time_s
        tokens = as_token_array(np.repeat(np.array(request.blocks, np.int32), BLOCK_TOKENS))
        match = self._index.match(b"", tokens)
        self._count(request, match.num_tokens)
        missing = len(request.blocks) - len(match.pages)
        self._make_room(missing, set(match.pages.tolist()))
        taken = [self._free.pop() for _ in range(min(missing, len(self._free)))]
        pages = np.concatenate((match.pages, np.array(taken, np.int64)))
        insertion = self._index.insert(b"", tokens[: len(pages) * BLOCK_TOKENS], pages)
        self._attach(request.session_id, insertion.node, len(pages))

    def _attach(self, session_id: str, node: Node | None, num_pages: int) -> None:
        if num_pages:
            resident = self.sessions.setdefault(session_id, Resident(session_id))
            self._index.attach(resident, node, num_pages)

    def _make_room(self, num_pages: int, pinned: set[int]) -> None:
        while len(self._free) < num_pages:
            missing = 1 if self._singly else num_pages - len(self._free)
            eviction = self._index.evict(missing, pinned.__contains__)
            if not eviction.pages:
                return
            self._free += eviction.pages
            self._close_empty(eviction)

    def _close_empty(self, eviction: Eviction) -> None:
        for resident in eviction.residents:
            if not resident.num_pages:
                self.sessions.pop(resident.session_id)

    def _count(self, request: Request, num_reused: int) -> None:
        score, cost = self.score, self._costs.recompute_s
        score.reused_tokens += num_reused
        score.asked_tokens += request.num_tokens
        score.saved_s += num_reused * cost(num_reused // 2)  # linear, so that of the middle is the average
        score.asked_s += request.num_tokens * cost(request.num_tokens // 2)


class Clairvoyant:
    """Evicts the leaf whose last page is wanted again latest, or never; its clock counts requests.

    Ranks fall when a page was used, for its next use lies further away then: that is when it is asked again.
    """

    def __init__(self, requests: Sequence[Request]) -> None:
        self.number = 0
        self._uses: dict[int, list[int]] = {}
        for number, request in enumerate(requests):
            for block in request.blocks:
                self._uses.setdefault(block, []).append(number)

    def now_s(self) -> float:
        """Requests served so far."""
        return self.number

    def recheck_at_s(self, leaf: Node) -> float:
        """Its next use."""
        return -self.rank(leaf)

    def rank(self, leaf: Node) -> float:
        """The negative number of the next request that uses the leaf's last page."""
        uses = self._uses[int(leaf.tokens.view[-1])]
        place = bisect.bisect_right(uses, self.number)
        return -uses[place] if place < len(uses) else -math.inf


def replay_lru(requests: Sequence[Request], budget_tokens: int, costs: TokenCosts) -> Score:
    """The least recently used leaf goes first."""
    replay = Replay(budget_tokens, LeastRecentlyUsed(), costs, Clock())
    for request in requests:
        replay.serve(request)
    return replay.score


def replay_clairvoyant(requests: Sequence[Request], budget_tokens: int, costs: TokenCosts) -> Score:
    """What could be had by knowing the future."""
    policy = Clairvoyant(requests)
    replay = Replay(budget_tokens, policy, costs, Clock(), singly=True)
    for policy.number, request in enumerate(requests):
        replay.serve(request)
    return replay.score


def replay_returns(
    requests: Sequence[Request], budget_tokens: int, costs: TokenCosts, policy_costs: TokenCosts | None = None
) -> Score:
    """By probability of return, with a planner that makes its pass each second of simulated time."""
    clock, records = Clock(), Records()
    policy = ReturnPolicy(policy_costs or costs, clock=clock, wall_clock=clock)
    replay = Replay(budget_tokens, policy, costs, clock)
    planner = EvictionPlanner(records, lambda: replay.sessions, policy, clock=clock)
    planned_s = -math.inf
    for request in requests:
        clock.now_s = request.time_s
        if clock.now_s >= planned_s + PASS_EVERY_S:
            planner.run_once()
            planned_s = clock.now_s
        replay.serve(request)
        records.note(request)
    return replay.score


Contender = Callable[[Sequence[Request], int, TokenCosts], Score]
